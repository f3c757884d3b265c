// The answers of a build without CUDA.
#include "cuda/device.h"

namespace setformer::cuda {

std::string runtime_version() { return ""; }

std::string driver_version() { return ""; }

std::vector<std::string> devices() { return {}; }

}  // namespace setformer::cuda
