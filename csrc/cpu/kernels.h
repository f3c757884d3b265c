// The entry points that kernels.cpp defines for each instruction set it is compiled for.
#pragma once

#include "../set_attention.h"

#define SETFORMER_DECLARE_KERNELS(isa)      \
  namespace setformer::cpu::isa {           \
  Status forward(const ForwardParams& p);   \
  Status backward(const BackwardParams& p); \
  Status plan(const PlanParams& p);         \
  }

SETFORMER_DECLARE_KERNELS(baseline)
SETFORMER_DECLARE_KERNELS(avx2)
SETFORMER_DECLARE_KERNELS(avx512)
