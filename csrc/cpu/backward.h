// Backward of one head: how the two sides' gradients fit together (equations in side_gradient.h).
#pragma once

#include "side_gradient.h"

namespace setformer::cpu::SETFORMER_ISA {

template <class Storage>
class BackwardHead : public Head<Storage, BackwardParams> {
  using Base = Head<Storage, BackwardParams>;
  using Base::index, Base::steps, Base::leave;
  using Base::p_, Base::b_, Base::h_, Base::widths_, Base::keys_, Base::queries_, Base::references_;

 public:
  using typename Base::T;

  BackwardHead(const BackwardParams& p, int64_t b, int64_t h,
               const References<Storage>* shared = nullptr)
      : Base(p, b, h, shared, true),
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

  bool done() const { return progress_.phase == Phase::kDone; }

  // The next phase.
  Status run(const Team<T>& team) {
    this->leavings_ = {};
    const auto [phase, step] = progress_;
    progress_.advance([this](Phase phase) { return times(phase); });
    if (phase == Phase::kPrepare) return Base::prepare(team);
    if (phase == Phase::kBegin) {
      begin(team);
    } else if (!keys_.empty()) {
      run(phase, step, team);
    }
    if (done()) store_reference_mass_gradient();
    return Status::kOk;
  }

 private:
  // Begin has a pass over the tokens in the log domain; distribute is backward through R. The steps
  // of a side go from the last to the first; its last phase is a pass for ds and the gradients of
  // tokens and references.
  enum class Phase {
    kPrepare,
    kBegin,
    kDistribute,
    kStepsOfKeys,
    kFinishKeys,
    kStepsOfQueries,
    kFinishQueries,
    kDone,
  };
  int64_t times(Phase phase) const {
    if (phase == Phase::kStepsOfKeys) return steps();
    if (phase == Phase::kStepsOfQueries) return p_.cross ? steps() : 0;
    return phase == Phase::kFinishQueries ? int64_t(p_.cross) : 1;
  }

  void run(Phase phase, int64_t step, const Team<T>& team) {
    if (phase == Phase::kDistribute) {
      distribute(team);
    } else if (phase == Phase::kStepsOfKeys) {
      if (step == 0) finish_pooled();
      run_step(of_keys_, step, team);
    } else if (phase == Phase::kFinishKeys) {
      finish_keys(team);
    } else if (!distributed()) {
      clear_queries();
    } else if (phase == Phase::kStepsOfQueries) {
      run_step(of_queries_, step, team);
    } else {
      of_queries_.finish(team, results_, true);
    }
  }

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
      pooled_.eta[j] = dot(pooled_.values + j * depth, pooled_.gradient + j * depth, depth);
    }
  }

  void finish_keys(const Team<T>& team) {
    of_keys_.finish(team, results_, false);
    if (T* grad = at<T>(p_.grad_token_mass, b_, h_)) of_keys_.store_mass_gradient(grad);
  }
  // Step 0..S - 1, S = max(T, 1), goes through t = T..1, or t = 0 if T = 0.
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
    if (T* grad = at<T>(p_.grad_token_mass, b_, h_)) fill(grad, p_.tokens, T(0));
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
      const double share = double(grad_log_b_[j]) / double(references_.b[j]);
      grad_mass[j] = T((share - sum) / double(references_.total_mass));
    }
  }

  Progress<Phase> progress_;
  const bool distributes_;
  SideGradient<Storage> of_keys_, of_queries_;
  typename SideGradient<Storage>::Pooled pooled_{};
  typename Similarity<Storage>::Results results_{};
  T* grad_log_b_ = nullptr;  // [references]
};

}  // namespace setformer::cpu::SETFORMER_ISA
