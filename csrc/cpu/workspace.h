// Scratch memory: one allocation per call, carved up by an arena.
#pragma once

#include <cstdlib>

#include "simd.h"

namespace setformer::cpu::SETFORMER_ISA {

// Hands out aligned arrays from a block; with no block it only measures how much it would need,
// so that one description of the buffers serves for both.
class Arena {
 public:
  explicit Arena(void* block = nullptr) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* take(int64_t count) {
    T* result = block_ == nullptr ? nullptr : reinterpret_cast<T*>(block_ + used_);
    int64_t bytes;
    if (__builtin_mul_overflow(count, int64_t{sizeof(T)}, &bytes) || bytes > kMost - used_) {
      used_ = kMost;  // and stays there: Block will find that it cannot have this much
    } else {
      used_ += round_up(bytes, kAlignment);
    }
    return result;
  }
  int64_t used() const { return used_; }

  static constexpr int64_t kAlignment = 64;           // a cache line, and the widest vector
  static constexpr int64_t kMost = int64_t{1} << 50;  // beyond any address space

 private:
  char* block_;
  int64_t used_ = 0;
};

// Owns the block of a call.
class Block {
 public:
  explicit Block(int64_t bytes)
      : data_(std::aligned_alloc(Arena::kAlignment, round_up(bytes + 1, Arena::kAlignment))) {}
  ~Block() { std::free(data_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
};

}  // namespace setformer::cpu::SETFORMER_ISA
