// Reads the arguments of a call into Params, and checks everything that a kernel relies on.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "arrays.h"
#include "build_info.h"
#include "cuda/device.h"

namespace setformer {

constexpr dlpack::DataType kBoolType{dlpack::kBool, 8, 1};
constexpr dlpack::DataType kInt64Type{dlpack::kInt, 64, 1};
constexpr dlpack::Device kHost{dlpack::kCpu, 0};
constexpr int64_t kMostIterations = int64_t{1} << 31;
constexpr int64_t kMostColumns = int64_t{1} << 24;  // of M, D and Dv: products of two stay small

inline dlpack::DataType accumulate_type(dlpack::DataType storage) {
  return {dlpack::kFloat, uint8_t(storage.bits == 64 ? 64 : 32), 1};
}

inline ScalarType scalar_type(const char* function, dlpack::DataType type) {
  if (type.code == dlpack::kFloat && type.bits == 32) return ScalarType::kFloat32;
  if (type.code == dlpack::kFloat && type.bits == 64) return ScalarType::kFloat64;
  if (type.code == dlpack::kFloat && type.bits == 16) return ScalarType::kFloat16;
  if (type.code == dlpack::kBFloat && type.bits == 16) return ScalarType::kBFloat16;
  throw py::type_error(std::string(function) +
                       ": key must be float32, float64, bfloat16 or float16, got " +
                       type_name(type));
}

inline void require(bool condition, const char* function, const std::string& message) {
  if (!condition) throw py::value_error(std::string(function) + ": " + message);
}

// Reads the arrays and options of a call into Params, checking each against the sizes that key and
// reference fix.
class Call {
 public:
  // `stream` is the cudaStream_t of CUDA arrays.
  Call(const char* function, const py::dict& arrays, uintptr_t stream)
      : function_(function), arrays_(arrays), stream_(stream) {}

  const char* function() const { return function_; }
  dlpack::Device device() const { return device_; }
  bool on_cuda() const { return device_.type == dlpack::kCuda; }
  void* stream() const { return reinterpret_cast<void*>(stream_); }
  dlpack::DataType storage() const { return storage_; }
  // Whose memory the arrays are in, as their owner names it.
  dlpack::Device memory_device() const { return emulated_device() ? kHost : device_; }

  Array array_of(const char* name, const py::object& object) const {
    return Array(function_, name, object, stream_);
  }

  // Inputs and options common to all calls.
  void read_problem(ForwardParams& p, const std::string& kernel, double position_bandwidth,
                    int64_t iterations, bool normalize) {
    const Array key = required("key");
    choose_device(key);
    p.type = scalar_type(function_, key.type());
    storage_ = key.type();
    key.expect_shape({{{"B"}, {"H"}, {"N"}, {"D"}}});
    p.batch = key.size(0);
    p.heads = key.size(1);
    p.tokens = key.size(2);
    p.depth = key.size(3);
    p.key = keep(key).view(4);
    const Array offsets = array("offsets");
    if (offsets.given()) {
      require(p.batch == 1, function_,
              "key must be [1, H, N, D] where offsets tell its sequences apart, got B=" +
                  std::to_string(p.batch));
      p.batch = offsets.rank() == 1 ? offsets.size(0) - 1 : 0;
      p.offsets = checked_offsets("offsets", offsets, p.batch, p.tokens, offsets_);
    }
    const Array reference = required("reference");
    reference.expect_device(device_).expect_type(storage_).expect_shape(
        {{{"H", p.heads}, {"M"}, {"D", p.depth}},
         {{"B", p.batch}, {"H", p.heads}, {"M"}, {"D", p.depth}}});
    p.references = reference.size(reference.rank() - 2);
    p.reference = keep(reference).view(4);
    require(p.references > 0, function_, "reference must hold at least one reference, got M=0");
    require(p.depth > 0, function_, "key must have at least one dimension per head, got D=0");
    require(p.references <= kMostColumns && p.depth <= kMostColumns, function_,
            "reference must be [.., M, D] with M and D up to 2^24, got M=" +
                std::to_string(p.references) + ", D=" + std::to_string(p.depth));

    require(kernel == "gaussian" || kernel == "linear", function_,
            "kernel must be 'gaussian' or 'linear', got '" + kernel + "'");
    require(std::isfinite(position_bandwidth) && position_bandwidth > 0, function_,
            "position_bandwidth must be > 0, got " + std::to_string(position_bandwidth));
    require(iterations >= 0 && iterations < kMostIterations, function_,
            "iterations must be >= 0 and < 2^31, got " + std::to_string(iterations));
    p.kernel = kernel == "gaussian" ? Kernel::kGaussian : Kernel::kLinear;
    p.position_bandwidth = position_bandwidth;
    p.iterations = iterations;
    p.normalize = normalize;

    p.mask = optional("mask", kBoolType, {{{"B", p.batch}, {"N", p.tokens}}}, 2);
    require(p.mask.data == nullptr || p.offsets == nullptr, function_,
            "mask must not be given with offsets: packed sequences have no padding");
    p.token_mass = optional("token_mass", accumulate(), {tokens_of(p, {"N", p.tokens})}, 3);
    p.reference_mass =
        optional("reference_mass", accumulate(),
                 {{{"H", p.heads}, {"M", p.references}}, heads_of(p, {"M", p.references})}, 3);
    p.bandwidth = per_head("bandwidth", p.heads, bandwidth_);
    p.epsilon = per_head("epsilon", p.heads, epsilon_);
    if (p.epsilon.data == nullptr) required("epsilon");
    const Array positions = array("reference_positions");
    if (positions.given()) {
      positions.expect_device(device_)
          .expect_type(accumulate())
          .expect_shape({{{"M", p.references}, {"P"}}});
      p.position_depth = positions.size(1);
      require(p.position_depth >= 1 && p.position_depth <= 3, function_,
              "reference_positions must be [M, P] with P = 1, 2 or 3, got P=" +
                  std::to_string(p.position_depth));
      p.reference_positions = keep(positions).view(2);
    }
    require(positions.given() == array("token_positions").given(), function_,
            "token_positions and reference_positions must be given together");
    p.token_positions =
        optional("token_positions", accumulate(), {{{"N", p.tokens}, {"P", p.position_depth}}}, 2);
  }

