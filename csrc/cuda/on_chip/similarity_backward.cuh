// ds, and from it the gradients of tokens, references, bandwidth and epsilon.
#pragma once

#include "steps_backward.cuh"

namespace setformer::cuda::on_chip {

// The distribution's share of ds / K, from G = dO A^T; the rows dO are in a slot.
template <class S>
__device__ __forceinline__ void differentiate_distribution(const StripParams& p, const Place& at,
                                                           const OwnTokens<S>& tokens, int slot,
                                                           int range, Strip<S>& ds) {
  const auto& gradients = shared_gradients<S>();
  if (!gradients.distributes) return clear(ds);
  multiply_by_rows<S, 2>(p, at, slot, p.sizes.pooled, p.sizes.value_groups, range, ds);
  float factors[2], shares[2];
  tokens.factors(p.iterations, factors);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    shares[half] = tokens.valid(half) ? -factors[half] * gradients.delta[tokens.token(half)] : 0.0f;
  }
  for_each_with(ds, pairs_at<S>(StripMemory<S>::kDistribution, at, range),
                [&](float& x, float of_reference, int half) {
                  x = fmaf(x, factors[half], shares[half]) * of_reference;
                });
}

// Adds to ds / K the shares of all steps and of the collection, from eta and from W_j H_ij
// (`weighed`). `last_flows` are those of step 1 (step 0 if T = 0), if this sweep has gone back
// through it.
template <class S>
__device__ __forceinline__ void differentiate_steps(const StripParams& p, const Place& at,
                                                    const OwnTokens<S>& tokens, int range,
                                                    const Scales& scales, const Flows& last_flows,
                                                    const Strip<S>& weighed, Strip<S>& ds) {
  const auto& gradients = shared_gradients<S>();
#pragma unroll 1
  for (int64_t t = p.iterations; t >= (p.iterations > 0 ? 1 : 0); --t) {
    Flows flows = last_flows;
    if (t > 1 || !kStepsWithGradients<S>) {
      float factors[2];
      tokens.factors(t - 1, factors);
      tokens.drawn(factors, scales.largest, flows.drawn);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = tokens.token(half);
        flows.adjoints[half] =
            t > 0 && i < gradients.token_count ? gradients.row_adjoint(t, i) : 0.0f;
      }
    }
    if (t == p.iterations && gradients.collects) {
#pragma unroll
      for (int n = 0; n < kRangeBlocks<S>; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) ds[n][e] = fmaf(weighed[n][e], flows.drawn[e / 2], ds[n][e]);
      }
    }
    for_each_with(ds, pairs_at<S>(step_offset<S>(p, t, 0), at, range),
                  [&](float& x, float adjoint, int half) { x -= flows.drawn[half] * adjoint; });
    if (t == 0) return;
    for_each_with(ds, pairs_at<S>(step_offset<S>(p, t, 1), at, range),
                  [&](float& x, float factor, int half) { x -= flows.adjoints[half] * factor; });
  }
}

// E = ds S of a strip and a range: in place of its entries, as the first operand of products, and
// in the warp's plan. Adds sum_ij E_ij to `total`. Returns the factor that turns the stored numbers
// into E. Beyond the last reference E is 0, because all numbers of such references are.
template <class S>
__device__ __forceinline__ float form_exchange(const StripParams& p, const Place& at, int range,
                                               const Strip<S>& similarities, const Strip<S>& ds,
                                               Strip<S>& entries, float& total,
                                               PackedStrip<S>& plan) {
  using Storage = typename S::Storage;
  float top = 0, unit = 1;
#pragma unroll
  for (int n = 0; n < kRangeBlocks<S>; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& x = entries[n][e];
      x *= ds[n][e] * similarities[n][e];
      total += x;
      if (kFewExponents<Storage>) top = most(top, fabsf(x));
    }
  }
  if constexpr (kFewExponents<Storage>) {
    const float scale = fitting_scale<Storage>(most_of_warp(top));
    for_each_of_strip(entries, [&](float& x) { x *= scale; });
    unit = 1.0f / scale;
    if (at.lane == 0) {
      shared_at<float>(StripMemory<S>::kUnitsOfPlans)[at.warp * kRanges<S> + range] = unit;
    }
  }
  pack_strip<S>(entries, plan);
  store_plan<S>(p, at, plan, range);
  return unit;
}

// sum_j E_ij y_j of a strip's tokens, and sum_j E_ij, in all four numbers of each token.
struct TokenSums {
  float rows[kMostGroups][2 * kBands][4] = {}, ones[4] = {};
};

// Adds the share of a range of references. The packed E is to be multiplied by `unit`.
template <class S>
__device__ __forceinline__ void add_exchange(const StripParams& p, const Place& at, int range,
                                             const PackedStrip<S>& plan, float unit,
                                             TokenSums& of) {
  using Storage = typename S::Storage;
  const uint32_t one = pack<Storage>(1.0f, 1.0f);
  float sums[2 * kBands][4] = {};
  const auto add = [&](float (&to)[4], float (&sum)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      to[e] = fmaf(sum[e], unit, to[e]);
      sum[e] = 0;
    }
  };
