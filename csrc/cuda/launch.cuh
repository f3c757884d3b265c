// How kernels are launched, and the code around the pass of each.
#pragma once

#include <atomic>

#include "kernels.h"
#include "problem.cuh"

namespace setformer::cuda {

// There is a block for each unit of work. More units than the largest grid holds take several
// launches: a kernel's first argument is the unit of its block 0. Whole clusters fill the grid.
inline constexpr int64_t kLargestGrid = 2147483647 / 8 * 8;

// Threads of a block in kernels that merge the results of other blocks: a thread or a warp per
// result.
inline constexpr int kMergeThreads = 128;

// Allows a kernel all the shared memory that the device gives a block; the default limit is 48 KiB.
// The limit is always set to this maximum: if each launch set its own size, another host thread
// could lower the limit before the launch.
template <auto kernel>
cudaError_t allow_shared_memory(const Stream& stream) {
  static std::atomic<uint64_t> allowed{0};  // a bit each for 64 devices; others are set each time
  const uint64_t bit = stream.device < 64 ? uint64_t(1) << stream.device : 0;
  if (allowed.load() & bit) return cudaSuccess;
  cudaFuncAttributes facts{};
  cudaError_t error = cudaFuncGetAttributes(&facts, kernel);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(stream.block_bytes - int64_t(facts.sharedSizeBytes)));
  }
  if (error == cudaSuccess) allowed.fetch_or(bit);
  return error;
}

// The compute capability (80 for 8.0) of the PTX that the device's code was compiled from. 0 if the
// build has no code for the device, if the stream already has an error, or if the capability cannot
// be found, which sets the stream's error.
template <auto kernel>
int ptx_version(Stream& stream) {
  if (stream.error != cudaSuccess) return 0;  // the call keeps its first error
  static std::atomic<int> known[64]{};
  const bool keeps = stream.device < 64;
  if (keeps && known[stream.device].load() != 0) return known[stream.device].load();
  cudaFuncAttributes facts{};
  const cudaError_t error = cudaFuncGetAttributes(&facts, kernel);
  if (error != cudaSuccess) {
    cudaGetLastError();  // reported by us, not by the next launch
    if (error == cudaErrorNoKernelImageForDevice) return 0;
    stream.error = error;
    stream.kernel = "cudaFuncGetAttributes";
    return 0;
  }
  if (keeps) known[stream.device].store(facts.ptxVersion);
  return facts.ptxVersion;
}

// What a launch is told beside its arguments; `ranks` blocks are a cluster.
class LaunchConfig {
 public:
  LaunchConfig(const Stream& stream, unsigned blocks, int ranks, int threads,
               int64_t shared_bytes) {
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim = {unsigned(ranks), 1, 1};
    config_.gridDim = blocks;
    config_.blockDim = threads;
    config_.dynamicSmemBytes = size_t(shared_bytes);
    config_.stream = stream.stream;
    config_.attrs = &cluster_;
    config_.numAttrs = ranks > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttribute cluster_{};
  cudaLaunchConfig_t config_{};
};

// Whether the device can run a cluster of so many blocks: a part of a device (MIG) may have too few
// multiprocessors side by side. The answer is kept: a multiprocessor holds one block of such
// kernels, whatever its shared memory.
template <auto kernel>
bool holds_clusters(const Stream& stream, int ranks, int threads, int64_t shared_bytes) {
  enum { kUnknown, kNo, kYes };
  static std::atomic<int> known[64][16]{};
  const bool keeps = stream.device < 64 && ranks < 16;
  int answer = keeps ? known[stream.device][ranks].load() : kUnknown;
  if (answer == kUnknown) {
    const LaunchConfig config(stream, unsigned(ranks), ranks, threads, shared_bytes);
    int clusters = 0;
    cudaError_t error = allow_shared_memory<kernel>(stream);
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveClusters(&clusters, kernel, config.get());
    }
    if (error != cudaSuccess) cudaGetLastError();  // not to be reported by the next launch
    answer = error == cudaSuccess && clusters > 0 ? kYes : kNo;
    if (keeps) known[stream.device][ranks].store(answer);
  }
  return answer == kYes;
}

