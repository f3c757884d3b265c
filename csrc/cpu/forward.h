// Forward of one head: solve, collect, distribute (equations in transport.h).
#pragma once

#include "head.h"

namespace setformer::cpu::SETFORMER_ISA {

template <class Storage>
class ForwardHead : public Head<Storage, ForwardParams> {
  using Base = Head<Storage, ForwardParams>;
  using Base::p_, Base::b_, Base::h_, Base::widths_, Base::keys_, Base::queries_;
  using Base::steps, Base::queried, Base::leave;

 public:
  using typename Base::T;

  ForwardHead(const ForwardParams& p, int64_t b, int64_t h,
              const References<Storage>* shared = nullptr)
      : Base(p, b, h, shared, false) {}

  void place(Arena& arena) {
    Base::place(arena);
    column_factors_ = arena.take<T>(widths_.references);
    pooled_.place(arena, keys_.spans(), p_.references * widths_.value_depth);
    if constexpr (kInPairs<Storage>) {
      pooled_pairs_ = arena.take<Pair>(pairs_of(p_.references) * widths_.value_depth);
    }
  }
  // Columns of Worker::left.
  static int64_t left_width(const ForwardParams&) { return 0; }

  bool done() const { return progress_.phase == Phase::kDone; }

  // The next phase.
  Status run(const Team<T>& team) {
    this->leavings_ = {};
    const auto [phase, step] = progress_;
    progress_.advance([this](Phase phase) { return times(phase); });
    switch (phase) {
      case Phase::kPrepare:
        return Base::prepare(team);
      case Phase::kStepsOfKeys:
        step_of_keys(step + 1, team);
        break;
      case Phase::kSumCollection:
        sum_collection(team);
        break;
      case Phase::kPoolCollection:
        pool_collection(team);
        break;
      case Phase::kStepsOfQueries:
        step_of_queries(step + 1, team);
        break;
      case Phase::kFinish:
        finish(team);
        break;
      case Phase::kDone:
        break;
    }
    return Status::kOk;
  }

 private:
  // Only the log domain needs passes of its own for the column sums of C and for A: with scaling
  // the last step of the keys computes A.
  enum class Phase {
    kPrepare,
    kStepsOfKeys,
    kSumCollection,
    kPoolCollection,
    kStepsOfQueries,
    kFinish,
    kDone,
  };
  int64_t times(Phase phase) const {
    if (phase == Phase::kStepsOfKeys) return steps();
    if (phase == Phase::kStepsOfQueries) return queried() ? steps() : 0;
    return 1;
  }

  // Adds sum_i matrix_ij v_i of a tile to its span.
  auto pooling() {
    return [this](const Tile<T>& tile, const T* matrix) {
      const TokenRows<Storage> values(p_.value, b_, h_, p_.value_depth);
      const int64_t depth = widths_.value_depth;
      if constexpr (kInPairs<Storage>) return pool_in_pairs(values, tile, matrix);
      T* rows = tile.worker.values;
      values.load_scaled(tile.begin, tile.count, keys_.similarity().valid(),
                         tile.worker.row_factors, rows);
      multiply(p_.references, depth, tile.count, matrix, 1, widths_.references, rows,
               pooled_.of(tile.span), true, values.next_tile(tile.begin));
    };
  }
  void pool_in_pairs(const TokenRows<Storage>& values, const Tile<T>& tile, const T* matrix) {
    const Worker<T>& worker = tile.worker;
    values.load_pairs_across(tile.begin, tile.count, keys_.similarity().valid(),
                             worker.value_pairs);
    add_transposed(
        {matrix, tile.count, widths_.references, worker.matrix_pairs},
        [&](int64_t i) { return worker.row_factors[i]; }, worker.value_pairs, p_.references,
        pooled_.of(tile.span), widths_.value_depth, values.next_tile(tile.begin));
  }
  void leave_pooled() { leave(pooled_.of(0), p_.references * widths_.value_depth); }
  T* pooled_of_caller() const {  // [M, Dv]
    return at<T>(p_.pooled, 0) + this->index() * p_.references * p_.value_depth;
  }

