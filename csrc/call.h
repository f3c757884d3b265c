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
  // The device of the arrays' memory, as their owner names it.
  dlpack::Device memory_device() const { return emulated_device() ? kHost : device_; }

  void require(bool condition, const std::string& message) const {
    if (!condition) throw py::value_error(std::string(function_) + ": " + message);
  }
  [[noreturn]] void refuse_type(const std::string& message) const {
    throw py::type_error(std::string(function_) + ": " + message);
  }

  Array array_of(const char* name, const py::object& object) const {
    return Array(function_, name, object, stream_);
  }

  void read(ForwardParams& p, bool results_are_written = true) {
    read_sizes(p);
    read_inputs(p);
    read_query(p);
    read_results(p, results_are_written);
  }
  void read(BackwardParams& p) {
    read(p, false);
    read_gradients(p);
    require(!p.distribute == (p.grad_output.data == nullptr),
            "output and grad_output must be given together");
  }
  void read_options(ForwardParams& p, const std::string& kernel, double position_bandwidth,
                    int64_t iterations, bool normalize, int64_t max_seqlen,
                    int64_t max_seqlen_query) {
    require(kernel == "gaussian" || kernel == "linear",
            "kernel must be 'gaussian' or 'linear', got '" + kernel + "'");
    require(std::isfinite(position_bandwidth) && position_bandwidth > 0,
            "position_bandwidth must be > 0, got " + std::to_string(position_bandwidth));
    require(iterations >= 0 && iterations < kMostIterations,
            "iterations must be >= 0 and < 2^31, got " + std::to_string(iterations));
    require(max_seqlen >= 0, "max_seqlen must be >= 0, got " + std::to_string(max_seqlen));
    require(max_seqlen_query >= 0,
            "max_seqlen_query must be >= 0, got " + std::to_string(max_seqlen_query));
    max_seqlen_ = max_seqlen;
    max_seqlen_query_ = max_seqlen_query;
    p.kernel = kernel == "gaussian" ? Kernel::kGaussian : Kernel::kLinear;
    p.position_bandwidth = position_bandwidth;
    p.iterations = iterations;
    p.normalize = normalize;
    steps_.size = iterations + 1;
    solved_steps_.size = std::max<int64_t>(iterations, 1);
    columns_.size = solved_steps_.size + 1;
  }

  // Refuses names that nothing above has read: they would be ignored silently.
  void finish() const {
    for (const auto& [name, array] : arrays_) {
      const auto text = py::cast<std::string_view>(name);
      if (std::find(known_.begin(), known_.end(), text) == known_.end()) {
        refuse_type("unexpected argument '" + std::string(text) + "'");
      }
    }
  }

 private:
  struct Number {
    double wide = 0;
    float narrow = 0;
  };

  // Key and reference: all other sizes follow from theirs.
  void read_sizes(ForwardParams& p) {
    const Array key = required("key");
    choose_device(key);
    storage_ = key.type();
    p.type = scalar_type();
    p.key = checked(key, storage_, {&Bt, &H, &N, &D});
    B.size = Bt.size;
    if (const Array offsets = array("offsets"); offsets.given()) {
      require(Bt.size == 1,
              "key must be [1, H, N, D] where offsets tell its sequences apart, got B=" +
                  std::to_string(Bt.size));
      B.size = offsets.rank() == 1 ? offsets.size(0) - 1 : 0;
      p.offsets = checked_offsets("offsets", offsets, N, "max_seqlen", max_seqlen_, offsets_);
    }
    p.reference = checked(required("reference"), storage_, {&H, &M, &D}, {&B, &H, &M, &D});
    require(M.size > 0, "reference must hold at least one reference, got M=0");
    require(D.size > 0, "key must have at least one dimension per head, got D=0");
    require(M.size <= kMostColumns && D.size <= kMostColumns,
            "reference must be [.., M, D] with M and D up to 2^24, got M=" +
                std::to_string(M.size) + ", D=" + std::to_string(D.size));
    p.batch = B.size;
    p.heads = H.size;
    p.tokens = most_tokens(p, N, max_seqlen_);
    p.packed_tokens = N.size;
    p.depth = D.size;
    p.references = M.size;
  }

  // The other inputs that belong to the keys and the references.
  void read_inputs(ForwardParams& p) {
    p.value = checked(required("value"), storage_, {&Bt, &H, &N, &Dv});
    p.value_depth = Dv.size;
    require(Dv.size > 0 && Dv.size <= kMostColumns,
            "value must be [.., Dv] with Dv from 1 to 2^24, got Dv=" + std::to_string(Dv.size));
    p.mask = optional_mask("mask", N, p);
    p.token_mass = optional("token_mass", accumulate(), {&Bt, &H, &N});
    p.reference_mass = optional("reference_mass", accumulate(), {&H, &M}, {&B, &H, &M});
    p.bandwidth = per_head("bandwidth", bandwidth_);
    p.epsilon = per_head("epsilon", epsilon_);
    if (p.epsilon.data == nullptr) required("epsilon");
    P.size = given("reference_positions") ? -1 : 0;
    p.reference_positions = optional("reference_positions", accumulate(), {&M, &P});
    p.position_depth = P.size;
    require(
        !given("reference_positions") || (P.size >= 1 && P.size <= 3),
        "reference_positions must be [M, P] with P = 1, 2 or 3, got P=" + std::to_string(P.size));
    require(given("reference_positions") == given("token_positions"),
            "token_positions and reference_positions must be given together");
    p.token_positions = optional("token_positions", accumulate(), {&N, &P});
  }

  void read_query(ForwardParams& p) {
    p.cross = given("query");
    if (!p.cross) return;
    p.query = checked(array("query"), storage_, {&Bt, &H, &Nq, &D});
    if (p.offsets != nullptr) {
      p.query_offsets = checked_offsets("query_offsets", required("query_offsets"), Nq,
                                        "max_seqlen_query", max_seqlen_query_, query_offsets_);
    }
    p.queries = most_tokens(p, Nq, max_seqlen_query_);
    p.packed_queries = Nq.size;
    p.query_mask = optional_mask("query_mask", Nq, p);
    p.query_positions = optional("query_positions", accumulate(), {&Nq, &P});
  }

  // On the CPU `output` may be given alone: the other results then go to scratch memory of the
  // call.
  void read_results(ForwardParams& p, bool are_written) {
    own_scratch_ = are_written && !on_cuda() && given("output") && !given("pooled") &&
                   !given("rows") && !given("columns");
    p.rows = contiguous("rows", {&Bt, &H, &steps_, &N});
    p.columns = contiguous("columns", {&B, &H, &columns_, &M});
    if (p.cross) {
      p.query_rows = contiguous("query_rows", {&Bt, &H, &steps_, &Nq});
      p.query_columns = contiguous("query_columns", {&B, &H, &solved_steps_, &M});
    }
    p.pooled = contiguous("pooled", {&B, &H, &M, &Dv});
    p.distribute = given("output");
    if (p.distribute) p.output = written("output", {&Bt, &H, p.cross ? &Nq : &N, &Dv});
    require(p.distribute || !p.cross,
            "query is given, so output must be: nothing else depends on the query");
  }

  void read_gradients(BackwardParams& p) {
    p.grad_output = optional("grad_output", storage_, {&Bt, &H, p.cross ? &Nq : &N, &Dv});
    p.grad_pooled = optional("grad_pooled", accumulate(), {&B, &H, &M, &Dv});
    p.grad_key = written("grad_key", {&Bt, &H, &N, &D});
    p.grad_value = written("grad_value", {&Bt, &H, &N, &Dv});
    if (p.cross) p.grad_query = written("grad_query", {&Bt, &H, &Nq, &D});
    p.grad_reference = contiguous("grad_reference", {&B, &H, &M, &D});
    if (given("grad_bandwidth")) required("bandwidth");
    if (given("grad_reference_mass")) required("reference_mass");
    p.grad_bandwidth = contiguous_if_given("grad_bandwidth", {&B, &H});
    p.grad_epsilon = contiguous("grad_epsilon", {&B, &H});
    p.grad_token_mass = contiguous_if_given("grad_token_mass", {&Bt, &H, &N});
    p.grad_reference_mass = contiguous_if_given("grad_reference_mass", {&B, &H, &M});
  }

  ScalarType scalar_type() const {
    if (storage_.code == dlpack::kFloat && storage_.bits == 32) return ScalarType::kFloat32;
    if (storage_.code == dlpack::kFloat && storage_.bits == 64) return ScalarType::kFloat64;
    if (storage_.code == dlpack::kFloat && storage_.bits == 16) return ScalarType::kFloat16;
    if (storage_.code == dlpack::kBFloat && storage_.bits == 16) return ScalarType::kBFloat16;
    refuse_type("key must be float32, float64, bfloat16 or float16, got " + type_name(storage_));
  }
  dlpack::DataType accumulate() const { return accumulate_type(storage_); }

  // Offsets on the CPU are read and copied here: other threads must not be able to change them
  // after the check. On CUDA they cannot be read without waiting; kernels keep within bounds.
  const int64_t* checked_offsets(const char* name, const Array& array, const Dimension& tokens,
                                 const char* name_of_most, int64_t most,
                                 std::vector<int64_t>& copy) {
    Dimension ends{"S+1", B.size + 1};
    const Tensor view = checked(array, kInt64Type, {&ends});
    array.expect_contiguous();
    require(ends.size > 1, std::string(name) + " must tell of at least one sequence");
    const auto* given = static_cast<const int64_t*>(view.data);
    if (on_cuda()) {
      require(most > 0 || tokens.size == 0,
              std::string(name_of_most) + " must be given on CUDA, where offsets are not read");
      return given;
    }
    copy.assign(given, given + ends.size);
    require(
        copy.front() == 0 && copy.back() == tokens.size && std::is_sorted(copy.begin(), copy.end()),
        std::string(name) + " must ascend from 0 to the number of packed tokens, " +
            std::to_string(tokens.size));
    int64_t longest = 0;
    for (size_t s = 0; s + 1 < copy.size(); ++s) longest = std::max(longest, copy[s + 1] - copy[s]);
    require(most == 0 || longest <= most,
            std::string(name_of_most) + " must be at least the length of every sequence, got " +
                std::to_string(most) + " and a sequence of " + std::to_string(longest));
    return copy.data();
  }
  // See ForwardParams::offsets. What is given decides, not the number of packed tokens, so that a
  // sequence has the same bits whatever it is packed with; more than 2^48 fit into no memory.
  int64_t most_tokens(const ForwardParams& p, const Dimension& tokens, int64_t given) const {
    if (p.offsets == nullptr || !on_cuda()) return tokens.size;
    return std::min(given, int64_t{1} << 48);
  }

  // The key's memory decides whose kernels run.
  void choose_device(const Array& key) {
    device_ = key.device();
    require(
        device_.type == dlpack::kCpu || on_cuda(),
        "key must be in the memory of the CPU or of a CUDA device, got " + device_name(device_));
    require(!on_cuda() || cuda::compiled(),
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
  bool given(const char* name) { return !object(name).is_none(); }
  Array array(const char* name) { return array_of(name, object(name)); }
  Array required(const char* name) {
    if (!given(name)) refuse_type(std::string(name) + " must be given");
    return array(name);
  }

  // An absent array gives a null Tensor. The others are kept until the call is over: a capsule may
  // own the memory that it points to.
  Tensor checked(const Array& array, dlpack::DataType type, Shape shape, Shape other = {}) {
    if (!array.given()) return {};
    array.expect_device(device_).expect_type(type).expect_shape(shape, other);
    kept_.push_back(array);
    return array.view(int(std::max(shape.size(), other.size())));
  }
  Tensor optional(const char* name, dlpack::DataType type, Shape shape, Shape other = {}) {
    return checked(array(name), type, shape, other);
  }
  Tensor optional_mask(const char* name, Dimension& tokens, const ForwardParams& p) {
    const Tensor mask = optional(name, kBoolType, {&B, &tokens});
    require(
        mask.data == nullptr || p.offsets == nullptr,
        std::string(name) + " must not be given with offsets: packed sequences have no padding");
    return mask;
  }
  // Results of the storage type: like inputs, but in memory that may be written.
  Tensor written(const char* name, Shape shape) {
    const Array found = required(name);
    found.expect_writable();
    return checked(found, storage_, shape);
  }
  // Results of the accumulate type.
  Tensor contiguous(const char* name, Shape shape) {
    if (own_scratch_) return scratch(shape);
    const Array found = required(name);
    const Tensor view = checked(found, accumulate(), shape);
    found.expect_contiguous().expect_writable();
    return view;
  }
  Tensor contiguous_if_given(const char* name, Shape shape) {
    return given(name) ? contiguous(name, shape) : Tensor{};
  }
  // Without strides: the layout is that of contiguous results.
  Tensor scratch(Shape shape) {
    double bytes = accumulate().bits / 8;  // exact up to 2^53, and no overflow on the way to 0
    for (const Dimension* dimension : shape) bytes *= double(dimension->size);
    if (bytes > double(int64_t{1} << 53)) throw std::bad_alloc();
    scratch_.emplace_back(new char[size_t(bytes)]);
    Tensor view;
    view.data = scratch_.back().get();
    return view;
  }
  // An array [H], or on the CPU a number for all heads.
  Tensor per_head(const char* name, Number& number) {
    const py::object given = object(name);
    if (!PyFloat_Check(given.ptr()) || on_cuda()) return optional(name, accumulate(), {&H});
    const double value = py::cast<double>(given);
    require(std::isfinite(value), std::string(name) + " must be finite");
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
  // Dimensions by their letters. Bt is the batch of arrays with a row for each token: 1 for packed
  // sequences, which lie in one such array.
  Dimension B{"B"}, Bt{"B"}, H{"H"}, N{"N"}, Nq{"Nq"}, M{"M"}, D{"D"}, Dv{"Dv"}, P{"P"};
  Dimension steps_{"T+1"}, solved_steps_{"max(T,1)"}, columns_{"max(T,1)+1"};
  bool own_scratch_ = false;
  Number bandwidth_, epsilon_;
  int64_t max_seqlen_ = 0, max_seqlen_query_ = 0;
  std::vector<int64_t> offsets_, query_offsets_;
  std::vector<std::unique_ptr<char[]>> scratch_;
  std::vector<Array> kept_;
  std::vector<std::string_view> known_;
};

}  // namespace setformer
