// What environment variables choose about launches, so that one program can measure one design
// beside another: docs/cuda.md. Results are right with any, but not the same to the bit.
#pragma once

namespace setformer::cuda {

struct Knobs {
  bool resident;    // SETFORMER_CUDA_RESIDENT: heads that fit a block are worked on by one
  int tiles_shift;  // log2 of SETFORMER_CUDA_TILES: tiles of tokens that are one block's, at least
};

// As they were at the first call that returned. Throws std::invalid_argument for a value that is
// none, which names the variable.
const Knobs& knobs();

}  // namespace setformer::cuda
