// The functions of a build without CUDA. The binding asks compiled() before it calls a kernel; C++
// callers that do not ask get an error.
#include "cuda/device.h"
#include "cuda/launch.h"

namespace setformer::cuda {
namespace {

constexpr int kNoDevice = 100;  // cudaErrorNoDevice

}  // namespace

bool compiled() { return false; }

std::string runtime_version() { return ""; }

std::string driver_version() { return ""; }

std::vector<std::string> devices() { return {}; }

int64_t forward_workspace(const ForwardParams&) { return 0; }

int64_t backward_workspace(const BackwardParams&) { return 0; }

Result set_attention_forward(const ForwardParams&, void*, int, void*) {
  return {kNoDevice, "set_attention_forward"};
}

Result set_attention_backward(const BackwardParams&, void*, int, void*) {
  return {kNoDevice, "set_attention_backward"};
}

const char* error_name(int) { return "cudaErrorNoDevice"; }

const char* error_message(int) { return "this build has no CUDA kernels"; }

}  // namespace setformer::cuda
