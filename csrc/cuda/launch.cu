// From the entry points to the kernels of a storage type.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"
#include "launch.h"

namespace setformer::cuda {
namespace {

// Makes `device` current for the time of a call.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

template <class Call>
Result run(const ForwardParams& p, int device, void* stream, Call call) {
  const DeviceGuard guard(device);
  // An error that is reported here must not be found again by the next launch's check.
  if (guard.error() != cudaSuccess) {
    cudaGetLastError();
    return {int(guard.error()), "cudaSetDevice"};
  }
  int major = 0, bytes = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    return {int(error), "cudaDeviceGetAttribute"};
  }
  Stream target{static_cast<cudaStream_t>(stream), major >= 8 ? 2 : 1, bytes};
  switch (p.type) {
    case ScalarType::kFloat32:
      call(Kernels<float>{}, target);
      break;
    case ScalarType::kFloat64:
      call(Kernels<double>{}, target);
      break;
    case ScalarType::kBFloat16:
      call(Kernels<__nv_bfloat16>{}, target);
      break;
    case ScalarType::kFloat16:
      call(Kernels<__half>{}, target);
      break;
  }
  return {int(target.error), target.kernel};
}

int64_t bytes_of(ScalarType type, int64_t numbers) {
  return numbers * int64_t(type == ScalarType::kFloat64 ? sizeof(double) : sizeof(float));
}

}  // namespace

// The layouts of float64 differ by its smaller tiles; all other types are alike.
int64_t forward_workspace(const ForwardParams& p) {
  return bytes_of(p.type, p.type == ScalarType::kFloat64
                              ? Kernels<double>::forward_workspace(p).total
                              : Kernels<float>::forward_workspace(p).total);
}

int64_t backward_workspace(const BackwardParams& p) {
  return bytes_of(p.type, p.type == ScalarType::kFloat64
                              ? Kernels<double>::backward_workspace(p).total
                              : Kernels<float>::backward_workspace(p).total);
}

Result set_attention_forward(const ForwardParams& p, void* workspace, int device, void* stream) {
  return run(p, device, stream,
             [&](auto kernels, Stream& target) { kernels.forward(p, workspace, target); });
}

Result set_attention_backward(const BackwardParams& p, void* workspace, int device, void* stream) {
  return run(p, device, stream,
             [&](auto kernels, Stream& target) { kernels.backward(p, workspace, target); });
}

Result transport_plan(const PlanParams& p, int device, void* stream) {
  return run(p, device, stream, [&](auto kernels, Stream& target) { kernels.plan(p, target); });
}

const char* error_name(int error) { return cudaGetErrorName(cudaError_t(error)); }
const char* error_message(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace setformer::cuda
