// The entries of a head: scores s_ij log2(e), or factors 2^(s_ij - scale) <= 1 made of them.
#pragma once

#include "rows_in_parts.cuh"

namespace setformer::cuda::on_chip {

// Stores the positions of the references in shared memory, for all warps.
template <class S>
__device__ __forceinline__ void stage_positions(const ForwardParams& p, const Place& at) {
  if (!shared_head<S>().similarity.has_positions) return;
  const Tensor& from = p.reference_positions;
  for (int i = at.thread; i < int(p.position_depth) * S::kReferences; i += S::kThreads) {
    const int axis = i / S::kReferences, j = i % S::kReferences;
    shared_at<float>(Memory<S>::kPositions)[i] =
        j < p.references
            ? static_cast<const float*>(from.data)[j * from.stride[0] + axis * from.stride[1]]
            : 0.0f;
  }
}

// Copies the references into shared memory, from `room` on, for all warps, scaled to unit length if
// wanted; the caller must call meet() before they are read.
template <class S>
__device__ __forceinline__ void stage_references(const ForwardParams& p, const Place& at, int room,
                                                 int pitch) {
  using Storage = typename S::Storage;
  const auto& head = shared_head<S>();
  Rows<Storage> rows;
  rows.select(p.reference, head.b, head.h, p.references, p.depth);
  Storage* to = shared_at<Storage>(room);
  // Eight lanes write at once, each a piece of another row; the rows begin in different banks.
#pragma unroll 1
  for (int j = 8 * at.warp + at.lane % 8; j < S::kReferences; j += S::kThreads / 4) {
    float square = 0;
#pragma unroll 1
    for (int column = at.lane / 8 * 8; column < pitch - 8; column += 32) {
      const int left = j < p.references ? rows.depth - column : 0;
      const Storage* from = rows.data + j * rows.row_stride + column * rows.column_stride;
      const uint4 piece = rows.vectors && left >= 8 ? *reinterpret_cast<const uint4*>(from)
                                                    : gather_piece(from, rows.column_stride, left);
      *reinterpret_cast<uint4*>(to + j * pitch + column) = piece;
      square += square_of_piece<Storage>(piece);
    }
    square = square_of_row(square, true);
    if (p.normalize) {
      const float factor = inverse_length(square);
      square = 0;
#pragma unroll 1
      for (int column = at.lane / 8 * 8; column < pitch - 8; column += 32) {
        uint4& piece = *reinterpret_cast<uint4*>(to + j * pitch + column);
        piece = scaled_piece<Storage>(piece, factor);
        square += square_of_piece<Storage>(piece);
      }
      square = square_of_row(square, true);
    }
    if (at.lane < 8) shared_at<float>(Memory<S>::kTerms)[j] = head.exponent(square);
  }
  stage_positions<S>(p, at);
}

// The references of forward.
template <class S>
__device__ __forceinline__ void stage_references(const Params& p, const Place& at) {
  if constexpr (kParts<typename S::Storage> > 1) {
    stage_references_in_parts<S>(p, at);
    stage_positions<S>(p, at);
  } else {
    stage_references<S>(p, at, p.sizes.references, p.sizes.depth_pitch);
  }
}

// Scales the rows that the warp's lanes are copying into its room to unit length; of float32 they
// are.
template <class S>
__device__ __forceinline__ void scale_tokens(const Params& p, const Place& at,
                                             const Tokens<S>& tokens) {
  if constexpr (kParts<typename S::Storage> > 1) return;
  const int bytes_of_room = p.sizes.room * p.sizes.pitch * kElement;
  wait_for_copies<0>();
  scale_to_unit_length<typename S::Storage>(at, p.sizes.rows + at.warp * bytes_of_room,
                                            16 * tokens.strips, p.sizes.pitch);
}

// Adds the share of kBands bands of the depth to k.y, for `together` strips against all references,
// and to |k|^2, from the diagonal of k k^T.
template <class S, int together>
__device__ __forceinline__ void multiply_strips(const Params& p, const Place& at, int from,
                                                int band, Entries<S>& entries,
                                                OfTokens<S>& squares) {
  using Storage = typename S::Storage;
  const int room_pitch = p.sizes.pitch, pitch = p.sizes.depth_pitch;
  constexpr int kStep = 16 * kElement;  // of a band
  const uint32_t rows = strip_matrices<S>(p, at, false) + kStep * (band % kMostBands<Storage>);
  constexpr int kParts = on_chip::kParts<Storage>;
  uint32_t keys[together][kParts][kBands][4];
  const int source = (at.lane & ~3) | at.g / 2;
#pragma unroll
  for (int i = 0; i < together; ++i) {
    const int s = from + i;
    if (s >= S::kStrips) continue;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int b = 0; b < kBands; ++b) {
        load_matrices<false>(keys[i][part][b],
                             rows + part * p.sizes.part * kElement + kStep * (s * room_pitch + b));
      }
    }
    float upper[4] = {}, lower[4] = {};
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
      for_each_product<Storage>([&](int one, int other) {
        // k as the second operand consists of the same matrices, for tokens 0 to 7 and 8 to 15
        const uint32_t (&k)[4] = keys[i][other][b];
        multiply_block<Part<Storage>>(upper, keys[i][one][b], k[0], k[2]);
        multiply_block<Part<Storage>>(lower, keys[i][one][b], k[1], k[3]);
      });
    }
    squares[s][0] += __shfl_sync(kFullWarp, at.g % 2 ? upper[1] : upper[0], source);
    squares[s][1] += __shfl_sync(kFullWarp, at.g % 2 ? lower[3] : lower[2], source);
  }
  const uint32_t references = shared_address(p.sizes.references) + kStep * band +
                              kElement * (at.lane % 8 * pitch + at.lane / 8 * 8);
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
    uint32_t y[kParts][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      load_matrices<false>(
          y[part], references + part * p.sizes.depth_part * kElement + 8 * kElement * n * pitch);
    }
