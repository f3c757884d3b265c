// Storage types, their conversions, and rows in and out of strided tensors.
#pragma once

#include <type_traits>

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
using Accumulate = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

template <class To, class From>
SETFORMER_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// The formulas below serve scalars (Float = float, Bits = uint32_t) and vectors of them alike.

template <class Float, class Bits>
SETFORMER_INLINE Float from_bfloat16(Bits x) {
  return bit_cast<Float>(x << 16);
}

template <class Float, class Bits>
SETFORMER_INLINE Float from_float16(Bits x) {
  // In float's fields the exponent is 112 too low; the product corrects it, for subnormals too.
  const Bits magnitude = (x & 0x7fffu) << 13;
  const Bits finite = bit_cast<Bits>(bit_cast<Float>(magnitude) * 0x1p112f);
  const Bits bits = magnitude >= (0x7c00u << 13) ? (magnitude | 0x7f800000u) : finite;
  return bit_cast<Float>(bits | (x & 0x8000u) << 16);
}

// Both round to nearest, ties to even.
template <class Float, class Bits>
SETFORMER_INLINE Bits to_bfloat16(Float x) {
  const Bits bits = bit_cast<Bits>(x);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet_nan = (bits >> 16) | 0x40u;  // rounding could carry a NaN over to zero
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
}

template <class Float, class Bits>
SETFORMER_INLINE Bits to_float16(Float x) {
  const Bits bits = bit_cast<Bits>(x);
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // The last bit of 0.5 is worth 2^-24, so adding 0.5 rounds as float16's subnormals need it.
  const Bits subnormal = bit_cast<Bits>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits infinity = (magnitude & 0u) + 0x7c00u;
  const Bits special = magnitude > 0x7f800000u ? infinity + 0x200u : infinity;
  const Bits finite = magnitude < 0x38800000u ? subnormal : normal;
  const Bits half = magnitude >= 0x477ff000u ? special : finite;  // 65520 rounds to infinity
  return half | ((bits >> 16) & 0x8000u);
}

SETFORMER_INLINE float to_accumulate(float x) { return x; }
SETFORMER_INLINE double to_accumulate(double x) { return x; }
SETFORMER_INLINE float to_accumulate(BFloat16 x) { return from_bfloat16<float>(uint32_t{x.bits}); }
SETFORMER_INLINE float to_accumulate(Float16 x) { return from_float16<float>(uint32_t{x.bits}); }

SETFORMER_INLINE void to_storage(float x, float* y) { *y = x; }
SETFORMER_INLINE void to_storage(double x, double* y) { *y = x; }
SETFORMER_INLINE void to_storage(float x, BFloat16* y) {
  y->bits = uint16_t(to_bfloat16<float, uint32_t>(x));
}
SETFORMER_INLINE void to_storage(float x, Float16* y) {
  y->bits = uint16_t(to_float16<float, uint32_t>(x));
}

typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

SETFORMER_INLINE Bits32 load_bits(const void* p) {
  return __builtin_convertvector(*static_cast<const Bits16*>(p), Bits32);
}
SETFORMER_INLINE void store_bits(void* p, Bits32 bits) {
  *static_cast<Bits16*>(p) = __builtin_convertvector(bits, Bits16);
}

// A whole vector of storage elements, converted.
SETFORMER_INLINE Vector<float> load_vector(const float* p) { return load(p); }
SETFORMER_INLINE Vector<double> load_vector(const double* p) { return load(p); }
SETFORMER_INLINE Vector<float> load_vector(const BFloat16* p) {
  return from_bfloat16<Vector<float>>(load_bits(p));
}
SETFORMER_INLINE Vector<float> load_vector(const Float16* p) {
  return from_float16<Vector<float>>(load_bits(p));
}
SETFORMER_INLINE void store_vector(Vector<float> x, float* p) { store(p, x); }
SETFORMER_INLINE void store_vector(Vector<double> x, double* p) { store(p, x); }
SETFORMER_INLINE void store_vector(Vector<float> x, BFloat16* p) {
  store_bits(p, to_bfloat16<Vector<float>, Bits32>(x));
}
SETFORMER_INLINE void store_vector(Vector<float> x, Float16* p) {
  store_bits(p, to_float16<Vector<float>, Bits32>(x));
}

template <class T>
void fill(T* x, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) x[i] = value;
}

// Less than a vector: `count` elements `stride` apart, then zeros.
template <class T, class Storage>
SETFORMER_INLINE Vector<T> load_some(const Storage* from, int64_t stride, int64_t count) {
  T elements[kLanes<T>] = {};
  for (int64_t c = 0; c < smaller<int64_t>(count, kLanes<T>); ++c) {
    elements[c] = to_accumulate(from[c * stride]);
  }
  return load(elements);
}
template <class T, class Storage>
SETFORMER_INLINE void store_some(Vector<T> x, int64_t count, Storage* to, int64_t stride) {
  T elements[kLanes<T>];
  store<T>(elements, x);
  for (int64_t c = 0; c < smaller<int64_t>(count, kLanes<T>); ++c) {
    to_storage(elements[c], to + c * stride);
  }
}

// row[0 .. width) = `count` elements `stride` apart, then zeros; each(x, c) maps the vector at c.
template <class Storage, class T, class Each>
SETFORMER_INLINE void load_row(const Storage* from, int64_t stride, int64_t count, T* row,
                               int64_t width, Each each) {
  int64_t c = 0;
  if (stride == 1) {
    for (; c + kLanes<T> <= count; c += kLanes<T>)
      store<T>(row + c, each(load_vector(from + c), c));
  }
  for (; c < width; c += kLanes<T>) {
    store<T>(row + c, each(load_some<T>(from + c * stride, stride, count - c), c));
  }
}
template <class Storage, class T>
SETFORMER_INLINE void load_row(const Storage* from, int64_t stride, int64_t count, T* row,
                               int64_t width) {
  load_row(from, stride, count, row, width,
           [](Vector<T> x, int64_t) SETFORMER_LAMBDA { return x; });
}

template <class Storage, class T, class Each>
SETFORMER_INLINE void store_row(const T* row, int64_t count, Storage* to, int64_t stride,
                                Each each) {
  int64_t c = 0;
  if (stride == 1) {
    for (; c + kLanes<T> <= count; c += kLanes<T>) store_vector(each(load(row + c)), to + c);
  }
  for (; c < count; c += kLanes<T>) {
    store_some<T>(each(load(row + c)), count - c, to + c * stride, stride);
  }
}
template <class Storage, class T>
SETFORMER_INLINE void store_row(const T* row, int64_t count, Storage* to, int64_t stride) {
  store_row(row, count, to, stride, [](Vector<T> x) SETFORMER_LAMBDA { return x; });
}

}  // namespace setformer::cpu::SETFORMER_ISA
