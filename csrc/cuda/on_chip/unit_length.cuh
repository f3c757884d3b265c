// Scaling rows to unit length where they lie in shared memory, so that it takes no pass of its own.
// Scaled rows are rounded to the storage type, as those are that other kernels find in the
// workspace (csrc/cuda/unit_length.cuh): forward and backward see the same ones, whoever scales.
#pragma once

#include "rows.cuh"

namespace setformer::cuda::on_chip {

template <class Storage>
__device__ __forceinline__ float square_of_piece(const uint4& piece) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
  float square = 0;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const float2 x = unpack<Storage>(words[word]);
    square = fmaf(x.x, x.x, fmaf(x.y, x.y, square));
  }
  return square;
}

template <class Storage>
__device__ __forceinline__ uint4 scaled_piece(const uint4& piece, float factor) {
  uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const float2 x = unpack<Storage>(words[word]);
    words[word] = pack<Storage>(x.x * factor, x.y * factor);
  }
  return {words[0], words[1], words[2], words[3]};
}

// The sum over the lanes that hold pieces of the same row (see Piece).
__device__ __forceinline__ float square_of_row(float square, bool is_short) {
  if (!is_short) square += __shfl_xor_sync(kFullWarp, square, 1);
  if (!is_short) square += __shfl_xor_sync(kFullWarp, square, 2);
  square += __shfl_xor_sync(kFullWarp, square, is_short ? 8 : 4);
  if (is_short) square += __shfl_xor_sync(kFullWarp, square, 16);
  return square;
}

// Scales `count` rows of at most 64 columns, each lane the pieces that it has copied itself; 1 /
// |x| goes to `factors`, if given. The caller must call __syncwarp() before others read the rows.
template <class Storage>
__device__ __forceinline__ void scale_to_unit_length(const Place& at, int rows, int count,
                                                     int pitch, float* factors = nullptr) {
  const bool is_short = pitch == kShortPitch;
  const Piece own(is_short, pitch, at);
#pragma unroll 1
  for (int i = 0; i < count; i += own.at_once) {
    uint4& piece = *shared_at<uint4>(rows + own.bytes + i * pitch * kElement);
    const float factor = inverse_length(square_of_row(square_of_piece<Storage>(piece), is_short));
    piece = scaled_piece<Storage>(piece, factor);
    if (factors != nullptr && own.column == 0) factors[i + own.row] = factor;
  }
}

}  // namespace setformer::cuda::on_chip