#pragma unroll
  for (int pair = 0; pair < kRangePairs<S>; ++pair) {
    multiply_block<Storage>(kFewExponents<Storage> ? sums[0] : of.ones, plan[pair], one, one);
  }
  if (kFewExponents<Storage>) add(of.ones, sums[0]);
#pragma unroll
  for (int group = 0; group < kMostGroups; ++group) {
    if (group >= p.sizes.groups) break;
    auto& rows = of.rows[group];
    multiply_by_references<S>(p, at, plan, p.sizes.references, range, group,
                              kFewExponents<Storage> ? sums : rows);
#pragma unroll
    for (int tile = 0; kFewExponents<Storage> && tile < 2 * kBands; ++tile) {
      add(rows[tile], sums[tile]);
    }
  }
}

// Calls visit(first column, which of the two tokens, number, number of the next column) for what a
// lane holds of a strip's rows.
template <class Visit>
__device__ __forceinline__ void for_each_pair_of_columns(const StripParams& p, TokenSums& sums,
                                                         Visit visit) {
#pragma unroll
  for (int group = 0; group < kMostGroups; ++group) {
    if (group >= p.sizes.groups) break;
#pragma unroll
    for (int tile = 0; tile < 2 * kBands; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&numbers)[4] = sums.rows[group][tile];
        visit(kColumns * group + 8 * tile, half, numbers[2 * half], numbers[2 * half + 1]);
      }
    }
  }
}

// 1 / (epsilon bandwidth^2), the factor of E = ds S in dk and dy.
template <class S>
__device__ __forceinline__ float of_similarity() {
  const Similarity<float>& similarity = shared_head<S>().similarity;
  return quotient(1.0f, similarity.epsilon * similarity.bandwidth * similarity.bandwidth);
}

// dk_i = sum_j E_ij (y_j - k_i) / (epsilon bandwidth^2) of a strip, by way of the slot after its
// keys, to the tensor. Where k_i is a key scaled to unit length, the derivative by the key itself
// is (dk_i - k_i k_i.dk_i) / length. Returns the lane's share of sum_i k_i.dk_i.
template <class S>
__device__ __forceinline__ float store_token_gradient(const StripParams& p, const Place& at,
                                                      int first, int slot, TokenSums& sums) {
  using Storage = typename S::Storage;
  const int pitch = p.sizes.pitch;
  const float unit = of_similarity<S>();
  const int own = (at.g * pitch + 2 * at.c) * kElement;
  const uint32_t* keys = shared_at<uint32_t>(slot + own);
  uint32_t* to = shared_at<uint32_t>(slot + slot_bytes(p) + own);
  __syncwarp();  // all lanes have read what is there
  float products[2] = {};
  for_each_pair_of_columns(p, sums, [&](int column, int half, float& x, float& y) {
    const float2 key = unpack<Storage>(keys[(8 * half * pitch + column) / 2]);
    x = (x - key.x * sums.ones[2 * half]) * unit;
    y = (y - key.y * sums.ones[2 * half]) * unit;
    products[half] = fmaf(key.x, x, fmaf(key.y, y, products[half]));
  });
  const float product = products[0] + products[1];
  float factors[2] = {1, 1};
  if (p.normalize) {
    const float* lengths = shared_at<float>(StripMemory<S>::kLengths) + 16 * at.warp + at.g;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factors[half] = lengths[8 * half];
      products[half] = quad_sum(products[half]);
    }
  } else {
    products[0] = products[1] = 0;
  }
  for_each_pair_of_columns(p, sums, [&](int column, int half, float& x, float& y) {
    const int pair = (8 * half * pitch + column) / 2;
    const float2 key = unpack<Storage>(keys[pair]);
    to[pair] = pack<Storage>((x - key.x * products[half]) * factors[half],
                             (y - key.y * products[half]) * factors[half]);
  });
  __syncwarp();
  store_strip(p, at, shared_gradients<S>().token_gradients, first, slot + slot_bytes(p));
  return product;
}

// The last sweep for a strip and a range: ds, and its share of dk; before that, if not another
// sweep has done so, back through step 1 (step 0 if T = 0). Leaves E in the warp's plan.
template <class S>
__device__ __forceinline__ void differentiate_range(const StripParams& p, const Place& at,
                                                    const OwnTokens<S>& tokens, int slot, int range,
                                                    const Scales& scales, float& total,
                                                    TokenSums& sums) {
  const auto& gradients = shared_gradients<S>();
  const int values = slot + slot_bytes(p), output_gradients = values + slot_bytes(p);
  Strip<S> similarities, entries[1], ds, weighed;
  form_strip<S>(p, at, tokens.own - at.g, slot, range, similarities);
  copy(entries[0], similarities);
  entries_of_strip<S>(entries[0]);
  differentiate_distribution<S>(p, at, tokens, output_gradients, range, ds);
  if (gradients.collects) weigh_values<S>(p, at, values, range, scales, weighed);
  Flows flows = {};
  if constexpr (kStepsWithGradients<S>) {
    const int64_t t = p.iterations > 0 ? 1 : 0;
    const bool collects = gradients.collects && t == p.iterations;
    float of_step[2] = {};
    if (t > 0 || collects) {
      add_to_sums<S>(p, at, t, range, entries[0], weighed, collects, of_step);
      step_backward<S>(p, at, t, tokens, values, entries, of_step, collects, scales, flows);
    }
  }
  differentiate_steps<S>(p, at, tokens, range, scales, flows, weighed, ds);
  PackedStrip<S> plan;
  const float unit = form_exchange<S>(p, at, range, similarities, ds, entries[0], total, plan);
  add_exchange<S>(p, at, range, plan, unit, sums);
}

