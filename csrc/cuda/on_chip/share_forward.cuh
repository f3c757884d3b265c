// Forward of heads that neither a block nor a cluster holds: many blocks take a share each, and a
// launch is one pass over all tokens, which forms their entries anew.
//
//   step t      rows^{t-1}, and columns^t of each share; in the last step of the keys also A
//   merge       columns^t, and A, from those of the shares
//   distribute  rows^T and O
//
// In T + 1 passes keys cross device memory T + 1 times, values and output once.
#pragma once

#include "../merge_ranks.cuh"
#include "share.cuh"

namespace setformer::cuda {
namespace on_chip {

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksAtOnce)
    attention_forward_on_shares_kernel(const int64_t first, const ShareParams p) {
#if __CUDA_ARCH__ >= 800
  attend_share<S>(p, place(), first + blockIdx.x);
#endif
}

// columns^t, and A, from all shares of a head, in their order; a warp per reference.
template <class Storage>
__global__ void __launch_bounds__(kMergeThreads)
    merge_shares_kernel(const int64_t first, const ShareParams p) {
  const int64_t references = p.references, width = p.value_depth;
  const int64_t at = (first + blockIdx.x) * (kMergeThreads / 32) + threadIdx.x / 32;
  const int lane = int(threadIdx.x) % 32;
  if (at >= p.batch * p.heads * references) return;
  const int64_t head = at / references, j = at - head * references;
  const int64_t b = head / p.heads, h = head - b * p.heads;
  const Side side = p.side();
  const Span span = side.span(b);
  const int count = Shares(p, p.least, span.count).count;
  if (count == 1) return;
  const int64_t before = shares_before(p, p.least, side, b, span.before, count) + h * count;
  const int64_t of_share = p.numbers_of_share();
  const float* averages = p.partial + before * of_share + j * width;
  const float* columns = p.partial + before * of_share + references * width + j;
  LogSum<float> all;
  for (int share = lane; share < count; share += 32) all.merge({columns[share * of_share], 1.0f});
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) all.merge(shuffled(all, distance));
  const float column = all.logarithm();
  if (lane == 0) {
    float* to = static_cast<float*>(side.columns) + head * side.column_rows * references + j;
    to[(p.t > 0 ? p.t - 1 : 0) * references] = column;
    if (p.collects) to[steps_kept(p) * references] = collection_scale(p, column);
  }
  if (!p.collects) return;
  for (int64_t c = lane; c < width; c += 32) {
    float sum = 0, weights = 0;
    const float *part = columns, *average = averages + c;
    for (int share = 0; share < count; ++share) {
      const float weight = part_of(*part, column);
      weights += weight;
      if (weight != 0.0f) sum += weight * *average;  // a share without mass has no A
      part += of_share;
      average += of_share;
    }
    static_cast<float*>(p.pooled.data)[at * width + c] = sum * inverse(weights);
  }
}

// Turns the columns of a rank alone into the scales of its C.
template <class Storage>
__global__ void __launch_bounds__(kMergeThreads)
    scale_rank_kernel(const int64_t first, const ForwardParams p) {
  const int64_t at = (first + blockIdx.x) * kMergeThreads + threadIdx.x;
  if (at >= p.batch * p.heads * p.references) return;
  const Side keys = keys_of(p);
  const int64_t head = at / p.references;
  float* columns = static_cast<float*>(keys.columns) + head * keys.column_rows * p.references +
                   at % p.references;
  float& scale = columns[steps_kept(p) * p.references];
  scale = part_of(columns[(steps_kept(p) - 1) * p.references], scale);
}