  void read_query(ForwardParams& p) {
    const Array query = array("query");
    p.cross = query.given();
    if (!p.cross) return;
    query.expect_device(device_).expect_type(storage_).expect_shape(
        {tokens_of(p, {"Nq"}, {"D", p.depth})});
    p.queries = query.size(2);
    p.query = keep(query).view(4);
    if (p.offsets != nullptr) {
      p.query_offsets = checked_offsets("query_offsets", required("query_offsets"), p.batch,
                                        p.queries, query_offsets_);
    }
    p.query_mask = optional("query_mask", kBoolType, {{{"B", p.batch}, {"Nq", p.queries}}}, 2);
    require(p.query_mask.data == nullptr || p.offsets == nullptr, function_,
            "query_mask must not be given with offsets: packed sequences have no padding");
    p.query_positions = optional("query_positions", accumulate(),
                                 {{{"Nq", p.queries}, {"P", p.position_depth}}}, 2);
  }

  void read_query_normalizers(ForwardParams& p) {
    if (!p.cross) return;
    p.query_rows =
        contiguous("query_rows", tokens_of(p, {"T+1", p.iterations + 1}, {"Nq", p.queries}));
    p.query_columns = contiguous(
        "query_columns",
        heads_of(p, {"max(T,1)", std::max<int64_t>(p.iterations, 1)}, {"M", p.references}));
  }

  void read_value(ForwardParams& p) {
    const Array value = required("value");
    value.expect_device(device_).expect_type(storage_).expect_shape(
        {tokens_of(p, {"N", p.tokens}, {"Dv"})});
    p.value_depth = value.size(3);
    require(
        p.value_depth > 0 && p.value_depth <= kMostColumns, function_,
        "value must be [.., Dv] with Dv from 1 to 2^24, got Dv=" + std::to_string(p.value_depth));
    p.value = keep(value).view(4);
  }

  // Where forward is asked for the output alone, the rest is scratch, on the CPU the call's own.
  void read_forward_results(ForwardParams& p, bool to_be_written) {
    own_scratch_ = to_be_written && !on_cuda() && array("output").given() &&
                   !array("pooled").given() && !array("rows").given() && !array("columns").given();
    read_normalizers(p);
    read_query_normalizers(p);
    p.pooled = contiguous("pooled", heads_of(p, {"M", p.references}, {"Dv", p.value_depth}));
    p.output = written_if_given("output", storage_, {output_shape(p)}, 4);
    p.distribute = p.output.data != nullptr;
    require(array("output").given() || !array("query").given(), function_,
            "query is given, so output must be: nothing else depends on the query");
  }

