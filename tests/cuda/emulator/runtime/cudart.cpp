// The CUDA runtime's functions that a host object of nvcc (-cudart none) calls, on emulated
// devices: memory is the host's, a launch runs at once.
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <regex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "machine.h"

#ifndef EMULATED_CAPABILITY
#error "define EMULATED_CAPABILITY as 80 for compute capability 8.0"
#endif

namespace {

using emulator::Kernel;

constexpr int kDevices = 2;  // so that a tensor can lie on a device that is not the current one
constexpr size_t kSharedPerBlock = 48 << 10;  // without opting in

struct DeviceFacts {
  int capability;
  int shared_per_block_optin, multiprocessors;
  const char* name;
};
// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
constexpr DeviceFacts kFacts[] = {
    {75, 64 << 10, 40, "emulated device of compute capability 7.5"},
    {80, 163 << 10, 108, "emulated device of compute capability 8.0"},
    {86, 99 << 10, 84, "emulated device of compute capability 8.6"},
    {89, 99 << 10, 128, "emulated device of compute capability 8.9"},
    {90, 227 << 10, 132, "emulated device of compute capability 9.0"},
    {100, 227 << 10, 148, "emulated device of compute capability 10.0"},
    {120, 99 << 10, 170, "emulated device of compute capability 12.0"},
};

constexpr const DeviceFacts* facts_of(int capability) {
  for (const DeviceFacts& device : kFacts) {
    if (device.capability == capability) return &device;
  }
  return nullptr;
}
static_assert(facts_of(EMULATED_CAPABILITY));

const DeviceFacts* facts = facts_of(EMULATED_CAPABILITY);  // of all devices
unsigned most_ranks = 8;  // that the devices can hold of a cluster at once

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

struct LaunchRecord {
  std::string kernel;
  dim3 grid, block;
  size_t shared;
  int device;
  const void* stream;
  int status;
};

// What cudaFuncSetAttribute has allowed.
struct LimitRecord {
  const Kernel* kernel;
  int device;
  size_t bytes;
};

std::mutex mutex;                                               // one launch at a time
std::map<std::pair<int, const Kernel*>, size_t> shared_limits;  // by device, as in CUDA
std::vector<LimitRecord> limits;
void (*after_limit)() = nullptr;
std::map<const void*, int> stream_devices;
std::vector<LaunchRecord> launches;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::vector<Configuration> configurations;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

size_t shared_limit(const Kernel* kernel) {
  const auto found = shared_limits.find({current_device, kernel});
  return found == shared_limits.end() ? kSharedPerBlock : found->second;
}

size_t static_shared(const Kernel* kernel) {
  size_t bytes = 0;
  for (int i = 0; i < kernel->shared_array_count; ++i) bytes += kernel->shared_arrays[i].bytes;
  return bytes;
}

// Host objects register before main() begins, in no known order with what else starts there: the
// map is made when it is first asked for, and names are resolved by the first launch.
std::map<const void*, std::string>& names_by_stub() {
  static std::map<const void*, std::string> names;
  return names;
}

const Kernel* kernel_of(const void* stub) {
  const auto found = names_by_stub().find(stub);
  return found == names_by_stub().end() ? nullptr : emulator::find_kernel(found->second.c_str());
}

// Whether the devices can run the kernel's code, which an older one cannot.
bool has_code(const Kernel* kernel) { return kernel && kernel->target <= facts->capability; }

cudaError_t check_launch(const Kernel* kernel, dim3 grid, dim3 block, size_t shared,
                         cudaStream_t stream, uint32_t ranks) {
  if (!kernel) return cudaErrorInvalidDeviceFunction;
  if (!has_code(kernel)) return cudaErrorNoKernelImageForDevice;
  if (ranks > 1 && facts->capability < 90) return cudaErrorNotSupported;
  if (ranks > most_ranks) return cudaErrorInvalidClusterSize;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared + static_shared(kernel) > shared_limit(kernel)) return cudaErrorInvalidValue;
  if (kernel->most_threads && threads > uint64_t(kernel->most_threads)) {
    return cudaErrorLaunchOutOfResources;
  }
  const auto device = stream_devices.find(stream);
  if (device != stream_devices.end() && device->second != current_device) {
    return cudaErrorInvalidResourceHandle;
  }
  return cudaSuccess;
}

