// Backward through O = R A: delta, dA, eta and gbar^T.
#pragma once

#include "sweep.cuh"

namespace setformer::cuda::on_chip {

// delta_i = dO_i.O_i. The rows dO are in `slot`, the rows O in the slot after it; both, and so
// delta, are 0 for hidden tokens.
template <class S>
__device__ __forceinline__ void output_products(const StripParams& p, const Place& at, int slot,
                                                float (&deltas)[2]) {
  using Storage = typename S::Storage;
  const int pitch = p.sizes.pitch;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
#pragma unroll 1
    for (int column = 8 * at.c; column < kColumns * p.sizes.value_groups; column += 32) {
      const int offset = slot + ((at.g + 8 * half) * pitch + column) * kElement;
      const uint4 x = *shared_at<uint4>(offset), y = *shared_at<uint4>(offset + slot_bytes(p));
      const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const float2 a = unpack<Storage>(xs[word]), b = unpack<Storage>(ys[word]);
        sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
      }
    }
    deltas[half] = quad_sum(sum);
  }
}

// Stores R of a strip and a range of references, times kPlanScale, in the warp's plan; adds sum_i
// R_ij delta_i, from the same rounded numbers, to `columns`.
template <class S>
__device__ __forceinline__ void distribute_range(const StripParams& p, const Place& at, int first,
                                                 int slot, int range, const float (&factors)[2],
                                                 const float (&deltas)[2],
                                                 OfReferences<S>& columns) {
  using Storage = typename S::Storage;
  Strip<S> entries;
  form_strip<S>(p, at, first, slot, range, entries);
  entries_of_strip<S>(entries);
  for_each_with(entries, pairs_at<S>(StripMemory<S>::kDistribution, at, range),
                [&](float& x, float of_reference, int half) { x *= factors[half] * of_reference; });
  PackedStrip<S> plan;
  pack_strip<S>(entries, plan);
  store_plan<S>(p, at, plan, range);
  // gbar^T is the difference of two sums; rounding errors of R cancel in it if both use the same R
#pragma unroll
  for (int n = 0; n < kRangeBlocks<S>; ++n) {
    float (&of_block)[2] = columns[kRangeBlocks<S> * range + n];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 x = unpack<Storage>(plan[n / 2][2 * (n % 2) + half]);
      of_block[0] = fmaf(x.x, deltas[half], of_block[0]);
      of_block[1] = fmaf(x.y, deltas[half], of_block[1]);
    }
  }
}

template <class S>
__device__ __forceinline__ void distribute_strip(const StripParams& p, const Place& at,
                                                 const OwnTokens<S>& tokens, int slot,
                                                 OfReferences<S>& columns) {
  const auto& gradients = shared_gradients<S>();
  float deltas[2], factors[2];
  output_products<S>(p, at, slot + slot_bytes(p), deltas);
  tokens.factors(p.iterations, factors);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = tokens.token(half);
    if (at.c == 0 && i < gradients.token_count) gradients.delta[i] = deltas[half];
    factors[half] *= kPlanScale<typename S::Storage>;
  }
#pragma unroll
  for (int range = 0; range < kRanges<S>; ++range) {
    distribute_range<S>(p, at, tokens.own - at.g, slot, range, factors, deltas, columns);
  }
}

// Computes delta in the workspace, sum_i R_ij dO_i in `pooled` [M, pitch], and kPlanScale sum_i
// R_ij delta_i in totals.
template <class S>
__device__ __forceinline__ void distribute_backward(const StripParams& p, const Place& at,
                                                    float* pooled, int pitch) {
  const auto& gradients = shared_gradients<S>();
  const int groups = p.sizes.value_groups, width = int(p.value_depth);
  OfUnits<S> sums;
  OfReferences<S> columns = {};
  sweep<S>(p, at, &gradients.output_gradients, &shared_head<S>().outputs,
           [&](int round, const OwnTokens<S>& tokens, int slot) {
             distribute_strip<S>(p, at, tokens, slot, columns);
             meet<S>();
             sum_over_tokens<S, false>(p, at, round, 1, groups, sums);
             meet<S>();
           });
  for_each_sum<S>(p, at, groups, sums, [&](int j, int column, float x) {
    if (column < width) {
      pooled[j * pitch + column] = x * (1.0f / kPlanScale<typename S::Storage>);
    }
  });
  add_columns<S>(at, columns);
  meet<S>();
}