// Makes all steps of one side.
template <class S>
void launch_steps(ShareParams p, Stream& stream) {
  using Storage = typename S::Storage;
  const Side side = p.side();
  const int64_t heads = p.batch * p.heads;
  p.blocks = Shares::most(p, p.least, side);
  for (p.t = p.iterations > 0; p.t <= p.iterations; ++p.t) {
    p.collects = !p.of_queries && p.t == p.iterations;
    launch<attention_forward_on_shares_kernel<S>>(stream, "attention_forward_on_shares_kernel",
                                                  heads * p.blocks, S::kThreads, p.sizes.total, p);
    if (p.blocks > 1) {
      launch<merge_shares_kernel<Storage>>(stream, "merge_shares_kernel",
                                           divide_up(heads * p.references, kMergeThreads / 32),
                                           kMergeThreads, 0, p);
    }
    float* columns = static_cast<float*>(side.columns) + (p.t > 0 ? p.t - 1 : 0) * p.references;
    const Shared shared{columns, heads, p.references, side.column_rows * p.references,
                        Merge::kLogSum};
    merge(p, stream, &shared, 1);
  }
}

template <class S>
void launch_shares(const ForwardParams& given, const Sizes& sizes, int strips, float* workspace,
                   Stream& stream) {
  using Storage = typename S::Storage;
  ShareParams p{{given, sizes}};
  p.partial = workspace;
  p.strips = strips;
  p.least = S::kLeastStrips;
  launch_steps<S>(p, stream);
  if (p.group != nullptr) {
    const int64_t heads = p.batch * p.heads, of_head = keys_of(p).column_rows * p.references;
    launch<scale_rank_kernel<Storage>>(stream, "scale_rank_kernel",
                                       divide_up(heads * p.references, kMergeThreads),
                                       kMergeThreads, 0, given);
    merge_pooled(given, static_cast<float*>(p.columns.data) + steps_kept(p) * p.references, of_head,
                 stream);
  }
  if (!p.distribute) return;
  p.of_queries = p.cross;
  if (p.cross) launch_steps<S>(p, stream);
  p.distributes = true;
  p.blocks = Shares::most(p, p.least, p.side());
  launch<attention_forward_on_shares_kernel<S>>(stream, "attention_forward_on_shares_kernel",
                                                p.batch * p.heads * p.blocks, S::kThreads,
                                                p.sizes.total, p);
}

}  // namespace on_chip

// The ranks of a group merge A by logarithms, whose errors are too large for float32's tolerance.
template <class Storage>
bool merges_exactly(const ForwardParams& p) {
  return on_chip::kParts<Storage> == 1 || p.group == nullptr;
}

template <class Storage>
int64_t SharedForward<Storage>::workspace(const ForwardParams& p) {
  using namespace on_chip;
  int64_t numbers = 0;
  if (!merges_exactly<Storage>(p)) return numbers;
  visit_references<Storage>(p, [&](auto size) {
    using S = ShareShape<Storage, size.blocks, size.strips>;
    const auto visit = [&](const Side& side) {
      const int64_t count = Shares(p, S::kLeastStrips, side.count).count;
      if (count == 1) return;
      const int64_t all = shares_before(p, S::kLeastStrips, side, p.batch, side.packed, count);
      const int64_t wanted = all * p.references * (p.value_depth + 1);
      if (numbers < wanted) numbers = wanted;
    };
    visit(keys_of(p));
    if (p.cross) visit(queries_of(p));
    return true;
  });
  return numbers;
}

template <class Storage>
bool SharedForward<Storage>::run(const ForwardParams& p, float* workspace, Stream& stream) {
  using namespace on_chip;
  constexpr int64_t kMostTokens = int64_t{1} << 30;  // strips and tokens are counted as int
  if (stream.stages == 1 || !can_scale<Storage>(p)) return false;
  if (!merges_exactly<Storage>(p)) return false;
  if (p.tokens > kMostTokens || p.queries > kMostTokens) return false;
  return visit_references<Storage>(p, [&](auto size) {
    using S = ShareShape<Storage, size.blocks, size.strips>;
    // newer devices can also run compute_75's PTX, in which this kernel has no body
    if (ptx_version<attention_forward_on_shares_kernel<S>>(stream) < 80) return false;
    for (int strips = S::kStrips; strips > 0; --strips) {
      const Sizes sizes = Memory<S>::sizes_of(p, strips);
      if (sizes.total > stream.block_bytes) continue;
      launch_shares<S>(p, sizes, strips, workspace, stream);
      return true;
    }
    return false;
  });
}

}  // namespace setformer::cuda
