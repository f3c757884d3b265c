// The ranks of a group, reached through a Python function that merges numbers over all of them.
#pragma once

#include <exception>
#include <memory>
#include <string>

#include "call.h"

namespace setformer {

// Calls merge([capsule, ...], how) with DLPack capsules of [rows, columns], of the accumulate type
// on the call's device, to be written to, and only valid during the call; `how` is "sum" or
// "logsum", log2 of the sum of 2^x.
class PythonRanks {
 public:
  // `merge` may be None: the call's rank is alone.
  PythonRanks(const Call& call, const py::object& merge, ForwardParams& p)
      : merge_(merge), device_(call.memory_device()), type_(accumulate_type(call.storage())) {
    if (merge.is_none()) return;
    if (!PyCallable_Check(merge.ptr())) {
      call.refuse_type("merge must be a function of a list of arrays and how to merge, got " +
                       class_name(merge));
    }
    call.require(p.offsets == nullptr,
                 "offsets must not be given with merge: packed sequences are each of one rank");
    group_ = {this, &PythonRanks::merge};
    p.group = &group_;
  }
  PythonRanks(const PythonRanks&) = delete;
  PythonRanks& operator=(const PythonRanks&) = delete;

  // Raises what the function raised in the call of this problem, with the GIL held.
  static void rethrow(const ForwardParams& p) {
    if (p.group == nullptr) return;
    const auto& self = *static_cast<const PythonRanks*>(p.group->context);
    if (self.error_) std::rethrow_exception(self.error_);
  }

 private:
  // A capsule's tensor with its sizes.
  struct View {
    dlpack::ManagedTensor managed;
    int64_t shape[2], strides[2];
  };

  static bool merge(void* context, const Shared* numbers, int64_t count) {
    auto& self = *static_cast<PythonRanks*>(context);
    const py::gil_scoped_acquire acquire;
    try {
      py::list list;
      for (int64_t i = 0; i < count; ++i) list.append(self.capsule(numbers[i]));
      self.merge_(list, numbers[0].how == Merge::kSum ? "sum" : "logsum");
      return true;
    } catch (...) {
      self.error_ = std::current_exception();
      return false;
    }
  }

  py::object capsule(const Shared& numbers) const {
    auto view = std::make_unique<View>();
    view->shape[0] = numbers.rows;
    view->shape[1] = numbers.columns;
    view->strides[0] = numbers.row_stride;
    view->strides[1] = 1;
    view->managed.tensor = {numbers.data, device_, 2, type_, view->shape, view->strides, 0};
    view->managed.manager_context = view.get();
    view->managed.deleter = [](dlpack::ManagedTensor* managed) {
      delete static_cast<View*>(managed->manager_context);
    };
    const py::capsule capsule(&view->managed, "dltensor", [](PyObject* unused) {
      // A consumer renames the capsule and then owns the memory.
      if (!PyCapsule_IsValid(unused, "dltensor")) return;
      auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(unused, "dltensor"));
      managed->deleter(managed);
    });
    view.release();
    return capsule;
  }

  py::object merge_;
  dlpack::Device device_;
  dlpack::DataType type_;
  RankGroup group_;
  std::exception_ptr error_;
};

}  // namespace setformer
