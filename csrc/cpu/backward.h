// Backward of one head: how the two sides' gradients fit together (equations in side_gradient.h).
#pragma once

#include "side_gradient.h"

namespace setformer::cpu::SETFORMER_ISA {

template <class Storage>
class BackwardHead : public Head<Storage, BackwardParams> {
  using Base = Head<Storage, BackwardParams>;
  using Base::index, Base::steps, Base::leave;
  using Base::p_, Base::b_, Base::h_, Base::widths_, Base::keys_, Base::queries_, Base::marginal_;

 public:
  using typename Base::T;

  BackwardHead(const BackwardParams& p, int64_t b, int64_t h)
      : Base(p, b, h, true),
        distributes_(p.distribute && p.grad_output.data != nullptr),
        of_keys_(p, b, h, keys_, p.grad_key, true, distributes_ && !p.cross),
        of_queries_(p, b, h, queries_, p.grad_query, false, distributes_) {}

  void place(Arena& arena) {
    Base::place(arena);
    of_keys_.place(arena);
    if (p_.cross) of_queries_.place(arena);
    pooled_.values = arena.take<T>(p_.references * widths_.value_depth);
    pooled_.gradient = arena.take<T>(p_.references * widths_.value_depth);
    pooled_.eta = arena.take<T>(widths_.references);
    grad_log_b_ = arena.take<T>(widths_.references);
  }
  // Columns of Worker::left.
  static int64_t left_width(const BackwardParams& p) {
    return Columns{p.value_depth, p.iterations, true, true}.total();
  }

  // Stages: prepare; begin (in the log domain with a pass over the tokens); backward through R;
  // then for the keys, and in cross attention for the queries, S = max(T, 1) steps and a last pass
  // for ds and the gradients of tokens and references.
  int64_t stages() const { return 3 + (steps() + 1) * (p_.cross ? 2 : 1); }

  Status run(int64_t stage, const Team<T>& team) {
    this->leavings_ = {};
    if (stage == 0) return Base::prepare(team);
    if (stage == 1) {
      begin(team);
    } else if (keys_.empty()) {
      // Nothing is left to do.
    } else if (stage == 2) {
      distribute(team);
    } else if (stage <= steps() + 3) {
      run_keys(stage - 3, team);
    } else {
      run_queries(stage - steps() - 4, team);
    }
    if (stage + 1 == stages()) store_reference_mass_gradient();
    return Status::kOk;
  }

 private:
  // The side that receives the output, and whether a gradient comes through it.
  SideGradient<Storage>& receivers() { return p_.cross ? of_queries_ : of_keys_; }
  bool distributed() const { return distributes_ && !(p_.cross ? queries_ : keys_).empty(); }

  void begin(const Team<T>& team) {
    const int64_t depth = widths_.value_depth;
    fill(grad_log_b_, widths_.references, T(0));
    of_keys_.begin();
    if (p_.cross) of_queries_.begin();
    results_ = {at<T>(p_.grad_reference, 0) + index() * p_.references * p_.depth,
                at<T>(p_.grad_bandwidth, 0), at<T>(p_.grad_epsilon, 0) + index()};
    if (results_.bandwidth != nullptr) results_.bandwidth += index();
    if (keys_.empty()) return clear();
    if (keys_.log_domain()) {
      keys_.sum_collection(team);
      leave(keys_.column_sums(), p_.references);
    }
    const T* values = at<const T>(p_.pooled, 0) + index() * p_.references * p_.value_depth;
    for (int64_t j = 0; j < p_.references; ++j) {
      load_row(values + j * p_.value_depth, 1, p_.value_depth, pooled_.values + j * depth, depth);
    }
    if (p_.grad_pooled.data == nullptr) {
      fill(pooled_.gradient, p_.references * depth, T(0));
    } else {
      TokenRows<T>(p_.grad_pooled, b_, h_, p_.value_depth)
          .load(0, p_.references, Validity(), pooled_.gradient);
    }
  }

  void distribute(const Team<T>& team) {
    if (keys_.log_domain()) keys_.finish_collection();
    if (!distributed()) return;
    receivers().distribute(team);
    leave(receivers().sums(), p_.references);
    leave(receivers().matrix_sums(), p_.references * widths_.value_depth);
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

  void run_keys(int64_t step, const Team<T>& team) {
    if (step == 0) finish_pooled();
    if (step < steps()) return run_step(of_keys_, step, team);
    of_keys_.finish(team, results_, false);
    if (T* grad = at<T>(p_.grad_token_mass, 0)) {
      of_keys_.store_mass_gradient(grad + index() * p_.tokens);
    }
  }
  void run_queries(int64_t step, const Team<T>& team) {
    if (!distributed()) {
      if (step == 0) clear_queries();
    } else if (step < steps()) {
      run_step(of_queries_, step, team);
    } else {
      of_queries_.finish(team, results_, true);
    }
  }
  // Step 0..S - 1 goes through t = T..1, or t = 0 if T = 0.
  void run_step(SideGradient<Storage>& side, int64_t step, const Team<T>& team) {
    if (step > 0) side.finish_step();
    side.step(p_.iterations - step, team, pooled_, grad_log_b_);
    // After the last step no other needs its sums.
    if (step + 1 < steps()) leave(side.sums(), p_.references);
  }

  // No token holds mass: the output is 0 whatever the inputs are.
  void clear() {
    fill(results_.reference, p_.references * p_.depth, T(0));
    if (results_.bandwidth != nullptr) *results_.bandwidth = T(0);
    *results_.epsilon = T(0);
    if (T* grad = at<T>(p_.grad_token_mass, 0)) {
      fill(grad + index() * p_.tokens, p_.tokens, T(0));
    }
    TokenRows<Storage>(p_.grad_key, b_, h_, p_.depth).clear(p_.tokens);
    TokenRows<Storage>(p_.grad_value, b_, h_, p_.value_depth).clear(p_.tokens);
    if (p_.cross) clear_queries();
  }

  void clear_queries() { TokenRows<Storage>(p_.grad_query, b_, h_, p_.depth).clear(p_.queries); }

  // b_j = mass_j / total: dmass_j = (dlog b_j / b_j - sum_k dlog b_k) / total.
  void store_reference_mass_gradient() const {
    T* grad_mass = at<T>(p_.grad_reference_mass, 0);
    if (grad_mass == nullptr) return;
    grad_mass += index() * p_.references;
    double sum = 0;
    for (int64_t j = 0; j < p_.references; ++j) sum += double(grad_log_b_[j]);
    for (int64_t j = 0; j < p_.references; ++j) {
      const double share = double(grad_log_b_[j]) / double(marginal_.b[j]);
      grad_mass[j] = T((share - sum) / double(marginal_.total));
    }
  }

  const bool distributes_;
  SideGradient<Storage> of_keys_, of_queries_;
  typename SideGradient<Storage>::Pooled pooled_{};
  typename Similarity<Storage>::Results results_{};
  T* grad_log_b_ = nullptr;  // [references]
};

}  // namespace setformer::cpu::SETFORMER_ISA
