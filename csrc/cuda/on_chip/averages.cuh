// The two averages of a head whose entries are in registers: A_j = sum_i C_ij V_i and O_i =
// sum_j R_ij A_j, on the tensor cores.
//
// C_ij = u_i K_ij / c_j and R_ij = v_j K_ij / r_i. In the log domain entries are the plans
// themselves, with factors 1. Entries of plans and of A are rounded to the storage type before they
// are multiplied. bfloat16 has a range large enough to multiply u K and K: the factors of
// references are multiplied into A, those of tokens into the output. float16 multiplies plans times
// kPlanScale.
#pragma once

#include "solve.cuh"

namespace setformer::cuda::on_chip {

template <class Storage>
inline constexpr bool kFewExponents = std::is_same_v<Storage, __half>;
inline constexpr int kPlanShift = 14;
template <class Storage>
inline constexpr float kPlanScale = kFewExponents<Storage> ? float(1 << kPlanShift) : 1.0f;

// Stores columns of the output, from `first_column` on, that are in the warp's room.
template <class S>
__device__ __forceinline__ void store_outputs(const Params& p, const Place& at,
                                              const Tokens<S>& tokens, int first_column) {
  const auto& rows = shared_head<S>().outputs;
  const int count = min(16 * tokens.strips, int(rows.count) - tokens.first);
  if constexpr (kParts<typename S::Storage> > 1) {
    store_float_rows(p, at, rows, tokens.first, count, first_column);
    return;
  }
  store_rows(at, rows, tokens.first, count, first_column, p.sizes.pitch,
             p.sizes.rows + at.warp * p.sizes.room * p.sizes.pitch * kElement);
}

// Factors of the sums of products, in the warp's own rooms, as pairs of references.
struct Weights {
  const float2* pooled;   // for A
  const float2* further;  // for the operand of distribute; in a share, for A so far
};

// Adds to a number of A so far. Where its factor is 0 there is nothing yet.
__device__ __forceinline__ void add_to_average(float& average, float kept, float x) {
  average = kept == 0.0f ? x : fmaf(average, kept, x);
}

// Stores a lane's part of a tile of A^T, 16 columns by 8 references: in the pooled output, and in
// the operand of distribute, where the same lane will need it. In a share, adds it to what the same
// lane has stored before.
template <class S>
__device__ __forceinline__ void keep_pooled(const Params& p, const Weights& weights, int band,
                                            int block, int lane, const float4& sum) {
  using Storage = typename S::Storage;
  const int pair = 4 * block + lane % 4, column = 16 * band + lane / 4;
  const float2 weight = weights.pooled[pair], factor = weights.further[pair];
  const float x[2][2] = {{sum.x * weight.x, sum.y * weight.y},
                         {sum.z * weight.x, sum.w * weight.y}};
  const int width = int(p.value_depth);
  const int left = rank<S>() == 0 ? int(p.references) - 2 * pair : 0;  // to store for all ranks
  float* pooled = shared_head<S>().pooled + (2 * pair * width + column);
  uint32_t* operand =
      shared_at<uint32_t>(Memory<S>::kOperand) + (band * S::kPairs + block / 2) * 128 + 2 * lane;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (S::kShare) {
      if (column + 8 * half >= width) continue;
      if (left > 0) add_to_average(pooled[8 * half], factor.x, x[half][0]);
      if (left > 1) add_to_average(pooled[8 * half + width], factor.y, x[half][1]);
      continue;
    }
    if (column + 8 * half < width) {
      if (left > 0) pooled[8 * half] = x[half][0];
      if (left > 1) pooled[8 * half + width] = x[half][1];
    }
    uint32_t parts[kParts<Storage>];
    pack_parts<Storage>(x[half][0] * factor.x, x[half][1] * factor.y, parts);
#pragma unroll
    for (int part = 0; part < kParts<Storage>; ++part) {
      uint32_t* to = operand + part * p.sizes.value_bands * S::kPairs * 128 + 64 * half;
      to[block % 2] = parts[part];
      if (S::kBlocks % 2 == 1 && block == S::kBlocks - 1) to[1] = 0;
    }
  }
}

using Tiles = float[kGroup][kBands][4];
inline constexpr int kTiles = kGroup * kBands;

