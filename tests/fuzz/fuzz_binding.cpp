// libFuzzer on the binding: bytes describe the arrays and options of a call, which computes or
// raises ValueError, TypeError or MemoryError, and touches no memory but that of the arrays
// (AddressSanitizer). Most calls are right but for a few changes. Descriptions may be absurd but do
// not lie: whatever shape and strides reach is allocated, and no byte more.
#include <fuzzer/FuzzedDataProvider.h>
#include <pybind11/embed.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "dlpack.h"

extern "C" PyObject* PyInit__C();

namespace {

namespace py = pybind11;
namespace dlpack = setformer::dlpack;
using Bytes = FuzzedDataProvider;

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
constexpr double kMostElements = 1 << 14;  // of an array, and between those that it leaves out

struct Description {
  std::string name;
  std::vector<int64_t> shape, strides;
  dlpack::DataType type;
  char fill = 0x3f;  // each byte: numbers between 0 and 2 in any type
  bool without_strides = false;
  bool read_only = false;
  bool versioned = true;
  dlpack::Device device = {dlpack::kCpu, 0};
  std::vector<int64_t> content = {};  // where it is not `fill`
};

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  uint64_t stride = 1;  // may overflow, in arrays without elements
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = int64_t(stride);
    stride *= uint64_t(shape[i]);
  }
  return strides;
}

// An array of a description, as a capsule.
class Array {
 public:
  explicit Array(const Description& description) : description_(description) {
    auto& [name, shape, strides, type, fill, without_strides, read_only, versioned, device,
           content] = description_;
    double before = 0, after = 1;  // elements in reach before the first, and from it on
    double elements = 1;           // doubles: sizes may be absurd
    for (size_t i = 0; i < shape.size(); ++i) {
      elements *= double(shape[i]);
      (strides[i] < 0 ? before : after) += double(shape[i] - 1) * std::abs(double(strides[i]));
    }
    if (elements == 0) before = after = 0;
    if (before + after > kMostElements) {  // one element, expanded
      strides.assign(shape.size(), 0);
      without_strides = false;
      before = 0, after = 1;
    }
    const int64_t bytes = (int64_t{type.bits} * type.lanes + 7) / 8;
    memory_.reset(new char[int64_t(before + after) * bytes]);
    std::memset(memory_.get(), type.code == dlpack::kBool ? fill & 1 : fill,
                size_t(before + after) * bytes);
    std::copy_n(reinterpret_cast<const char*>(content.data()),
                std::min(content.size() * 8, size_t(after) * bytes), memory_.get());
    const dlpack::Tensor tensor = {elements == 0 ? nullptr : memory_.get(),
                                   device,
                                   int32_t(shape.size()),
                                   type,
                                   shape.data(),
                                   without_strides ? nullptr : strides.data(),
                                   uint64_t(before) * bytes};
    versioned_ = {1, 0, nullptr, nullptr, read_only ? dlpack::kReadOnly : 0, tensor};
    unversioned_ = {tensor, nullptr, nullptr};
  }
  Array(const Array&) = delete;

  py::object capsule() {
    return description_.versioned ? py::capsule(&versioned_, "dltensor_versioned")
                                  : py::capsule(&unversioned_, "dltensor");
  }

 private:
  Description description_;
  std::unique_ptr<char[]> memory_;
  dlpack::ManagedTensorVersioned versioned_;
  dlpack::ManagedTensor unversioned_;
};

