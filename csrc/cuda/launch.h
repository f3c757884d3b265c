// The CUDA backend's entry points: every pointer in the parameters is device memory.
//
// Nothing here allocates, synchronises or changes the current device for good: all work goes onto
// `stream` of `device`, so that a call can be captured in a CUDA graph. CUDA loads code lazily, at
// the first call: make one call outside of the graph before capturing. Values cannot be checked
// without waiting for the device: where the CPU backend refuses a mass, bandwidth or epsilon, the
// head's results are NaN here. All functions except error_name and error_message throw
// std::invalid_argument if an environment variable of knobs.h has an invalid value.
#pragma once

#include <cstdint>

#include "../set_attention.h"

namespace setformer::cuda {

// The largest sizes that shared memory has room for; larger ones are refused.
inline constexpr int64_t kMostDepth = 256, kMostValueDepth = 256, kMostReferences = 512;

// error is a cudaError_t, 0 for success; else `kernel` names what failed.
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
