// Backward through the Sinkhorn steps and through A = C^T v: flows of the tokens, gbar and dv.
#pragma once

#include "sweep.cuh"

namespace setformer::cuda::on_chip {

// Stores the references' numbers for step t: gbar^t W^t (in the step that collects, (gbar^t + eta)
// W^t) and G^{t-1}.
template <class S>
__device__ __forceinline__ void prepare_step(const StripParams& p, const Place& at, int64_t t,
                                             const Scales& scales) {
  const auto& gradients = shared_gradients<S>();
  const float* columns = shared_head<S>().columns + (t > 0 ? t - 1 : 0) * p.references;
  const float log_largest = log_two(scales.largest);
  for (int j = at.thread; j < S::kReferences; j += S::kThreads) {
    float adjoint = 0, collection = 0, distribution = 0;
    if (j < p.references) {
      if (columns[j] != -infinity<float>()) collection = power_of_two(log_largest - columns[j]);
      if (t > 0) {
        adjoint = gradients.column_adjoint(t, j);
        distribution = power_of_two(potential<S>(p, t - 1, j));
      }
    }
    if (t == p.iterations) {
      shared_at<float>(StripMemory<S>::kCollection)[j] = collection;
      if (gradients.collects) adjoint += shared_at<float>(StripMemory<S>::kEta)[j];
    }
    shared_at<float>(step_offset<S>(p, t, 0))[j] = adjoint * collection;
    shared_at<float>(step_offset<S>(p, t, 1))[j] = distribution;
  }
}

// W_j H_ij of the side that collects; H = v dA^T, from the values in a slot.
template <class S>
__device__ __forceinline__ void weigh_values(const StripParams& p, const Place& at, int slot,
                                             int range, const Scales& scales, Strip<S>& weighed) {
  multiply_by_rows<S, 2>(p, at, slot, p.sizes.pooled_gradient, p.sizes.value_groups, range,
                         weighed);
  for_each_with(weighed, pairs_at<S>(StripMemory<S>::kCollection, at, range),
                [&](float& x, float of_reference, int) {
                  x *= kFewExponents<typename S::Storage> ? scales.unit * of_reference
                                                          : of_reference;
                });
}

// Calls visit(range, numbers of its references at `offset`).
template <class S, class Visit>
__device__ __forceinline__ void for_each_range(const Place& at, int offset, Visit visit) {
#pragma unroll
  for (int range = 0; range < kRanges<S>; ++range) visit(range, pairs_at<S>(offset, at, range));
}

// C / a as the first operand of the product with dA. For float16 each row is multiplied by a scale
// of its own, which `units` corrects.
template <class S>
__device__ __forceinline__ void pack_collection(const Place& at, const Ranges<S>& entries,
                                                PackedStrip<S> (&plan)[kRanges<S>],
                                                float (&units)[2]) {
  using Storage = typename S::Storage;
  constexpr int kAt = StripMemory<S>::kCollection;
  float inverses[2] = {1, 1};
  if constexpr (kFewExponents<Storage>) {  // a token of little mass has numbers beyond float16
    float tops[2] = {};
    for_each_range<S>(at, kAt, [&](int range, const float2* collection) {
      for_each_with(entries[range], collection, [&](float x, float of_reference, int half) {
        tops[half] = most(tops[half], x * of_reference);
      });
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float top = quad_maximum(tops[half]);
      inverses[half] = top == 0.0f ? 0.0f : kPlanScale<Storage> * reciprocal(top);
      units[half] *= top * (1.0f / kPlanScale<Storage>);
    }
  }
  for_each_range<S>(at, kAt, [&](int range, const float2* collection) {
    Strip<S> weighed;
    copy(weighed, entries[range]);
    for_each_with(weighed, collection, [&](float& x, float of_reference, int half) {
      x *= of_reference;
      if (kFewExponents<Storage>) x *= inverses[half];
    });
    pack_strip<S>(weighed, plan[range]);
  });
}

// dv of a strip, from a U of the tokens, by way of the slot of its values, to the tensor. Uses only
// the rounded part of dA, because dv is rounded anyway.
template <class S>
__device__ __forceinline__ void store_value_gradient(const StripParams& p, const Place& at,
                                                     int first, int slot, const Ranges<S>& entries,
                                                     const Scales& scales,
                                                     const float (&collected)[2]) {
  using Storage = typename S::Storage;
  const int pitch = p.sizes.pitch;
  float units[2] = {scales.unit * collected[0], scales.unit * collected[1]};
  PackedStrip<S> plan[kRanges<S>];
  pack_collection<S>(at, entries, plan, units);
  uint32_t* to = shared_at<uint32_t>(slot + (at.g * pitch + 2 * at.c) * kElement);
  __syncwarp();  // all lanes have read the values
#pragma unroll
  for (int group = 0; group < kMostGroups; ++group) {
    if (group >= p.sizes.value_groups) break;
    float sums[2 * kBands][4] = {};
#pragma unroll
    for (int range = 0; range < kRanges<S>; ++range) {
      multiply_by_references<S>(p, at, plan[range], p.sizes.pooled_gradient, range, group, sums);
    }
#pragma unroll
    for (int tile = 0; tile < 2 * kBands; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // nothing comes from a token without mass, however large the sums
        to[(8 * half * pitch + kColumns * group + 8 * tile) / 2] =
            collected[half] == 0.0f ? 0
                                    : pack<Storage>(sums[tile][2 * half] * units[half],
                                                    sums[tile][2 * half + 1] * units[half]);
      }
    }
  }
  __syncwarp();
  store_strip(p, at, shared_gradients<S>().value_gradients, first, slot);
  __syncwarp();
}

// Limits C / a of tokens of little or no mass, which can be arbitrarily large, and the numbers that
// follow from it.
__device__ __forceinline__ float bounded(float x) {
  constexpr float kMost = 1e30f;
  return x > kMost ? kMost : x < -kMost ? -kMost : x;
}

// The results of a step for a lane's two tokens.
struct Flows {
  float drawn[2];     // a U^{t-1}
  float adjoints[2];  // a U^{t-1} fhat^t
};

// The flows of step t of a strip, kept for other sweeps, and fhat^t, added to the gradient of
// masses. `sums` still lack the factor U^{t-1}.
template <class S>
__device__ __forceinline__ void keep_flows(const Place& at, int64_t t, int64_t last,
                                           const OwnTokens<S>& tokens, float largest,
                                           const float (&factors)[2], const float (&sums)[2],
                                           Flows& flows) {
  const auto& gradients = shared_gradients<S>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = tokens.token(half);
    const float drawn = flows.drawn[half];
    flows.adjoints[half] = drawn == 0.0f ? 0.0f : factors[half] * (drawn * sums[half]);
    if (at.c != 0 || i >= gradients.token_count) continue;
    if (t > 1 || !kStepsWithGradients<S>) gradients.row_adjoint(t, i) = flows.adjoints[half];
    if (gradients.mass_gradients.absent()) continue;
    const bool valid = tokens.valid(half) && largest != 0.0f;
    const float adjoint =
        valid ? bounded(bounded(factors[half] * sums[half]) * bounded(1.0f / largest)) : 0.0f;
    float& gradient = gradients.mass_gradients[i];
    gradient = t == last ? adjoint : gradient + adjoint;
  }
}

