// What forward and backward of a head share: the solves of its two sides (the keys, and in cross
// attention the queries) and the numbers that the ranks of a group merge.
#pragma once

#include "transport.h"

namespace setformer::cpu::SETFORMER_ISA {

// The phase that a head runs next. Phase is an enum class of the phases in their order, from 0 to
// kDone. A phase may run several times, once for each step.
template <class Phase>
struct Progress {
  Phase phase{};
  int64_t step = 0;

  // times(phase) is how often a phase runs; 0 leaves it out.
  template <class Times>
  void advance(Times times) {
    if (++step < times(phase)) return;
    step = 0;
    do {
      phase = Phase(int(phase) + 1);
    } while (phase != Phase::kDone && times(phase) == 0);
  }
};

// The work on a head is cut into phases where sums over all its tokens are needed. If several ranks
// hold the tokens, these sums are merged between the phases.
template <class Storage, class ParamsOfCall>
class Head {
 public:
  using Params = ParamsOfCall;
  using T = Accumulate<Storage>;

  // Numbers of this head that all ranks must merge. They have one row; gather_shared (kernels.cpp)
  // joins the rows of several heads.
  struct Leavings {
    int count = 0;
    Shared numbers[2];
  };

  Head(const Params& p, int64_t b, int64_t h, bool backward)
      : p_(p),
        b_(b),
        h_(h),
        widths_(p),
        keys_(p, {p.tokens, p.key, p.mask, p.token_positions}, b, h, backward),
        queries_(p, {p.cross ? p.queries : 0, p.query, p.query_mask, p.query_positions}, b, h,
                 backward) {}

  int64_t spans() const { return larger(keys_.spans().count, queries_.spans().count); }
  const Leavings& leavings() const { return leavings_; }

  // After the first phase and merging: takes the masses of all ranks' tokens, rounded to T.
  Status take_masses() {
    keys_.set_total_mass(double(masses_[0]));
    queries_.set_total_mass(double(masses_[1]));
    return masses_[2] == T(0) ? Status::kOk : Status::kPeerFailed;
  }

 protected:
  void place(Arena& arena) {
    keys_.place(arena);
    if (p_.cross) queries_.place(arena);
    marginal_.b = arena.take<T>(widths_.references);
    marginal_.log2_b = arena.take<T>(widths_.references);
    masses_ = arena.take<T>(3);
  }

  int64_t index() const { return b_ * p_.heads + h_; }
  int64_t steps() const { return larger<int64_t>(p_.iterations, 1); }
  bool queried() const { return p_.cross && p_.distribute; }

  void leave(T* numbers, int64_t count, Merge how = Merge::kSum) {
    leavings_.numbers[leavings_.count++] = {numbers, 1, count, count, how};
  }

  // The first phase. All ranks need the total masses, and how many ranks have an error, before they
  // go on.
  Status prepare(const Team<T>& team) {
    Status status = load_marginal();
    if (status != Status::kOk) return status;
    status = prepare(keys_, p_.token_mass, p_.rows, p_.columns, steps() + 1, team);
    if (queried()) prepare(queries_, Tensor{}, p_.query_rows, p_.query_columns, steps(), team);
    masses_[0] = T(keys_.total_mass());
    masses_[1] = T(queries_.total_mass());
    masses_[2] = T(0);
    leave(masses_, 3);
    return status;
  }

  const Params& p_;
  const int64_t b_, h_;
  Widths<T> widths_;
  Transport<Storage> keys_, queries_;
  ReferenceMarginal<T> marginal_{};
  Leavings leavings_;

 private:
  Status prepare(Transport<Storage>& side, const Tensor& mass, const Tensor& rows,
                 const Tensor& columns, int64_t column_rows, const Team<T>& team) {
    return side.prepare(mass, marginal_,
                        at<T>(rows, 0) + index() * (p_.iterations + 1) * side.spans().tokens,
                        at<T>(columns, 0) + index() * column_rows * p_.references, team.workers[0]);
  }

  // The marginal b from the references' masses; uniform where none are given.
  Status load_marginal() {
    const T* mass = at<const T>(p_.reference_mass, b_, h_);
    double total = 0;
    fill(marginal_.b, widths_.references, T(0));
    for (int64_t j = 0; j < p_.references; ++j) {
      marginal_.b[j] = mass == nullptr ? T(1) : mass[j * p_.reference_mass.stride[2]];
      if (marginal_.b[j] <= T(0)) return Status::kNonPositiveReferenceMass;
      total += double(marginal_.b[j]);
    }
    marginal_.total = T(total);
    for (int64_t j = 0; j < p_.references; ++j) marginal_.b[j] = T(double(marginal_.b[j]) / total);
    for (int64_t j = 0; j < widths_.references; j += kLanes<T>) {
      store<T>(marginal_.log2_b + j, log2<T>(load(marginal_.b + j)));
    }
    // The fast log2 gives -inf below the smallest normal number of T, but large similarities can
    // make even such a b count.
    for (int64_t j = 0; j < p_.references; ++j) {
      if (marginal_.b[j] >= kSmallestNormal<T>) continue;
      const T given = mass == nullptr ? T(1) : mass[j * p_.reference_mass.stride[2]];
      marginal_.log2_b[j] = T(__builtin_log2(double(given)) - __builtin_log2(total));
    }
    return Status::kOk;
  }

  T* masses_ = nullptr;  // [3] of keys, of queries, and the ranks that failed
};

}  // namespace setformer::cpu::SETFORMER_ISA
