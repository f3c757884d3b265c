// setformer_ext._C: the kernels for any DLPack array, on the CPU or a CUDA device. Memory is the
// caller's; the GIL is released while kernels run or are launched.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "call.h"
#include "cpu/kernels.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "nvtx.h"
#include "rank_group.h"

namespace setformer {
namespace {

constexpr int64_t kWorkspaceAlignment = 256;

// Scratch memory of a CUDA call. If any is needed, `allocate`, a function of the caller, is called
// with the number of bytes and returns an array of that size.
class Workspace {
 public:
  Workspace(const Call& call, const py::object& allocate, int64_t bytes) {
    if (bytes == 0) return;
    if (!PyCallable_Check(allocate.ptr())) {
      call.refuse_type(
          "workspace must be a function that takes a number of bytes and returns a uint8 array of "
          "that size on " +
          device_name(call.device()) + ", got " + class_name(allocate));
    }
    const int64_t with_room_to_align = bytes + kWorkspaceAlignment - 1;
    array_ = call.array_of("workspace", allocate(with_room_to_align));
    if (!array_.given()) call.refuse_type("workspace must return an array, got None");
    array_.expect_device(call.device())
        .expect_type({dlpack::kUInt, 8, 1})
        .expect_contiguous()
        .expect_writable();
    if (array_.rank() != 1 || array_.size(0) < with_room_to_align) {
      Dimension size{"bytes", with_room_to_align};
      array_.expect_shape({&size});
    }
    const auto start = reinterpret_cast<uintptr_t>(array_.view(1).data);
    start_ = reinterpret_cast<void*>((start + kWorkspaceAlignment - 1) / kWorkspaceAlignment *
                                     kWorkspaceAlignment);
  }
  void* start() const { return start_; }

