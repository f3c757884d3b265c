// The entry points that kernels.cpp defines for each instruction set it is compiled for.
#pragma once

#include "../set_attention.h"

#define SETFORMER_DECLARE_KERNELS(isa)      \
  namespace setformer::cpu::isa {           \
  Status forward(const ForwardParams& p);   \
  Status backward(const BackwardParams& p); \
  }

SETFORMER_DECLARE_KERNELS(baseline)
SETFORMER_DECLARE_KERNELS(avx2)
SETFORMER_DECLARE_KERNELS(avx512)
SETFORMER_DECLARE_KERNELS(avx512_bf16)  // bfloat16 by itself, other types by avx512

namespace setformer::cpu {

// Threads that a call may use: OpenMP's number, but 1 in a process forked from one with several
// threads. Such a child inherits OpenMP's record of the threads but not the threads, and would wait
// for them forever.
int available_threads();

// Operations from which it pays to wake threads. SETFORMER_LEAST_PARALLEL_WORK overrides it.
double least_parallel_work();

}  // namespace setformer::cpu
