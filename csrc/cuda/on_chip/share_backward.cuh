// Backward on shares of a head's tokens: one block a share and one launch a pass (equations in
// csrc/cuda/backward.cuh, numbers in backward.cuh). A launch is a sweep of the on-chip kernels over
// the tokens of a share; between launches the kernels of backward_kernels.cuh merge the sums of all
// shares, as they do for blocks that stream. Shares are those blocks' too.
#pragma once

#include "backward.cuh"

namespace setformer::cuda {
namespace on_chip {

struct SharedStripParams : StripParams {
  int64_t blocks;  // of a head: at least as many as it has shares
  int64_t t;       // of a step
  Pass pass;
  bool of_queries;

  // The share's sums [M, width] among those of all.
  __device__ __forceinline__ float* partial(int64_t share, int64_t width) const {
    return workspace + parts.partial + share * references * width;
  }
};

// To be called by one thread. Where there is no share for the block, first_strip becomes -1.
template <class S>
__device__ void select_share_backward(const SharedStripParams& p, int64_t index, int64_t share) {
  using Storage = typename S::Storage;
  constexpr int kStrips = cuda::Shape<Storage>::kRows / 16;  // of a tile
  auto& head = shared_head<S>();
  const Span span = head.select(p, index, p.of_queries);
  const Splits<Storage> splits(p, span.count);
  const int strips = int(splits.tiles_each) * kStrips;
  head.first_strip = share < splits.count ? int(share) * strips : -1;
  head.last_strip = min(head.first_strip + strips, all_strips<S>());
  const Side side = p.of_queries ? queries_of(p) : keys_of(p);
  const Share shares = share_of<Storage>(p, side, span, head.b, head.h);
  auto& gradients = shared_gradients<S>();
  gradients.share = shares.before + share;
  gradients.is_alone = shares.count == 1;
  gradients.select_gradients(p, p.parts, p.workspace, head, span, gradients.share, p.of_queries);
}

// sum_i R_ij dO_i and, in the last column, sum_i R_ij delta_i.
template <class S>
__device__ __forceinline__ void distribution_of_share(const SharedStripParams& p, const Place& at) {
  const int width = int(p.value_depth);
  float* sums = p.partial(shared_gradients<S>().share, width + 1);
  distribute_backward<S>(p, at, sums, width + 1);
  const float* totals = shared_at<float>(StripMemory<S>::kTotals);
  for (int j = at.thread; j < int(p.references); j += S::kThreads) {
    sums[j * (width + 1) + width] = totals[j] * (1.0f / kPlanScale<typename S::Storage>);
  }
}

// Stores dA as an operand, and eta. Returns the factor that turns the operand into dA.
template <class S>
__device__ __forceinline__ float load_pooled_gradient(const SharedStripParams& p, const Place& at) {
  using Storage = typename S::Storage;
  const auto& gradients = shared_gradients<S>();
  for (int j = at.thread; j < S::kReferences; j += S::kThreads) {
    shared_at<float>(StripMemory<S>::kEta)[j] = j < p.references ? gradients.eta[j] : 0.0f;
  }
  float scale = 1;
  if constexpr (kFewExponents<Storage>) {
    float largest = 0;
    for (int i = at.thread; i < int(p.references * p.value_depth); i += S::kThreads) {
      largest = most(largest, fabsf(gradients.pooled_gradient[i]));
    }
    scale = fitting_scale<Storage>(most_of_block<S>(at, largest));
  }
  store_operand<S>(p, at, p.sizes.pooled_gradient, gradients.pooled_gradient, scale);
  return 1.0f / scale;
}

template <class S>
__device__ __forceinline__ void step_of_share(const SharedStripParams& p, const Place& at,
                                              Scales& scales) {
  const auto& gradients = shared_gradients<S>();
  if (gradients.collects && p.t == p.iterations) scales.unit = load_pooled_gradient<S>(p, at);
  meet<S>();
  prepare_step<S>(p, at, p.t, scales);
  meet<S>();
  float* adjoints = gradients.is_alone && p.t > 1 ? &gradients.column_adjoint(p.t - 1, 0)
                                                  : p.partial(gradients.share, 1);
  sweep_of_step<S>(p, at, p.t, scales, adjoints);
}

template <class S>
__device__ __forceinline__ void gradients_of_share(const SharedStripParams& p, const Place& at,
                                                   Scales& scales) {
  const auto& head = shared_head<S>();
  const auto& gradients = shared_gradients<S>();
  if (gradients.collects) scales.unit = load_pooled_gradient<S>(p, at);
  if (gradients.distributes) store_operand<S>(p, at, p.sizes.pooled, head.pooled, 1.0f);
  meet<S>();
#pragma unroll 1
  for (int64_t t = p.iterations; t > 0 || t == p.iterations; --t) {
    prepare_step<S>(p, at, t, scales);
  }
  meet<S>();
  sweep_of_gradients<S>(p, at, scales, p.partial(gradients.share, p.depth + 1));
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, kRanges<S> == 1 ? 2 : 1)
    attention_backward_on_shares_kernel(const int64_t first, const SharedStripParams p) {
#if __CUDA_ARCH__ >= 800
  const Place at = place();
  const int64_t work = first + blockIdx.x, index = work / p.blocks;
  if (!is_on_chip(p.parts, p.workspace, index, kPassesOnChip)) return;
  if (at.thread == 0) select_share_backward<S>(p, index, work - index * p.blocks);
  meet<S>();
  if (shared_head<S>().first_strip < 0) return;
  begin_side<S>(p, at);
  meet<S>();
  if (p.pass == Pass::kDistribution) return distribution_of_share<S>(p, at);
  Scales scales{1, largest_mass<S>(at)};
  if (p.pass == Pass::kStep) return step_of_share<S>(p, at, scales);
  gradients_of_share<S>(p, at, scales);
#endif
}

// Finds the heads whose passes run on shares; a block per head.
template <class Storage>
__global__ void __launch_bounds__(kMergeThreads)
    select_shared_heads_kernel(const int64_t first, const BackwardParams p, float* const flags) {
  const int64_t index = first + blockIdx.x;
  const bool is_own = is_for_chip<Storage>(p, index, kMergeThreads);
  if (threadIdx.x == 0) flags[index] = is_own ? kPassesOnChip : kNotOnChip;
}

// The answer of launch(shape, sizes) for the first shape that holds the references of a head and
// for which the device has room; false if there is none.
template <class Storage, class Launch>
bool visit_shared_strip_shape(const BackwardParams& p, int64_t block_bytes, Launch launch) {
  constexpr int64_t kMostTokens = int64_t{1} << 30;  // strips and tokens are counted as int
  const auto fits = [&](auto shape) {
    using S = decltype(shape);
    const StripSizes sizes = StripMemory<S>::sizes(p);
    const bool divides = cuda::Shape<Storage>::kRows / 16 << p.tiles_shift >= S::kWarps;
    return divides && sizes.total <= block_bytes && launch(shape, sizes);
  };
  if (!can_go_by_strips(p)) return false;
  if (p.tokens > kMostTokens || p.queries > kMostTokens) return false;
  if (p.references <= 64) return fits(StripShape<Storage, 8, 4>{});
  if (p.references > 128) return false;
  return fits(StripShape<Storage, 16, 8>{}) || fits(StripShape<Storage, 16, 4>{});
}

}  // namespace on_chip

template <class Storage>
bool SharedBackward<Storage>::begin(const BackwardParams& p, const BackwardWorkspace& parts,
                                    float* workspace, Stream& stream) {
  if (stream.stages == 1) return false;
  return on_chip::visit_shared_strip_shape<Storage>(
      p, stream.block_bytes, [&](auto shape, const on_chip::StripSizes&) {
        using S = decltype(shape);
        // newer devices can also run compute_75's PTX, in which the kernel has no body
        if (ptx_version<on_chip::attention_backward_on_shares_kernel<S>>(stream) < 80) return false;
        launch<on_chip::select_shared_heads_kernel<Storage>>(stream, "select_shared_heads_kernel",
                                                             p.batch * p.heads, kMergeThreads, 0, p,
                                                             workspace + parts.on_chip);
        return true;
      });
}

template <class Storage>
void SharedBackward<Storage>::run(const BackwardParams& p, const BackwardWorkspace& parts,
                                  float* workspace, Pass pass, bool of_queries, int64_t t,
                                  Stream& stream) {
  on_chip::visit_shared_strip_shape<Storage>(
      p, stream.block_bytes, [&](auto shape, const on_chip::StripSizes& sizes) {
        using S = decltype(shape);
        if (pass == Pass::kStep && t <= 1 && on_chip::kStepsWithGradients<S>) return false;
        const Side side = of_queries ? queries_of(p) : keys_of(p);
        const int64_t blocks = most_shares<Storage>(p, side);
        launch<on_chip::attention_backward_on_shares_kernel<S>>(
            stream, "attention_backward_on_shares_kernel", p.batch * p.heads * blocks, S::kThreads,
            sizes.total,
            on_chip::SharedStripParams{{p, parts, workspace, sizes}, blocks, t, pass, of_queries});
        return true;
      });
}

}  // namespace setformer::cuda
