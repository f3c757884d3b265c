// Turns arrays from Python (anything with __dlpack__, or a DLPack capsule) into setformer::Tensor,
// after a check of their shape, type and device.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "dlpack.h"
#include "set_attention.h"

namespace setformer {

namespace py = pybind11;

inline std::string type_name(dlpack::DataType type) {
  static const char* const kinds[] = {"int",    "uint",    "float", "handle",
                                      "bfloat", "complex", "bool"};
  if (type.code == dlpack::kBool) return "bool";
  return (type.code < 7 ? kinds[type.code] : "type") + std::to_string(type.bits);
}

// As torch writes it: "cpu", "cuda:1".
inline std::string device_name(dlpack::Device device) {
  if (device.type == dlpack::kCpu) return "cpu";
  if (device.type == dlpack::kCuda) return "cuda:" + std::to_string(device.id);
  return "DLPack device type " + std::to_string(device.type);
}

inline std::string class_name(const py::object& object) {
  return py::str(py::type::handle_of(object).attr("__name__"));
}

// A dimension's letter and size; the size is -1 until the first array with this dimension sets it.
struct Dimension {
  const char* letter;
  int64_t size = -1;
};
using Shape = std::initializer_list<Dimension*>;

// "[a, b]": text(item) for each item.
template <class Item, class Text>
std::string listed(const Item* items, size_t count, Text text) {
  std::string result;
  for (size_t i = 0; i < count; ++i) result += (i > 0 ? ", " : "") + text(items[i]);
  return "[" + result + "]";
}

inline std::string describe(Shape shape) {
  return listed(shape.begin(), shape.size(), [](const Dimension* dimension) {
    const std::string letter = dimension->letter;
    return dimension->size < 0 ? letter : letter + "=" + std::to_string(dimension->size);
  });
}

// True in a build for tests that runs the CUDA kernels on the CPU: host memory then counts as
// memory of CUDA device 0, so that CPU tensors are treated as CUDA tensors.
constexpr bool emulated_device() {
#ifdef SETFORMER_EMULATED_DEVICE
  return true;
#else
  return false;
#endif
}

class Array {
 public:
  Array() = default;
  // `object` may be None: an absent array. `stream` is the cudaStream_t that will use it.
  Array(const char* function, const char* name, const py::object& object, uintptr_t stream)
      : function_(function), name_(name) {
    if (object.is_none()) return;
    capsule_ = object;
    if (!PyCapsule_CheckExact(object.ptr())) {
      if (!py::hasattr(object, "__dlpack__")) {
        refuse<py::type_error>("must be an array with __dlpack__ (NumPy, torch, ...), got " +
                               class_name(object));
      }
      capsule_ = export_capsule(object, stream);
    }
    // The capsule stays ours, unconsumed, until the call is over; then its own destructor frees it.
    if (PyCapsule_IsValid(capsule_.ptr(), "dltensor_versioned")) {
      auto* managed = static_cast<dlpack::ManagedTensorVersioned*>(
          PyCapsule_GetPointer(capsule_.ptr(), "dltensor_versioned"));
      tensor_ = &managed->tensor;
      read_only_ = managed->flags & dlpack::kReadOnly;
    } else {
      auto* managed =
          static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
      if (managed == nullptr) throw py::error_already_set();
      tensor_ = &managed->tensor;
    }
  }

  bool given() const { return tensor_ != nullptr; }
  int rank() const { return tensor_->ndim; }
  int64_t size(int dimension) const { return tensor_->shape[dimension]; }
  dlpack::DataType type() const { return tensor_->dtype; }
  dlpack::Device device() const { return memory_of(tensor_->device); }

  // Throws unless the array has this shape or `other` (if given). Sets the sizes of the dimensions.
  const Array& expect_shape(Shape shape, Shape other = {}) const {
    for (const Shape& candidate : {shape, other}) {
      if (!fits(candidate)) continue;
      for (int i = 0; i < rank(); ++i) candidate.begin()[i]->size = size(i);
      return *this;
    }
    const auto number = [](int64_t size) { return std::to_string(size); };
    refuse("must be " + describe(shape) + (other.size() > 0 ? " or " + describe(other) : "") +
           ", got " + listed(tensor_->shape, size_t(rank()), number));
  }