// Stores x rounded, and the remainder.
template <class Storage>
__device__ __forceinline__ void store_parts(Storage* to, int rest, float x) {
  const Storage rounded = narrow<Storage>(x);
  to[0] = rounded;
  to[rest] = narrow<Storage>(x - widen(rounded));
}

// Stores numbers [M, Dv] times `scale` as an operand.
template <class S>
__device__ __forceinline__ void store_operand(const StripParams& p, const Place& at, int operand,
                                              const Global<float>& numbers, float scale) {
  using Storage = typename S::Storage;
  const int width = int(p.value_depth), pitch = p.sizes.pitch;
#pragma unroll 1
  for (int j = at.warp; j < 16 * S::kPairs; j += S::kWarps) {
#pragma unroll
    for (int i = 0; i < kMostGroups; ++i) {
      const int c = at.lane + kColumns * i;
      if (i >= p.sizes.value_groups) break;
      store_parts(shared_at<Storage>(operand) + j * pitch + c, 16 * S::kPairs * pitch,
                  j < p.references && c < width ? numbers[j * width + c] * scale : 0.0f);
    }
  }
}

// Stores A and dA of reference j as operands, eta and gbar^T, by one warp; returns the lane's
// largest |dA|.
template <class S>
__device__ __forceinline__ float finish_pooled_row(const StripParams& p, const Place& at, int j) {
  using Storage = typename S::Storage;
  const auto& gradients = shared_gradients<S>();
  const bool inside = j < p.references;
  const int width = int(p.value_depth), pitch = p.sizes.pitch, rest = 16 * S::kPairs * pitch;
  float distributed = 0, total = 0, largest = 0;
#pragma unroll 1
  for (int c = at.lane; c < kColumns * p.sizes.value_groups; c += 32) {
    float sum = 0, average = 0;
    if (inside && c < width) {
      float& kept = gradients.pooled_gradient[j * width + c];
      average = shared_head<S>().pooled[j * width + c];
      if (gradients.distributes) sum = kept;
      distributed = fmaf(sum, average, distributed);
      if (!gradients.given.absent()) {
        sum += gradients.given[j * gradients.given_row_stride + c * gradients.given_column_stride];
      }
      total = fmaf(sum, average, total);
      if (kFewExponents<Storage>) kept = sum;
    }
    largest = most(largest, fabsf(sum));
    store_parts(shared_at<Storage>(p.sizes.pooled) + j * pitch + c, rest, average);
    store_parts(shared_at<Storage>(p.sizes.pooled_gradient) + j * pitch + c, rest, sum);
  }
  distributed = lanes_sum<32>(distributed);
  total = lanes_sum<32>(total);
  if (at.lane != 0 || j >= S::kReferences) return largest;
  shared_at<float>(StripMemory<S>::kEta)[j] = total;
  if (!inside) return largest;
  if (gradients.distributes) {
    const float* totals = shared_at<float>(StripMemory<S>::kTotals);
    distributed -= totals[j] * (1.0f / kPlanScale<Storage>);
  }
  gradients.key_column_adjoints[p.iterations * p.references + j] = 0.0f;
  gradients.column_adjoint(p.iterations, j) = distributed;  // replaces that 0 on the keys' side
  return largest;
}

// The same for all references; returns the factor that turns the operand of dA into dA.
template <class S>
__device__ __forceinline__ float finish_pooled_gradient(const StripParams& p, const Place& at) {
  using Storage = typename S::Storage;
  float largest = 0;
#pragma unroll 1
  for (int j = at.warp; j < 16 * S::kPairs; j += S::kWarps) {
    largest = most(largest, finish_pooled_row<S>(p, at, j));
  }
  if constexpr (!kFewExponents<Storage>) return 1.0f;
  const float scale = fitting_scale<Storage>(most_of_block<S>(at, largest));
  store_operand<S>(p, at, p.sizes.pooled_gradient, shared_gradients<S>().pooled_gradient, scale);
  return 1.0f / scale;
}

}  // namespace setformer::cuda::on_chip
