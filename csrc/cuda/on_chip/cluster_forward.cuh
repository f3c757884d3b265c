// Forward of a head that the blocks of a cluster share: each holds a part of the tokens, with their
// entries in its registers, and all hold the references, the potentials g and A.
#pragma once

#include "forward.cuh"

namespace setformer::cuda {
namespace on_chip {

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksAtOnce)
    attention_forward_on_cluster_kernel(const int64_t first, const Params p) {
#if __CUDA_ARCH__ >= 900
  attend<S>(p, place(), (first + blockIdx.x) / p.sizes.ranks);
#endif
}

// Calls launch(sizes) with the smallest cluster that holds the tokens of a head. Returns
// false if there is none.
template <class S, class Launch>
bool visit_ranks(const ForwardParams& p, const Stream& stream, Launch launch) {
  const int64_t tokens = p.cross && p.queries > p.tokens ? p.queries : p.tokens;
  for (int ranks = 2; ranks <= stream.most_ranks; ranks *= 2) {
    if (tokens > int64_t{S::kTokens} * ranks) continue;
    const Sizes sizes = Memory<S>::sizes(p, ranks);
    if (sizes.total > stream.block_bytes) continue;
    launch(sizes);
    return true;
  }
  return false;
}

}  // namespace on_chip

template <class Storage>
bool OnClusterForward<Storage>::run(const ForwardParams& p, Stream& stream) {
  if (!stream.resident || p.group != nullptr || !on_chip::can_scale<Storage>(p)) return false;
  return on_chip::visit_references<Storage>(p, [&](auto size) {
    using S = on_chip::ClusterShape<Storage, size.blocks, size.strips>;
    constexpr auto kKernel = on_chip::attention_forward_on_cluster_kernel<S>;
    bool launched = false;
    on_chip::visit_ranks<S>(p, stream, [&](const on_chip::Sizes& sizes) {
      // a build for older devices has no body of this kernel
      launched = ptx_version<kKernel>(stream) >= 90 &&
                 holds_clusters<kKernel>(stream, sizes.ranks, S::kThreads, sizes.total);
      if (!launched) return;
      launch_clusters<kKernel>(stream, "attention_forward_on_cluster_kernel",
                               p.batch * p.heads * sizes.ranks, sizes.ranks, S::kThreads,
                               sizes.total, on_chip::Params{p, sizes});
    });
    return launched;
  });
}

}  // namespace setformer::cuda