  void read_normalizers(ForwardParams& p) {
    p.rows = contiguous("rows", tokens_of(p, {"T+1", p.iterations + 1}, {"N", p.tokens}));
    p.columns = contiguous(
        "columns",
        heads_of(p, {"max(T,1)+1", std::max<int64_t>(p.iterations, 1) + 1}, {"M", p.references}));
  }

  void read_gradients(BackwardParams& p) {
    p.grad_output = optional("grad_output", storage_, {output_shape(p)}, 4);
    p.grad_pooled = optional("grad_pooled", accumulate(),
                             {heads_of(p, {"M", p.references}, {"Dv", p.value_depth})}, 4);
    p.grad_key = written("grad_key", storage_, {tokens_of(p, {"N", p.tokens}, {"D", p.depth})}, 4);
    p.grad_value =
        written("grad_value", storage_, {tokens_of(p, {"N", p.tokens}, {"Dv", p.value_depth})}, 4);
    if (p.cross) {
      p.grad_query =
          written("grad_query", storage_, {tokens_of(p, {"Nq", p.queries}, {"D", p.depth})}, 4);
    }
    p.grad_reference =
        contiguous("grad_reference", heads_of(p, {"M", p.references}, {"D", p.depth}));
    if (array("grad_bandwidth").given()) {
      required("bandwidth");
      p.grad_bandwidth = contiguous("grad_bandwidth", {{"B", p.batch}, {"H", p.heads}});
    }
    p.grad_epsilon = contiguous("grad_epsilon", {{"B", p.batch}, {"H", p.heads}});
    if (array("grad_token_mass").given()) {
      p.grad_token_mass = contiguous("grad_token_mass", tokens_of(p, {"N", p.tokens}));
    }
    if (array("grad_reference_mass").given()) {
      required("reference_mass");
      p.grad_reference_mass = contiguous("grad_reference_mass", heads_of(p, {"M", p.references}));
    }
  }

  // Names that no read above knows would otherwise be ignored in silence.
  void finish() const {
    for (const auto& [name, array] : arrays_) {
      const auto text = py::cast<std::string_view>(name);
      if (std::find(known_.begin(), known_.end(), text) == known_.end()) {
        throw py::type_error(std::string(function_) + ": unexpected argument '" +
                             std::string(text) + "'");
      }
    }
  }

 private:
  struct Number {
    double wide = 0;
    float narrow = 0;
  };

  dlpack::DataType accumulate() const { return accumulate_type(storage_); }
  static Shape heads_of(const ForwardParams& p, Dimension third) {
    return {{"B", p.batch}, {"H", p.heads}, third};
  }
  static Shape heads_of(const ForwardParams& p, Dimension third, Dimension fourth) {
    return {{"B", p.batch}, {"H", p.heads}, third, fourth};
  }
  // Of arrays with a row for each token, which packed sequences share.
  static Shape tokens_of(const ForwardParams& p, Dimension third) {
    return {{"B", p.offsets != nullptr ? 1 : p.batch}, {"H", p.heads}, third};
  }
  static Shape tokens_of(const ForwardParams& p, Dimension third, Dimension fourth) {
    return {{"B", p.offsets != nullptr ? 1 : p.batch}, {"H", p.heads}, third, fourth};
  }
  static Shape output_shape(const ForwardParams& p) {
    return p.cross ? tokens_of(p, {"Nq", p.queries}, {"Dv", p.value_depth})
                   : tokens_of(p, {"N", p.tokens}, {"Dv", p.value_depth});
  }

  // Offsets are read here, whatever device the arrays are on, and copied: what was checked must
  // still hold while other threads run.
  const int64_t* checked_offsets(const char* name, const Array& array, int64_t sequences,
                                 int64_t tokens, std::vector<int64_t>& copy) const {
    array.expect_host_memory()
        .expect_type(kInt64Type)
        .expect_contiguous()
        .expect_shape({{{"S+1", sequences + 1}}});
    const auto* given = static_cast<const int64_t*>(array.view(1).data);
    copy.assign(given, given + sequences + 1);
    const int64_t* offsets = copy.data();
    bool ascending = sequences >= 1 && offsets[0] == 0 && offsets[sequences] == tokens;
    for (int64_t s = 0; ascending && s < sequences; ++s) ascending = offsets[s] <= offsets[s + 1];
    require(ascending, function_,
            std::string(name) + " must ascend from 0 to the number of packed tokens, " +
                std::to_string(tokens) + ", for at least one sequence");
    return offsets;
  }