 private:
  Array array_;
  void* start_ = nullptr;
};

// The entry points of forward or of backward.
template <class Params>
struct Operation {
  const char* name;
  Status (*on_cpu)(const Params&);
  cuda::Result (*on_cuda)(const Params&, void* workspace, int device, void* stream);
  int64_t (*workspace)(const Params&);  // of CUDA, in bytes
};
constexpr Operation<ForwardParams> kForward{"set_attention_forward", cpu::set_attention_forward,
                                            cuda::set_attention_forward, cuda::forward_workspace};
constexpr Operation<BackwardParams> kBackward{"set_attention_backward", cpu::set_attention_backward,
                                              cuda::set_attention_backward,
                                              cuda::backward_workspace};

void check_status(const std::string& function, Status status) {
  switch (status) {
    case Status::kOk:
      return;
    case Status::kOutOfMemory:
      throw std::bad_alloc();
    case Status::kNegativeTokenMass:
      throw py::value_error(function + ": token_mass must be >= 0 everywhere, got a negative mass");
    case Status::kNonPositiveReferenceMass:
      throw py::value_error(function + ": reference_mass must be > 0 everywhere, got a mass <= 0");
    case Status::kNonPositiveBandwidth:
      throw py::value_error(
          function + ": bandwidth must be > 0 for every head, got a value <= 0, infinite or NaN");
    case Status::kNonPositiveEpsilon:
      throw py::value_error(
          function + ": epsilon must be > 0 for every head, got a value <= 0, infinite or NaN");
    case Status::kPeerFailed:
      throw std::runtime_error(function +
                               ": another rank of the group failed; its own error says why");
    case Status::kMergeFailed:
      throw std::runtime_error(function + ": merging over the ranks of the group failed");
  }
}

template <class Params>
void run_on_cpu(const Operation<Params>& operation, const Params& p) {
  Status status;
  {
    py::gil_scoped_release release;
    status = operation.on_cpu(p);
  }
  PythonRanks::rethrow(p);
  check_status(operation.name, status);
}

// What to do about an error that CUDA knows by this name.
std::string advice(const std::string& error) {
  if (error == "cudaErrorNoKernelImageForDevice") {
    return "this build has no code for the device (`setformer info` shows both): install again "
           "with TORCH_CUDA_ARCH_LIST set to its compute capability";
  }
  if (error == "cudaErrorInsufficientDriver" || error == "cudaErrorUnsupportedPtxVersion") {
    return "the driver is older than this build's CUDA (`setformer info` shows both): update the "
           "driver, or install again with an older CUDA toolkit";
  }
  if (error == "cudaErrorIllegalAddress" || error == "cudaErrorMisalignedAddress" ||
      error == "cudaErrorLaunchFailure" || error == "cudaErrorAssert") {
    return "a kernel that ran before this one failed, of any library: CUDA_LAUNCH_BLOCKING=1 in "
           "the environment shows which";
  }
  return "`setformer info` shows the devices and what this build has code for";
}

void check_limit(const Call& call, const char* what, int64_t size, int64_t most) {
  call.require(size <= most, std::string(what) + " must be at most " + std::to_string(most) +
                                 " on CUDA, got " + std::to_string(size) +
                                 "; the CPU takes any size");
}

template <class Params>
void run_on_cuda(const Operation<Params>& operation, const Params& p, const Call& call,
                 const py::object& allocate) {
  const Workspace workspace(call, allocate, operation.workspace(p));
  check_limit(call, "D, the depth of key,", p.depth, cuda::kMostDepth);
  check_limit(call, "Dv, the depth of value,", p.value_depth, cuda::kMostValueDepth);
  check_limit(call, "M, the number of references,", p.references, cuda::kMostReferences);
  cuda::Result result;
  {
    py::gil_scoped_release release;
    result = operation.on_cuda(p, workspace.start(), int(call.device().id), call.stream());
  }
  PythonRanks::rethrow(p);
  if (result.error == 0) return;
  const std::string name = cuda::error_name(result.error);
  throw std::runtime_error(std::string(operation.name) + ": " + result.kernel + " failed on " +
                           device_name(call.device()) + ": " + name + ": " +
                           cuda::error_message(result.error) + "; " + advice(name));
}

template <class Params>
void define(py::module_& module, const Operation<Params>& operation, const char* about) {
  const auto call =
      [&operation](const std::string& kernel, double position_bandwidth, int64_t iterations,
                   bool normalize, int64_t max_seqlen, int64_t max_seqlen_query, uintptr_t stream,
                   const py::object& workspace, const py::object& merge, const py::kwargs& arrays) {
        Call call(operation.name, arrays, stream);
        Params p;
        call.read_options(p, kernel, position_bandwidth, iterations, normalize, max_seqlen,
                          max_seqlen_query);
        call.read(p);
        call.finish();
        const PythonRanks ranks(call, merge, p);
        const nvtx::Range range(operation.name, p);
        if (call.on_cuda()) {
          run_on_cuda(operation, p, call, workspace);
        } else {
          run_on_cpu(operation, p);
        }
      };
  module.def(operation.name, call, py::arg("kernel") = "gaussian",
             py::arg("position_bandwidth") = 1.0, py::arg("iterations") = 1,
             py::arg("normalize") = false, py::arg("max_seqlen") = 0,
             py::arg("max_seqlen_query") = 0, py::arg("stream") = 0,
             py::arg("workspace") = py::none(), py::arg("merge") = py::none(), about);
}

// The module's docstring.
constexpr const char* kAbout = R"(SeT attention kernels for any DLPack array.

Arrays are passed by keyword: B batch, H heads, N tokens, Nq queries, M references, D and Dv depths,
P coordinates, T iterations. Storage is float32, float64, bfloat16 or float16, the same for all;
accumulate is float64 for float64 storage and float32 otherwise. Results are written to arrays that
the caller allocates.

Inputs:

    key                  [B, H, N, D]               storage
    value                [B, H, N, Dv]              storage
    reference            [H, M, D] or [B, H, M, D]  storage
    query                [B, H, Nq, D]              storage, optional: cross attention
    mask                 [B, N]                     bool, optional
    query_mask           [B, Nq]                    bool, optional
    token_mass           [B, H, N]                  accumulate, optional
    reference_mass       [H, M] or [B, H, M]        accumulate, optional
    bandwidth, epsilon   [H]                        accumulate; on the CPU a float for all heads, too
    token_positions      [N, P]                     accumulate, optional
    query_positions      [Nq, P]                    accumulate, optional
    reference_positions  [M, P]                     accumulate, optional
    offsets              [S + 1]                    int64, optional
    query_offsets        [S + 1]                    int64, optional

With normalize=True query, key and reference are scaled to unit length first; gradients are by the
arrays that are given here.

Results of forward, contiguous but for output:

