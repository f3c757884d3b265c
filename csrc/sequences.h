// Packed sequences of different lengths, one after another. Each is a problem of its own, whose
// arrays are parts of the packed arrays.
#pragma once

#include "set_attention.h"

namespace setformer {

// The problem of sequence `s` alone: a batch of one.
template <class Params>
Params sequence(const Params& packed, int64_t s);

// A problem with sizes that no sequence exceeds.
template <class Params>
Params longest_sequence(const Params& packed);

}  // namespace setformer