  // The key's memory decides whose kernels run.
  void choose_device(const Array& key) {
    device_ = key.device();
    require(
        device_.type == dlpack::kCpu || on_cuda(), function_,
        "key must be in the memory of the CPU or of a CUDA device, got " + device_name(device_));
    require(!on_cuda() || cuda::compiled(), function_,
            "key must be in CPU memory, for this build has no CUDA kernels (" +
                build_info()["cuda"] + "), got " + device_name(device_) +
                ": install again with SETFORMER_CUDA=on in the environment and nvcc in PATH");
  }

  // None where it is not given.
  py::object object(const char* name) {
    known_.push_back(name);
    PyObject* const found = PyDict_GetItemString(arrays_.ptr(), name);
    return py::reinterpret_borrow<py::object>(found == nullptr ? Py_None : found);
  }
  Array array(const char* name) { return array_of(name, object(name)); }
  Array required(const char* name) {
    Array found = array(name);
    if (!found.given()) {
      throw py::type_error(std::string(function_) + ": " + name + " must be given");
    }
    return found;
  }
  // Arrays live until the call is over: a capsule may own what it points to.
  const Array& keep(const Array& array) {
    kept_.push_back(array);
    return kept_.back();
  }
  Tensor checked(const Array& array, dlpack::DataType type, const std::vector<Shape>& shapes,
                 int dimensions) {
    if (!array.given()) return {};
    array.expect_device(device_).expect_type(type).expect_shape(shapes);
    return keep(array).view(dimensions);
  }
  Tensor optional(const char* name, dlpack::DataType type, const std::vector<Shape>& shapes,
                  int dimensions) {
    return checked(array(name), type, shapes, dimensions);
  }
  // Results: like inputs, but in memory that may be written.
  Tensor written_if_given(const char* name, dlpack::DataType type, const std::vector<Shape>& shapes,
                          int dimensions) {
    const Array found = array(name);
    if (found.given()) found.expect_writable();
    return checked(found, type, shapes, dimensions);
  }
  Tensor written(const char* name, dlpack::DataType type, const std::vector<Shape>& shapes,
                 int dimensions) {
    required(name);
    return written_if_given(name, type, shapes, dimensions);
  }
  Tensor contiguous(const char* name, const Shape& shape) {
    if (own_scratch_) return scratch(shape);
    const Array found = required(name);
    const Tensor view = checked(found, accumulate(), {shape}, found.rank());
    found.expect_contiguous().expect_writable();
    return view;
  }
  Tensor scratch(const Shape& shape) {
    Tensor view;
    double most = 8;  // bytes; a float64 does not overflow
    for (const Dimension& dimension : shape) most *= double(dimension.size);
    if (most > double(int64_t{1} << 60)) throw std::bad_alloc();
    uint64_t elements = 1;  // may overflow on the way to 0
    for (int i = int(shape.size()) - 1; i >= 0; --i) {
      view.stride[i] = int64_t(elements);
      elements *= uint64_t(shape[i].size);
    }
    const uint64_t bytes = std::max<uint64_t>(elements, 1) * accumulate().bits / 8;
    scratch_.emplace_back(new char[bytes]);
    view.data = scratch_.back().get();
    return view;
  }
  // An array [H], or on the CPU a number for all heads.
  Tensor per_head(const char* name, int64_t heads, Number& number) {
    const py::object given = object(name);
    if (!PyFloat_Check(given.ptr()) || on_cuda()) {
      return optional(name, accumulate(), {{{"H", heads}}}, 1);
    }
    const double value = py::cast<double>(given);
    require(std::isfinite(value), function_, std::string(name) + " must be finite");
    number = {value, float(value)};
    Tensor view;  // stride 0: the same for every head
    view.data = accumulate().bits == 64 ? static_cast<void*>(&number.wide) : &number.narrow;
    return view;
  }

  const char* function_;
  const py::dict& arrays_;
  uintptr_t stream_;
  dlpack::Device device_{};
  dlpack::DataType storage_{};
  bool own_scratch_ = false;
  Number bandwidth_, epsilon_;
  std::vector<int64_t> offsets_, query_offsets_;
  std::vector<std::unique_ptr<char[]>> scratch_;
  std::vector<Array> kept_;
  std::vector<std::string_view> known_;
};

}  // namespace setformer