// Arrays of a right call.
class Problem {
 public:
  Problem(const std::string& function, Bytes& bytes) {
    const auto size = [&] { return bytes.PickValueInArray<int64_t>({1, 2, 3, 4, 5, 0}); };
    const auto maybe = [&] { return bytes.ConsumeBool(); };
    const bool forward = function == "set_attention_forward";
    const bool packed = maybe(), cross = maybe(), positions = maybe();
    const int64_t B = size(), H = size(), N = 4 * size() + size(), Nq = size(), M = 1 + 4 * size();
    const int64_t D = 1 + 3 * size(), Dv = 1 + 3 * size(), P = 1 + size() % 3, T = size();
    const int64_t rows = packed ? 1 : B, queries = cross ? Nq : N;
    storage_ = bytes.PickValueInArray<dlpack::DataType>({{dlpack::kFloat, 32, 1},
                                                         {dlpack::kFloat, 64, 1},
                                                         {dlpack::kFloat, 16, 1},
                                                         {dlpack::kBFloat, 16, 1}});
    accumulate_ = {dlpack::kFloat, uint8_t(storage_.bits == 64 ? 64 : 32), 1};
    iterations = T;

    storage("key", {rows, H, N, D});
    storage("reference", {H, M, D});
    if (maybe()) arrays.back().shape.insert(arrays.back().shape.begin(), B);
    accumulate("epsilon", {H});
    const bool bandwidth = maybe(), reference_mass = maybe();
    if (bandwidth) accumulate("bandwidth", {H});
    if (maybe()) accumulate("token_mass", {rows, H, N});
    if (reference_mass) accumulate("reference_mass", {B, H, M});
    if (positions) {
      accumulate("token_positions", {N, P});
      accumulate("reference_positions", {M, P});
    }
    if (!packed && maybe()) add("mask", {B, N}, {dlpack::kBool, 8, 1});
    if (packed) offsets("offsets", B, N, bytes);
    if (cross) {
      storage("query", {rows, H, Nq, D});
      if (positions) accumulate("query_positions", {Nq, P});
      if (!packed && maybe()) add("query_mask", {B, Nq}, {dlpack::kBool, 8, 1});
      if (packed) offsets("query_offsets", B, Nq, bytes);
    }
    storage("value", {rows, H, N, Dv});
    const bool with_output = cross || maybe();
    if (with_output) storage("output", {rows, H, queries, Dv});
    if (!forward || !with_output || maybe()) {
      accumulate("rows", {rows, H, T + 1, N});
      accumulate("columns", {B, H, std::max<int64_t>(T, 1) + 1, M});
      accumulate("pooled", {B, H, M, Dv});
      if (cross) {
        accumulate("query_rows", {rows, H, T + 1, Nq});
        accumulate("query_columns", {B, H, std::max<int64_t>(T, 1), M});
      }
    }
    if (forward) return;
    if (with_output) storage("grad_output", {rows, H, queries, Dv});
    if (maybe()) accumulate("grad_pooled", {B, H, M, Dv});
    storage("grad_key", {rows, H, N, D});
    storage("grad_value", {rows, H, N, Dv});
    if (cross) storage("grad_query", {rows, H, Nq, D});
    accumulate("grad_reference", {B, H, M, D});
    accumulate("grad_epsilon", {B, H});
    if (bandwidth && maybe()) accumulate("grad_bandwidth", {B, H});
    if (maybe()) accumulate("grad_token_mass", {rows, H, N});
    if (reference_mass && maybe()) accumulate("grad_reference_mass", {B, H, M});
  }

  std::vector<Description> arrays;
  int64_t iterations;

 private:
  void add(const char* name, const std::vector<int64_t>& shape, dlpack::DataType type) {
    arrays.push_back({name, shape, {}, type});
  }
  void storage(const char* name, const std::vector<int64_t>& shape) { add(name, shape, storage_); }
  void accumulate(const char* name, const std::vector<int64_t>& shape) {
    add(name, shape, accumulate_);
  }
  void offsets(const char* name, int64_t sequences, int64_t tokens, Bytes& bytes) {
    std::vector<int64_t> content = {0};
    for (int64_t s = 1; s < sequences; ++s) {
      content.push_back(bytes.ConsumeIntegralInRange(content.back(), tokens));
    }
    if (sequences > 0) content.push_back(tokens);
    add(name, {sequences + 1}, {dlpack::kInt, 64, 1});
    arrays.back().content = content;
  }

  dlpack::DataType storage_, accumulate_;
};

int64_t any_size(Bytes& bytes) {
  if (bytes.ConsumeBool()) return bytes.ConsumeIntegralInRange<int64_t>(0, 9);
  return bytes.PickValueInArray<int64_t>({int64_t{1} << 59, int64_t{1} << 62, kMost});
}

enum class Change {
  kSize,
  kMoreDimensions,
  kLessDimensions,
  kStride,
  kOrderInMemory,
  kNoStrides,
  kBits,
  kType,
  kDevice,
  kReadOnly,
  kFill,
  kContent,
  kMaxValue = kContent
};

