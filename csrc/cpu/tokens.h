// Tokens of the caller's tensors, and rows of them in whole vectors.
#pragma once

#include "../set_attention.h"
#include "pairs.h"
#include "prefetch.h"
#include "tile_ops.h"

namespace setformer::cpu::SETFORMER_ISA {

// The tensor's elements from [i, j, 0, 0] on; null where the tensor is absent.
template <class Element>
SETFORMER_INLINE Element* at(const Tensor& tensor, int64_t i, int64_t j = 0) {
  if (tensor.data == nullptr) return nullptr;
  return static_cast<Element*>(tensor.data) + i * tensor.stride[0] + j * tensor.stride[1];
}

// Row widths in whole vectors.
template <class T>
struct Widths {
  int64_t references, depth, value_depth;

  explicit Widths(const ForwardParams& p)
      : references(round_up(p.references, kLanes<T>)),
        depth(round_up(p.depth, kLanes<T>)),
        value_depth(round_up(p.value_depth, kLanes<T>)) {}
};

// The tokens of one side: the keys, or the queries of cross attention.
struct Tokens {
  int64_t count = 0;
  Tensor rows;       // storage [B, H, count, D]
  Tensor mask;       // bool [B, count], optional
  Tensor positions;  // accumulate [count, P], optional
};

// The valid tokens of one batch item.
class Validity {
 public:
  Validity() = default;
  Validity(const Tensor& mask, int64_t b)
      : mask_(at<const bool>(mask, b)), stride_(mask.stride[1]) {}
  bool operator[](int64_t i) const { return mask_ == nullptr || mask_[i * stride_]; }

 private:
  const bool* mask_ = nullptr;
  int64_t stride_ = 0;
};

// The rows of a head's tokens in a tensor [B, H, tokens, depth].
template <class Storage>
class TokenRows {
  using T = Accumulate<Storage>;

 public:
  TokenRows(const Tensor& tensor, int64_t b, int64_t h, int64_t depth)
      : first_(at<Storage>(tensor, b, h)),
        token_stride_(tensor.stride[2]),
        stride_(tensor.stride[3]),
        depth_(depth) {}

  // Copies tokens [begin, begin + count) into rows of whole vectors; invalid tokens and the padding
  // become 0, whatever they hold. `each` (x, i, c) maps the vector at channel c of row i.
  template <class Each>
  void load(int64_t begin, int64_t count, const Validity& valid, T* rows, Each each) const {
    const int64_t width = round_up(depth_, kLanes<T>);
    const Storage* from = first_ + begin * token_stride_;
    for (int64_t i = 0; i < count; ++i, from += token_stride_, rows += width) {
      const int64_t depth = valid[begin + i] ? depth_ : 0;
      load_row(from, stride_, depth, rows, width,
               [&](Vector<T> x, int64_t c) SETFORMER_LAMBDA { return each(x, i, c); });
    }
  }
  void load(int64_t begin, int64_t count, const Validity& valid, T* rows) const {
    load(begin, count, valid, rows,
         [](Vector<T> x, int64_t, int64_t) SETFORMER_LAMBDA { return x; });
  }
  // Times a factor for each row.
  void load_scaled(int64_t begin, int64_t count, const Validity& valid, const T* factors,
                   T* rows) const {
    load(begin, count, valid, rows, [factors](Vector<T> x, int64_t i, int64_t) SETFORMER_LAMBDA {
      return x * splat(factors[i]);
    });
  }
  // Pairs of neighbours in each row, `width` of them: a multiple of the lanes, with zeros beyond
  // the depth and for invalid tokens. They are where the caller has them if these lie so already,
  // else in `room`.
  static int64_t pair_width(int64_t depth) { return round_up(depth, 2 * kLanes<Pair>) / 2; }
  PairRows pairs_along(int64_t begin, int64_t count, const Validity& valid, Pair* room) const {
    const int64_t width = pair_width(depth_);
    const Storage* from = first_ + begin * token_stride_;
    bool lie_so = stride_ == 1 && depth_ == 2 * width && token_stride_ % 2 == 0 &&
                  reinterpret_cast<uintptr_t>(from) % sizeof(Pair) == 0;
    for (int64_t i = 0; i < count; ++i) lie_so = lie_so && valid[begin + i];
    if (lie_so) return {reinterpret_cast<const Pair*>(from), token_stride_ / 2, width};
    for (int64_t i = 0; i < count; ++i, from += token_stride_) {
      for (int64_t c = 0; c < width; c += kLanes<Pair> / 2) {
        store_bits(room + i * width + c, valid[begin + i] ? bits_of(from, 2 * c) : Bits32{});
      }
    }
    return {room, width, width};
  }
  // Pairs of rows that are neighbours: [pairs_of(count)] rows of whole vectors.
  void load_pairs_across(int64_t begin, int64_t count, const Validity& valid, Pair* rows) const {
    const int64_t width = round_up(depth_, kLanes<Pair>);
    const Storage* from = first_ + begin * token_stride_;
    for (int64_t i = 0; i < count; i += 2, from += 2 * token_stride_, rows += width) {
      const bool has_first = valid[begin + i];
      const bool has_second = i + 1 < count && valid[begin + i + 1];
      for (int64_t c = 0; c < width; c += kLanes<Pair>) {
        const Bits32 first = has_first ? bits_of(from, c) : Bits32{};
        const Bits32 second = has_second ? bits_of(from + token_stride_, c) : Bits32{};
        store_pairs(first | second << 16, rows + c);
      }
    }
  }
  void store(int64_t begin, int64_t count, const T* rows) const {
    Storage* to = first_ + begin * token_stride_;
    for (int64_t i = 0; i < count; ++i, to += token_stride_) {
      store_row(rows + i * round_up(depth_, kLanes<T>), depth_, to, stride_);
    }
  }
  // Times a factor for each row; invalid tokens become 0.
  void store_scaled(int64_t begin, int64_t count, const Validity& valid, const T* factors,
                    const T* rows) const {
    Storage* to = first_ + begin * token_stride_;
    const int64_t width = round_up(depth_, kLanes<T>);
    for (int64_t i = 0; i < count; ++i, to += token_stride_, rows += width) {
      const bool keep = valid[begin + i];
      const Vector<T> factor = splat(factors[i]);
      store_row(rows, depth_, to, stride_,
                [=](Vector<T> x) SETFORMER_LAMBDA { return keep ? x * factor : Vector<T>{}; });
    }
  }
  void clear(int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < depth_; ++c) {
        to_storage(T(0), first_ + i * token_stride_ + c * stride_);
      }
    }
  }
  // The tile after the one that begins at `begin`.
  Upcoming next_tile(int64_t begin) const {
    if (stride_ != 1) return {};
    return {first_, begin + kTileTokens, kTileTokens, token_stride_, depth_};
  }

 private:
  // A vector of a row's elements from channel c on; zeros beyond the depth.
  SETFORMER_INLINE Bits32 bits_of(const Storage* row, int64_t c) const {
    return bits_of_row(row + c * stride_, stride_, depth_ - c);
  }

  Storage* first_;
  int64_t token_stride_, stride_, depth_;
};

}  // namespace setformer::cpu::SETFORMER_ISA