// EMULATOR_FAULT is "fault" or "hang" for kernels that access memory that is not theirs, or never
// end; "fault:REGEX" and "hang:REGEX" for those alone in whose mangled name the expression is
// found.
struct Fault {
  bool hangs = false;
  std::optional<std::regex> kernels;

  Fault() {
    const char* variable = std::getenv("EMULATOR_FAULT");
    const std::string text = variable ? variable : "";
    if (text.empty()) return;
    const size_t colon = text.find(':');
    const std::string kind = text.substr(0, colon);
    hangs = kind == "hang";
    if (!hangs && kind != "fault") {
      std::fprintf(stderr, "emulator: expected EMULATOR_FAULT fault or hang, got \"%s\"\n",
                   kind.c_str());
      std::abort();
    }
    kernels.emplace(colon == std::string::npos ? "" : text.substr(colon + 1));
  }
  bool is_in(const Kernel& kernel) const {
    return kernels && std::regex_search(kernel.name, *kernels);
  }
};

cudaError_t launch(const Kernel* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                   cudaStream_t stream, uint32_t ranks = 0) {
  static const Fault fault;
  const std::lock_guard lock(mutex);
  cudaError_t status = check_launch(kernel, grid, block, shared, stream, ranks);
  if (status == cudaSuccess && fault.is_in(*kernel)) {
    while (fault.hangs) std::this_thread::sleep_for(std::chrono::hours(1));
    status = cudaErrorIllegalAddress;
  }
  if (status == cudaSuccess) {
    status =
        cudaError_t(emulator::run(*kernel, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
                                  uint32_t(shared), arguments, ranks));
  }
  launches.push_back(
      {kernel ? kernel->name : "", grid, block, shared, current_device, stream, status});
  return remember(status);
}

cudaError_t set_device_checked(int device) {
  if (device < 0 || device >= kDevices) return remember(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

struct ErrorText {
  cudaError_t error;
  const char *name, *text;
};
constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorInvalidClusterSize, "cudaErrorInvalidClusterSize", "invalid cluster size"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress",
     "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
};

}  // namespace

extern "C" {

// Registration and launch, as the code that nvcc writes calls them

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names_by_stub()[stub] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return launch(kernel_of(kernel), grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t stream) {
  return launch(kernel_of(stub), grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub,
                                void** arguments) {
  uint32_t ranks = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    const auto& size = attribute.val.clusterDim;
    if (attribute.id != cudaLaunchAttributeClusterDimension || size.y != 1 || size.z != 1) {
      return remember(cudaErrorNotSupported);
    }
    ranks = size.x;
  }
  return launch(kernel_of(stub), config->gridDim, config->blockDim, arguments,
                config->dynamicSmemBytes, config->stream, ranks);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* stub,
                                           const cudaLaunchConfig_t* config) {
  const unsigned ranks = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  const Kernel* kernel = kernel_of(stub);
  if (!has_code(kernel)) return remember(cudaErrorInvalidDeviceFunction);
  if (config->dynamicSmemBytes + static_shared(kernel) > shared_limit(kernel)) {
    return remember(cudaErrorInvalidValue);
  }
  *clusters = ranks > most_ranks ? 0 : facts->multiprocessors / int(ranks);
  return cudaSuccess;
}

// Errors

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t error) {
  for (const ErrorText& known : kErrors) {
    if (known.error == error) return known.name;
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  for (const ErrorText& known : kErrors) {
    if (known.error == error) return known.text;
  }
  return "unrecognized error code";
}

// Devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return set_device_checked(device); }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDevices) return remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = facts->capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = facts->capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedPerBlock;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = facts->shared_per_block_optin;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = facts->multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMaxGridDimX:
      *value = 0x7fffffff;
      return cudaSuccess;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *value = 65535;
      return cudaSuccess;
    default:
      std::fprintf(stderr, "emulator: cudaDeviceGetAttribute does not know %d\n", int(attribute));
      return remember(cudaErrorNotSupported);
  }
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= kDevices) return remember(cudaErrorInvalidDevice);
  std::memset(properties, 0, sizeof *properties);
  std::snprintf(properties->name, sizeof properties->name, "%s", facts->name);
  properties->major = facts->capability / 10;
  properties->minor = facts->capability % 10;
  properties->totalGlobalMem = size_t{1} << 34;
  properties->sharedMemPerBlock = kSharedPerBlock;
  properties->sharedMemPerBlockOptin = facts->shared_per_block_optin;
  properties->multiProcessorCount = facts->multiprocessors;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}