  void begin() {
    T* columns = at<T>(p_.columns, 0) + this->index() * (steps() + 1) * p_.references;
    fill(columns + steps() * p_.references, p_.references, T(1));
    keys_.normalize_masses();
    if (keys_.empty()) {
      keys_.clear_normalizers();
      fill(pooled_of_caller(), p_.references * p_.value_depth, T(0));
    }
    // Only the side that distributes needs rows^T, the normalisers after the last step.
    if (!p_.distribute || p_.cross) keys_.clear_last_rows();
    if (!queried()) return;
    queries_.normalize_masses();
    if (keys_.empty() || queries_.empty()) queries_.clear_normalizers();
  }

  // Step 1..S, S = max(T, 1); its t is 0 where T = 0.
  void step_of_keys(int64_t step, const Team<T>& team) {
    if (step == 1) begin();
    if (keys_.empty()) return;
    if (step > 1) keys_.finish_step(step - 1);
    const bool pools = step == steps() && !keys_.log_domain();
    keys_.step(smaller(step, p_.iterations), team, pools ? &pooled_ : nullptr, pooling());
    leave(keys_.column_sums(), p_.references, keys_.merge_of_columns());
    if (pools) leave_pooled();
  }
  void step_of_queries(int64_t step, const Team<T>& team) {
    if (keys_.empty() || queries_.empty()) return;
    if (step > 1) queries_.finish_step(step - 1);
    queries_.step(smaller(step, p_.iterations), team, nullptr, pooling());
    leave(queries_.column_sums(), p_.references, queries_.merge_of_columns());
  }

  void sum_collection(const Team<T>& team) {
    if (keys_.empty()) return;
    keys_.finish_step(p_.iterations);
    if (!keys_.log_domain()) return;
    keys_.sum_collection(team);
    leave(keys_.column_sums(), p_.references);
  }
  void pool_collection(const Team<T>& team) {
    if (keys_.empty() || !keys_.log_domain()) return;
    keys_.finish_collection();
    keys_.pool_collection(team, pooled_, pooling());
    leave_pooled();
  }

  // A_j = sum_i C_ij v_i, into pooled_ and the caller's `pooled` [M, Dv]; then distribute.
  void finish(const Team<T>& team) {
    if (!keys_.empty()) {
      const int64_t depth = widths_.value_depth;
      T* total = pooled_.of(0);
      keys_.collection_columns(p_.iterations, column_factors_);
      scale_rows(total, p_.references, depth, column_factors_);
      for (int64_t j = 0; j < p_.references; ++j) {
        store_row(total + j * depth, p_.value_depth, pooled_of_caller() + j * p_.value_depth, 1);
      }
      if (queried() && !queries_.empty()) queries_.finish_step(p_.iterations);
    }
    if (p_.distribute) distribute(p_.cross ? queries_ : keys_, team);
  }

  // O_i = sum_j R_ij A_j, with A in pooled_.
  void distribute(Transport<Storage>& side, const Team<T>& team) {
    const TokenRows<Storage> outputs(p_.output, b_, h_, p_.value_depth);
    if (keys_.empty() || side.empty()) return outputs.clear(side.spans().tokens);
    const int64_t depth = widths_.value_depth, steps = p_.iterations;
    T* pooled = pooled_.of(0);
    side.distribution_columns(steps, column_factors_);
    scale_rows(pooled, p_.references, depth, column_factors_);
    if constexpr (kInPairs<Storage>) {
      store_pairs_across(pooled, p_.references, depth, pooled_pairs_);
    }
    side.sum_pass(team, {}, [&](const Tile<T>& tile, const T* scores) {
      T *rows = tile.worker.outputs, *factors = tile.worker.row_factors;
      side.normalize_rows(steps, tile, scores, true);
      const T* matrix = side.distribution(steps, tile, scores);
      if constexpr (kInPairs<Storage>) {
        multiply({matrix, tile.count, widths_.references, tile.worker.matrix_pairs}, pooled_pairs_,
                 p_.references, rows, depth);
      } else {
        multiply(tile.count, depth, p_.references, matrix, widths_.references, 1, pooled, rows,
                 false);
      }
      outputs.store_scaled(tile.begin, tile.count, side.similarity().valid(), factors, rows);
    });
  }

  Progress<Phase> progress_;
  T* column_factors_ = nullptr;   // [references]
  Partials<T> pooled_{};          // [M, value_depth] per span
  Pair* pooled_pairs_ = nullptr;  // [pairs_of(M), value_depth] A of distribute
};

}  // namespace setformer::cpu::SETFORMER_ISA