  const Array& expect_type(dlpack::DataType expected) const {
    if (type().code != expected.code || type().bits != expected.bits || type().lanes != 1) {
      refuse<py::type_error>("must be " + type_name(expected) + ", got " + type_name(type()));
    }
    return *this;
  }

  const Array& expect_device(dlpack::Device expected) const {
    if (device().type != expected.type || device().id != expected.id) {
      refuse("must be on the key's device, " + device_name(expected) + ", got " +
             device_name(device()) + ": move one to the other");
    }
    return *this;
  }

  const Array& expect_writable() const {
    if (read_only_) refuse("must be writable, got a read-only array");
    if (!has_elements()) return *this;  // NumPy gives such arrays strides of 0
    for (int i = 0; i < rank(); ++i) {
      if (size(i) > 1 && stride(i, 1) == 0) {
        refuse("must hold every element once, got an expanded array");
      }
    }
    return *this;
  }

  // Throws unless C-contiguous: outputs whose layout the kernels fix.
  const Array& expect_contiguous() const {
    int64_t stride = 1;
    if (!has_elements()) return *this;
    for (int i = rank() - 1; i >= 0; --i) {
      if (size(i) > 1 && this->stride(i, stride) != stride) refuse("must be contiguous");
      stride *= size(i);
    }
    return *this;
  }

  // A Tensor of `dimensions` dimensions: the last ones are the array's, those before have stride 0.
  Tensor view(int dimensions) const {
    Tensor view;
    if (!given()) return view;
    view.data = static_cast<char*>(tensor_->data) + tensor_->byte_offset;
    // A null pointer means absent, but a given array without elements may have a null pointer too.
    static double nothing = 0;
    if (view.data == nullptr) view.data = &nothing;
    uint64_t stride = 1;  // may overflow, in arrays without elements
    for (int i = rank() - 1; i >= 0; --i) {
      view.stride[i + dimensions - rank()] = this->stride(i, int64_t(stride));
      stride *= uint64_t(size(i));
    }
    return view;
  }

 private:
  bool fits(Shape shape) const {
    const int64_t* const sizes = tensor_->shape;
    return shape.size() > 0 &&
           std::equal(shape.begin(), shape.end(), sizes, sizes + rank(),
                      [](const Dimension* d, int64_t n) { return d->size < 0 || d->size == n; });
  }
  // `contiguous` is the dimension's stride in a contiguous array, whose strides may be null.
  int64_t stride(int dimension, int64_t contiguous) const {
    return tensor_->strides == nullptr ? contiguous : tensor_->strides[dimension];
  }
  bool has_elements() const { return std::count(tensor_->shape, tensor_->shape + rank(), 0) == 0; }

  // The device whose kernels can use the memory.
  static dlpack::Device memory_of(dlpack::Device device) {
    if (emulated_device() && device.type == dlpack::kCpu) return {dlpack::kCuda, 0};
    if (device.type == dlpack::kCudaManaged) return {dlpack::kCuda, device.id};
    return device;
  }

  static bool is_cuda(const py::object& object) {
    const int type = py::cast<int>(py::tuple(object.attr("__dlpack_device__")())[0]);
    return type == dlpack::kCuda || type == dlpack::kCudaManaged;
  }

  static py::object export_capsule(const py::object& object, uintptr_t stream) {
    const py::object method = object.attr("__dlpack__");
    py::dict options;
    // The array's owner makes our stream wait until pending writes are done. CUDA's default stream
    // is 0 as a cudaStream_t, but 1 in the protocol.
    if (is_cuda(object)) options["stream"] = stream == 0 ? 1 : stream;
    // Version 1.0 of the protocol can hand over read-only arrays; older libraries do not know it.
    options["max_version"] = py::make_tuple(1, 0);
    try {
      return method(**options);
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
      options.attr("pop")("max_version");
      return method(**options);
    }
  }

  template <class Error = py::value_error>
  [[noreturn]] void refuse(const std::string& why) const {
    throw Error(std::string(function_) + ": " + name_ + " " + why);
  }

  const char* function_ = "";
  const char* name_ = "";
  py::object capsule_;
  const dlpack::Tensor* tensor_ = nullptr;
  bool read_only_ = false;
};

}  // namespace setformer