// Adds a range's share of the sums from which fhat^t follows; in the step that collects, from W_j
// H_ij as well.
template <class S>
__device__ __forceinline__ void add_to_sums(const StripParams& p, const Place& at, int64_t t,
                                            int range, const Strip<S>& entries,
                                            const Strip<S>& weighed, bool collects,
                                            float (&sums)[2]) {
  for_each_with(entries, pairs_at<S>(step_offset<S>(p, t, 0), at, range),
                [&](float x, float adjoint, int half) { sums[half] -= x * adjoint; });
  if (!collects) return;
#pragma unroll
  for (int n = 0; n < kRangeBlocks<S>; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[e / 2] += entries[n][e] * weighed[n][e];
  }
}

// Step t of a strip from a lane's share of the sums over the references. The step that collects
// writes dv over the values in the slot.
template <class S>
__device__ __forceinline__ void step_backward(const StripParams& p, const Place& at, int64_t t,
                                              const OwnTokens<S>& tokens, int slot,
                                              const Ranges<S>& entries, float (&sums)[2],
                                              bool collects, const Scales& scales, Flows& flows) {
  float factors[2];
  tokens.factors(t - 1, factors);
  tokens.drawn(factors, scales.largest, flows.drawn);
#pragma unroll
  for (int half = 0; half < 2; ++half) sums[half] = quad_sum(sums[half]);
  if (collects) {
    store_value_gradient<S>(p, at, tokens.own - at.g, slot, entries, scales, flows.drawn);
  }
  keep_flows<S>(at, t, p.iterations, tokens, scales.largest, factors, sums, flows);
}

// A sweep for step t: its flows and, for t > 1, the block's share of gbar^{t-1}.
template <class S>
__device__ __forceinline__ void sweep_of_step(const StripParams& p, const Place& at, int64_t t,
                                              const Scales& scales, float* adjoints) {
  const auto& gradients = shared_gradients<S>();
  const bool collects = gradients.collects && t == p.iterations;
  OfReferences<S> columns = {};
  sweep<S>(p, at, collects ? &shared_head<S>().values : nullptr, nullptr,
           [&](int, const OwnTokens<S>& tokens, int slot) {
             const int values = slot + slot_bytes(p);
             Ranges<S> entries;
             Flows flows;
             float sums[2] = {};
#pragma unroll
             for (int range = 0; range < kRanges<S>; ++range) {
               Strip<S> weighed;
               form_strip<S>(p, at, tokens.own - at.g, slot, range, entries[range]);
               entries_of_strip<S>(entries[range]);
               if (collects) weigh_values<S>(p, at, values, range, scales, weighed);
               add_to_sums<S>(p, at, t, range, entries[range], weighed, collects, sums);
             }
             step_backward<S>(p, at, t, tokens, values, entries, sums, collects, scales, flows);
#pragma unroll
             for (int range = 0; range < kRanges<S>; ++range) {
               add_to_columns<S>(entries[range], flows.adjoints, range, columns);
             }
           });
  if (t <= 1) return;
  add_columns<S>(at, columns);
  meet<S>();
  const float* factors = shared_at<float>(step_offset<S>(p, t, 1));
  const float* totals = shared_at<float>(StripMemory<S>::kTotals);
  for (int j = at.thread; j < int(p.references); j += S::kThreads) {
    adjoints[j] = -factors[j] * totals[j];
  }
  meet<S>();
}

}  // namespace setformer::cuda::on_chip
