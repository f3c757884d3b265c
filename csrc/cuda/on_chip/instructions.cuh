// Instructions of sm_80 that CUDA C++ has no functions for, in the form that the on-chip kernels
// use.
#pragma once

#include "../product.cuh"

namespace setformer::cuda::on_chip {

// The smaller and the larger of two numbers; NaN if one is NaN.
__device__ __forceinline__ float least(float x, float y) {
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(x), "f"(y));
  return least;
}

__device__ __forceinline__ float most(float x, float y) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(x), "f"(y));
  return most;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / |x| from |x|^2, by which x is scaled to unit length; 1 for vectors that stay as they are.
__device__ __forceinline__ float inverse_length(float square) {
  constexpr float kLeast = float(kShortest * kShortest);
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(square));
  return square <= kLeast ? 1.0f : y;
}
// log2 x, for x that is not subnormal.
__device__ __forceinline__ float logarithm(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x; 0 for x = 0, the sum of nothing.
__device__ __forceinline__ float reciprocal_or_zero(float x) {
  return x == 0.0f ? 0.0f : reciprocal(x);
}

// Two half numbers in one register; x is the lower one.
template <class Storage>
__device__ __forceinline__ uint32_t pack(float x, float y) {
  uint32_t pair;
  if constexpr (std::is_same_v<Storage, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  }
  return pair;
}

// The two numbers that a register holds as halves.
template <class Storage>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<Storage, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
}

// Transposes an 8 x 8 matrix of half numbers; four lanes hold a row.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(pair));
  return y;
}

}  // namespace setformer::cuda::on_chip
