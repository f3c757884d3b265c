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
  return Status::kOk;
}

inline Tokens keys_of(const ForwardParams& p) {
  return {p.tokens, p.key, p.mask, p.token_positions};
}
inline Tokens queries_of(const ForwardParams& p) {
  return {p.cross ? p.queries : 0, p.query, p.query_mask, p.query_positions};
}

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
  }
  static void place_worker(Arena& arena, const ForwardParams& p, Worker<T>& worker) {
    worker.place(arena, Widths<T>(p), false, 0);
  }
  int64_t spans() const { return larger(keys_.spans().count, queries_.spans().count); }

  Status run(int64_t b, int64_t h, const Team<Worker<T>>& team) {
    const int64_t head = b * p_.heads + h, steps = p_.iterations;
    T* rows = at<T>(p_.rows, 0) + head * (steps + 1) * p_.tokens;
    const int64_t of_columns = larger<int64_t>(steps, 1) * p_.references;
    T* columns = at<T>(p_.columns, 0) + head * (of_columns + p_.references);
    fill(columns + of_columns, p_.references, T(1));
    T* pooled = at<T>(p_.pooled, 0) + head * p_.references * p_.value_depth;
    Status status = load_reference_marginal(p_, widths_, b, h, marginal_);
    if (status != Status::kOk) return status;
    status = keys_.prepare(b, h, p_.token_mass, marginal_, rows, columns, team.workers[0]);
    if (status != Status::kOk) return status;
    if (keys_.empty()) {
      fill(rows, (steps + 1) * p_.tokens, T(0));
      fill(columns, of_columns, T(0));
      fill(pooled, p_.references * p_.value_depth, T(0));
    } else {
      collect(b, h, team, pooled);
    }
    // Only the side that distributes has normalisers after the last step.
    if (!p_.distribute || p_.cross) fill(rows + steps * p_.tokens, p_.tokens, T(0));
    if (!p_.distribute) return Status::kOk;
    if (!p_.cross) return distribute(keys_, b, h, team);

    T* query_rows = at<T>(p_.query_rows, 0) + head * (steps + 1) * p_.queries;
    T* query_columns = at<T>(p_.query_columns, 0) + head * of_columns;
    status =
        queries_.prepare(b, h, Tensor{}, marginal_, query_rows, query_columns, team.workers[0]);
    if (status != Status::kOk) return status;
    if (keys_.empty() || queries_.empty()) {
      fill(query_rows, (steps + 1) * p_.queries, T(0));
      fill(query_columns, of_columns, T(0));
    } else {
      queries_.solve(team, false, [](int64_t) {}, [](auto...) {});
    }
    return distribute(queries_, b, h, team);
  }

 private:
  // A_j = sum_i C_ij v_i, into pooled_ and the caller's `pooled` [M, Dv].
  void collect(int64_t b, int64_t h, const Team<Worker<T>>& team, T* pooled) {
    const int64_t depth = widths_.value_depth;
    keys_.solve(
        team, true, [&](int64_t span) { pooled_.clear(span); },
        [&](int64_t span, int64_t begin, int64_t count, const T* matrix, const Worker<T>& worker) {
          load_tokens<Storage>(p_.value, b, h, begin, count, p_.value_depth,
                               keys_.similarity().valid(), worker.values, depth);
          scale_rows(worker.values, count, depth, worker.row_factors);
          multiply(p_.references, depth, count, matrix, int64_t{1}, widths_.references,
                   worker.values, depth, pooled_.of(span), depth, true,
                   next_tile<Storage>(p_.value, b, h, begin, p_.value_depth));
        });
    T* total = pooled_.total(keys_.spans());
    keys_.collection_columns(p_.iterations, column_factors_);
    scale_rows(total, p_.references, depth, column_factors_);
    for (int64_t j = 0; j < p_.references; ++j) {
      store_row(total + j * depth, p_.value_depth, pooled + j * p_.value_depth, 1);
    }
  }

  // O_i = sum_j R_ij A_j, with A in pooled_.
  Status distribute(const Transport<Storage>& side, int64_t b, int64_t h,
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
    return Status::kOk;
  }

  const ForwardParams& p_;
  Widths<T> widths_;
  Transport<Storage> keys_, queries_;
  ReferenceMarginal<T> marginal_{};
  T* column_factors_ = nullptr;  // [references]
  Partials<T> pooled_{};         // [M, value_depth] per span
};

}  // namespace setformer::cpu::SETFORMER_ISA
