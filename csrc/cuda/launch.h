// The CUDA backend's entry points: every pointer in the parameters is device memory, but
// for the offsets of packed sequences.
//
// Nothing here allocates, synchronises or changes the current device for good: all work goes onto
// `stream` of `device`, so that a call can be captured in a CUDA graph. A first call may load code,
// which CUDA does lazily; capture after one call outside of the graph. Values cannot be checked
// without waiting for the device: where the CPU backend refuses a mass, bandwidth or epsilon, the
// head's results are NaN here. All but the names of errors throw std::invalid_argument where an
// environment variable of knobs.h is nonsense.
#pragma once

#include <cstdint>

#include "../set_attention.h"

namespace setformer::cuda {

// What shared memory has room for; problems beyond are refused.
inline constexpr int64_t kMostDepth = 256, kMostValueDepth = 256, kMostReferences = 512;

// error is a cudaError_t, 0 for success; where it is not, `kernel` names what failed.
struct Result {
  int error = 0;
  const char* kernel = nullptr;
};

// Device memory that a call needs beside its tensors, in bytes; it starts at a multiple of 256 and
// may hold anything.
int64_t forward_workspace(const ForwardParams& params);
int64_t backward_workspace(const BackwardParams& params);

Result set_attention_forward(const ForwardParams& params, void* workspace, int device,
                             void* stream);
Result set_attention_backward(const BackwardParams& params, void* workspace, int device,
                              void* stream);

// "cudaErrorInvalidValue: invalid argument"
const char* error_name(int error);
const char* error_message(int error);

}  // namespace setformer::cuda
