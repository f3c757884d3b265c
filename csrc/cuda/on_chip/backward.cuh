// Backward of a head whose entries are factors, one block a head and one launch a call (equations
// in csrc/cuda/backward.cuh). With K_ij = 2^(s_ij - scale), of token i U^t_i = 2^(scale - rows^t_i)
// and of reference j G^t_j = 2^(g^t_j) and W^t_j = 2^(-columns^t_j), plans are
//
//   R^t_ij = U^t_i K_ij G^t_j        C^t_ij = a_i U^{t-1}_i K_ij W^t_j
//
// so that steps need only sums of K times one number for each token or reference, and their share
// of ds is K times a matrix of rank 2 T. a is divided by its largest entry, and W multiplied by it.
// The ranges of G, U and W are those of v, u and 1 / c in solve.cuh, times the ratio of the
// reference masses to the first one, 2^30 at most.
//
// Sweeps over the tokens; each computes K again:
//
//   of distribution   delta, dA
//   of step t = T..2  fhat^t, in step T dv, and gbar^{t-1}
//   the last          fhat^1 (dv where T <= 1), then ds, dk and dy
#pragma once

#include "../launch.cuh"
#include "distribution_backward.cuh"
#include "similarity_backward.cuh"

namespace setformer::cuda {
namespace on_chip {

// Stores what all sweeps need of the references; the caller must call meet() before it is read.
template <class S>
__device__ __forceinline__ void begin_side(const StripParams& p, const Place& at) {
  using Storage = typename S::Storage;
  stage_references<S>(p, at, p.sizes.references, p.sizes.pitch);
  if constexpr (16 * S::kPairs > S::kReferences) {  // products read whole pairs of blocks
    Storage* beyond = shared_at<Storage>(p.sizes.references) + S::kReferences * p.sizes.pitch;
    for (int i = at.thread; i < 8 * p.sizes.pitch; i += S::kThreads) {
      beyond[i] = narrow<Storage>(0.0f);
    }
  }
  for (int j = at.thread; j < S::kReferences; j += S::kThreads) {
    shared_at<float>(StripMemory<S>::kDistribution)[j] =
        j < p.references ? power_of_two(potential<S>(p, p.iterations, j)) : 0.0f;
  }
}

// One side: the keys, which collect, or the queries.
template <class S>
__device__ __forceinline__ void side_backward(const StripParams& p, const Place& at,
                                              Scales& scales) {
  const auto& head = shared_head<S>();
  const auto& gradients = shared_gradients<S>();
  begin_side<S>(p, at);
  meet<S>();
  if (gradients.distributes) {
    distribute_backward<S>(p, at, gradients.pooled_gradient, int(p.value_depth));
  }
  if (p.cross != gradients.collects) scales.unit = finish_pooled_gradient<S>(p, at);
  meet<S>();
  scales.largest = largest_mass<S>(at);
#pragma unroll 1
  for (int64_t t = p.iterations; t > 1; --t) {
    prepare_step<S>(p, at, t, scales);
    meet<S>();
    sweep_of_step<S>(p, at, t, scales, &gradients.column_adjoint(t - 1, 0));
  }
  prepare_step<S>(p, at, p.iterations > 0 ? 1 : 0, scales);
  meet<S>();
  const int64_t width = (p.depth > p.value_depth ? p.depth : p.value_depth) + 1;
  float* partial = p.workspace + p.parts.partial + head.index * p.references * width;
  sweep_of_gradients<S>(p, at, scales, partial);
  meet<S>();
  finish_reference_gradient<S>(p, at, p.cross && gradients.collects, partial);
}

// In cross attention the side of the queries comes first, because it gives dA.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kWarps == 1 ? 8 : 2)
    attention_backward_on_chip_kernel(const int64_t first, const StripParams p) {
#if __CUDA_ARCH__ >= 800
  using Storage = typename S::Storage;
  const Place at = place();
  Scales scales{1, 1};
  const bool is_own = is_for_chip<Storage>(p, first + blockIdx.x, S::kThreads);
  if (at.thread == 0) {
    p.workspace[p.parts.on_chip + first + blockIdx.x] = is_own ? kAllOnChip : kNotOnChip;
  }
  if (!is_own) return;  // other kernels handle the head
#pragma unroll 1
  for (int pass = 0; pass <= int(p.cross); ++pass) {
    const bool of_queries = p.cross && pass == 0;
    meet<S>();
    if (at.thread == 0) {
      auto& head = shared_head<S>();
      const Span span = head.select(p, first + blockIdx.x, of_queries);
      head.first_strip = 0;
      head.last_strip = all_strips<S>();
      shared_gradients<S>().select_gradients(p, p.parts, p.workspace, head, span, head.index,
                                             of_queries);
    }
    meet<S>();
    side_backward<S>(p, at, scales);
  }
  meet<S>();
  if (at.warp == 0) {
    const auto& head = shared_head<S>();
    const Share alone{head.index, 1};
    finish_head<Storage>(p, p.parts, p.workspace, head.b, head.h, alone, alone);
  }
#endif
}

// Calls launch(shape, sizes) with the smallest shape that holds the references of a head. Returns
// false if there is none, or if the device has no room for it.
template <class Storage, class Launch>
bool visit_strip_shape(const BackwardParams& p, int64_t block_bytes, Launch launch) {
  const auto fits = [&](auto shape) {
    using S = decltype(shape);
    const StripSizes sizes = StripMemory<S>::sizes(p);
    if (sizes.units > kUnits<S> * S::kWarps || sizes.total > block_bytes) return false;
    launch(shape, sizes);
    return true;
  };
  const int64_t tokens = p.cross && p.queries > p.tokens ? p.queries : p.tokens;
  const auto visit = [&](auto alone, auto together) {
    return (tokens <= 64 && fits(alone)) || fits(together);
  };
  if (!can_go_by_strips(p)) return false;
  if (p.references <= 32) return visit(StripShape<Storage, 4, 1>{}, StripShape<Storage, 4, 4>{});
  if (p.references <= 56) return visit(StripShape<Storage, 7, 1>{}, StripShape<Storage, 7, 4>{});
  if (p.references <= 64) return visit(StripShape<Storage, 8, 1>{}, StripShape<Storage, 8, 4>{});
  return false;
}

}  // namespace on_chip

template <class Storage>
bool OnChipBackward<Storage>::run(const BackwardParams& p, const BackwardWorkspace& parts,
                                  void* workspace, Stream& stream) {
  // A block takes as long as its head is; of longer heads several blocks share the tokens.
  constexpr int64_t kMostTokens = 4096;
  if (stream.stages == 1 || !stream.resident) return false;
  if (p.group != nullptr) return false;  // ranks merge between launches
  if (p.tokens > kMostTokens || (p.cross && p.queries > kMostTokens)) return false;
  bool launched = false;
  on_chip::visit_strip_shape<Storage>(
      p, stream.block_bytes, [&](auto shape, const on_chip::StripSizes& sizes) {
        using S = decltype(shape);
        constexpr auto kKernel = on_chip::attention_backward_on_chip_kernel<S>;
        // newer devices can also run compute_75's PTX, in which this kernel has no body
        launched = ptx_version<kKernel>(stream) >= 80;
        if (!launched) return;
        launch<kKernel>(stream, "attention_backward_on_chip_kernel", p.batch * p.heads, S::kThreads,
                        sizes.total,
                        on_chip::StripParams{p, parts, static_cast<float*>(workspace), sizes});
      });
  return launched;
}

}  // namespace setformer::cuda
