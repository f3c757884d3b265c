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
// the tokens, what `share` tells of a stage is merged before the next. What a stage is, its phase
// and the step of it, `place_of` tells.
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

  int64_t stages() const { return 4 + steps() * (queried() ? 2 : 1); }

  Status run(int64_t stage, int64_t b, int64_t h, const Team<Worker<T>>& team) {
    const Place place = place_of(stage);
    switch (place.phase) {
      case Phase::kPrepare:
        return prepare(b, h, team);
      case Phase::kStep:
        step_of_keys(place.step, b, h, team);
        break;
      case Phase::kSumCollection:
        if (!keys_.empty()) keys_.finish_step(p_.iterations);
        if (!keys_.empty() && keys_.log_domain()) keys_.sum_collection(team);
        break;
      case Phase::kPool:
        if (!keys_.empty() && keys_.log_domain()) pool_collection(b, h, team);
        break;
      case Phase::kStepOfQueries:
        if (!keys_.empty() && !queries_.empty()) step_of_queries(place.step, team);
        break;
      case Phase::kDistribute:
        finish(b, h, team);
    }
    return Status::kOk;
  }

  // What all ranks need merged after a stage: how many entries of `shared` [2] it fills.
  int share(int64_t stage, Shared* shared) const {
    const Place place = place_of(stage);
    if (place.phase == Phase::kPrepare) {
      shared[0] = masses_.shared();
      return 1;
    }
    const int64_t references = p_.references, pooled = references * widths_.value_depth;
    const Transport<Storage>& side = place.phase == Phase::kStepOfQueries ? queries_ : keys_;
    if (keys_.empty() || side.empty()) return 0;
    const Shared columns = share_of_head(side.column_sums(), references, side.merge_of_columns());
    const Shared sums = share_of_head(side.column_sums(), references);
    const Shared collected = share_of_head(pooled_.of(0), pooled);
    switch (place.phase) {
      case Phase::kStep:
        shared[0] = columns;
        shared[1] = collected;
        return pools_with(place.step) ? 2 : 1;
      case Phase::kStepOfQueries:
        shared[0] = columns;
        return 1;
      case Phase::kSumCollection:
        shared[0] = sums;
        return keys_.log_domain() ? 1 : 0;
      case Phase::kPool:
        shared[0] = collected;
        return keys_.log_domain() ? 1 : 0;
      default:
        return 0;
    }
  }

 private:
  enum class Phase {
    kPrepare,
    kStep,           // of the keys, S = max(T, 1) times; scaled, the last one pools, too
    kSumCollection,  // in the log domain: the sums of C over its columns
    kPool,           // in the log domain: A
    kStepOfQueries,  // in cross attention, S times
    kDistribute
  };
  struct Place {
    Phase phase;
    int64_t step = 0;  // 1..S
  };

  Place place_of(int64_t stage) const {
    if (stage == 0) return {Phase::kPrepare};
    if (stage <= steps()) return {Phase::kStep, stage};
    if (stage == steps() + 1) return {Phase::kSumCollection};
    if (stage == steps() + 2) return {Phase::kPool};
    if (stage + 1 < stages()) return {Phase::kStepOfQueries, stage - steps() - 2};
    return {Phase::kDistribute};
  }
  bool pools_with(int64_t step) const { return step == steps() && !keys_.log_domain(); }

  auto clearing() {
    return [this](int64_t span) { pooled_.clear(span); };
  }
  // Adds sum_i matrix_ij v_i of a tile to its span.
  auto pooling(int64_t b, int64_t h) {
    return [this, b, h](int64_t span, int64_t begin, int64_t count, const T* matrix,
                        const Worker<T>& worker) {
      load_tokens<Storage>(p_.value, b, h, begin, count, p_.value_depth, keys_.similarity().valid(),
                           worker.values, widths_.value_depth);
      scale_rows(worker.values, count, widths_.value_depth, worker.row_factors);
      multiply(p_.references, widths_.value_depth, count, matrix, int64_t{1}, widths_.references,
               worker.values, widths_.value_depth, pooled_.of(span), widths_.value_depth, true,
               next_tile<Storage>(p_.value, b, h, begin, p_.value_depth));
    };
  }

  void step_of_keys(int64_t step, int64_t b, int64_t h, const Team<Worker<T>>& team) {
    if (step == 1) begin();
    if (keys_.empty()) return;
    if (step > 1) keys_.finish_step(number_of(step - 1));
    keys_.step(number_of(step), team, pools_with(step), clearing(), pooling(b, h));
    if (pools_with(step)) pooled_.total(keys_.spans());
  }

  void pool_collection(int64_t b, int64_t h, const Team<Worker<T>>& team) {
    keys_.finish_collection();
    keys_.pool_collection(team, clearing(), pooling(b, h));
    pooled_.total(keys_.spans());
  }

  void step_of_queries(int64_t step, const Team<Worker<T>>& team) {
    if (step > 1) queries_.finish_step(number_of(step - 1));
    queries_.step(number_of(step), team, false, clearing(), pooling(0, 0));  // which pools nothing
  }

  int64_t steps() const { return larger<int64_t>(p_.iterations, 1); }
  // t of a step: 0 where T = 0.
  int64_t number_of(int64_t step) const { return p_.iterations == 0 ? 0 : step; }
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
