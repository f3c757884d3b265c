// The kernels of one storage type, as launch.cu calls them. Each forward_*.cu and backward_*.cu
// instantiates one direction of one type, so that they can be compiled in parallel.
#pragma once

#include <cuda_runtime_api.h>

#include "../set_attention.h"

namespace setformer::cuda {

// Where and how a call launches kernels; remembers the first launch that failed.
struct Stream {
  cudaStream_t stream;
  int device;
  int stages;           // buffers per tile: 2 where copies run in the background (sm_80 on)
  int64_t block_bytes;  // shared memory that the device gives a block
  bool resident;        // whether a head that fits a block or a cluster is computed by it alone
  int most_ranks;       // blocks that a cluster may have; 1 where there are no clusters
  cudaError_t error = cudaSuccess;
  const char* kernel = nullptr;
};

// Where the parts of the workspace begin, counted in numbers of the accumulate type.
struct UnitLengthWorkspace {
  int64_t key = 0, query = 0, reference = 0;  // storage [B, H, count, D], reference 1 or B
};
struct ForwardWorkspace {
  int64_t partial = 0, total = 0;
  UnitLengthWorkspace scaled;  // after all others
};
// How much of a head's backward runs on chip: nothing; the passes over its tokens, on shares of
// them; or all.
inline constexpr float kNotOnChip = 0, kPassesOnChip = 1, kAllOnChip = 2;

struct BackwardWorkspace {
  int64_t delta = 0;                   // [B, H, receivers]
  int64_t pooled_gradient = 0;         // [B, H, M, Dv]
  int64_t eta = 0;                     // [B, H, M]
  int64_t row_adjoints[2] = {};        // [B, H, max(T, 1), count] of keys and of queries
  int64_t column_adjoints[2] = {};     // [B, H, T + 1, M]
  int64_t scalars[2] = {};             // [shares, 2]
  int64_t reference_products[2] = {};  // [B, H, M]
  // [B, H]: kNotOnChip, kPassesOnChip or kAllOnChip; -1 where nothing runs on chip
  int64_t on_chip = 0;
  int64_t partial = 0, total = 0;
  UnitLengthWorkspace scaled;  // after all others
};

template <class Storage>
struct ForwardKernels {
  static ForwardWorkspace workspace(const ForwardParams& p);
  static void run(const ForwardParams& p, void* workspace, Stream& stream);
};

// Heads that stay on the chip: all types but float64, on sm_80 and later. Returns false, and
// launches nothing, if there is no kernel for the problem or the device has no room for it.
template <class Storage>
struct OnChipForward {
  static bool run(const ForwardParams& p, Stream& stream);
};

// The same for heads that the blocks of a cluster share: half types, on sm_90 and later.
template <class Storage>
struct OnClusterForward {
  static bool run(const ForwardParams& p, Stream& stream);
};

// The same for heads of which many blocks take a share each, with launches between which they merge
// their sums: on sm_80 and later, up to 128 references.
template <class Storage>
struct SharedForward {
  static int64_t workspace(const ForwardParams& p);  // in numbers of the accumulate type
  static bool run(const ForwardParams& p, float* workspace, Stream& stream);
};

// The same for backward, with the gaussian kernel only. Leaves to other kernels the heads that need
// logarithms: for large scores, or reference masses that are far apart.
template <class Storage>
struct OnChipBackward {
  static bool run(const BackwardParams& p, const BackwardWorkspace& parts, void* workspace,
                  Stream& stream);
};

enum class Pass { kDistribution, kStep, kGradients };  // over the tokens of one side, in backward

// The passes of backward on shares, up to 128 references; other kernels merge their sums. Returns
// false, and launches nothing, as OnChipBackward does.
template <class Storage>
struct SharedBackward {
  // Finds the heads that the passes compute. To be called before any pass.
  static bool begin(const BackwardParams& p, const BackwardWorkspace& parts, float* workspace,
                    Stream& stream);
  // Step t, or another pass.
  static void run(const BackwardParams& p, const BackwardWorkspace& parts, float* workspace,
                  Pass pass, bool of_queries, int64_t t, Stream& stream);
};

template <class Storage>
struct BackwardKernels {
  static BackwardWorkspace workspace(const BackwardParams& p);
  static void run(const BackwardParams& p, void* workspace, Stream& stream);
};

}  // namespace setformer::cuda
