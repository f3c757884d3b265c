// Rows of tensors into the warps' rooms of shared memory, and back.
#pragma once

#include "shape.cuh"

namespace setformer::cuda::on_chip {

// Eight elements of a row; those after the first `left` are 0.
template <class Storage>
__device__ __forceinline__ uint4 gather_piece(const Storage* from, int64_t stride, int left) {
  uint32_t words[4] = {};
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (e >= left) continue;
    const uint32_t half = *reinterpret_cast<const uint16_t*>(from + e * stride);
    words[e / 2] |= half << 16 * (e % 2);
  }
  return {words[0], words[1], words[2], words[3]};
}

inline constexpr int kShortPitch = 16 * kBands + 8;  // of rows of 4 pieces; others have 8

// The piece of 8 columns that a lane copies, in one of every `at_once` rows. Eight lanes copy a
// piece of each of eight short rows, or one long row, without bank conflicts.
struct Piece {
  int row, column, at_once, bytes;  // bytes from the first row
  __device__ __forceinline__ Piece(bool is_short, int pitch, const Place& at) {
    at_once = is_short ? 8 : 4;
    row = is_short ? at.lane % 8 : at.lane / 8;
    column = 8 * (is_short ? at.lane / 8 : at.lane % 8);
    bytes = (row * pitch + column) * kElement;
  }
};

// Starts copying columns of the warp's tokens, from `first_column` on, into its room; hidden tokens
// and what is beyond the end become 0.
template <class S, bool is_short>
__device__ __forceinline__ void stage_pieces(const Params& p, const Place& at,
                                             const Tokens<S>& tokens,
                                             const Rows<typename S::Storage>& rows,
                                             int first_column) {
  using Storage = typename S::Storage;
  const int room = p.sizes.room, pitch = p.sizes.pitch;
  const Piece own(is_short, pitch, at);
  const int left = rows.depth - first_column - own.column;
  const bool whole = rows.vectors && left >= 8;
  int to = p.sizes.rows + at.warp * room * pitch * kElement + own.bytes;
  const Storage* from = rows.data + (tokens.first + own.row) * rows.row_stride +
                        (first_column + own.column) * rows.column_stride;
  const int64_t step = own.at_once * rows.row_stride;
  const int step_of_room = own.at_once * pitch * kElement;
  if (whole) {
    uint32_t address = shared_address(to);
#pragma unroll
    for (int first = 0; first < S::kWarpTokens; first += 32) {
      if (first >= room) break;
      const uint32_t valid = tokens.valid[first / 32] >> own.row;
#pragma unroll
      for (int i = 0; i < 32; i += own.at_once) {
        copy_async(address, from, valid & 1u << i ? 16 : 0);
        from += step;
        address += step_of_room;
      }
    }
    return;
  }
#pragma unroll 1
  for (int row = own.row; row < room; row += own.at_once) {
    const bool valid = row < 16 * tokens.strips && rows.valid(tokens.first + row);
    *shared_at<uint4>(to) = gather_piece(from, rows.column_stride, valid ? left : 0);
    from += step;
    to += step_of_room;
  }
}

// The warp stores `count` rows of shared memory to rows from `first` on, columns from
// `first_column` on.
template <class Storage>
__device__ __forceinline__ void store_rows(const Place& at, const Rows<Storage>& rows, int first,
                                           int count, int first_column, int pitch, int from) {
  const Piece own(pitch == kShortPitch, pitch, at);
  const int left = rows.depth - first_column - own.column;
  if (left <= 0) return;
  const bool whole = rows.vectors && left >= 8;
  from += own.bytes;
  Storage* to = rows.data + (first + own.row) * rows.row_stride +
                (first_column + own.column) * rows.column_stride;
  const int64_t step = own.at_once * rows.row_stride;
  const int next = own.at_once * pitch * kElement;
#pragma unroll 1
  for (int i = own.row; i < count; i += own.at_once) {
    if (whole) {
      *reinterpret_cast<uint4*>(to) = *shared_at<uint4>(from);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8 && e < left; ++e) {
        to[e * rows.column_stride] = shared_at<Storage>(from)[e];
      }
    }
    from += next;
    to += step;
  }
}

}  // namespace setformer::cuda::on_chip
