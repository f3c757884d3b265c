// The CPU backend for one instruction set: compiled once per SETFORMER_ISA (CMakeLists.txt).
#include "kernels.h"

#include "../sequences.h"
#include "backward.h"

namespace setformer::cpu::SETFORMER_ISA {
namespace {

// The plan b_j C_ij of one head, from the normalisers that forward left.
template <class Storage>
class PlanHead {
  using T = Accumulate<Storage>;

 public:
  explicit PlanHead(const PlanParams& p) : p_(p), widths_(p), keys_(p, keys_of(p), false) {}

  void place(Arena& arena) {
    keys_.place(arena);
    marginal_.b = arena.take<T>(widths_.references);
    marginal_.log2_b = arena.take<T>(widths_.references);
    column_factors_ = arena.take<T>(widths_.references);
  }
  static void place_worker(Arena& arena, const PlanParams& p, Worker<T>& worker) {
    worker.place(arena, Widths<T>(p), false, 0);
  }
  int64_t spans() const { return keys_.spans().count; }

  Status run(int64_t b, int64_t h, const Team<Worker<T>>& team) {
    const int64_t head = b * p_.heads + h, steps = p_.iterations, width = widths_.references;
    T* rows = at<T>(p_.rows, 0) + head * (steps + 1) * p_.tokens;
    T* columns = at<T>(p_.columns, 0) + head * (larger<int64_t>(steps, 1) + 1) * p_.references;
    Status status = load_reference_marginal(p_, widths_, b, h, marginal_);
    if (status != Status::kOk) return status;
    status = keys_.prepare(b, h, p_.token_mass, marginal_, rows, columns, team.workers[0]);
    if (status != Status::kOk) return status;
    if (!keys_.empty()) {
      keys_.restore_potentials();
      keys_.normalize_collection(team);
      keys_.collection_columns(steps, column_factors_);
      for (int64_t j = 0; j < width; ++j) column_factors_[j] *= marginal_.b[j];
    }
    team.for_each_tile(
        keys_.spans(), [](int64_t) {},
        [&](int64_t, int64_t begin, int64_t count, const Worker<T>& worker) {
          if (keys_.empty()) {
            fill(worker.matrix, count * width, T(0));
          } else {
            const T* scores = keys_.scores(begin, count, worker);
            const T* matrix = keys_.collection(steps, begin, count, scores, worker);
            keys_.collection_rows(steps, begin, count, worker.row_factors);
            for (int64_t i = 0; i < count; ++i) {
              const Vector<T> factor = splat(worker.row_factors[i] * keys_.a()[begin + i]);
              for (int64_t j = 0; j < width; j += kLanes<T>) {
                store<T>(worker.matrix + i * width + j,
                         load(matrix + i * width + j) * factor * load(column_factors_ + j));
              }
            }
          }
          store_tokens<Storage>(worker.matrix, width, p_.plan, b, h, begin, count, p_.references);
        });
    return Status::kOk;
  }

 private:
  const PlanParams& p_;
  Widths<T> widths_;
  Transport<Storage> keys_;
  ReferenceMarginal<T> marginal_{};
  T* column_factors_ = nullptr;  // [references]
};

// Is there enough to do to wake threads for it? Over the spans of a head they are woken for every
// pass over its tokens. All or none are: OpenMP ends the threads that a smaller team leaves over.
inline bool is_worth_waking(const ForwardParams& p, bool over_heads) {
  const double batch = p.offsets == nullptr ? double(p.batch) : 1;
  const double rows = batch * double(p.heads) * double(p.tokens + p.queries);
  const double operations = double(2 * p.depth + 4 * p.value_depth + 4 * p.iterations);
  const double wakes = over_heads ? 1 : double(p.batch * p.heads) * double(p.iterations + 2);
  return rows * double(p.references) * operations >= wakes * least_parallel_work();
}

// Runs a Head for every (batch item, head): whole heads in parallel where all threads get as many
// or nearly so, else the spans of one head after another.
template <class Storage, template <class> class Head, class Params>
Status run(const Params& p) {
  using T = Accumulate<Storage>;
  const int64_t heads = p.batch * p.heads;
  if (heads == 0) return Status::kOk;
  const int available = available_threads();
  const Params longest = p.offsets == nullptr ? p : longest_sequence(p);
  Head<Storage> sample(longest);
  const bool over_heads = sample.spans() == 1 || (p.offsets == nullptr && heads % available == 0) ||
                          heads >= 4 * int64_t{available};
  const int most = is_worth_waking(p, over_heads) ? available : 1;
  const int threads = int(smaller<int64_t>(most, over_heads ? heads : sample.spans()));
  const int heads_at_once = over_heads ? threads : 1;

  Arena head_size, worker_size;
  Worker<T> measured{};
  sample.place(head_size);
  Head<Storage>::place_worker(worker_size, p, measured);
  const int64_t bytes = heads_at_once * head_size.used() + threads * worker_size.used() +
                        threads * int64_t{sizeof(Worker<T>)};
  Block block(bytes);
  if (block.data() == nullptr) return Status::kOutOfMemory;
  char* head_memory = block.data();
  char* worker_memory = head_memory + heads_at_once * head_size.used();
  auto* workers = reinterpret_cast<Worker<T>*>(worker_memory + threads * worker_size.used());
  for (int thread = 0; thread < threads; ++thread) {
    Arena arena(worker_memory + thread * worker_size.used());
    Head<Storage>::place_worker(arena, p, workers[thread]);
  }

  // A head of a packed sequence is one of a problem of its own, in the same memory.
  const auto run_head = [&p](Head<Storage>& head, char* memory, int64_t i,
                             const Team<Worker<T>>& team) {
    if (p.offsets == nullptr) return head.run(i / p.heads, i % p.heads, team);
    const Params own = sequence(p, i / p.heads);
    Head<Storage> own_head(own);
    Arena arena(memory);
    own_head.place(arena);
    return own_head.run(0, i % p.heads, team);
  };

  Status result = Status::kOk;
  int64_t first_failed = heads;  // its status is the result, whichever thread is done first
  if (over_heads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const int thread = omp_get_thread_num();
      Head<Storage> head(p);
      char* memory = head_memory + thread * head_size.used();
      Arena arena(memory);
      if (p.offsets == nullptr) head.place(arena);
      const Team<Worker<T>> team{workers + thread, 1};
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < heads; ++i) {
        const Status status = run_head(head, memory, i, team);
        if (status != Status::kOk) {
#pragma omp critical
          if (i < first_failed) {
            first_failed = i;
            result = status;
          }
        }
      }
    }
  } else {
    Arena arena(head_memory);
    sample.place(arena);
    const Team<Worker<T>> team{workers, threads};
    for (int64_t i = 0; i < heads; ++i) {
      const Status status = run_head(sample, head_memory, i, team);
      if (status != Status::kOk) return status;
    }
  }
  return result;
}

template <template <class> class Head, class Params>
Status dispatch(const Params& p) {
  switch (p.type) {
    case ScalarType::kFloat32:
      return run<float, Head>(p);
    case ScalarType::kFloat64:
      return run<double, Head>(p);
    case ScalarType::kBFloat16:
      return run<BFloat16, Head>(p);
    case ScalarType::kFloat16:
      return run<Float16, Head>(p);
  }
  return Status::kOk;
}

}  // namespace

Status forward(const ForwardParams& p) { return dispatch<ForwardHead>(p); }
Status backward(const BackwardParams& p) { return dispatch<BackwardHead>(p); }
Status plan(const PlanParams& p) { return dispatch<PlanHead>(p); }

}  // namespace setformer::cpu::SETFORMER_ISA
