// Prefetches memory.
#pragma once

#include "simd.h"

namespace setformer::cpu::SETFORMER_ISA {

// Rows of a tensor that are needed after the current arithmetic. They are prefetched a few at a
// time during that arithmetic, because a core can keep only some tens of requests open and waits if
// there are more. Nothing is read: rows may lie outside the array, so addresses are computed as
// integers.
class Upcoming {
 public:
  Upcoming() = default;
  // `count` rows from `first` on, of `elements` elements each, `stride` apart.
  template <class Element>
  Upcoming(const Element* rows, int64_t first, int64_t count, int64_t stride, int64_t elements)
      : next_(reinterpret_cast<uintptr_t>(rows) +
              uintptr_t(first) * uintptr_t(stride) * sizeof(Element)),
        stride_(uintptr_t(stride) * sizeof(Element)),
        bytes_(elements * int64_t{sizeof(Element)}),
        rows_(count) {}

  int64_t rows() const { return rows_; }
  SETFORMER_INLINE void ask_for(int64_t rows) {
    for (; rows > 0 && rows_ > 0; --rows, --rows_, next_ += stride_) {
      for (int64_t byte = 0; byte < bytes_; byte += kCacheLine) {
        __builtin_prefetch(reinterpret_cast<const void*>(next_ + uintptr_t(byte)));
      }
    }
  }

 private:
  static constexpr int64_t kCacheLine = 64;
  uintptr_t next_ = 0, stride_ = 0;
  int64_t bytes_ = 0, rows_ = 0;
};

}  // namespace setformer::cpu::SETFORMER_ISA
