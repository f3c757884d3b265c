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
template <class StorageOfCall, class ParamsOfCall>
class Head {
 public:
  using Storage = StorageOfCall;
  using Params = ParamsOfCall;
  using T = Accumulate<Storage>;

  // Numbers of this head that all ranks must merge. They have one row; gather_shared (kernels.cpp)
  // joins the rows of several heads.
  struct Leavings {
    int count = 0;
    Shared numbers[2];
  };

  // `shared` references are prepared already; without them the head prepares its own.
  Head(const Params& p, int64_t b, int64_t h, const References<Storage>* shared, bool backward)
      : p_(p),
        b_(b),
        h_(h),
        widths_(p),
        has_own_(shared == nullptr),
        references_(has_own_ ? own_ : *shared),
        keys_(p, {p.tokens, p.key, p.mask, p.token_positions}, b, h, references_, backward),
        queries_(p, {p.cross ? p.queries : 0, p.query, p.query_mask, p.query_positions}, b, h,
                 references_, backward) {}
  // Its sides refer to it.
  Head(const Head&) = delete;
  Head& operator=(const Head&) = delete;

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
    if (has_own_) own_.place(arena, p_);
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
    Status status = has_own_ ? own_.prepare(p_, b_, h_) : Status::kOk;
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
  const bool has_own_;
  References<Storage> own_;
  const References<Storage>& references_;
  Transport<Storage> keys_, queries_;
  Leavings leavings_;

 private:
  Status prepare(Transport<Storage>& side, const Tensor& mass, const Tensor& rows,
                 const Tensor& columns, int64_t column_rows, const Team<T>& team) {
    return side.prepare(mass, at<T>(rows, 0) + index() * (p_.iterations + 1) * side.spans().tokens,
                        at<T>(columns, 0) + index() * column_rows * p_.references, team.workers[0]);
  }

  T* masses_ = nullptr;  // [3] of keys, of queries, and the ranks that failed
};

}  // namespace setformer::cpu::SETFORMER_ISA
