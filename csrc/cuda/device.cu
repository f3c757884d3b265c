#include <cuda_runtime_api.h>

#include "cuda/device.h"

namespace setformer::cuda {
namespace {

// Never launched: only for asking the driver which compiled form of a kernel a device would run.
__global__ void probe() {}

std::string dotted(int version) {  // 13010 -> "13.1"
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string code_for_current_device() {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return std::string("cannot run this build: ") + cudaGetErrorString(status);
  }
  // Digits as in "sm_90": binaryVersion is 10 * major + minor.
  return "runs code for " + std::to_string(attributes.binaryVersion);
}

std::string describe(int device) {
  cudaDeviceProp properties{};
  cudaError_t status = cudaGetDeviceProperties(&properties, device);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return std::string("unavailable: ") + cudaGetErrorString(status);
  }
  return std::string(properties.name) + ", capability " + std::to_string(properties.major) + "." +
         std::to_string(properties.minor) + ", " + std::to_string(properties.totalGlobalMem >> 20) +
         " MiB, " + code_for_current_device();
}

}  // namespace

bool compiled() { return true; }

std::string runtime_version() { return dotted(CUDART_VERSION); }

std::string driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return "";
  return dotted(version);
}

std::vector<std::string> devices() {
  int count = 0;
  int current = 0;
  // If a call failed, the last error is cleared, so that no later check of a launch reports it.
  if (cudaGetDeviceCount(&count) != cudaSuccess || cudaGetDevice(&current) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  std::vector<std::string> lines;
  for (int device = 0; device < count; ++device) lines.push_back(describe(device));
  cudaSetDevice(current);
  return lines;
}

}  // namespace setformer::cuda