void change(Description& array, Bytes& bytes) {
  auto& shape = array.shape;
  auto& strides = array.strides;
  const size_t dimension = shape.empty() ? 0 : bytes.ConsumeIntegral<uint8_t>() % shape.size();
  const auto kind = bytes.ConsumeEnum<Change>();
  if (shape.empty() && kind < Change::kNoStrides && kind != Change::kMoreDimensions) return;
  switch (kind) {
    case Change::kSize:
      shape[dimension] = any_size(bytes);
      strides = contiguous_strides(shape);
      break;
    case Change::kMoreDimensions:
      shape.insert(shape.begin() + dimension, any_size(bytes));
      strides = contiguous_strides(shape);
      break;
    case Change::kLessDimensions:
      shape.erase(shape.begin() + dimension);
      strides = contiguous_strides(shape);
      break;
    case Change::kStride:
      strides[dimension] = bytes.ConsumeIntegralInRange<int64_t>(-40, 40);
      array.without_strides = false;
      break;
    case Change::kOrderInMemory:
      std::swap(shape[dimension], shape.back());
      strides = contiguous_strides(shape);
      std::swap(shape[dimension], shape.back());
      std::swap(strides[dimension], strides.back());
      array.without_strides = false;
      break;
    case Change::kNoStrides:
      strides = contiguous_strides(shape);
      array.without_strides = true;
      break;
    case Change::kBits:
      array.type.bits = bytes.PickValueInArray<uint8_t>({1, 8, 16, 32, 64, 255});
      break;
    case Change::kType:
      array.type.code = bytes.ConsumeIntegral<uint8_t>();
      array.type.lanes = bytes.ConsumeIntegralInRange<uint16_t>(0, 4);
      break;
    case Change::kDevice:
      array.device = {bytes.ConsumeIntegralInRange(0, 16), bytes.ConsumeIntegralInRange(-1, 1)};
      break;
    case Change::kReadOnly:
      array.read_only = true;
      array.versioned = bytes.ConsumeBool();
      break;
    case Change::kFill:
      array.fill = bytes.PickValueInArray<char>({0, -1, char(0xbf), 0x7f, 0x01});
      break;
    case Change::kContent:
      for (int64_t& x : array.content) x = bytes.ConsumeIntegralInRange<int64_t>(-1, 30);
      if (bytes.ConsumeBool() && !array.content.empty()) array.content.back() = kMost;
      break;
  }
}

py::dict options(int64_t iterations, Bytes& bytes) {
  py::dict options;
  options["iterations"] = iterations;
  if (bytes.ConsumeBool()) options["kernel"] = "linear";
  options["normalize"] = bytes.ConsumeBool();
  if (bytes.ConsumeIntegral<uint8_t>() != 1) return options;
  options["kernel"] = py::bytes(bytes.ConsumeRandomLengthString(8));
  options["position_bandwidth"] = bytes.ConsumeFloatingPoint<double>();
  options["iterations"] =
      bytes.PickValueInArray<int64_t>({-1, iterations, int64_t{1} << 31, kMost});
  return options;
}

}  // namespace

extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }  // Python's, at exit

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  PyImport_AppendInittab("_C", PyInit__C);
  new py::scoped_interpreter(false);  // lives as long as the process; signals are libFuzzer's
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  const char* function =
      bytes.PickValueInArray({"set_attention_forward", "set_attention_backward"});
  Problem problem(function, bytes);
  py::dict arguments = options(problem.iterations, bytes);
  for (Description& array : problem.arrays) array.strides = contiguous_strides(array.shape);
  const int changes = bytes.ConsumeIntegralInRange(0, 3);
  for (int i = 0; i < changes; ++i) {
    change(problem.arrays[bytes.ConsumeIntegral<uint8_t>() % problem.arrays.size()], bytes);
  }
  std::list<Array> arrays;
  for (const Description& description : problem.arrays) {
    const auto what = bytes.ConsumeIntegral<uint8_t>();
    if (what == 1) continue;
    if (what == 2) {
      arguments[description.name.c_str()] = bytes.ConsumeFloatingPointInRange<double>(-1, 2);
      continue;
    }
    arrays.emplace_back(description);
    arguments[description.name.c_str()] = arrays.back().capsule();
  }
  try {
    py::module_::import("_C").attr(function)(**arguments);
  } catch (const py::error_already_set& error) {
    const bool expected = error.matches(PyExc_ValueError) || error.matches(PyExc_TypeError) ||
                          error.matches(PyExc_MemoryError);
    if (!expected) throw;
  }
  return 0;
}
