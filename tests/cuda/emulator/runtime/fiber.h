// Stacks and the switch between them.
#pragma once

#include <cstddef>

namespace emulator {

// Saves the registers that a called function keeps, on the current stack, and takes up `to`.
extern "C" void emulator_switch_stack(void** from, void* to);

// Memory for stacks, with a page between two that nobody may touch.
class Stacks {
 public:
  static constexpr size_t kBytes = size_t{4} << 20, kGuard = 4096;
  ~Stacks();
  // The stack with that number, ready to call entry() when it is taken up.
  void* prepare(size_t number, void (*entry)());
  bool in_guard(const void* address) const;
  void reserve(size_t count);

 private:
  unsigned char* base_ = nullptr;
  size_t count_ = 0;
};

}  // namespace emulator