// The warp's share of A^T = V^T C for kGroup blocks of references and kBands bands of columns: the
// sum over its own tokens.
template <class S>
__device__ __forceinline__ void pool_tiles(const Params& p, const Place& at,
                                           const Tokens<S>& tokens, int band, int block,
                                           const Entries<S>& entries, const OfTokens<S>& factors,
                                           const OfReferences<S>& of_plan, Tiles& tiles) {
  using Storage = typename S::Storage;
  const int pitch = p.sizes.pitch;
  constexpr int kStep = 16 * kElement;  // of a band
  const uint32_t values = strip_matrices<S>(p, at, true) + kStep * band;
#pragma unroll
  for (int s = 0; s < S::kStrips; ++s) {
    if (s >= tokens.strips) continue;
    uint32_t columns[kParts<Storage>][kBands][4];
#pragma unroll
    for (int part = 0; part < kParts<Storage>; ++part) {
#pragma unroll
      for (int b = 0; b < kBands; ++b) {
        load_matrices<true>(columns[part][b],
                            values + part * p.sizes.part * kElement + kStep * (s * pitch + b));
      }
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (block + i >= S::kBlocks) continue;
      const int n = block + i < S::kBlocks ? block + i : 0;
      uint32_t plan[2][kParts<Storage>];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          x[e] = entries[s][n][2 * half + e] * factors[s][half];
          if (kFewExponents<Storage>) x[e] *= of_plan[n][e];
        }
        pack_parts<Storage>(x[0], x[1], plan[half]);
#pragma unroll
        for (int part = 0; part < kParts<Storage>; ++part) {
          plan[half][part] = transposed(plan[half][part]);
        }
      }
#pragma unroll
      for (int b = 0; b < kBands; ++b) {
        for_each_product<Storage>([&](int one, int other) {
          multiply_block<Part<Storage>>(tiles[i][b], columns[one][b], plan[0][other],
                                        plan[1][other]);
        });
      }
    }
  }
}

// The sum of a tile over `count` warps or blocks, in their order, from room [count, kTiles, 32].
__device__ __forceinline__ float4 sum_of_tile(const Place& at, int tile, int count,
                                              const float4* room) {
  const float4* own = room + tile * 32 + at.lane;
  float4 sum = *own;
#pragma unroll
  for (int i = 1; i < count; ++i) {
    const float4 other = own[i * kTiles * 32];
    sum = {sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w};
  }
  return sum;
}

// Sends the block's sums of `count` tiles to all blocks of the cluster. Returns the room in which
// theirs are.
template <class S>
__device__ __forceinline__ const float4* exchange_tiles(const Place& at, Exchange& exchange,
                                                        int count, const float4* room) {
  const int received = Memory<S>::kTiles + int(exchange.room()) * kMostRanks * kTiles * 32 * 16;
  expect<S>(at, exchange, ranks<S>() * count * 32 * 16);
  static_assert(S::kWarps >= kTiles);
  if (at.warp < count) {
    const float4 sum = sum_of_tile(at, at.warp, S::kWarps, room);
    const int place = ((rank<S>() * kTiles + at.warp) * 32 + at.lane) * 16;
#pragma unroll 1
    for (int to = 0; to < ranks<S>(); ++to) {
      send(address_in(to, shared_address(received + place)),
           address_in(to, shared_address(Memory<S>::kBarriers + 8 * exchange.room())), sum);
    }
  }
  receive<S>(exchange);
  ++exchange.count;
  return shared_at<float4>(received);
}

// Adds the tiles of all warps, in the order of the warps and ranks, to get A. `parity` alternates
// between calls, so that no warp overwrites what another still reads.
template <class S>
__device__ __forceinline__ void add_tiles(const Params& p, const Place& at, const Weights& weights,
                                          int band, int block, int parity, Exchange& exchange,
                                          const Tiles& tiles) {
  float4* room = shared_at<float4>(Memory<S>::kSums) + parity * S::kWarps * kTiles * 32;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (block + i >= S::kBlocks) continue;
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
      const float (&d)[4] = tiles[i][b];
      if constexpr (S::kWarps == 1) {
        keep_pooled<S>(p, weights, band + b, block + i, at.lane, {d[0], d[1], d[2], d[3]});
      } else {
        room[(at.warp * kTiles + i * kBands + b) * 32 + at.lane] = {d[0], d[1], d[2], d[3]};
      }
    }
  }
  if constexpr (S::kWarps == 1) return;
  meet<S>();
  const int all = kBands * min(kGroup, S::kBlocks - block);  // of the tiles
  const float4* from = room;
  if constexpr (S::kClustered) from = exchange_tiles<S>(at, exchange, all, room);
