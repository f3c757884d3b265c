// Vectors of the instruction set this file is compiled for, through the vector extensions of GCC
// and Clang: the same source serves SSE2, AVX2, AVX-512 and NEON.
//
// Everything here lives in a namespace named after the instruction set, and nothing here may
// instantiate a non-inlined template of the standard library: the linker would merge it with the
// copy of another instruction set and run illegal instructions on an older processor.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef SETFORMER_ISA
#define SETFORMER_ISA baseline
#endif

#define SETFORMER_INLINE inline __attribute__((always_inline))
#define SETFORMER_LAMBDA __attribute__((always_inline))

namespace setformer::cpu::SETFORMER_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kVectorRegisters = 32;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorRegisters = 16;
#endif

// Of each type: its vectors, its fields, and the minimax polynomial of 2^r on [-1/2, 1/2], highest
// power first (relative error 2.6e-9 and 1.8e-17).
template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  using Integer = int32_t;
  static constexpr int kLanes = kVectorBytes / 4;
  static constexpr int kMantissaBits = 23;
  static constexpr Integer kExponentBias = 127;
  static constexpr float kExp2[] = {1.559467816132662e-4f,
                                    1.3406643902351759e-3f,
                                    9.617692972993062e-3f,
                                    5.550310551013797e-2f,
                                    2.4022652782887738e-1f,
                                    6.931472149680279e-1f,
                                    1.0f};
};

template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
  using Integer = int64_t;
  static constexpr int kLanes = kVectorBytes / 8;
  static constexpr int kMantissaBits = 52;
  static constexpr Integer kExponentBias = 1023;
  static constexpr double kExp2[] = {
      4.078071929588337e-10,  7.072570412814423e-09,  1.0180647659234139e-07,
      1.3215442675329823e-06, 1.5252727385193868e-05, 1.540353044157213e-04,
      1.3333558153439966e-03, 9.618129107607003e-03,  5.550410866479039e-02,
      2.4022650695910097e-01, 6.931471805599457e-01,  1.0};
};

template <class T>
using Vector = typename Simd<T>::Vector;
template <class T>
inline constexpr int kLanes = Simd<T>::kLanes;

template <class T>
SETFORMER_INLINE Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
SETFORMER_INLINE void store(T* p, Vector<T> x) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = x;
}

template <class T>
SETFORMER_INLINE Vector<T> splat(T x) {
  return x -
         Vector<T>{};  // x - 0 is x for every x, -0 and NaN included: a broadcast, no arithmetic
}

// min(x, bound) and max(x, bound) that keep a NaN in x. Written with the operands in this order
// they are one instruction of SSE and AVX; of AVX-512 compilers make a comparison and a choice.
// (The mask selects all lanes: GCC warns of the functions without one.)
template <class T>
SETFORMER_INLINE Vector<T> at_most(Vector<T> x, Vector<T> bound) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_min_ps(__mmask16(-1), bound, x);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_min_pd(__mmask8(-1), bound, x);
#endif
  return bound < x ? bound : x;
}
template <class T>
SETFORMER_INLINE Vector<T> at_least(Vector<T> x, Vector<T> bound) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_max_ps(__mmask16(-1), bound, x);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_max_pd(__mmask8(-1), bound, x);
#endif
  return bound > x ? bound : x;
}

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
template <class N>
constexpr N smaller(N a, N b) {
  return b < a ? b : a;
}
template <class N>
constexpr N larger(N a, N b) {
  return a < b ? b : a;
}

// The functions below work on several vectors at once: one operation on all of them, then the next
// operation. Operations on one vector wait for each other, and a processor that looks ahead only
// some tens of operations would not find enough others to do meanwhile.
inline constexpr int kPack = kVectorRegisters == 32 ? 8 : 4;
// For each index i of the Count vectors, unrolled.
#define SETFORMER_EACH _Pragma("GCC unroll 8") for (int i = 0; i < Count; ++i)

// x = 2^x for x within the exponents of normal numbers. Adding 1.5 * 2^mantissa_bits plus the
// exponent's bias rounds x to the nearest integer n and leaves n + bias in the low bits, to be
// shifted into the exponent field of 2^n.
template <class T, int Count>
SETFORMER_INLINE void exp2_in_range(Vector<T> (&x)[Count]) {
  using S = Simd<T>;
  constexpr auto& coefficients = S::kExp2;
  constexpr T magic = T(3) * T(int64_t{1} << (S::kMantissaBits - 1)) + T(S::kExponentBias);
  Vector<T> shifted[Count], sum[Count];
  SETFORMER_EACH shifted[i] = x[i] + magic;
  SETFORMER_EACH x[i] -= shifted[i] - magic;
  SETFORMER_EACH sum[i] = coefficients[0] * x[i] + coefficients[1];
#pragma GCC unroll 16
  for (int power = 2; power < int(sizeof(coefficients) / sizeof(T)); ++power) {
    SETFORMER_EACH sum[i] = sum[i] * x[i] + coefficients[power];
  }
  SETFORMER_EACH {
    const auto scale = reinterpret_cast<typename S::Bits>(shifted[i]) << S::kMantissaBits;
    x[i] = sum[i] * reinterpret_cast<Vector<T>>(scale);
  }
}

