// The products of backward on the tensor cores: of a strip with the references, and over the
// tokens.
#pragma once

#include "strip.cuh"

namespace setformer::cuda::on_chip {

// The address that a lane gives to ldmatrix for a 16 x 16 tile of rows. The four matrices are rows
// 0 to 7 and 8 to 15 at columns 0 to 7, then both at columns 8 to 15; with `by_columns` first both
// column ranges of rows 0 to 7, then those of rows 8 to 15.
__device__ __forceinline__ uint32_t tile_matrices(const Place& at, int offset, int pitch,
                                                  bool by_columns) {
  const int matrix = at.lane / 8, line = at.lane % 8;
  const int down = by_columns ? matrix / 2 : matrix % 2,
            right = by_columns ? matrix % 2 : matrix / 2;
  return shared_address(offset) + kElement * ((8 * down + line) * pitch + 8 * right);
}

template <class S>
__device__ __forceinline__ int first_reference(int range) {
  return 8 * kRangeBlocks<S> * range;
}

// Calls visit(entry, number of its reference, which of the two tokens); `numbers` come from
// pairs_at.
template <int blocks, class Number, class Visit>
__device__ __forceinline__ void for_each_with(Number (&strip)[blocks][4], const float2* numbers,
                                              Visit visit) {
#pragma unroll
  for (int n = 0; n < blocks; ++n) {
    const float2 pair = numbers[4 * n];
#pragma unroll
    for (int e = 0; e < 4; ++e) visit(strip[n][e], e % 2 ? pair.y : pair.x, e / 2);
  }
}

// x_i.z_j of a slot's rows x and an operand's rows z, those of a range of references. z is the sum
// of the operand's parts, of 16 kPairs rows each. With `squares` also |x_i|^2, from the diagonal of
// x x^T.
template <class S, int parts>
__device__ __forceinline__ void multiply_by_rows(const StripParams& p, const Place& at, int slot,
                                                 int operand, int groups, int range,
                                                 Strip<S>& products,
                                                 float (*squares)[2] = nullptr) {
  using Storage = typename S::Storage;
  const int pitch = p.sizes.pitch;
  uint32_t rows = tile_matrices(at, slot, pitch, false);
  uint32_t columns =
      shared_address(operand) +
      kElement * ((first_reference<S>(range) + at.lane % 8) * pitch + at.lane / 8 * 8);
  float upper[4] = {}, lower[4] = {};
  clear(products);
#pragma unroll
  for (int group = 0; group < kMostGroups; ++group) {
    if (group >= groups) break;
    uint32_t x[kBands][4];
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
      load_matrices<false>(x[b], rows + 16 * kElement * b);
      if (squares == nullptr) continue;
      // x as the second operand consists of the same matrices, for tokens 0 to 7 and 8 to 15
      multiply_block<Storage>(upper, x[b], x[b][0], x[b][2]);
      multiply_block<Storage>(lower, x[b], x[b][1], x[b][3]);
    }
#pragma unroll
    for (int n = 0; n < kRangeBlocks<S>; ++n) {
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        uint32_t z[4];
        load_matrices<false>(z, columns + kElement * (8 * n + part * 16 * S::kPairs) * pitch);
        multiply_block<Storage>(products[n], x[0], z[0], z[1]);
        multiply_block<Storage>(products[n], x[1], z[2], z[3]);
      }
    }
    rows += kColumns * kElement;
    columns += kColumns * kElement;
  }
  if (squares == nullptr) return;
  const int source = (at.lane & ~3) | at.g / 2;
  (*squares)[0] = __shfl_sync(kFullWarp, at.g % 2 ? upper[1] : upper[0], source);
  (*squares)[1] = __shfl_sync(kFullWarp, at.g % 2 ? lower[3] : lower[2], source);
}

// Adds sum_j plan_ij z_j [16, kColumns] for the tokens of a packed strip and an operand's rows z,
// those of a range of references.
template <class S>
__device__ __forceinline__ void multiply_by_references(const StripParams& p, const Place& at,
                                                       const PackedStrip<S>& plan, int operand,
                                                       int range, int group,
                                                       float (&sums)[2 * kBands][4]) {
  using Storage = typename S::Storage;
  const int pitch = p.sizes.pitch;
  const int first = first_reference<S>(range) * pitch + kColumns * group;
  const uint32_t z_of_lane = tile_matrices(at, operand + kElement * first, pitch, false);
#pragma unroll
  for (int pair = 0; pair < kRangePairs<S>; ++pair) {
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
      uint32_t z[4];
      load_matrices<true>(z, z_of_lane + 16 * kElement * (pair * pitch + b));
      multiply_block<Storage>(sums[2 * b], plan[pair], z[0], z[1]);
      multiply_block<Storage>(sums[2 * b + 1], plan[pair], z[2], z[3]);
    }
  }
}

// Rounds a strip to the storage type; 0 beyond the last block.
template <class S>
__device__ __forceinline__ void pack_strip(const Strip<S>& strip, PackedStrip<S>& packed) {
  using Storage = typename S::Storage;
#pragma unroll
  for (int n = 0; n < 2 * kRangePairs<S>; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float (&x)[4] = strip[n < kRangeBlocks<S> ? n : 0];
      packed[n / 2][2 * (n % 2) + half] =
          n < kRangeBlocks<S> ? pack<Storage>(x[2 * half], x[2 * half + 1]) : 0;
    }
  }
}

