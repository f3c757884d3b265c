// The CPU backend for one instruction set: compiled once per SETFORMER_ISA (CMakeLists.txt).
#include "kernels.h"

#include <new>

#include "../sequences.h"
#include "backward.h"
#include "forward.h"

namespace setformer::cpu::SETFORMER_ISA {
namespace {

// Is there enough work to wake threads? Threads that share the spans of a head are woken for every
// pass over its tokens. A call uses all threads or one: OpenMP would end those that a smaller team
// does not use.
inline bool is_worth_waking(const ForwardParams& p, bool over_heads) {
  const double batch = p.offsets == nullptr ? double(p.batch) : 1;
  const double rows = batch * double(p.heads) * double(p.tokens + p.queries);
  const double operations = double(2 * p.depth + 4 * p.value_depth + 4 * p.iterations);
  const double wakes = over_heads ? 1 : double(p.batch * p.heads) * double(p.iterations + 2);
  return rows * double(p.references) * operations >= wakes * least_parallel_work();
}

// How a problem is spread over threads, and how much memory that takes.
template <class Head>
struct Workplace {
  using T = typename Head::T;
  using Params = typename Head::Params;

  bool over_heads;  // true: heads in parallel; false: head after head, its spans in parallel
  int threads;
  int64_t head_bytes, worker_bytes;

  // `sample` is a head of the problem's largest size.
  Workplace(const Params& p, Head& sample) {
    const int64_t heads = p.batch * p.heads;
    const int available = available_threads();
    over_heads = sample.spans() == 1 || (p.offsets == nullptr && heads % available == 0) ||
                 heads >= 4 * int64_t{available};
    const int most = is_worth_waking(p, over_heads) ? available : 1;
    threads = int(smaller<int64_t>(most, over_heads ? heads : sample.spans()));
    Arena head_size, worker_size;
    sample.place(head_size);
    head_bytes = head_size.used();
    Worker<T> measured{};
    measured.place(worker_size, Widths<T>(p), Head::left_width(p));
    worker_size.take<Worker<T>>(1);
    worker_bytes = worker_size.used();
  }

  int64_t bytes(int64_t heads_at_once) const {
    return heads_at_once * head_bytes + threads * worker_bytes;
  }
  Worker<T>* place_workers(const Params& p, Arena& memory) const {
    auto* workers = memory.take<Worker<T>>(threads);
    for (int thread = 0; thread < threads; ++thread) {
      workers[thread].place(memory, Widths<T>(p), Head::left_width(p));
    }
    return workers;
  }

