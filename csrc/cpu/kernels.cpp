// The CPU backend for one instruction set: compiled once per SETFORMER_ISA (CMakeLists.txt).
#include "kernels.h"

#include <new>

#include "../sequences.h"
#include "backward.h"

namespace setformer::cpu::SETFORMER_ISA {
namespace {

// Is there enough to do to wake threads for it? Over the spans of a head they are woken for every
// pass over its tokens. All or none are: OpenMP ends the threads that a smaller team leaves over.
inline bool is_worth_waking(const ForwardParams& p, bool over_heads) {
  const double batch = p.offsets == nullptr ? double(p.batch) : 1;
  const double rows = batch * double(p.heads) * double(p.tokens + p.queries);
  const double operations = double(2 * p.depth + 4 * p.value_depth + 4 * p.iterations);
  const double wakes = over_heads ? 1 : double(p.batch * p.heads) * double(p.iterations + 2);
  return rows * double(p.references) * operations >= wakes * least_parallel_work();
}

// How a problem is spread over threads, and the memory of all.
template <class Storage, template <class> class Head, class Params>
struct Workplace {
  using T = Accumulate<Storage>;

  bool over_heads;  // whole heads in parallel, or the spans of one head after another
  int threads;
  int64_t head_bytes, worker_bytes;

  // `sample` is a head of the problem's largest size.
  Workplace(const Params& p, Head<Storage>& sample) {
    const int64_t heads = p.batch * p.heads;
    const int available = available_threads();
    over_heads = sample.spans() == 1 || (p.offsets == nullptr && heads % available == 0) ||
                 heads >= 4 * int64_t{available};
    const int most = is_worth_waking(p, over_heads) ? available : 1;
    threads = int(smaller<int64_t>(most, over_heads ? heads : sample.spans()));
    Arena head_size, worker_size;
    Worker<T> measured{};
    sample.place(head_size);
    Head<Storage>::place_worker(worker_size, p, measured);
    head_bytes = head_size.used();
    worker_bytes = worker_size.used();
  }

  int64_t bytes(int64_t heads_at_once) const {
    return heads_at_once * head_bytes + threads * (worker_bytes + int64_t{sizeof(Worker<T>)});
  }
  // The workers, in a block's memory after that of the heads.
  Worker<T>* place_workers(const Params& p, char* memory) const {
    auto* workers = reinterpret_cast<Worker<T>*>(memory + threads * worker_bytes);
    for (int thread = 0; thread < threads; ++thread) {
      Arena arena(memory + thread * worker_bytes);
      Head<Storage>::place_worker(arena, p, workers[thread]);
    }
    return workers;
  }

  // body(i, thread, team) for every head i of `heads`. The first head that fails, whichever thread
  // is done first, gives the result.
  template <class Body>
  Status for_each_head(int64_t heads, Worker<T>* workers, Body body) const {
    if (!over_heads) {
      const Team<Worker<T>> team{workers, threads};
      for (int64_t i = 0; i < heads; ++i) {
        const Status status = body(i, 0, team);
        if (status != Status::kOk) return status;
      }
      return Status::kOk;
    }
    Status result = Status::kOk;
    int64_t first_failed = heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const int thread = omp_get_thread_num();
      const Team<Worker<T>> team{workers + thread, 1};
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < heads; ++i) {
        const Status status = body(i, thread, team);
        if (status != Status::kOk) {
#pragma omp critical
          if (i < first_failed) {
            first_failed = i;
            result = status;
          }
        }
      }
    }
    return result;
  }
};

// All stages of a Head for every (batch item, head).
template <class Storage, template <class> class Head, class Params>
Status run(const Params& p) {
  using T = Accumulate<Storage>;
  const int64_t heads = p.batch * p.heads;
  if (heads == 0) return Status::kOk;
  const Params longest = p.offsets == nullptr ? p : longest_sequence(p);
  Head<Storage> sample(longest);
  const Workplace<Storage, Head, Params> workplace(p, sample);
  const int64_t heads_at_once = workplace.over_heads ? workplace.threads : 1;
  Block block(workplace.bytes(heads_at_once));
  if (block.data() == nullptr) return Status::kOutOfMemory;
  Worker<T>* workers =
      workplace.place_workers(p, block.data() + heads_at_once * workplace.head_bytes);
  const auto run_head = [&](const Params& own, int thread, int64_t batch_item, int64_t h,
                            const Team<Worker<T>>& team) {
    Head<Storage> head(own);
    Arena arena(block.data() + thread * workplace.head_bytes);
    head.place(arena);
    Status status = Status::kOk;
    for (int64_t stage = 0; stage < head.stages() && status == Status::kOk; ++stage) {
      status = head.run(stage, batch_item, h, team);
    }
    return status;
  };
  return workplace.for_each_head(
      heads, workers, [&](int64_t i, int thread, const Team<Worker<T>>& team) {
        if (p.offsets == nullptr) return run_head(p, thread, i / p.heads, i % p.heads, team);
        // A head of a packed sequence is one of a problem of its own.
        return run_head(sequence(p, i / p.heads), thread, 0, i % p.heads, team);
      });
}

