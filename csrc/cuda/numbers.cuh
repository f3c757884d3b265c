// Scalar types, base-2 exponentials and logarithms, and sums over a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace setformer::cuda {

// The type of sums and potentials: float64 for float64 storage, else float32.
template <class Storage>
using Accumulate = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

template <class Storage>
inline constexpr bool kIsHalf = sizeof(Storage) == 2;

// Whether there are kernels that keep 2^s on the chip: its products are those of tensor cores.
template <class Storage>
inline constexpr bool kRunsOnChip = !std::is_same_v<Storage, double>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class Storage>
__device__ __forceinline__ Storage narrow(Accumulate<Storage> x) {
  if constexpr (std::is_same_v<Storage, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<Storage, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <class T>
__device__ __forceinline__ T infinity() {
  return T(__builtin_huge_val());
}

// ex2.approx: 2 ulp. lg2.approx: 2^-22 absolute between 1/2 and 2, 2 ulp elsewhere (PTX manual).
// These errors are smaller than the rounding of sums of exponentials; logarithms are only used in
// exponents.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// In float64: 2^n e^y with |y| <= ln(2) / 2, by Taylor's series, whose remainder is 4e-18 of the
// result. Shorter than exp2, because subnormal results become 0, as above.
__device__ __forceinline__ double power_of_two(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 2^52: adding it rounds to an integer
  const double shifted = x + kRound;
  const double y = (x - (shifted - kRound)) * 0.69314718055994530942;
  double factorial = 6227020800.0, sum = 1.0 / factorial;
#pragma unroll
  for (int k = 13; k > 0; --k) {
    factorial /= k;
    sum = fma(sum, y, 1.0 / factorial);
  }
  const int high = __double2hiint(sum) + (__double2loint(shifted) << 20);
  const double power = __hiloint2double(high, __double2loint(sum));
  if (x != x) return x;
  return x < -1021.0 ? 0.0 : x >= 1024.0 ? infinity<double>() : power;
}
__device__ __forceinline__ float log_two(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double log_two(double x) { return log2(x); }

// Off by 2 ulp in float32, for |y| between 2^-126 and 2^126; exact division would be a function
// call.
__device__ __forceinline__ float quotient(float x, float y) { return __fdividef(x, y); }
__device__ __forceinline__ double quotient(double x, double y) { return x / y; }
// 1 / sum; 0 for an empty sum.
template <class T>
__device__ __forceinline__ T inverse(T sum) {
  return sum == T(0) ? T(0) : quotient(T(1), sum);
}

__device__ __forceinline__ float maximum(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double maximum(double x, double y) { return fmax(x, y); }

inline constexpr double kLog2E = 1.4426950408889634074;
inline constexpr double kLn2 = 0.69314718055994530942;

inline constexpr unsigned kFullWarp = 0xffffffffu;

// The thread's index in its block, read from its register at every call. In kernels of several
// passes the compiler would otherwise keep all values that depend on it from pass to pass, and
// spill registers.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// The same pointer, hidden from the compiler: addresses that depend on it are computed where they
// are used, not once for all passes.
template <class T>
__device__ __forceinline__ T* anew(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// Fragments (product.cuh): four neighbouring lanes, a quad, hold one row; eight quads a column.
template <class T>
__device__ __forceinline__ T quad_sum(T x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}
template <class T>
__device__ __forceinline__ T quad_maximum(T x) {
  x = maximum(x, __shfl_xor_sync(kFullWarp, x, 1));
  return maximum(x, __shfl_xor_sync(kFullWarp, x, 2));
}

// Combines the values of `lanes` neighbouring lanes (a power of two): each gets the result.
template <int lanes, class T, class Combine>
__device__ __forceinline__ T across_lanes(T x, Combine combine) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    x = combine(x, __shfl_xor_sync(kFullWarp, x, distance));
  }
  return x;
}
template <int lanes, class T>
__device__ __forceinline__ T lanes_sum(T x) {
  return across_lanes<lanes>(x, [](T a, T b) { return a + b; });
}
template <class T>
__device__ __forceinline__ T warp_maximum(T x) {
  return across_lanes<32>(x, [](T a, T b) { return maximum(a, b); });
}

// log2(2^m1 l1 + 2^m2 l2) as a pair again: a log-sum-exp with its largest exponent kept apart.
// An empty sum is (-inf, 0), and (-inf) - (-inf) never occurs.
template <class T>
struct LogSum {
  T largest = -infinity<T>();
  T sum = T(0);

  __device__ __forceinline__ void merge(const LogSum& other) {
    const T top = maximum(largest, other.largest);
    const T base = top == -infinity<T>() ? T(0) : top;
    sum = sum * power_of_two(largest - base) + other.sum * power_of_two(other.largest - base);
    largest = top;
  }
  __device__ __forceinline__ T logarithm() const {
    return largest == -infinity<T>() && sum == T(0) ? largest : largest + log_two(sum);
  }
};

template <class T>
__device__ __forceinline__ LogSum<T> shuffled(const LogSum<T>& x, int distance) {
  LogSum<T> y;
  y.largest = __shfl_xor_sync(kFullWarp, x.largest, distance);
  y.sum = __shfl_xor_sync(kFullWarp, x.sum, distance);
  return y;
}

}  // namespace setformer::cuda