  // Calls body(i, thread, team) for every head i < `heads`. The result is that of the failed head
  // with the smallest i, whatever the order of the threads.
  template <class Body>
  Status for_each_head(int64_t heads, Worker<T>* workers, Body body) const {
    if (!over_heads) {
      const Team<T> team{workers, threads};
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
      const Team<T> team{workers + thread, 1};
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

// The references of every head, prepared once for all samples, if the samples share them.
template <class Storage>
class SharedReferences {
 public:
  explicit SharedReferences(const ForwardParams& p) : p_(p) {
    if (!References<Storage>::are_shared(p)) return;
    Arena of_one;
    References<Storage>().place(of_one, p);
    of_one.take<References<Storage>>(1);
    bytes_of_head_ = of_one.used();
    heads_ = p.heads <= kMostSharedBytes / bytes_of_head_ ? p.heads : 0;
  }
  int64_t bytes() const { return heads_ * bytes_of_head_; }

  Status prepare(Arena& memory) {
    of_heads_ = memory.take<References<Storage>>(heads_);
    Status status = Status::kOk;
    for (int64_t h = 0; h < heads_ && status == Status::kOk; ++h) {
      auto* references = new (of_heads_ + h) References<Storage>;
      references->place(memory, p_);
      status = references->prepare(p_, 0, h);
    }
    return status;
  }
  // Null where the samples share none.
  const References<Storage>* of(int64_t h) const { return heads_ == 0 ? nullptr : of_heads_ + h; }

 private:
  // References of more bytes take long to compute with, and little of that to prepare.
  static constexpr int64_t kMostSharedBytes = int64_t{4} << 20;
  const ForwardParams& p_;
  int64_t heads_ = 0, bytes_of_head_ = 0;
  References<Storage>* of_heads_ = nullptr;
};

// Each head goes through all its phases before the thread, or the team, takes the next one.
template <class Head>
Status run_alone(const typename Head::Params& p) {
  const bool packed = p.offsets != nullptr;
  const auto longest = packed ? longest_sequence(p) : p;
  Head sample(longest, 0, 0);
  const Workplace<Head> workplace(p, sample);
  const int64_t heads_at_once = workplace.over_heads ? workplace.threads : 1;
  SharedReferences<typename Head::Storage> shared(p);
  Block block(shared.bytes() + workplace.bytes(heads_at_once));
  if (block.data() == nullptr) return Status::kOutOfMemory;
  Arena memory(block.data());
  const Status prepared = shared.prepare(memory);
  if (prepared != Status::kOk) return prepared;
  char* of_heads = memory.take<char>(heads_at_once * workplace.head_bytes);
  auto* workers = workplace.place_workers(p, memory);
  const auto run_head = [&](int64_t i, int thread, const auto& team) {
    // Each packed sequence is a problem of its own.
    const auto own = packed ? sequence(p, i / p.heads) : p;
    Head head(own, packed ? 0 : i / p.heads, i % p.heads, shared.of(i % p.heads));
    Arena arena(of_heads + thread * workplace.head_bytes);
    head.place(arena);
    Status status = Status::kOk;
    while (!head.done() && status == Status::kOk) status = head.run(team);
    return status;
  };
  return workplace.for_each_head(p.batch * p.heads, workers, run_head);
}

// Collects the numbers of all heads that are merged by `how` after a phase. Those of neighbouring
// heads lie `head_bytes` apart: where the head before has as many entries, the entries are extended
// by a row. Fills `shared` [2 heads]; returns the number of entries.
template <class Head>
int64_t gather_shared(const Head* heads, int64_t count, int64_t head_bytes, Merge how,
                      Shared* shared) {
  int64_t entries = 0;
  int alike = 0;  // entries of the head before, if they are merged in this way
  for (int64_t i = 0; i < count; ++i) {
    const typename Head::Leavings& own = heads[i].leavings();
    const int found = own.count > 0 && own.numbers[0].how == how ? own.count : 0;
    if (found > 0 && found == alike) {
      for (int64_t entry = entries - found; entry < entries; ++entry) ++shared[entry].rows;
    } else {
      for (int entry = 0; entry < found; ++entry) {
        shared[entries] = own.numbers[entry];
        shared[entries++].row_stride = head_bytes / int64_t{sizeof(typename Head::T)};
      }
    }
    alike = found;
  }
  return entries;
}

// Either all ranks go on after the first merge or none does: an error of the first phase is sent
// with it.
template <class T>
Status fail_in_group(const RankGroup& group, int64_t heads, Status status) {
  Block block(heads * 3 * int64_t{sizeof(T)});
  if (block.data() == nullptr) return status;
  T* numbers = reinterpret_cast<T*>(block.data());
  fill(numbers, heads * 3, T(1));
  const Shared masses{numbers, heads, 3, 3, Merge::kSum};
  return group.merge(group.context, &masses, 1) ? status : Status::kMergeFailed;
}

// Runs one phase of all heads, merges their sums with those of the other ranks, runs the next
// phase.
template <class Head>
Status run_in_group(const typename Head::Params& p) {
  using T = typename Head::T;
  const int64_t heads = p.batch * p.heads;
  Head sample(p, 0, 0);
  const Workplace<Head> workplace(p, sample);
  // Memory of all heads at once; every array starts at a cache line.
  const int64_t objects = heads * int64_t{sizeof(Head) + 2 * sizeof(Shared)};
  Block block(workplace.bytes(heads) + objects + 2 * Arena::kAlignment);
  if (block.data() == nullptr) return fail_in_group<T>(*p.group, heads, Status::kOutOfMemory);
  Arena memory(block.data());
  char* of_heads = memory.take<char>(heads * workplace.head_bytes);
  auto* workers = workplace.place_workers(p, memory);
  Head* all = memory.take<Head>(heads);
  Shared* shared = memory.take<Shared>(2 * heads);
  for (int64_t i = 0; i < heads; ++i) {
    new (all + i) Head(p, i / p.heads, i % p.heads);
    Arena arena(of_heads + i * workplace.head_bytes);
    all[i].place(arena);
  }
  for (bool first = true; !all[0].done(); first = false) {
    const Status status = workplace.for_each_head(
        heads, workers, [&](int64_t i, int, const auto& team) { return all[i].run(team); });
    if (status != Status::kOk) return fail_in_group<T>(*p.group, heads, status);
    for (const Merge how : {Merge::kSum, Merge::kLogSum}) {
      const int64_t entries = gather_shared(all, heads, workplace.head_bytes, how, shared);
      if (entries > 0 && !p.group->merge(p.group->context, shared, entries)) {
        return Status::kMergeFailed;
      }
    }
    for (int64_t i = 0; first && i < heads; ++i) {
      const Status failed = all[i].take_masses();
      if (failed != Status::kOk) return failed;
    }
  }
  return Status::kOk;
}

template <class Head>
Status run(const typename Head::Params& p) {
  if (p.batch * p.heads == 0) return Status::kOk;
  return p.group == nullptr ? run_alone<Head>(p) : run_in_group<Head>(p);
}

#if !defined(__AVX512BF16__)
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
#endif

}  // namespace

#if defined(__AVX512BF16__)
Status forward(const ForwardParams& p) {
  return p.type == ScalarType::kBFloat16 ? run<ForwardHead<BFloat16>>(p) : avx512::forward(p);
}
Status backward(const BackwardParams& p) {
  return p.type == ScalarType::kBFloat16 ? run<BackwardHead<BFloat16>>(p) : avx512::backward(p);
}
#else
Status forward(const ForwardParams& p) {
  return dispatch(p.type, [&p](auto storage) { return run<ForwardHead<decltype(storage)>>(p); });
}
Status backward(const BackwardParams& p) {
  return dispatch(p.type, [&p](auto storage) { return run<BackwardHead<decltype(storage)>>(p); });
}
#endif

}  // namespace setformer::cpu::SETFORMER_ISA
