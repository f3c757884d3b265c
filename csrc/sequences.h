// Packed sequences of different lengths, one after another: each is a problem of its own, whose
// arrays are parts of those of all.
#pragma once

#include "set_attention.h"

namespace setformer {

// The problem of sequence `s` alone: a batch of one.
ForwardParams sequence(const ForwardParams& packed, int64_t s);
BackwardParams sequence(const BackwardParams& packed, int64_t s);

// A problem with sizes that no sequence exceeds.
ForwardParams longest_sequence(const ForwardParams& packed);
BackwardParams longest_sequence(const BackwardParams& packed);

}  // namespace setformer