// x = 2^x for x below the largest exponent and for NaN; exactly 0 below the smallest normal number,
// -inf included.
template <class T, int Count>
SETFORMER_INLINE void exp2_bounded(Vector<T> (&x)[Count]) {
  SETFORMER_EACH x[i] = at_least<T>(x[i], splat<T>(-T(Simd<T>::kExponentBias)));
  exp2_in_range<T>(x);
}
template <class T>
SETFORMER_INLINE Vector<T> exp2_bounded(Vector<T> x) {
  Vector<T> result[] = {x};
  exp2_bounded<T>(result);
  return result[0];
}

template <class T>
constexpr T kSmallestNormal = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);

// log2 x for x >= 0; -inf at 0 and below the smallest normal number; keeps inf and NaN. With
// m in [sqrt(1/2), sqrt(2)) and z = (m - 1) / (m + 1): log m = 2 (z + z^3/3 + z^5/5 + ...).
template <class T>
SETFORMER_INLINE Vector<T> log2(Vector<T> x) {
  using S = Simd<T>;
  using Bits = typename S::Bits;
  constexpr bool is_float = sizeof(T) == 4;
  constexpr T two_over_log2 = T(2.8853900817779268147);
  const auto bits = reinterpret_cast<Bits>(x);
  const typename S::Integer sqrt_half = is_float ? 0x3f3504f3 : 0x3fe6a09e667f3bcd;
  const Bits exponent = (bits - sqrt_half) >> S::kMantissaBits;
  const auto m = reinterpret_cast<Vector<T>>(bits - (exponent << S::kMantissaBits));
  const Vector<T> z = (m - T(1)) / (m + T(1));
  const Vector<T> z2 = z * z;
  constexpr int last = is_float ? 9 : 21;
  Vector<T> p = splat<T>(two_over_log2 / last);
#pragma GCC unroll 16
  for (int k = last - 2; k >= 1; k -= 2) p = p * z2 + two_over_log2 / T(k);
  const Vector<T> result = p * z + __builtin_convertvector(exponent, Vector<T>);
  const Vector<T> smallest_normal = splat<T>(kSmallestNormal<T>);
  const Vector<T> infinity = splat<T>(T(__builtin_inf()));
  return x < smallest_normal ? -infinity : (x < infinity ? result : x);
}

// One level of the tree of sums_of: each lane of a and b is already the sum of `Size` lanes, and
// each lane of the result is the sum of two of theirs. With the lanes of a and b numbered one after
// the other, result lane `lane` adds lane first_of_pair(lane) and the lane kPairDistance after it.
// Processors have shuffles for these pairs: interleaved halves within 16 bytes, whole blocks of 16
// bytes beyond.
template <class T>
inline constexpr int kBlockLanes = 16 / sizeof(T);
template <class T, int Size>
inline constexpr int kPairDistance = Size < kBlockLanes<T> ? kBlockLanes<T> / 2 : kBlockLanes<T>;
template <class T, int Size>
constexpr int first_of_pair(int lane) {
  constexpr int lanes = kLanes<T>, block_lanes = kBlockLanes<T>;
  const int block = lane / block_lanes, rest = lane % block_lanes;
  if (Size >= block_lanes) return 2 * block * block_lanes + rest;
  const int piece = rest / Size;
  return (piece % 2) * lanes + block * block_lanes + piece / 2 * Size + rest % Size;
}

template <class T, int Size, int... I>
SETFORMER_INLINE Vector<T> pair_sums(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
  constexpr int distance = kPairDistance<T, Size>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, first_of_pair<T, Size>(I)...) +
         __builtin_shufflevector(a, b, (first_of_pair<T, Size>(I) + distance)...);
#else
  using Bits = typename Simd<T>::Bits;
  return __builtin_shuffle(a, b, Bits{first_of_pair<T, Size>(I)...}) +
         __builtin_shuffle(a, b, Bits{(first_of_pair<T, Size>(I) + distance)...});
#endif
}
template <class T, int Size>
SETFORMER_INLINE Vector<T> pair_sums(Vector<T> a, Vector<T> b) {
  return pair_sums<T, Size>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// Lane i is the sum of all lanes of vector x[i], i < kLanes. The tree is fixed: the order of the
// additions never changes.
template <class T, int Size = 1>
SETFORMER_INLINE Vector<T> sums_of(const Vector<T>* x) {
  if constexpr (Size == kLanes<T>) {
    return x[0];
  } else {
    constexpr int count = kLanes<T> / Size / 2;
    Vector<T> half[count];
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) half[i] = pair_sums<T, Size>(x[2 * i], x[2 * i + 1]);
    return sums_of<T, 2 * Size>(half);
  }
}

template <class T, int Size = 1>
SETFORMER_INLINE T sum_of(Vector<T> x) {
  if constexpr (Size == kLanes<T>) {
    return x[0];
  } else {
    return sum_of<T, 2 * Size>(pair_sums<T, Size>(x, x));
  }
}

// The largest lane; NaN if any lane is NaN.
template <class T>
SETFORMER_INLINE T max_of(Vector<T> x) {
  T result = x[0];
  for (int i = 1; i < kLanes<T>; ++i) result = (x[i] > result || x[i] != x[i]) ? x[i] : result;
  return result;
}

}  // namespace setformer::cpu::SETFORMER_ISA