    output               [B, H, Nq or N, Dv]        storage; without it only pooled is computed
    pooled               [B, H, M, Dv]              accumulate
    rows                 [B, H, T + 1, N]           accumulate
    columns              [B, H, max(T, 1) + 1, M]   accumulate
    query_rows           [B, H, T + 1, Nq]          accumulate
    query_columns        [B, H, max(T, 1), M]       accumulate

On the CPU output may be given alone, if no gradient is needed.

Packed sequences: offsets and query_offsets hold the first token of each of S sequences, then the
number of all tokens. B is then S, but 1 for arrays with a row for each token; rows and query_rows
hold one sequence after another. No sequence may have more tokens than max_seqlen, or more queries
than max_seqlen_query. On CUDA these two must be given, for they choose the kernels, and offsets are
not checked: wrong ones make sequences NaN; rows that no sequence has hold anything.

Devices: all arrays lie in the memory of the CPU or of one CUDA device, whose kernels run. CUDA uses
two more arguments. All work is put on `stream`, a cudaStream_t as an integer (0: the default
stream), without waiting for it. `workspace` is called with a number of bytes, if any are needed,
and returns a uint8 array of that size on the device. Its memory, like that of all arrays, may be
used for other work only after the stream has passed the call. Arrays are requested by
__dlpack__(stream=stream): their owner makes the stream wait for pending writes. A capsule that was
made earlier is taken as it is.

Ranks: if several ranks hold the tokens of each sequence, merge(arrays, how) is called on all of
them equally often, with the same shapes. arrays is a list of DLPack capsules [rows, columns],
accumulate, valid during the call. merge must replace their numbers by the merged numbers of all
ranks: the sum for how = 'sum', log2 of the sum of 2^x for how = 'logsum'. Gradients of what all
ranks have in common are then this rank's shares; only grad_reference_mass is the whole gradient.

Errors: wrong shapes and values raise ValueError, wrong types TypeError, naming the argument. On
CUDA values are not read: a bandwidth, epsilon or reference mass <= 0 or a negative token mass gives
NaN in its head. A failing launch raises RuntimeError.
)";

}  // namespace
}  // namespace setformer

PYBIND11_MODULE(_C, m) {
  using namespace setformer;
  m.doc() = kAbout;
  define(m, kForward,
         "Writes output, pooled, rows and columns; see the module's docstring for the arrays.");
  define(m, kBackward,
         "Takes what forward took and wrote, with grad_output [B, H, Nq or N, Dv] (storage) and\n"
         "grad_pooled [B, H, M, Dv] (accumulate, optional); writes grad_query, grad_key,\n"
         "grad_value (storage), grad_reference [B, H, M, D], grad_bandwidth and grad_epsilon\n"
         "[B, H] and, where given, grad_token_mass [B, H, N] and grad_reference_mass [B, H, M]\n"
         "(accumulate).");
  m.def("cpu_isa", &cpu::instruction_set,
        "The instruction set in use: 'baseline', 'avx2' or 'avx512'.\n"
        "The environment variable SETFORMER_CPU_ISA overrides the choice.");
  m.def(
      "cpu_isas_supported",
      [] { return py::str(cpu::supported_instruction_sets()).attr("split")(); },
      "All instruction sets that were compiled and that this processor has.");
  m.def("max_threads", &cpu::available_threads,
        "Threads a call may use; torch.set_num_threads sets it.");
  m.def("build_info", &build_info, "What this module was compiled with.");
  m.def("cuda_driver_version", &cuda::driver_version, "Empty where there is no CUDA driver.");
  m.def("cuda_devices", &cuda::devices,
        "One line a device, and whether this module has code for it. For reports: it starts the\n"
        "CUDA context of each.");
}
