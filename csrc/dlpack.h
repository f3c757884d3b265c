// The part of the DLPack ABI (github.com/dmlc/dlpack, version 1.0) that crosses into this package.
#pragma once

#include <cstdint>

namespace setformer::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null where contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* manager_context;
  void (*deleter)(ManagedTensor*);
};

// Since version 1.0, named "dltensor_versioned": says whether the memory may be written.
struct ManagedTensorVersioned {
  uint32_t major, minor;
  void* manager_context;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  Tensor tensor;
};

constexpr uint64_t kReadOnly = 1;

}  // namespace setformer::dlpack
