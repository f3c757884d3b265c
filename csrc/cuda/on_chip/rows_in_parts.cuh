// The same for rows of float32, which lie in the rooms as parts. They pass through registers on
// their way: there keys and references are scaled to unit length, if wanted, and the mean of the
// references is subtracted from both, for the Gaussian kernel. Without that, |k|^2 + |y|^2 - 2 k.y
// would cancel for data far from the origin.
#pragma once

#include "unit_length.cuh"

namespace setformer::cuda::on_chip {

// Eight elements of a row, in a lane.
using Eight = float[8];

// Those after the first `left` are 0.
__device__ __forceinline__ void load_eight(const Rows<float>& rows, const float* from, int left,
                                           Eight& x) {
  if (rows.vectors && left >= 8) {
    const float4 lower = *reinterpret_cast<const float4*>(from);
    const float4 upper = *reinterpret_cast<const float4*>(from + 4);
    const float all[8] = {lower.x, lower.y, lower.z, lower.w, upper.x, upper.y, upper.z, upper.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = all[e];
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) x[e] = e < left ? from[e * rows.column_stride] : 0.0f;
}

__device__ __forceinline__ float square_of(const Eight& x) {
  float square = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) square = fmaf(x[e], x[e], square);
  return square;
}

// 1 / |x| to the accuracy of float32: with a step of Newton's method.
__device__ __forceinline__ float exact_inverse_length(float square) {
  const float y = inverse_length(square);
  return square <= float(kShortest * kShortest) ? y : y * fmaf(-0.5f * square * y, y, 1.5f);
}

// x = factor x - center, for the columns from `column` on.
template <class S>
__device__ __forceinline__ void center_eight(float factor, int column, Eight& x) {
  const float* center = shared_at<float>(Memory<S>::kCenter) + column;
#pragma unroll
  for (int e = 0; e < 8; ++e) x[e] = fmaf(x[e], factor, -center[e]);
}

// Stores the parts of eight elements, `step` bytes apart.
__device__ __forceinline__ void store_parts(int to, int step, const Eight& x) {
  uint4 pieces[3];
  uint32_t words[4][3];
#pragma unroll
  for (int word = 0; word < 4; ++word) pack_parts<float>(x[2 * word], x[2 * word + 1], words[word]);
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    pieces[part] = {words[0][part], words[1][part], words[2][part], words[3][part]};
    *shared_at<uint4>(to + part * step) = pieces[part];
  }
}

// What a row is multiplied by to have unit length. Four lanes ask for it together, which have
// pieces of its columns from `column` on, every 32; a row that does not exist is 0.
__device__ __forceinline__ float factor_of_row(const Rows<float>& rows, const float* row,
                                               int column, bool exists) {
  float square = 0;
#pragma unroll 1
  for (; column < rows.depth; column += 32) {
    Eight x;
    load_eight(rows, row + column * rows.column_stride, exists ? rows.depth - column : 0, x);
    square += square_of(x);
  }
  return exact_inverse_length(square_of_row(square, true));
}

// Columns of the warp's tokens, from `first_column` on, into its room; what is beyond the end
// becomes 0, and so do values of hidden tokens.
template <class S>
__device__ __forceinline__ void stage_in_parts(const Params& p, const Place& at,
                                               const Tokens<S>& tokens, const Rows<float>& rows,
                                               int first_column, bool of_keys) {
  const int room = p.sizes.room, pitch = p.sizes.pitch;
  const Piece own(true, pitch, at);
  const int column = first_column + own.column;
  const float* from = rows.data + (tokens.first + own.row) * rows.row_stride;
  const int64_t step = own.at_once * rows.row_stride;
  int to = p.sizes.rows + at.warp * room * pitch * kElement + own.bytes;
#pragma unroll 2
  for (int row = own.row; row < room; row += own.at_once) {
    const bool valid = tokens.valid[row / 32] >> row % 32 & 1;
    Eight x;
    load_eight(rows, from + column * rows.column_stride, valid ? rows.depth - column : 0, x);
    if (of_keys) {
      const float factor = p.normalize ? factor_of_row(rows, from, own.column, valid) : 1.0f;
      center_eight<S>(factor, column, x);
    }
    store_parts(to, p.sizes.part * kElement, x);
    from += step;
    to += own.at_once * pitch * kElement;
  }
}

// Calls visit(reference) for those of which the lane has pieces; four lanes have those of one.
template <class S, class Visit>
__device__ __forceinline__ void for_each_reference(const Place& at, Visit visit) {
#pragma unroll 1
  for (int j = 8 * at.warp + at.lane % 8; j < S::kReferences; j += S::kThreads / 4) visit(j);
}

