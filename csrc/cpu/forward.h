// Forward of one head: solve, collect, distribute (equations in transport.h).
#pragma once

#include "transport.h"

namespace setformer::cpu::SETFORMER_ISA {

// The marginal b of head (b, h) from its masses; uniform where none are given.
template <class T>
Status load_reference_marginal(const ForwardParams& p, const Widths<T>& widths, int64_t b,
                               int64_t h, ReferenceMarginal<T>& marginal) {
  const T* mass = at<const T>(p.reference_mass, b, h);
  double total = 0;
  fill(marginal.b, widths.references, T(0));
  for (int64_t j = 0; j < p.references; ++j) {
    marginal.b[j] = mass == nullptr ? T(1) : mass[j * p.reference_mass.stride[2]];
    if (marginal.b[j] <= T(0)) return Status::kNonPositiveReferenceMass;
    total += double(marginal.b[j]);
  }
  marginal.total = T(total);
  for (int64_t j = 0; j < p.references; ++j) marginal.b[j] = T(double(marginal.b[j]) / total);
  for (int64_t j = 0; j < widths.references; j += kLanes<T>) {
    store<T>(marginal.log2_b + j, log2<T>(load(marginal.b + j)));
  }
  // Below the normal numbers of T the fast log2 knows none, and similarities can outweigh such b.
  for (int64_t j = 0; j < p.references; ++j) {
    if (marginal.b[j] >= kSmallestNormal<T>) continue;
    const T given = mass == nullptr ? T(1) : mass[j * p.reference_mass.stride[2]];
    marginal.log2_b[j] = T(__builtin_log2(double(given)) - __builtin_log2(total));
  }
  return Status::kOk;
}

inline Tokens keys_of(const ForwardParams& p) {
  return {p.tokens, p.key, p.mask, p.token_positions};
}
inline Tokens queries_of(const ForwardParams& p) {
  return {p.cross ? p.queries : 0, p.query, p.query_mask, p.query_positions};
}

// Numbers of one head; whoever merges them knows of how many.
inline Shared share_of_head(void* numbers, int64_t count, Merge how = Merge::kSum) {
  return {numbers, 1, count, count, how};
}

// The masses of a head's tokens and queries, which all ranks of a group add up before anything
// else, and how many of them found an error in theirs.
template <class T>
struct Masses {
  T* numbers;                    // [3]
  double keys = 0, queries = 0;  // in a group those of all ranks, to the digits of T

  void place(Arena& arena) { numbers = arena.take<T>(3); }
  void set(double of_keys, double of_queries) {
    keys = of_keys;
    queries = of_queries;
    numbers[0] = T(keys);
    numbers[1] = T(queries);
    numbers[2] = T(0);
  }
  Shared shared() const { return share_of_head(numbers, 3); }
  // After merging.
  Status finish() {
    keys = double(numbers[0]);
    queries = double(numbers[1]);
    return numbers[2] == T(0) ? Status::kOk : Status::kPeerFailed;
  }
};

// The work on a head is cut into stages at the sums over all its tokens. Where several ranks have
// the tokens, what `share` tells of a stage is merged before the next.
template <class Storage>
class ForwardHead {
  using T = Accumulate<Storage>;

 public:
  explicit ForwardHead(const ForwardParams& p)
      : p_(p), widths_(p), keys_(p, keys_of(p), false), queries_(p, queries_of(p), false) {}

  void place(Arena& arena) {
    keys_.place(arena);
    if (p_.cross) queries_.place(arena);
    marginal_.b = arena.take<T>(widths_.references);
    marginal_.log2_b = arena.take<T>(widths_.references);
    column_factors_ = arena.take<T>(widths_.references);
    pooled_.place(arena, keys_.spans(), p_.references * widths_.value_depth);
    masses_.place(arena);
  }
  static void place_worker(Arena& arena, const ForwardParams& p, Worker<T>& worker) {
    worker.place(arena, Widths<T>(p), false, 0);
  }
  int64_t spans() const { return larger(keys_.spans().count, queries_.spans().count); }
  Masses<T>& masses() { return masses_; }

  // Stage 0 prepares; 1..S are the steps of the keys, S = max(T, 1); S + 1 and S + 2 are what
  // collects in the log domain; then come, in cross attention, the steps of the queries; the last
  // distributes.
  int64_t stages() const { return 4 + steps() * (queried() ? 2 : 1); }