// Stores a packed strip in the warp's own plan, at a range of references.
template <class S>
__device__ __forceinline__ void store_plan(const StripParams& p, const Place& at,
                                           const PackedStrip<S>& packed, int range) {
  constexpr int kPitch = StripMemory<S>::kPlanPitch;
  const int first = (16 * at.warp + at.g) * kPitch + first_reference<S>(range) + 2 * at.c;
  uint32_t* to = shared_at<uint32_t>(p.sizes.plan + first * kElement);
#pragma unroll
  for (int n = 0; n < 2 * kRangePairs<S>; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      to[4 * n + 4 * kPitch * half] = packed[n / 2][2 * (n % 2) + half];
    }
  }
}

// Sums over the tokens, [units of the warp][tiles of 16 references by 8 columns], and `ones`, the
// sums of the plan itself, the same in all columns of a tile.
template <class S>
struct OfUnits {
  float sums[kUnits<S>][2 * kBands][4] = {};
  float ones[kUnits<S>][4] = {};
};

// Calls visit(number in OfUnits, first reference, first column) for each unit of a warp.
template <class S, class Visit>
__device__ __forceinline__ void for_each_unit(const Place& at, int groups, Visit visit) {
#pragma unroll
  for (int i = 0; i < kUnits<S>; ++i) {
    const int unit = at.warp + i * S::kWarps, group = unit / S::kPairs;
    if (group < groups) visit(i, 16 * (unit % S::kPairs), kColumns * group);
  }
}

// Adds sum_i plan_ij x_i over the strips of all warps; each warp has the rows x of its strip in
// `slot`. The caller puts a barrier before and after.
template <class S, bool with_ones>
__device__ __forceinline__ void sum_over_tokens(const StripParams& p, const Place& at, int round,
                                                int slot, int groups, OfUnits<S>& of) {
  using Storage = typename S::Storage;
  constexpr int kPitch = StripMemory<S>::kPlanPitch;
  constexpr bool kInUnits = with_ones && kFewExponents<Storage>;
  const uint32_t one = pack<Storage>(1.0f, 1.0f);
  for_each_unit<S>(at, groups, [&](int i, int reference, int column) {
    uint32_t plan = tile_matrices(at, p.sizes.plan + reference * kElement, kPitch, true);
    uint32_t rows = tile_matrices(at, slot_offset<S>(p, 0, round, slot) + column * kElement,
                                  p.sizes.pitch, false);
#pragma unroll
    for (int warp = 0; warp < S::kWarps; ++warp) {
      uint32_t of_plan[4];
      load_matrices<true>(of_plan, plan);
      float own[2 * kBands + 1][4] = {};
      const int of_range = warp * kRanges<S> + reference / (8 * kRangeBlocks<S>);
      const float unit =
          kInUnits ? shared_at<float>(StripMemory<S>::kUnitsOfPlans)[of_range] : 1.0f;
      const auto add = [&](int tile, float (&sums)[4], uint32_t x, uint32_t y) {
        if constexpr (kInUnits) {
          multiply_block<Storage>(own[tile], of_plan, x, y);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[e] = fmaf(own[tile][e], unit, sums[e]);
        } else {
          multiply_block<Storage>(sums, of_plan, x, y);
        }
      };
#pragma unroll
      for (int b = 0; b < kBands; ++b) {
        uint32_t x[4];
        load_matrices<true>(x, rows + 16 * kElement * b);
        add(2 * b, of.sums[i][2 * b], x[0], x[1]);
        add(2 * b + 1, of.sums[i][2 * b + 1], x[2], x[3]);
      }
      if constexpr (with_ones) add(2 * kBands, of.ones[i], one, one);
      plan += 16 * kPitch * kElement;
      rows += kRounds<S> * kSlots * slot_bytes(p);
    }
  });
}

// Calls visit(reference, column, sum) for the sums that a lane holds.
template <class S, class Visit>
__device__ __forceinline__ void for_each_sum(const StripParams& p, const Place& at, int groups,
                                             const OfUnits<S>& of, Visit visit) {
  for_each_unit<S>(at, groups, [&](int i, int reference, int column) {
#pragma unroll
    for (int tile = 0; tile < 2 * kBands; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = reference + at.g + 8 * (e / 2);
        if (j < p.references) visit(j, column + 8 * tile + 2 * at.c + e % 2, of.sums[i][tile][e]);
      }
    }
  });
}
// Calls visit(reference, sum) for the sums of the plan itself.
template <class S, class Visit>
__device__ __forceinline__ void for_each_one(const StripParams& p, const Place& at, int groups,
                                             const OfUnits<S>& of, Visit visit) {
  for_each_unit<S>(at, groups, [&](int i, int reference, int column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = reference + at.g + 8 * half;
      if (column == 0 && at.c == 0 && j < p.references) visit(j, of.ones[i][2 * half]);
    }
  });
}

// The similarities of the strip in a slot with a range of references.
template <class S>
__device__ __forceinline__ void form_strip(const StripParams& p, const Place& at, int first,
                                           int slot, int range, Strip<S>& similarities) {
  float squares[2];
  multiply_by_rows<S, 1>(p, at, slot, p.sizes.references, p.sizes.groups, range, similarities,
                         &squares);
  similarities_of_strip<S>(p, at, first, squares, similarities, kRangeBlocks<S> * range);
}

}  // namespace setformer::cuda::on_chip