// What the heads share after a stage, that is to be merged in one way. They lie `head_bytes` apart,
// and so do their numbers: neighbours that share alike go together. Fills `shared` [2 heads] and
// returns how many entries.
template <class Storage, class Head>
int64_t gather_shared(const Head* const* heads, int64_t count, int64_t head_bytes, int64_t stage,
                      Merge how, Shared* shared) {
  int64_t entries = 0;
  int alike = 0;  // entries of the head before, if they are merged in this way
  for (int64_t i = 0; i < count; ++i) {
    Shared own[2];
    int found = heads[i]->share(stage, own);
    if (found > 0 && own[0].how != how) found = 0;
    if (found > 0 && found == alike) {
      for (int64_t entry = entries - found; entry < entries; ++entry) ++shared[entry].rows;
    } else {
      for (int entry = 0; entry < found; ++entry) {
        own[entry].row_stride = head_bytes / int64_t{sizeof(Accumulate<Storage>)};
        shared[entries++] = own[entry];
      }
    }
    alike = found;
  }
  return entries;
}

// All ranks must get past the first merge, or none: an error of stage 0 travels with it.
template <class T>
Status fail_in_group(const RankGroup& group, int64_t heads, Status status) {
  Block block(heads * 3 * int64_t{sizeof(T)});
  if (block.data() == nullptr) return status;
  T* numbers = reinterpret_cast<T*>(block.data());
  fill(numbers, heads * 3, T(1));
  const Shared masses{numbers, heads, 3, 3, Merge::kSum};
  return group.merge(group.context, &masses, 1) ? status : Status::kMergeFailed;
}

// The same stage of all heads, then what their sums lack from the other ranks, then the next stage.
template <class Storage, template <class> class HeadOf, class Params>
Status run_in_group(const Params& p) {
  using T = Accumulate<Storage>;
  using Head = HeadOf<Storage>;
  const int64_t heads = p.batch * p.heads;
  if (heads == 0) return Status::kOk;
  Head sample(p);
  const Workplace<Storage, HeadOf, Params> workplace(p, sample);
  const int64_t object_bytes = round_up(int64_t{sizeof(Head)}, Arena::kAlignment);
  const int64_t list_bytes = 2 * int64_t{sizeof(Shared)} + int64_t{sizeof(Head*)};
  Block block(workplace.bytes(heads) + heads * (object_bytes + list_bytes));
  if (block.data() == nullptr) return fail_in_group<T>(*p.group, heads, Status::kOutOfMemory);
  char* objects = block.data() + heads * workplace.head_bytes;
  Worker<T>* workers = workplace.place_workers(p, objects + heads * object_bytes);
  auto* shared = reinterpret_cast<Shared*>(workers + workplace.threads);
  auto** all = reinterpret_cast<Head**>(shared + 2 * heads);
  for (int64_t i = 0; i < heads; ++i) {
    all[i] = new (objects + i * object_bytes) Head(p);
    Arena arena(block.data() + i * workplace.head_bytes);
    all[i]->place(arena);
  }
  for (int64_t stage = 0; stage < sample.stages(); ++stage) {
    const Status status =
        workplace.for_each_head(heads, workers, [&](int64_t i, int, const Team<Worker<T>>& team) {
          return all[i]->run(stage, i / p.heads, i % p.heads, team);
        });
    if (status != Status::kOk) return fail_in_group<T>(*p.group, heads, status);
    for (const Merge how : {Merge::kSum, Merge::kLogSum}) {
      const int64_t entries =
          gather_shared<Storage>(all, heads, workplace.head_bytes, stage, how, shared);
      if (entries > 0 && !p.group->merge(p.group->context, shared, entries)) {
        return Status::kMergeFailed;
      }
    }
    for (int64_t i = 0; stage == 0 && i < heads; ++i) {
      const Status failed = all[i]->masses().finish();
      if (failed != Status::kOk) return failed;
    }
  }
  return Status::kOk;
}

template <class Storage, template <class> class Head, class Params>
Status run_alone_or_in_group(const Params& p) {
  return p.group == nullptr ? run<Storage, Head>(p) : run_in_group<Storage, Head>(p);
}

// call(Storage{}) for the storage type of the problem.
template <class Call>
Status dispatch(ScalarType type, Call call) {
  switch (type) {
    case ScalarType::kFloat32:
      return call(float{});
    case ScalarType::kFloat64:
      return call(double{});
    case ScalarType::kBFloat16:
      return call(BFloat16{});
    case ScalarType::kFloat16:
      return call(Float16{});
  }
  return Status::kOk;
}

}  // namespace

Status forward(const ForwardParams& p) {
  return dispatch(p.type, [&p](auto storage) {
    return run_alone_or_in_group<decltype(storage), ForwardHead>(p);
  });
}
Status backward(const BackwardParams& p) {
  return dispatch(p.type, [&p](auto storage) {
    return run_alone_or_in_group<decltype(storage), BackwardHead>(p);
  });
}

}  // namespace setformer::cpu::SETFORMER_ISA
