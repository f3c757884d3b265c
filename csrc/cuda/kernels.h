// The kernels of one storage type, as launch.cu knows them. Each forward_*.cu and backward_*.cu
// instantiates one direction of one type, so that compilers can work on them side by side.
#pragma once

#include <cuda_runtime_api.h>

#include "../set_attention.h"

namespace setformer::cuda {

// Where and how the launches of one call go; remembers the first that failed.
struct Stream {
  cudaStream_t stream;
  int device;
  int stages;           // buffers per tile: 2 where copies run in the background (sm_80 on)
  int64_t block_bytes;  // shared memory that the device gives a block
  bool resident;        // whether heads that fit a block are worked on by one
  cudaError_t error = cudaSuccess;
  const char* kernel = nullptr;
};

// Where the workspace's parts are, in numbers of the accumulate type from its start.
struct UnitLengthWorkspace {
  int64_t key = 0, query = 0, reference = 0;  // storage [B, H, count, D], reference 1 or B
};
struct ForwardWorkspace {
  int64_t partial = 0, total = 0;
  UnitLengthWorkspace scaled;  // after all others
};
struct BackwardWorkspace {
  int64_t delta = 0;                   // [B, H, receivers]
  int64_t pooled_gradient = 0;         // [B, H, M, Dv]
  int64_t eta = 0;                     // [B, H, M]
  int64_t row_adjoints[2] = {};        // [B, H, max(T, 1), count] of keys and of queries
  int64_t column_adjoints[2] = {};     // [B, H, T + 1, M]
  int64_t scalars[2] = {};             // [B, H, splits, 2]
  int64_t reference_products[2] = {};  // [B, H, M]
  int64_t partial = 0, total = 0;
  UnitLengthWorkspace scaled;  // after all others
};

template <class Storage>
struct ForwardKernels {
  static ForwardWorkspace workspace(const ForwardParams& p);
  static void run(const ForwardParams& p, void* workspace, Stream& stream);
};

// Heads that stay on the chip: half types on sm_80 and later. Returns whether there is a kernel for
// the problem and the device has room for it; else nothing is launched.
template <class Storage>
struct OnChipForward {
  static bool run(const ForwardParams& p, Stream& stream);
};

// The same of backward with the gaussian kernel. Heads that want logarithms, for large scores or
// for reference masses that are far apart, it leaves as they are.
template <class Storage>
struct OnChipBackward {
  static bool run(const BackwardParams& p, const BackwardWorkspace& parts, void* workspace,
                  Stream& stream);
};

template <class Storage>
struct BackwardKernels {
  static BackwardWorkspace workspace(const BackwardParams& p);
  static void run(const BackwardParams& p, void* workspace, Stream& stream);
};

}  // namespace setformer::cuda
