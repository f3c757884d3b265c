// Numbers of float32 on the tensor cores: each is the sum of three bfloat16 parts, which hold all
// of its 24 bits, and a product is the sum of the products of six pairs of parts. The three pairs
// that are left out are below 2^-25 of it. Half types consist of one part, themselves.
#pragma once

#include "instructions.cuh"

namespace setformer::cuda::on_chip {

template <class Storage>
inline constexpr int kParts = std::is_same_v<Storage, float> ? 3 : 1;
template <class Storage>
using Part = std::conditional_t<std::is_same_v<Storage, float>, __nv_bfloat16, Storage>;

// Calls visit(part of one factor, part of the other) for the pairs that are multiplied, the
// smallest products first.
template <class Storage, class Visit>
__device__ __forceinline__ void for_each_product(Visit visit) {
#pragma unroll
  for (int both = kParts<Storage> - 1; both >= 0; --both) {
#pragma unroll
    for (int part = both; part >= 0; --part) visit(part, both - part);
  }
}

// The parts of x and y, in pairs; x is the lower one.
template <class Storage>
__device__ __forceinline__ void pack_parts(float x, float y, uint32_t (&parts)[kParts<Storage>]) {
#pragma unroll
  for (int part = 0; part < kParts<Storage>; ++part) {
    parts[part] = pack<Part<Storage>>(x, y);
    if (part + 1 == kParts<Storage>) break;
    const float2 taken = unpack<Part<Storage>>(parts[part]);
    x -= taken.x;
    y -= taken.y;
  }
}

}  // namespace setformer::cuda::on_chip