// Kernels

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  const Kernel* kernel = kernel_of(stub);
  if (!kernel) return remember(cudaErrorInvalidDeviceFunction);
  if (!has_code(kernel)) return remember(cudaErrorNoKernelImageForDevice);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->binaryVersion = attributes->ptxVersion = kernel->target;
  attributes->sharedSizeBytes = static_shared(kernel);
  attributes->maxThreadsPerBlock = kernel->most_threads ? kernel->most_threads : 1024;
  attributes->maxDynamicSharedSizeBytes = int(shared_limit(kernel) - static_shared(kernel));
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  const Kernel* kernel = kernel_of(stub);
  if (!kernel) return remember(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return remember(cudaErrorInvalidValue);
  }
  const size_t total = size_t(value) + static_shared(kernel);
  if (value < 0 || total > size_t(facts->shared_per_block_optin)) {
    return remember(cudaErrorInvalidValue);
  }
  {
    const std::lock_guard lock(mutex);
    shared_limits[{current_device, kernel}] = total;
    limits.push_back({kernel, current_device, total});
  }
  if (after_limit) after_limit();
  return cudaSuccess;
}

// Memory

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (posix_memalign(pointer, 256, bytes ? bytes : 1)) return remember(cudaErrorMemoryAllocation);
  std::memset(*pointer, 0xff, bytes);  // memory that nobody has written reads as NaN
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

// Streams

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = static_cast<cudaStream_t>(std::malloc(1));
  stream_devices[*stream] = current_device;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  stream_devices.erase(stream);
  std::free(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// For tests: what has been launched and allowed

#define EMULATOR_API __attribute__((visibility("default")))

struct EmulatorLaunch {
  const char* kernel;
  unsigned grid[3], block[3];
  uint64_t shared;
  const void* stream;
  int device, status;
};
EMULATOR_API int emulator_launch_count() { return int(launches.size()); }
EMULATOR_API void emulator_clear_launches() {
  const std::lock_guard lock(mutex);
  launches.clear();
}
EMULATOR_API void emulator_launch(int index, EmulatorLaunch* out) {
  const LaunchRecord& launch = launches.at(index);
  *out = {launch.kernel.c_str(),
          {launch.grid.x, launch.grid.y, launch.grid.z},
          {launch.block.x, launch.block.y, launch.block.z},
          launch.shared,
          launch.stream,
          launch.device,
          launch.status};
}
struct EmulatorLimit {
  const char* kernel;
  int device;
  uint64_t bytes;
};
EMULATOR_API int emulator_limit_count() { return int(limits.size()); }
EMULATOR_API void emulator_limit(int index, EmulatorLimit* out) {
  const LimitRecord& limit = limits.at(index);
  *out = {limit.kernel->name, limit.device, limit.bytes};
}
// Called whenever cudaFuncSetAttribute has set a limit, where another host thread could come
// between.
EMULATOR_API void emulator_after_limit(void (*function)()) { after_limit = function; }
// What the devices are from now on, whatever the kernels were compiled for; false for an unknown
// one.
EMULATOR_API bool emulator_set_capability(int capability) {
  if (!facts_of(capability)) return false;
  facts = facts_of(capability);
  return true;
}
EMULATOR_API void emulator_set_most_ranks(unsigned ranks) { most_ranks = ranks; }
EMULATOR_API int emulator_set_device(int device) { return set_device_checked(device); }
EMULATOR_API int emulator_get_device() { return current_device; }
}