  Status run(int64_t stage, int64_t b, int64_t h, const Team<Worker<T>>& team) {
    if (stage == 0) return prepare(b, h, team);
    if (stage == 1) begin();
    const bool empty = keys_.empty(), collects_now = !keys_.log_domain();
    const auto clear = [this](int64_t span) { pooled_.clear(span); };
    const auto pool = [&](int64_t span, int64_t begin, int64_t count, const T* matrix,
                          const Worker<T>& worker) {
      load_tokens<Storage>(p_.value, b, h, begin, count, p_.value_depth, keys_.similarity().valid(),
                           worker.values, widths_.value_depth);
      scale_rows(worker.values, count, widths_.value_depth, worker.row_factors);
      multiply(p_.references, widths_.value_depth, count, matrix, int64_t{1}, widths_.references,
               worker.values, widths_.value_depth, pooled_.of(span), widths_.value_depth, true,
               next_tile<Storage>(p_.value, b, h, begin, p_.value_depth));
    };
    if (stage <= steps()) {
      if (empty) return Status::kOk;
      if (stage > 1) keys_.finish_step(step_of(stage - 1));
      const bool pools = collects_now && stage == steps();
      keys_.step(step_of(stage), team, pools, clear, pool);
      if (pools) pooled_.total(keys_.spans());
    } else if (stage == steps() + 1) {
      if (empty) return Status::kOk;
      keys_.finish_step(p_.iterations);
      if (!collects_now) keys_.sum_collection(team);
    } else if (stage == steps() + 2) {
      if (empty || collects_now) return Status::kOk;
      keys_.finish_collection();
      keys_.pool_collection(team, clear, pool);
      pooled_.total(keys_.spans());
    } else if (stage + 1 < stages()) {
      if (empty || queries_.empty()) return Status::kOk;
      const int64_t of_queries = stage - steps() - 2;
      if (of_queries > 1) queries_.finish_step(step_of(of_queries - 1));
      queries_.step(step_of(of_queries), team, false, clear, pool);
    } else {
      finish(b, h, team);
    }
    return Status::kOk;
  }

  // What all ranks need merged after a stage: how many entries of `shared` [2] it fills.
  int share(int64_t stage, Shared* shared) const {
    const int64_t references = p_.references, pooled = references * widths_.value_depth;
    if (stage == 0) {
      shared[0] = masses_.shared();
      return 1;
    }
    const bool of_queries = stage > steps() + 2;
    const Transport<Storage>& side = of_queries ? queries_ : keys_;
    if (keys_.empty() || side.empty() || stage + 1 == stages()) return 0;
    const Shared columns = share_of_head(side.column_sums(), references, side.merge_of_columns());
    const Shared sums = share_of_head(side.column_sums(), references);
    const Shared collected = share_of_head(pooled_.of(0), pooled);
    if (of_queries || stage <= steps()) {
      shared[0] = columns;
      if (of_queries || stage < steps() || keys_.log_domain()) return 1;
      shared[1] = collected;
      return 2;
    }
    if (!keys_.log_domain()) return 0;
    shared[0] = stage == steps() + 1 ? sums : collected;
    return 1;
  }

 private:
  int64_t steps() const { return larger<int64_t>(p_.iterations, 1); }
  int64_t step_of(int64_t stage) const { return p_.iterations == 0 ? 0 : stage; }
  bool queried() const { return p_.cross && p_.distribute; }

  Status prepare(int64_t b, int64_t h, const Team<Worker<T>>& team) {
    const int64_t head = b * p_.heads + h, of_columns = steps() * p_.references;
    rows_ = at<T>(p_.rows, 0) + head * (p_.iterations + 1) * p_.tokens;
    columns_ = at<T>(p_.columns, 0) + head * (of_columns + p_.references);
    output_pooled_ = at<T>(p_.pooled, 0) + head * p_.references * p_.value_depth;
    fill(columns_ + of_columns, p_.references, T(1));
    Status status = load_reference_marginal(p_, widths_, b, h, marginal_);
    if (status != Status::kOk) return status;
    status = keys_.prepare(b, h, p_.token_mass, marginal_, rows_, columns_, team.workers[0]);
    if (queried()) {
      query_rows_ = at<T>(p_.query_rows, 0) + head * (p_.iterations + 1) * p_.queries;
      query_columns_ = at<T>(p_.query_columns, 0) + head * of_columns;
      queries_.prepare(b, h, Tensor{}, marginal_, query_rows_, query_columns_, team.workers[0]);
    }
    masses_.set(keys_.total_mass(), queries_.total_mass());
    return status;
  }