#pragma unroll
    for (int i = 0; i < together; ++i) {
      const int s = from + i;
      if (s >= S::kStrips) continue;
      for_each_product<Storage>([&](int one, int other) {
        multiply_block<Part<Storage>>(entries[s][n], keys[i][one][0], y[other][0], y[other][1]);
        multiply_block<Part<Storage>>(entries[s][n], keys[i][one][1], y[other][2], y[other][3]);
      });
    }
  }
}

// Applies w_ij, the penalty of positions, to a strip: to exponents if the kernel is gaussian, else
// to similarities. The strip's first block of references is `from`.
template <class S, int blocks>
__device__ __forceinline__ void weigh_by_positions(const ForwardParams& p, const Place& at,
                                                   int first, float (&strip)[blocks][4], int from) {
  const auto& head = shared_head<S>();
#pragma unroll 1
  for (int axis = 0; axis < int(p.position_depth); ++axis) {
    float own[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first + at.g + 8 * half;
      own[half] = i < head.tokens.count
                      ? head.positions[i * head.position_stride + axis * head.axis_stride]
                      : 0.0f;
    }
    const float2* positions =
        shared_at<float2>(Memory<S>::kPositions) + axis * (S::kReferences / 2) + 4 * from + at.c;
#pragma unroll
    for (int n = 0; n < blocks; ++n) {
      const float2 pair = positions[4 * n];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float difference = own[e / 2] - (e % 2 ? pair.y : pair.x);
        const float log_w = difference * difference * head.similarity.position_scale;
        float& x = strip[n][e];
        x = head.similarity.gaussian ? x + log_w : x * power_of_two(log_w);
      }
    }
  }
}

// Calls visit(number) for each number of a strip.
template <int blocks, class Visit>
__device__ __forceinline__ void for_each_of_strip(float (&strip)[blocks][4], Visit visit) {
#pragma unroll
  for (int n = 0; n < blocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) visit(strip[n][e]);
  }
}

// Turns products into similarities, for one strip whose tokens have the square norms `squares`,
// and whose first block of references is `from`.
template <class S, int blocks>
__device__ __forceinline__ void similarities_of_strip(const ForwardParams& p, const Place& at,
                                                      int first, const float (&squares)[2],
                                                      float (&strip)[blocks][4], int from = 0) {
  const auto& head = shared_head<S>();
  const Similarity<float>& similarity = head.similarity;
  // Each strip loads its data again: kept from strip to strip, it would take registers of the
  // entries.
  asm volatile("" ::: "memory");
  if (similarity.gaussian) {
    const float of_tokens[2] = {head.exponent(squares[0]), head.exponent(squares[1])};
    const float2* of_references = shared_at<float2>(Memory<S>::kTerms) + 4 * from + at.c;
    const float twice = 2.0f * similarity.distance_scale;
#pragma unroll
    for (int n = 0; n < blocks; ++n) {
      const float2 pair = of_references[4 * n];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float exponent =
            fmaf(strip[n][e], twice, of_tokens[e / 2] + (e % 2 ? pair.y : pair.x));
        // rounding may leave a distance just below 0
        strip[n][e] = least(exponent, 0.0f);
      }
    }
  }
  if (similarity.has_positions) weigh_by_positions<S>(p, at, first, strip, from);
  if (similarity.gaussian) for_each_of_strip(strip, [](float& x) { x = power_of_two(x); });
}

// Turns similarities into entries.
template <class S, int blocks>
__device__ __forceinline__ void entries_of_strip(float (&strip)[blocks][4]) {
  const Similarity<float>& similarity = shared_head<S>().similarity;
  const float scale = similarity.scale;
  if (similarity.factored) {
    for_each_of_strip(strip, [&](float& x) { x = power_of_two(fmaf(x, scale, -scale)); });
  } else {
    for_each_of_strip(strip, [&](float& x) { x *= scale; });
  }
}

// Computes all entries of the warp's tokens. Copies of the tokens' first columns into the warp's
// room must have been started. Strips that the warp does not have are 0.
template <class S>
__device__ __forceinline__ void form_entries(const Params& p, const Place& at,
                                             const Tokens<S>& tokens, Entries<S>& entries) {
  constexpr int kTogether = kParts<typename S::Storage> > 1 ? 1 : 2;
  OfTokens<S> squares = {};
  for_each_entry<S>(entries, [](float& x, int, int, int, int) { x = 0.0f; });
  int band = 0;
#pragma unroll 1
  do {
    if (band % kMostBands<typename S::Storage> == 0) {
      __syncwarp();
      if (band > 0) stage<S>(p, at, tokens, shared_head<S>().tokens, 16 * band, true);
      wait_for_copies<0>();
      __syncwarp();
    }
#pragma unroll
    for (int from = 0; from < S::kStrips; from += kTogether) {
      if (from < tokens.strips) {
        multiply_strips<S, kTogether>(p, at, from, band, entries, squares);
      }
    }
    band += kBands;
  } while (band < p.sizes.bands);
#pragma unroll
  for (int s = 0; s < S::kStrips; ++s) {
    if (s < tokens.strips) {
      similarities_of_strip<S>(p, at, tokens.first + 16 * s, squares[s], entries[s]);
      entries_of_strip<S>(entries[s]);
    }
  }
}

}  // namespace setformer::cuda::on_chip
