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
    masses_.place(arena);
  }
  static void place_worker(Arena& arena, const BackwardParams& p, Worker<T>& worker) {
    const Columns widest(p, true, true);
    worker.place(arena, Widths<T>(p), true, widest.total());
  }
  int64_t spans() {
    return larger(keys_.transport().spans().count, queries_.transport().spans().count);
  }

  Masses<T>& masses() { return masses_; }

  int64_t stages() const { return 3 + (steps() + 1) * (p_.cross ? 2 : 1); }

  Status run(int64_t stage, int64_t b, int64_t h, const Team<Worker<T>>& team) {
    const Place place = place_of(stage);
    if (place.phase == Phase::kPrepare) return prepare(b, h, team);
    if (place.phase == Phase::kBegin) begin(b, h, team);
    if (!keys_.transport().empty()) {
      differentiate(place, b, h, team);
    } else if (place.phase == Phase::kBegin) {
      clear(b, h);
    }
    if (stage + 1 == stages()) store_reference_mass_gradient(b * p_.heads + h);
    return Status::kOk;
  }

  // What all ranks need merged after a stage: how many entries of `shared` [2] it fills.
  int share(int64_t stage, Shared* shared) const {
    const Place place = place_of(stage);
    if (place.phase == Phase::kPrepare) {
      shared[0] = masses_.shared();
      return 1;
    }
    if (keys_.transport().empty()) return 0;
    const int64_t references = p_.references, pooled = references * widths_.value_depth;
    switch (place.phase) {
      case Phase::kBegin:
        shared[0] = share_of_head(keys_.transport().column_sums(), references);
        return keys_.transport().log_domain() ? 1 : 0;
      case Phase::kDistribute:
        if (!distributed()) return 0;
        shared[0] = share_of_head(receivers().sums(), references);
        shared[1] = share_of_head(receivers().matrix_sums(), pooled);
        return 2;
      case Phase::kStep:
        // The last step leaves nothing to go on from.
        if (place.step + 1 >= steps() || (place.of_queries && !distributed())) return 0;
        shared[0] = share_of_head((place.of_queries ? queries_ : keys_).sums(), references);
        return 1;
      default:
        return 0;
    }
  }

 private:
  // Begin is a pass of the log domain; distribute goes through R; then come, for the keys and in
  // cross attention for the queries, S = max(T, 1) steps and what follows from them.
  enum class Phase { kPrepare, kBegin, kDistribute, kStep, kFinish };
  struct Place {
    Phase phase;
    bool of_queries = false;
    int64_t step = 0;  // 0..S - 1, from the last one back
  };

  Place place_of(int64_t stage) const {
    if (stage == 0) return {Phase::kPrepare};
    if (stage == 1) return {Phase::kBegin};
    if (stage == 2) return {Phase::kDistribute};
    const int64_t of_a_side = steps() + 1, step = (stage - 3) % of_a_side;
    return {step < steps() ? Phase::kStep : Phase::kFinish, stage - 3 >= of_a_side, step};
  }

  void differentiate(const Place& place, int64_t b, int64_t h, const Team<Worker<T>>& team) {
    if (place.phase == Phase::kBegin) return;
    if (place.phase == Phase::kDistribute) {
      keys_.finish_begin();
      if (distributed()) receivers().distribute(team);
      return;
    }
    if (!place.of_queries) {
      if (place.step == 0) finish_pooled();
      run_side(keys_, place, b, h, team, p_.grad_token_mass);
    } else if (distributed()) {
      run_side(queries_, place, b, h, team, Tensor{});
    } else if (place.phase == Phase::kFinish) {
      clear_tokens(p_.grad_query, b, h, p_.queries, p_.depth);
    }
  }

  int64_t steps() const { return larger<int64_t>(p_.iterations, 1); }
  // The side that receives the output, and whether anything comes of it.
  SideGradient<Storage>& receivers() { return p_.cross ? queries_ : keys_; }
  const SideGradient<Storage>& receivers() const { return p_.cross ? queries_ : keys_; }
  bool distributed() const { return distributes_ && !receivers().transport().empty(); }

  Status prepare(int64_t b, int64_t h, const Team<Worker<T>>& team) {
    Status status = load_reference_marginal(p_, widths_, b, h, marginal_);
    if (status != Status::kOk) return status;
    status = prepare(keys_, b, h, p_.token_mass, p_.rows, p_.columns, steps() + 1, team);
    if (p_.cross) prepare(queries_, b, h, Tensor{}, p_.query_rows, p_.query_columns, steps(), team);
    masses_.set(keys_.transport().total_mass(), queries_.transport().total_mass());
    return status;
  }
  Status prepare(SideGradient<Storage>& side, int64_t b, int64_t h, const Tensor& mass,
                 const Tensor& rows, const Tensor& columns, int64_t column_rows,
                 const Team<Worker<T>>& team) {
    const int64_t head = b * p_.heads + h;
    const int64_t tokens = side.transport().spans().tokens;
    return side.transport().prepare(
        b, h, mass, marginal_, at<T>(rows, 0) + head * (p_.iterations + 1) * tokens,
        at<T>(columns, 0) + head * column_rows * p_.references, team.workers[0]);
  }

  void begin(int64_t b, int64_t h, const Team<Worker<T>>& team) {
    const int64_t head = b * p_.heads + h, depth = widths_.value_depth;
    fill(grad_log_b_, widths_.references, T(0));
    keys_.transport().normalize_masses(masses_.keys);
    keys_.begin(b, h, team);
    if (p_.cross) {
      queries_.transport().normalize_masses(masses_.queries);
      queries_.begin(b, h, team);
    }
    results_ = {at<T>(p_.grad_reference, 0) + head * p_.references * p_.depth,
                at<T>(p_.grad_bandwidth, 0), at<T>(p_.grad_epsilon, 0) + head};
    if (results_.bandwidth != nullptr) results_.bandwidth += head;
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
  }

  // dA and eta, complete.
  void finish_pooled() {
    if (distributed()) receivers().finish_distribute(pooled_);
    const int64_t depth = widths_.value_depth;
    fill(pooled_.eta, widths_.references, T(0));
    for (int64_t j = 0; j < p_.references; ++j) {
      for (int64_t c = 0; c < depth; ++c) {
        pooled_.eta[j] += pooled_.values[j * depth + c] * pooled_.gradient[j * depth + c];
      }
    }
  }

  // Of a side: its steps T..1, or 0 where T = 0, and after the last its gradients.
  void run_side(SideGradient<Storage>& side, const Place& place, int64_t b, int64_t h,
                const Team<Worker<T>>& team, const Tensor& grad_mass) {
    if (place.step > 0) side.finish_step();
    if (place.phase == Phase::kStep) {
      side.step(p_.iterations - place.step, team, pooled_, grad_log_b_);
      return;
    }
    side.finish(team, results_, &side == &queries_);
    if (T* grad = at<T>(grad_mass, 0)) {
      side.store_mass_gradient(grad + (b * p_.heads + h) * p_.tokens);
    }
  }

  // No token holds mass: the output is 0 whatever the inputs are.
  void clear(int64_t b, int64_t h) {
    fill(results_.reference, p_.references * p_.depth, T(0));
    if (results_.bandwidth != nullptr) *results_.bandwidth = T(0);
    *results_.epsilon = T(0);
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
  void store_reference_mass_gradient(int64_t head) const {
    T* grad_mass = at<T>(p_.grad_reference_mass, 0);
    if (grad_mass == nullptr) return;
    grad_mass += head * p_.references;
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
  typename Similarity<Storage>::Results results_{};
  T* grad_log_b_ = nullptr;  // [references]
  Masses<T> masses_{};
};

}  // namespace setformer::cpu::SETFORMER_ISA