  void begin() {
    const int64_t rows = p_.iterations + 1, columns = steps() * p_.references;
    keys_.normalize_masses(masses_.keys);
    if (keys_.empty()) {
      fill(rows_, rows * p_.tokens, T(0));
      fill(columns_, columns, T(0));
      fill(output_pooled_, p_.references * p_.value_depth, T(0));
    }
    // Only the side that distributes has normalisers after the last step.
    if (!p_.distribute || p_.cross) fill(rows_ + p_.iterations * p_.tokens, p_.tokens, T(0));
    if (!queried()) return;
    queries_.normalize_masses(masses_.queries);
    if (keys_.empty() || queries_.empty()) {
      fill(query_rows_, rows * p_.queries, T(0));
      fill(query_columns_, columns, T(0));
    }
  }

  // A_j = sum_i C_ij v_i, into pooled_ and the caller's `pooled` [M, Dv]; then distribute.
  void finish(int64_t b, int64_t h, const Team<Worker<T>>& team) {
    if (!keys_.empty()) {
      const int64_t depth = widths_.value_depth;
      T* total = pooled_.of(0);
      keys_.collection_columns(p_.iterations, column_factors_);
      scale_rows(total, p_.references, depth, column_factors_);
      for (int64_t j = 0; j < p_.references; ++j) {
        store_row(total + j * depth, p_.value_depth, output_pooled_ + j * p_.value_depth, 1);
      }
      if (queried() && !queries_.empty()) queries_.finish_step(p_.iterations);
    }
    if (p_.distribute) distribute(p_.cross ? queries_ : keys_, b, h, team);
  }

  // O_i = sum_j R_ij A_j, with A in pooled_.
  void distribute(const Transport<Storage>& side, int64_t b, int64_t h,
                  const Team<Worker<T>>& team) {
    const int64_t depth = widths_.value_depth, steps = p_.iterations;
    const bool empty = keys_.empty() || side.empty();
    T* pooled = pooled_.of(0);
    if (!empty) {
      side.distribution_columns(steps, column_factors_);
      scale_rows(pooled, p_.references, depth, column_factors_);
    }
    team.for_each_tile(
        side.spans(), [](int64_t) {},
        [&](int64_t, int64_t begin, int64_t count, const Worker<T>& worker) {
          if (empty) {
            fill(worker.outputs, count * depth, T(0));
          } else {
            const T* scores = side.scores(begin, count, worker);
            side.normalize_rows(steps, begin, count, scores);
            const T* matrix = side.distribution(steps, begin, count, scores, worker);
            multiply(count, depth, p_.references, matrix, widths_.references, int64_t{1}, pooled,
                     depth, worker.outputs, depth, false);
            side.distribution_rows(steps, begin, count, worker.row_factors);
            scale_rows(worker.outputs, count, depth, worker.row_factors);
            for (int64_t i = 0; i < count; ++i) {
              if (!side.similarity().valid()[begin + i]) {
                fill(worker.outputs + i * depth, depth, T(0));
              }
            }
          }
          store_tokens<Storage>(worker.outputs, depth, p_.output, b, h, begin, count,
                                p_.value_depth);
        });
  }

  const ForwardParams& p_;
  Widths<T> widths_;
  Transport<Storage> keys_, queries_;
  ReferenceMarginal<T> marginal_{};
  T* column_factors_ = nullptr;  // [references]
  Partials<T> pooled_{};         // [M, value_depth] per span
  Masses<T> masses_{};
  // The head's results.
  T* rows_ = nullptr;           // [T + 1, N]
  T* columns_ = nullptr;        // [max(T, 1) + 1, M]
  T* query_rows_ = nullptr;     // [T + 1, Nq]
  T* query_columns_ = nullptr;  // [max(T, 1), M]
  T* output_pooled_ = nullptr;  // [M, Dv]
};

}  // namespace setformer::cpu::SETFORMER_ISA