template <auto kernel, class... Arguments>
void launch_clusters(Stream& stream, const char* name, int64_t blocks, int ranks, int threads,
                     int64_t shared_bytes, Arguments... arguments) {
  if (stream.error != cudaSuccess || blocks == 0) return;
  if (shared_bytes > 48 * 1024) {
    stream.error = allow_shared_memory<kernel>(stream);
    if (stream.error != cudaSuccess) cudaGetLastError();  // reported by us, not by the next launch
  }
  for (int64_t first = 0; first < blocks && stream.error == cudaSuccess; first += kLargestGrid) {
    const int64_t left = blocks - first;
    const unsigned grid = unsigned(left < kLargestGrid ? left : kLargestGrid);
    const LaunchConfig config(stream, grid, ranks, threads, shared_bytes);
    stream.error = cudaLaunchKernelEx(config.get(), kernel, first, arguments...);
    if (stream.error != cudaSuccess) cudaGetLastError();  // reported by us, not by the next launch
  }
  if (stream.error != cudaSuccess) stream.kernel = name;
}

template <auto kernel, class... Arguments>
void launch(Stream& stream, const char* name, int64_t blocks, int threads, int64_t shared_bytes,
            Arguments... arguments) {
  launch_clusters<kernel>(stream, name, blocks, 1, threads, shared_bytes, arguments...);
}

// In a group, to be called on all ranks: merges numbers whose kernels are already on the stream.
inline void merge(const ForwardParams& p, Stream& stream, const Shared* numbers, int64_t count) {
  if (p.group == nullptr || stream.error != cudaSuccess) return;
  if (p.group->merge(p.group->context, numbers, count)) return;
  stream.error = cudaErrorUnknown;
  stream.kernel = "merging over the ranks of the group";
}

// float64, mostly used to check gradients, always streams: that halves its code to compile.
template <class Storage>
inline constexpr bool kResident = sizeof(Storage) < 8;

template <class Storage>
int64_t resident_bytes(const ForwardParams& p, int needs, const Stream& stream) {
  const int64_t tokens = p.cross && p.queries > p.tokens ? p.queries : p.tokens;
  return Layout<Storage>(p, needs, true, tokens, stream.stages).total;
}

// Whether one block can hold the keys of each side, in at most the 163 KiB that sm_80 gives a
// block, or less if the device gives less.
template <class Storage>
bool fits_one_block(const ForwardParams& p, int needs, const Stream& stream) {
  constexpr int64_t kMost = 163 * 1024;
  if (!stream.resident) return false;
  if (p.group != nullptr) return false;  // ranks merge between launches
  // a key takes at least a byte; checked first, so that no size overflows in Layout
  if (p.tokens > kMost || p.queries > kMost) return false;
  return resident_bytes<Storage>(p, needs, stream) <=
         (stream.block_bytes < kMost ? stream.block_bytes : kMost);
}

template <class Storage>
int64_t streaming_bytes(const ForwardParams& p, int needs, const Stream& stream) {
  return Layout<Storage>(p, needs, false, 0, stream.stages).total;
}

// Puts the Head of one head and side into shared memory; to be called by all threads of a block.
// Returns whether there is work for the block: a short packed sequence is shared by fewer than the
// longest.
template <class Storage>
struct Select {
  const ForwardParams& p;
  Side side;
  int needs;
  Accumulate<Storage>* partial = nullptr;
  bool resident = false;
  __device__ bool operator()(int64_t index, int64_t split) const {
    Head<Storage>& head = shared_head<Head<Storage>>();
    if (thread_index() == 0) head.select(p, side, needs, resident, index, split, partial);
    head.find_center();
    return head.split < head.splits;
  }
};

// Selects the head and split of the block's unit of work, one of heads x splits x `rest`, and calls
// body(index within `rest`).
template <class SelectHead, class Body>
__device__ __forceinline__ void at_work(int64_t first, int64_t splits, int64_t rest,
                                        const SelectHead& select, Body body) {
  const int64_t work = first + blockIdx.x, part = work / rest;
  if (select(part / splits, part % splits)) body(work % rest);
}

}  // namespace setformer::cuda
