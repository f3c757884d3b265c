// Launch options that environment variables choose, so that one build can compare designs
// (docs/cuda.md). Results are right with all of them, but not bitwise the same.
#pragma once

namespace setformer::cuda {

struct Knobs {
  bool resident;    // SETFORMER_CUDA_RESIDENT: a head that fits a block is computed by one block
  int tiles_shift;  // log2 of SETFORMER_CUDA_TILES, the least number of token tiles of a block
};

// Read once, at the first call without an error. Throws std::invalid_argument for an invalid value;
// the message names the variable.
const Knobs& knobs();

}  // namespace setformer::cuda