// Finds what references are divided by to have unit length, and the mean of those scaled, for all
// warps.
template <class S>
__device__ __forceinline__ void find_center(const Params& p, const Place& at) {
  const auto& head = shared_head<S>();
  Rows<float> rows;
  rows.select(p.reference, head.b, head.h, p.references, p.depth);
  float* factors = shared_at<float>(Memory<S>::kTerms);
  for_each_reference<S>(at, [&](int j) {
    float factor = 1;
    if (p.normalize) {
      factor =
          factor_of_row(rows, rows.data + j * rows.row_stride, at.lane / 8 * 8, j < p.references);
    }
    if (at.lane < 8) factors[j] = factor;
  });
  meet<S>();
  const float weight = quotient(1.0f, float(p.references));
  for (int column = at.thread; column < p.sizes.depth_part; column += S::kThreads) {
    float sum = 0;
    if (column < rows.depth && head.similarity.gaussian) {
#pragma unroll 4
      for (int j = 0; j < int(p.references); ++j) {
        const float x = rows.data[j * rows.row_stride + column * rows.column_stride];
        sum = fmaf(x, factors[j], sum);
      }
    }
    shared_at<float>(Memory<S>::kCenter)[column] = sum * weight;
  }
  meet<S>();
}

// Scales and centres the references into shared memory, for all warps; find_center comes before,
// and the caller must call meet() before they are read.
template <class S>
__device__ __forceinline__ void stage_references_in_parts(const Params& p, const Place& at) {
  const auto& head = shared_head<S>();
  Rows<float> rows;
  rows.select(p.reference, head.b, head.h, p.references, p.depth);
  float* terms = shared_at<float>(Memory<S>::kTerms);
  for_each_reference<S>(at, [&](int j) {
    const float factor = terms[j];
    float square = 0;
    for (int column = at.lane / 8 * 8; column < p.sizes.depth_part; column += 32) {
      Eight x;
      load_eight(rows, rows.data + j * rows.row_stride + column * rows.column_stride,
                 j < p.references ? rows.depth - column : 0, x);
      if (j < p.references) center_eight<S>(factor, column, x);
      square += square_of(x);
      store_parts(p.sizes.references + (j * p.sizes.depth_pitch + column) * kElement,
                  p.sizes.depth_part * kElement, x);
    }
    square = square_of_row(square, true);
    __syncwarp();  // four lanes have read it
    if (at.lane < 8) terms[j] = head.exponent(square);
  });
}

// Starts copying columns of the warp's tokens, from `first_column` on, into its room.
template <class S>
__device__ __forceinline__ void stage(const Params& p, const Place& at, const Tokens<S>& tokens,
                                      const Rows<typename S::Storage>& rows, int first_column,
                                      bool of_keys = false) {
  if constexpr (kParts<typename S::Storage> > 1) {
    stage_in_parts<S>(p, at, tokens, rows, first_column, of_keys);
  } else if (p.sizes.pitch == kShortPitch) {
    stage_pieces<S, true>(p, at, tokens, rows, first_column);
    commit_copies();
  } else {
    stage_pieces<S, false>(p, at, tokens, rows, first_column);
    commit_copies();
  }
}

// The warp stores `count` rows of its room to rows from `first` on, columns from `first_column` on.
__device__ __forceinline__ void store_float_rows(const Params& p, const Place& at,
                                                 const Rows<float>& rows, int first, int count,
                                                 int first_column) {
  const int columns = min(rows.depth - first_column, p.sizes.part);
  const int pitch = p.sizes.pitch * kElement;
  const int from = p.sizes.rows + at.warp * p.sizes.room * pitch;
  // Eight lanes store a row, four columns each.
#pragma unroll 1
  for (int row = at.lane / 8; row < count; row += 4) {
    float* to = rows.data + (first + row) * rows.row_stride + first_column * rows.column_stride;
#pragma unroll 1
    for (int column = at.lane % 8 * 4; column < columns; column += 32) {
      const float4 x = *shared_at<float4>(from + row * pitch + column * 4);
      if (rows.vectors && column + 4 <= columns) {
        *reinterpret_cast<float4*>(to + column) = x;
        continue;
      }
      const float all[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (column + e < columns) to[(column + e) * rows.column_stride] = all[e];
      }
    }
  }
}

}  // namespace setformer::cuda::on_chip
