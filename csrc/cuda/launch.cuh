// How kernels are launched, and what each does around its pass.
#pragma once

#include "kernels.h"
#include "problem.cuh"

namespace setformer::cuda {

// A block per unit of work; beyond the largest grid blocks take several.
inline constexpr int64_t kLargestGrid = 2147483647;

template <class Kernel, class... Arguments>
void launch(Stream& stream, const char* name, Kernel kernel, int64_t blocks, int threads,
            int64_t shared_bytes, Arguments... arguments) {
  if (stream.error != cudaSuccess || blocks == 0) return;
  // More than 48 KiB must be asked for, per kernel and device.
  if (shared_bytes > 48 * 1024) {
    stream.error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        int(shared_bytes));
    if (stream.error != cudaSuccess) cudaGetLastError();  // reported by us, not by the next launch
  }
  if (stream.error == cudaSuccess) {
    const unsigned grid = unsigned(blocks < kLargestGrid ? blocks : kLargestGrid);
    kernel<<<grid, threads, size_t(shared_bytes), stream.stream>>>(arguments...);
    stream.error = cudaGetLastError();
  }
  if (stream.error != cudaSuccess) stream.kernel = name;
}

// Whether one block can hold each side's keys: from the shape alone, for devices that give a block
// 96 KiB (all but sm_75).
template <class Storage>
bool fits_one_block(const ForwardParams& p, int needs, const Stream& stream) {
  constexpr int64_t kMost = 96 * 1024;
  const int64_t most = stream.resident_bytes < kMost ? stream.resident_bytes : kMost;
  const int64_t tokens = p.cross && p.queries > p.tokens ? p.queries : p.tokens;
  // first the room for a bare key, so that no size overflows in Layout
  if (tokens > kMost) return false;
  return Layout<Storage>(p, needs, true, tokens, stream.stages).total <= most;
}

template <class Storage>
int64_t streaming_bytes(const ForwardParams& p, int needs, const Stream& stream) {
  return Layout<Storage>(p, needs, false, 0, stream.stages).total;
}

// Puts a head of one side into shared memory; for all threads of a block.
template <class Storage>
struct Select {
  const ForwardParams& p;
  Side side;
  int needs;
  Accumulate<Storage>* partial = nullptr;
  bool resident = false;
  __device__ void operator()(int64_t index, int64_t split) const {
    Head<Storage>& head = shared_head<Head<Storage>>();
    if (threadIdx.x == 0) head.select(p, side, needs, resident, index, split, partial);
    head.find_center();
  }
};

// Calls body(rest) for each of the block's units of work, heads x splits x `rest`, with the head
// and split selected.
template <class SelectHead, class Body>
__device__ __forceinline__ void for_each_work(const ForwardParams& p, int64_t splits, int64_t rest,
                                              const SelectHead& select, Body body) {
  const int64_t total = p.batch * p.heads * splits * rest;
  for (int64_t work = blockIdx.x; work < total; work += gridDim.x) {
    __syncthreads();  // the block is done with the head before
    select(work / rest / splits, work / rest % splits);
    body(work % rest);
  }
}

}  // namespace setformer::cuda