#pragma unroll 1
  for (int tile = at.warp; tile < all; tile += S::kWarps) {
    const float4 sum = sum_of_tile(at, tile, S::kClustered ? ranks<S>() : S::kWarps, from);
    keep_pooled<S>(p, weights, band + tile % kBands, block + tile / kBands, at.lane, sum);
  }
}

// A times `of_pooled`, from entries whose sums over the tokens are 1 / weights. `further` are the
// factors of Weights.
template <class S>
__device__ __forceinline__ void collect(const Params& p, const Place& at, const Tokens<S>& tokens,
                                        const Entries<S>& entries, const OfTokens<S>& factors,
                                        const Spread<S>& weights, const Spread<S>& of_pooled,
                                        const Spread<S>& further, Exchange& exchange) {
  using Storage = typename S::Storage;
  OfReferences<S> of_plan{};
  Spread<S> of_sums;
#pragma unroll
  for (int h = 0; h < S::kLanePairs; ++h) of_sums[h] = weights[h];
  if constexpr (kFewExponents<Storage>) {
    for_each_own(at, of_sums, [](int, float& x) { x *= kPlanScale<Storage>; });
    to_fragments<S>(at, of_sums, of_plan);
    for_each_own(at, of_sums, [](int, float& x) { x = 1.0f / kPlanScale<Storage>; });
  }
#pragma unroll
  for (int h = 0; h < S::kLanePairs; ++h) {
    of_sums[h] = {of_sums[h].x * of_pooled[h].x, of_sums[h].y * of_pooled[h].y};
  }
  const Weights of_tiles{in_room<S>(at, of_sums), in_room<S>(at, further, 1)};
  const int bands = p.sizes.value_bands;
  int parity = 0;
#pragma unroll 1
  for (int band = 0; band < bands; band += kBands) {
    if (band > 0 && band % kMostBands<Storage> == 0) {
      __syncwarp();
      stage<S>(p, at, tokens, shared_head<S>().values, 16 * band);
    }
    wait_for_copies<0>();
    __syncwarp();
#pragma unroll
    for (int block = 0; block < S::kBlocks; block += kGroup) {
      Tiles tiles = {};
      pool_tiles<S>(p, at, tokens, band % kMostBands<Storage>, block, entries, factors, of_plan,
                    tiles);
      add_tiles<S>(p, at, of_tiles, band, block, parity, exchange, tiles);
      parity ^= 1;
    }
  }
}

// Adds sum_j R_ij A_j, in kBands bands of columns, for the tokens of a strip, whose entries are
// split on the way. `step` leads from part to part of A.
template <class S>
__device__ __forceinline__ void distribute_strip(const float (&entries)[S::kBlocks][4],
                                                 const uint2* operand, int step,
                                                 float (&sums)[2 * kBands][4]) {
  using Storage = typename S::Storage;
  constexpr int kParts = on_chip::kParts<Storage>;
#pragma unroll
  for (int pair = 0; pair < S::kPairs; ++pair) {
    uint32_t plan[4][kParts];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = 2 * pair + i / 2;
      const float (&x)[4] = entries[n < S::kBlocks ? n : 0];
      const bool exists = n < S::kBlocks;
      pack_parts<Storage>(exists ? x[2 * (i % 2)] : 0.0f, exists ? x[2 * (i % 2) + 1] : 0.0f,
                          plan[i]);
    }
#pragma unroll
    for (int half = 0; half < 2 * kBands; ++half) {
      uint2 pooled[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        pooled[part] = operand[part * step + (half / 2 * S::kPairs + pair) * 64 + half % 2 * 32];
      }
      for_each_product<Storage>([&](int one, int other) {
        const uint32_t a[4] = {plan[0][one], plan[1][one], plan[2][one], plan[3][one]};
        multiply_block<Part<Storage>>(sums[half], a, pooled[other].x, pooled[other].y);
      });
    }
  }
}

