// What the ranks of a group merge after forward's steps: A, from which each rank's part is known.
#pragma once

#include "launch.cuh"

namespace setformer::cuda {

// Turns A into sums that the ranks of a group can merge, and merged sums into A again: multiplies
// each row of A by the inverse of its scale, and stores that inverse as the new scale. A warp per
// reference.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    rescale_pooled_kernel(const int64_t first, const int64_t heads, const int64_t references,
                          const int64_t width, T* const pooled, T* const scales,
                          const int64_t scales_of_head) {
  const int64_t at = (first + blockIdx.x) * (kMergeThreads / 32) + threadIdx.x / 32;
  if (at >= heads * references) return;
  T& scale = scales[at / references * scales_of_head + at % references];
  const T factor = inverse(scale);
  for (int64_t c = threadIdx.x % 32; c < width; c += 32) pooled[at * width + c] *= factor;
  __syncwarp();
  if (threadIdx.x % 32 == 0) scale = factor;
}

// Merges A and the scales over all ranks of a group.
template <class T>
void merge_pooled(const ForwardParams& p, T* scales, int64_t scales_of_head, Stream& stream) {
  if (p.group == nullptr) return;
  const int64_t heads = p.batch * p.heads, references = p.references;
  const int64_t pooled = references * p.value_depth;
  const auto rescale = [&] {
    launch<rescale_pooled_kernel<T>>(stream, "rescale_pooled_kernel",
                                     divide_up(heads * references, kMergeThreads / 32),
                                     kMergeThreads, 0, heads, references, p.value_depth,
                                     static_cast<T*>(p.pooled.data), scales, scales_of_head);
  };
  rescale();
  const Shared shared[2] = {{p.pooled.data, heads, pooled, pooled, Merge::kSum},
                            {scales, heads, references, scales_of_head, Merge::kSum}};
  merge(p, stream, shared, 2);
  rescale();
}

}  // namespace setformer::cuda