// The last sweep. Stores the sums for dy in `partial` [M, D + 1], and sum_ij ds_ij s_ij and sum_i
// k_i.dk_i in scalars.
template <class S>
__device__ __forceinline__ void sweep_of_gradients(const StripParams& p, const Place& at,
                                                   const Scales& scales, float* partial) {
  const auto& head = shared_head<S>();
  const auto& gradients = shared_gradients<S>();
  float total = 0, by_distance = 0;
  OfUnits<S> sums;
  sweep<S>(p, at, gradients.collects ? &head.values : nullptr,
           gradients.distributes ? &gradients.output_gradients : nullptr,
           [&](int round, const OwnTokens<S>& tokens, int slot) {
             TokenSums of_tokens;
#pragma unroll 1
             for (int range = 0; range < kRanges<S>; ++range) {
               differentiate_range<S>(p, at, tokens, slot, range, scales, total, of_tokens);
             }
             by_distance += store_token_gradient<S>(p, at, tokens.own - at.g, slot, of_tokens);
             meet<S>();
             sum_over_tokens<S, true>(p, at, round, 0, p.sizes.groups, sums);
             meet<S>();
           });
  const int width = int(p.depth);
  const float unit = of_similarity<S>();
  for_each_sum<S>(p, at, p.sizes.groups, sums, [&](int j, int column, float x) {
    if (column < width) partial[j * (width + 1) + column] = x * unit;
  });
  for_each_one<S>(p, at, p.sizes.groups, sums,
                  [&](int j, float x) { partial[j * (width + 1) + width] = x * unit; });
  const auto add = [](float a, float b) { return a + b; };
  total = of_block<S>(at, total, add);
  by_distance = of_block<S>(at, by_distance, add);
  if (at.thread == 0) {
    gradients.scalars[0] = total * head.similarity.scale;
    gradients.scalars[1] = by_distance;
  }
}

// 1 / |y_j| of a reference that was scaled to unit length, else 1; by a warp.
template <class S>
__device__ __forceinline__ float factor_of_reference(const StripParams& p, const Place& at, int j) {
  if (!p.normalize) return 1.0f;
  const auto& head = shared_head<S>();
  Rows<typename S::Storage> rows;
  rows.select(p.reference, head.b, head.h, p.references, p.depth);
  float square = 0;
#pragma unroll 1
  for (int c = at.lane; c < rows.depth; c += 32) {
    const float y = widen(rows.data[j * rows.row_stride + c * rows.column_stride]);
    square = fmaf(y, y, square);
  }
  return inverse_length(lanes_sum<32>(square));
}

// dy from its sums; the keys' dy is added to the queries'. Leaves y_j.dy_j for the derivative by
// the bandwidth. If references are scaled to unit length, their own derivative is (dy_j - y_j
// y_j.dy_j) / length.
template <class S>
__device__ __forceinline__ void finish_reference_gradient(const StripParams& p, const Place& at,
                                                          bool accumulate, const float* partial) {
  using Storage = typename S::Storage;
  const auto& gradients = shared_gradients<S>();
  const int width = int(p.depth);
#pragma unroll 1
  for (int j = at.warp; j < int(p.references); j += S::kWarps) {
    const Storage* reference = shared_at<Storage>(p.sizes.references) + j * p.sizes.pitch;
    const float total = partial[j * (width + 1) + width];
    float product = 0, sums[kMostGroups];
#pragma unroll
    for (int i = 0; i < kMostGroups; ++i) {
      const int c = at.lane + 32 * i;
      if (c >= width) break;
      const float y = widen(reference[c]);
      sums[i] = partial[j * (width + 1) + c] - y * total;
      product = fmaf(y, sums[i], product);
    }
    product = lanes_sum<32>(product);
    if (at.lane == 0) gradients.reference_products[j] = product;
    const float factor = factor_of_reference<S>(p, at, j), along = p.normalize ? product : 0.0f;
#pragma unroll
    for (int i = 0; i < kMostGroups; ++i) {
      const int c = at.lane + 32 * i;
      if (c >= width) break;
      const float x = (sums[i] - widen(reference[c]) * along) * factor;
      float& gradient = gradients.reference_gradients[j * width + c];
      gradient = accumulate ? gradient + x : x;
    }
  }
}

}  // namespace setformer::cuda::on_chip
