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

namespace setformer::cpu {

// Threads that a call may use: those of OpenMP, but 1 in a process forked from one that had
// several. The child has OpenMP's record of them and not the threads: it would wait for them
// forever.
int available_threads();

// Operations from which it pays to wake threads. SETFORMER_LEAST_PARALLEL_WORK overrides it.
double least_parallel_work();

}  // namespace setformer::cpu
