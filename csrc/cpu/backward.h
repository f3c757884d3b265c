// Backward of one head: how the two sides' gradients fit together (equations in side_gradient.h).
#pragma once

#include "side_gradient.h"

namespace setformer::cpu::SETFORMER_ISA {

template <class Storage>
class BackwardHead {
  using T = Accumulate<Storage>;

 public:
  explicit BackwardHead(const BackwardParams& p)
      : p_(p),
        widths_(p),
        distributes_(p.distribute && p.grad_output.data != nullptr),
        keys_(p, keys_of(p), p.grad_key, true, distributes_ && !p.cross),
        queries_(p, queries_of(p), p.grad_query, false, distributes_) {}

  void place(Arena& arena) {
    keys_.place(arena);
    if (p_.cross) queries_.place(arena);
    marginal_.b = arena.take<T>(widths_.references);
    marginal_.log2_b = arena.take<T>(widths_.references);
    pooled_.values = arena.take<T>(p_.references * widths_.value_depth);
    pooled_.gradient = arena.take<T>(p_.references * widths_.value_depth);
    pooled_.eta = arena.take<T>(widths_.references);
    grad_log_b_ = arena.take<T>(widths_.references);
  }
  static void place_worker(Arena& arena, const BackwardParams& p, Worker<T>& worker) {
    const Columns widest(p, true, true);
    worker.place(arena, Widths<T>(p), true, widest.total());
  }
  int64_t spans() {
    return larger(keys_.transport().spans().count, queries_.transport().spans().count);
  }

  Status run(int64_t b, int64_t h, const Team<Worker<T>>& team) {
    const int64_t head = b * p_.heads + h;
    Status status = load_reference_marginal(p_, widths_, b, h, marginal_);
    if (status != Status::kOk) return status;
    const int64_t steps = larger<int64_t>(p_.iterations, 1);
    status = prepare(keys_, b, h, p_.token_mass, p_.rows, p_.columns, steps + 1, team);
    if (status != Status::kOk) return status;
    if (p_.cross) {
      status = prepare(queries_, b, h, Tensor{}, p_.query_rows, p_.query_columns, steps, team);
      if (status != Status::kOk) return status;
    }
    T* grad_reference = at<T>(p_.grad_reference, 0) + head * p_.references * p_.depth;
    T* grad_bandwidth = at<T>(p_.grad_bandwidth, 0);
    if (grad_bandwidth != nullptr) grad_bandwidth += head;
    T* grad_epsilon = at<T>(p_.grad_epsilon, 0) + head;
    fill(grad_log_b_, widths_.references, T(0));
    if (keys_.transport().empty()) {
      clear(b, h, grad_reference);
      if (grad_bandwidth != nullptr) *grad_bandwidth = T(0);
      *grad_epsilon = T(0);
    } else {
      differentiate(b, h, team, {grad_reference, grad_bandwidth, grad_epsilon});
    }
    if (T* grad = at<T>(p_.grad_reference_mass, 0)) {
      store_reference_mass_gradient(grad + head * p_.references);
    }
    return Status::kOk;
  }

 private:
  Status prepare(SideGradient<Storage>& side, int64_t b, int64_t h, const Tensor& mass,
                 const Tensor& rows, const Tensor& columns, int64_t column_rows,
                 const Team<Worker<T>>& team) {
    const int64_t head = b * p_.heads + h, steps = p_.iterations;
    const int64_t tokens = side.transport().spans().tokens;
    const Status status = side.transport().prepare(
        b, h, mass, marginal_, at<T>(rows, 0) + head * (steps + 1) * tokens,
        at<T>(columns, 0) + head * column_rows * p_.references, team.workers[0]);
    if (status == Status::kOk) side.begin(b, h, team);
    return status;
  }

  void differentiate(int64_t b, int64_t h, const Team<Worker<T>>& team,
                     const typename Similarity<Storage>::Results& results) {
    const int64_t head = b * p_.heads + h, depth = widths_.value_depth;
    const T* values = at<const T>(p_.pooled, 0) + head * p_.references * p_.value_depth;
    const T* grad = at<const T>(p_.grad_pooled, b, h);
    for (int64_t j = 0; j < p_.references; ++j) {
      load_row(values + j * p_.value_depth, 1, p_.value_depth, pooled_.values + j * depth, depth);
      T* row = pooled_.gradient + j * depth;
      fill(row, depth, T(0));
      if (grad == nullptr) continue;
      load_row(grad + j * p_.grad_pooled.stride[2], p_.grad_pooled.stride[3], p_.value_depth, row,
               depth);
    }
    const bool has_queries = p_.cross && distributes_ && !queries_.transport().empty();
    if (has_queries) queries_.distribute(team, pooled_);
    if (!p_.cross && distributes_) keys_.distribute(team, pooled_);
    fill(pooled_.eta, widths_.references, T(0));
    for (int64_t j = 0; j < p_.references; ++j) {
      for (int64_t c = 0; c < depth; ++c) {
        pooled_.eta[j] += pooled_.values[j * depth + c] * pooled_.gradient[j * depth + c];
      }
    }
    keys_.steps(team, pooled_, grad_log_b_);
    keys_.finish(team, results, false);
    if (T* grad_mass = at<T>(p_.grad_token_mass, 0)) {
      keys_.store_mass_gradient(grad_mass + head * p_.tokens);
    }
    if (has_queries) {
      queries_.steps(team, pooled_, grad_log_b_);
      queries_.finish(team, results, true);
    } else if (p_.cross) {
      clear_tokens(p_.grad_query, b, h, p_.queries, p_.depth);
    }
  }

  // No token holds mass: the output is 0 whatever the inputs are.
  void clear(int64_t b, int64_t h, T* grad_reference) {
    fill(grad_reference, p_.references * p_.depth, T(0));
    if (T* grad = at<T>(p_.grad_token_mass, 0)) {
      fill(grad + (b * p_.heads + h) * p_.tokens, p_.tokens, T(0));
    }
    clear_tokens(p_.grad_key, b, h, p_.tokens, p_.depth);
    clear_tokens(p_.grad_value, b, h, p_.tokens, p_.value_depth);
    if (p_.cross) clear_tokens(p_.grad_query, b, h, p_.queries, p_.depth);
  }
  static void clear_tokens(const Tensor& tensor, int64_t b, int64_t h, int64_t count,
                           int64_t depth) {
    for (int64_t i = 0; i < count; ++i) {
      Storage* row = at<Storage>(tensor, b, h) + i * tensor.stride[2];
      for (int64_t c = 0; c < depth; ++c) to_storage(T(0), row + c * tensor.stride[3]);
    }
  }

  // b_j = mass_j / total: dmass_j = (dlog b_j / b_j - sum_k dlog b_k) / total.
  void store_reference_mass_gradient(T* grad_mass) const {
    double sum = 0;
    for (int64_t j = 0; j < p_.references; ++j) sum += double(grad_log_b_[j]);
    for (int64_t j = 0; j < p_.references; ++j) {
      const double share = double(grad_log_b_[j]) / double(marginal_.b[j]);
      grad_mass[j] = T((share - sum) / double(marginal_.total));
    }
  }

  const BackwardParams& p_;
  Widths<T> widths_;
  bool distributes_;
  SideGradient<Storage> keys_, queries_;
  ReferenceMarginal<T> marginal_{};
  typename SideGradient<Storage>::Pooled pooled_{};
  T* grad_log_b_ = nullptr;  // [references]
};

}  // namespace setformer::cpu::SETFORMER_ISA
