// The entry points; each calls the kernels of a storage type.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <vector>

#include "kernels.h"
#include "knobs.h"
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
Result run(int device, void* stream, Call call) {
  const DeviceGuard guard(device);
  // An error that is reported here must not be reported again by the check of the next launch.
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
  Stream target{static_cast<cudaStream_t>(stream),
                device,
                major >= 8 ? 2 : 1,
                bytes,
                knobs().resident,
                major >= 9 ? 8 : 1};
  call(target);
  return {int(target.error), target.kernel};
}

// The kernels of the storage type.
template <template <class> class Kernels, class Call>
void visit(ScalarType type, Call call) {
  switch (type) {
    case ScalarType::kFloat32:
      return call(Kernels<float>{});
    case ScalarType::kFloat64:
      return call(Kernels<double>{});
    case ScalarType::kBFloat16:
      return call(Kernels<__nv_bfloat16>{});
    case ScalarType::kFloat16:
      return call(Kernels<__half>{});
  }
}

// The tensors that have a row for each token, [B, H, tokens, *].
std::vector<Tensor*> tensors_of_tokens(ForwardParams& p) {
  return {&p.query, &p.key, &p.value, &p.token_mass, &p.output};
}
std::vector<Tensor*> tensors_of_tokens(BackwardParams& p) {
  std::vector<Tensor*> tensors = tensors_of_tokens(static_cast<ForwardParams&>(p));
  for (Tensor* x :
       {&p.grad_output, &p.grad_query, &p.grad_key, &p.grad_value, &p.grad_token_mass}) {
    tensors.push_back(x);
  }
  return tensors;
}

// With the knobs. In packed arrays, whose B is 1, the first dimension is made to run over the
// tokens, so that a sequence begins at the index of its first token.
template <class Params>
Params prepared(Params p) {
  p.tiles_shift = knobs().tiles_shift;
  if (p.offsets == nullptr) return p;
  for (Tensor* tensor : tensors_of_tokens(p)) tensor->stride[0] = tensor->stride[2];
  return p;
}

template <template <class> class Kernels, class Params>
int64_t workspace_bytes(const Params& given) {
  const Params p = prepared(given);
  const int64_t number = p.type == ScalarType::kFloat64 ? sizeof(double) : sizeof(float);
  int64_t numbers = 0;
  visit<Kernels>(p.type, [&](auto kernels) { numbers = kernels.workspace(p).total; });
  return numbers * number;
}

template <template <class> class Kernels, class Params>
void run_kernels(const Params& given, void* workspace, Stream& target) {
  const Params p = prepared(given);
  visit<Kernels>(p.type, [&](auto kernels) { kernels.run(p, workspace, target); });
}

}  // namespace

int64_t forward_workspace(const ForwardParams& p) { return workspace_bytes<ForwardKernels>(p); }
int64_t backward_workspace(const BackwardParams& p) { return workspace_bytes<BackwardKernels>(p); }

Result set_attention_forward(const ForwardParams& p, void* workspace, int device, void* stream) {
  return run(device, stream,
             [&](Stream& target) { run_kernels<ForwardKernels>(p, workspace, target); });
}

Result set_attention_backward(const BackwardParams& p, void* workspace, int device, void* stream) {
  return run(device, stream,
             [&](Stream& target) { run_kernels<BackwardKernels>(p, workspace, target); });
}

const char* error_name(int error) { return cudaGetErrorName(cudaError_t(error)); }
const char* error_message(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace setformer::cuda
