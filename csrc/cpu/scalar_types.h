// Storage types, their conversions, and rows in and out of strided tensors.
#pragma once

#include "simd.h"

namespace setformer::cpu::SETFORMER_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Float64 accumulates in itself, every other storage type in float32.
template <class Storage>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class Storage>
using Accumulate = typename AccumulateType<Storage>::type;

template <class To, class From>
SETFORMER_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

SETFORMER_INLINE float to_accumulate(float x) { return x; }
SETFORMER_INLINE double to_accumulate(double x) { return x; }
SETFORMER_INLINE float to_accumulate(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
SETFORMER_INLINE float to_accumulate(Float16 x) {
  // Moved into float's fields the exponent is 112 too low; the product mends subnormals as well.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x7c00u << 13 ? 0x7f800000u | magnitude : finite;
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000u) << 16);
}

// All round to nearest, ties to even.
SETFORMER_INLINE void to_storage(float x, float& y) { y = x; }
SETFORMER_INLINE void to_storage(double x, double& y) { y = x; }
SETFORMER_INLINE void to_storage(float x, BFloat16& y) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;  // adding could carry a NaN over to zero
  y.bits = uint16_t(x == x ? rounded : quiet_nan);
}
SETFORMER_INLINE void to_storage(float x, Float16& y) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Added to 0.5, whose last bit is worth 2^-24, the float unit does the rounding of subnormals.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t half = magnitude >= 0x477ff000u ? special : finite;  // 65520 rounds to infinity
  y.bits = uint16_t(half | ((bits >> 16) & 0x8000u));
}

template <class T>
void fill(T* x, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) x[i] = value;
}

// row[0 .. width) = `count` elements `stride` apart, then zeros. The loops of stride 1 vectorise.
template <class Storage, class T>
void load_row(const Storage* from, int64_t stride, int64_t count, T* row, int64_t width) {
  if (stride == 1) {
    for (int64_t c = 0; c < count; ++c) row[c] = to_accumulate(from[c]);
  } else {
    for (int64_t c = 0; c < count; ++c) row[c] = to_accumulate(from[c * stride]);
  }
  fill(row + count, width - count, T(0));
}

template <class Storage, class T>
void store_row(const T* row, int64_t count, Storage* to, int64_t stride) {
  if (stride == 1) {
    for (int64_t c = 0; c < count; ++c) to_storage(row[c], to[c]);
  } else {
    for (int64_t c = 0; c < count; ++c) to_storage(row[c], to[c * stride]);
  }
}

}  // namespace setformer::cpu::SETFORMER_ISA