// distribute() strip by strip, so that few parts of entries are in registers.
template <class S>
__device__ __forceinline__ void distribute_in_parts(const Params& p, const Place& at,
                                                    const Tokens<S>& tokens,
                                                    const Entries<S>& entries,
                                                    const OfTokens<S>& scales) {
  static_assert(kMostBands<typename S::Storage> == kBands);
  const int bands = p.sizes.value_bands, pitch = p.sizes.pitch * kElement;
  const int room = p.sizes.rows + (at.warp * p.sizes.room + at.g) * pitch + 2 * at.c * 4;
  const uint2* operand = shared_at<uint2>(Memory<S>::kOperand) + at.lane;
#pragma unroll 1
  for (int band = 0; band < bands; band += kBands) {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      if (s >= tokens.strips) break;
      float sums[2 * kBands][4] = {};
      distribute_strip<S>(entries[s], operand + band * S::kPairs * 64, bands * S::kPairs * 64,
                          sums);
#pragma unroll
      for (int i = 0; i < 4 * kBands; ++i) {
        const float* x = sums[i / 2] + 2 * (i % 2);
        *shared_at<float2>(room + (16 * s + 8 * (i % 2)) * pitch + 8 * (i / 2) * 4) = {
            x[0] * scales[s][i % 2], x[1] * scales[s][i % 2]};
      }
    }
    __syncwarp();
    store_outputs<S>(p, at, tokens, 16 * band);
    __syncwarp();
  }
}

// distribute() for all strips at once, so that A is loaded once.
template <class S>
__device__ __forceinline__ void distribute_at_once(const Params& p, const Place& at,
                                                   const Tokens<S>& tokens,
                                                   const Entries<S>& entries,
                                                   const OfTokens<S>& scales) {
  using Storage = typename S::Storage;
  uint32_t plan[S::kStrips][2 * S::kPairs][2];
#pragma unroll
  for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
    for (int n = 0; n < 2 * S::kPairs; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&x)[4] = entries[s][n < S::kBlocks ? n : 0];
        plan[s][n][half] = n < S::kBlocks ? pack<Storage>(x[2 * half], x[2 * half + 1]) : 0;
      }
    }
  }
  const int bands = p.sizes.value_bands, pitch = p.sizes.pitch;
  Storage* room =
      shared_at<Storage>(p.sizes.rows) + (at.warp * p.sizes.room + at.g) * pitch + 2 * at.c;
  const uint2* operand = shared_at<uint2>(Memory<S>::kOperand) + at.lane;
#pragma unroll 1
  for (int band = 0; band < bands; ++band) {
    Storage* own = room + 16 * (band % kMostBands<Storage>);
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      float sums[S::kStrips][4] = {};
#pragma unroll
      for (int pair = 0; pair < S::kPairs; ++pair) {
        const uint2 b = operand[(band * S::kPairs + pair) * 64 + upper * 32];
#pragma unroll
        for (int s = 0; s < S::kStrips; ++s) {
          const uint32_t a[4] = {plan[s][2 * pair][0], plan[s][2 * pair][1],
                                 plan[s][2 * pair + 1][0], plan[s][2 * pair + 1][1]};
          multiply_block<Storage>(sums[s], a, b.x, b.y);
        }
      }
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
        if (s >= tokens.strips) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<uint32_t*>(own + (16 * s + 8 * half) * pitch + 8 * upper) =
              pack<Storage>(sums[s][2 * half] * scales[s][half],
                            sums[s][2 * half + 1] * scales[s][half]);
        }
      }
    }
    constexpr int kMost = kMostBands<Storage>;
    if (band % kMost == kMost - 1 || band == bands - 1) {
      __syncwarp();
      store_outputs<S>(p, at, tokens, 16 * (band / kMost * kMost));
      __syncwarp();
    }
  }
}

// O = R A. R is the entries times `scales`, which are 0 for hidden tokens.
template <class S>
__device__ __forceinline__ void distribute(const Params& p, const Place& at,
                                           const Tokens<S>& tokens, const Entries<S>& entries,
                                           const OfTokens<S>& scales) {
  if constexpr (kParts<typename S::Storage> > 1) {
    distribute_in_parts<S>(p, at, tokens, entries, scales);
  } else {
    distribute_at_once<S>(p, at, tokens, entries, scales);
  }
}

}  // namespace setformer::cuda::on_chip
