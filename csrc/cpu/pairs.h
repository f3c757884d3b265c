// Products in bfloat16: pairs of factors that are neighbours along the depth, two multiply-adds in
// one instruction where the processor has AVX512_BF16. Products are exact, sums are of float32;
// subnormal factors count as 0.
#pragma once

#include "scalar_types.h"
#include "tile_ops.h"

namespace setformer::cpu::SETFORMER_ISA {

// Two numbers of bfloat16, the first one in the lower half.
using Pair = uint32_t;

template <>
struct Simd<Pair> {
  typedef Pair Vector __attribute__((vector_size(kVectorBytes)));
  typedef Pair Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  static constexpr int kLanes = kVectorBytes / 4;
};

// Whether products with rows of this type are computed in pairs.
#if defined(__AVX512BF16__)
template <class Storage>
inline constexpr bool kInPairs = std::is_same_v<Storage, BFloat16>;
#else
template <class Storage>
inline constexpr bool kInPairs = false;
#endif

constexpr int64_t pairs_of(int64_t depth) { return (depth + 1) / 2; }

// sum += a b
SETFORMER_INLINE void add_product(Vector<float>& sum, Vector<float> a, Vector<float> b) {
  sum += a * b;
}
SETFORMER_INLINE void add_product(Vector<double>& sum, Vector<double> a, Vector<double> b) {
  sum += a * b;
}
SETFORMER_INLINE void add_product(Vector<float>& sum, Vector<Pair> a, Vector<Pair> b) {
#if defined(__AVX512BF16__)
  sum = _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b));
#else
  sum += from_bfloat16<Vector<float>>(a) * from_bfloat16<Vector<float>>(b);
  sum += from_bfloat16<Vector<float>>(a >> 16) * from_bfloat16<Vector<float>>(b >> 16);
#endif
}

// A vector of a row's bits, `stride` apart; zeros after `count` elements.
SETFORMER_INLINE Bits32 bits_of_row(const BFloat16* row, int64_t stride, int64_t count) {
  if (stride == 1 && count >= kLanes<Pair>) return load_bits(row);
  Pair elements[kLanes<Pair>] = {};
  for (int64_t i = 0; i < smaller<int64_t>(kLanes<Pair>, count); ++i) {
    elements[i] = row[i * stride].bits;
  }
  return load(elements);
}
SETFORMER_INLINE void store_pairs(Vector<Pair> pairs, Pair* to) { store<Pair>(to, pairs); }

// The pairs (first, second) of each lane, rounded.
SETFORMER_INLINE Vector<Pair> pairs_across(Vector<float> first, Vector<float> second) {
#if defined(__AVX512BF16__)
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  return (Vector<Pair>)_mm512_permutexvar_epi16(order, both);
#else
  return to_bfloat16<Vector<float>, Bits32>(first) | to_bfloat16<Vector<float>, Bits32>(second)
                                                         << 16;
#endif
}

// x as products in pairs take it.
SETFORMER_INLINE Vector<float> rounded_to_bfloat16(Vector<float> x) {
#if defined(__AVX512BF16__)
  const auto halves = (Bits16)_mm512_cvtneps_pbh(x);
  return from_bfloat16<Vector<float>>(__builtin_convertvector(halves, Bits32));
#else
  return from_bfloat16<Vector<float>>(to_bfloat16<Vector<float>, Bits32>(x));
#endif
}
// In place; `count` is a multiple of the lanes.
inline void round_to_bfloat16(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    store<float>(x + i, rounded_to_bfloat16(load(x + i)));
  }
}
SETFORMER_INLINE Vector<double> rounded_to_bfloat16(Vector<double> x) { return x; }  // no pairs

// multiply_vector (tile_ops.h) with a matrix as products in pairs take it.
template <class T>
void multiply_rounded_vector(const T* matrix, int64_t count, int64_t columns, const T* weights,
                             T* products) {
  row_sums(matrix, count, columns, weights, products,
           [](Vector<T> x, Vector<T> weight)
               SETFORMER_LAMBDA { return rounded_to_bfloat16(x) * weight; });
}

// Stores the pairs of neighbours in a row of `width` numbers, a multiple of the lanes.
SETFORMER_INLINE void store_pairs_along(const float* row, int64_t width, Pair* to) {
  int64_t c = 0;
#if defined(__AVX512BF16__)
  for (; c + 2 * kLanes<float> <= width; c += 2 * kLanes<float>) {
    const __m512bh both = _mm512_cvtne2ps_pbh(load(row + c + kLanes<float>), load(row + c));
    store<Pair>(to + c / 2, (Vector<Pair>)both);
  }
#endif
  for (; c < width; c += kLanes<float>) {
    store_bits(to + c / 2, to_bfloat16<Vector<float>, Bits32>(load(row + c)));
  }
}

// Rows [count, width] of whole vectors as pairs [pairs_of(count), width] of a row and the next one;
// factor(i) is what row i is multiplied by.
template <class Factor>
SETFORMER_INLINE void store_pairs_across(const float* rows, int64_t count, int64_t width, Pair* to,
                                         Factor factor) {
  for (int64_t i = 0; i < count; i += 2, to += width) {
    const float *first = rows + i * width, *second = i + 1 < count ? first + width : first;
    const Vector<float> of_first = splat(factor(i));
    const Vector<float> of_second = splat(i + 1 < count ? factor(i + 1) : 0.0f);
    for (int64_t j = 0; j < width; j += kLanes<float>) {
      store<Pair>(to + j, pairs_across(load(first + j) * of_first, load(second + j) * of_second));
    }
  }
}

inline constexpr auto as_it_is = [](int64_t) { return 1.0f; };
inline void store_pairs_across(const float* rows, int64_t count, int64_t width, Pair* to) {
  store_pairs_across(rows, count, width, to, as_it_is);
}

// Rows of pairs, `width` each: a multiple of the lanes.
struct PairRows {
  const Pair* first;
  int64_t stride, width;
};

// Inner products of `count` rows with those of the same index; whole vectors are stored.
inline void inner_products(const PairRows& a, const PairRows& b, int64_t count, float* products) {
  constexpr int lanes = kLanes<float>;
  for (int64_t i = 0; i < count; i += lanes) {
    Vector<float> sums[lanes] = {};
    for (int row = 0; row < lanes && i + row < count; ++row) {
      const Pair *x = a.first + (i + row) * a.stride, *y = b.first + (i + row) * b.stride;
      for (int64_t c = 0; c < a.width; c += lanes) {
        add_product(sums[row], load<Pair>(x + c), load<Pair>(y + c));
      }
    }
    store<float>(products + i, sums_of<float>(sums));
  }
}

}  // namespace setformer::cpu::SETFORMER_ISA
