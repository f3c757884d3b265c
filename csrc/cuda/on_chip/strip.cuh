// Backward works on a strip of 16 tokens at a time, against all references.
//
// In a round each warp of a block takes a strip of its own. Rows of the next round's tokens are
// copied into the warp's slots meanwhile, where there is room. Entries against the references are
// computed again in each sweep over the tokens, as accumulators (shape.cuh), a range of at most 64
// references at a time. Sums over the tokens are products, in which each warp owns some of the
// references and reads the strips of all warps.
#pragma once

#include "../gradient_tensors.cuh"
#include "averages.cuh"

namespace setformer::cuda::on_chip {

template <class Storage, int blocks, int warps>
using StripShape = Shape<Storage, blocks, 1, warps>;

template <class S>
inline constexpr int kRanges = S::kBlocks > 8 ? 2 : 1;  // of references
template <class S>
inline constexpr int kRangeBlocks = S::kBlocks / kRanges<S>;  // of 8 references
template <class S>
inline constexpr int kRangePairs = (kRangeBlocks<S> + 1) / 2;

template <class S>
using Strip = float[kRangeBlocks<S>][4];  // a strip's numbers for the references of a range
template <class S>
using Ranges = Strip<S>[kRanges<S>];
template <class S>
using PackedStrip = uint32_t[kRangePairs<S>][4];  // as the first operand of products

// Whether the last sweep goes back through step 1 as well: then its entries are of one range.
template <class S>
inline constexpr bool kStepsWithGradients = kRanges<S> == 1;

inline constexpr int kSlots = 3;              // slots of a round: keys and two other tensors
inline constexpr int kColumns = 16 * kBands;  // columns of a group, which products take at once
inline constexpr int kMostGroups = 2;
// Rounds whose rows are in shared memory: that of the next as well, but beside many references.
template <class S>
inline constexpr int kRounds = kRanges<S> == 1 ? 2 : 1;
inline constexpr int kMostSteps = 256;  // the largest T: shared memory has numbers of each step
// Tiles of sums that a warp keeps: each 16 references by kColumns columns.
template <class S>
inline constexpr int kUnits =
    S::kWarps == 1 ? 4 : int(divide_up(kMostGroups * S::kPairs, S::kWarps));

struct StripSizes {
  int groups, value_groups;  // of kColumns columns
  int pitch;                 // elements from row to row, so that rows start in different banks
  int units;                 // tiles of sums over the tokens, as kUnits counts them
  int references, pooled, pooled_gradient, plan, rows, steps;  // where these begin, in bytes
  int total;
};
struct StripParams : BackwardParams {
  BackwardWorkspace parts;
  float* workspace;
  StripSizes sizes;
};

// The gradients of a head, and which share of it the block has.
template <class Storage>
struct GradientsOfBlock : GradientTensors<Storage> {
  int64_t share;  // among those of all heads
  bool is_alone;  // whether the head has no other
};

// A block's shared memory, in bytes from its start: the first parts of Memory, up to the columns,
// then
//
//   gradients        GradientsOfBlock
//   eta              [kReferences]                  float
//   distribution     [kReferences]                  float: 2^(g^T_j)
//   collection       [kReferences]                  float: 2^(-columns^T_j), times the largest mass
//   totals           [kReferences]                  float
//   units            [kWarps, kRanges]              float: what plans of float16 are divided by
//   lengths          [kWarps, 16]                   float: 1 / |k_i|, where keys are scaled
//   references       [16 kPairs, pitch]             storage
//   pooled           [2, 16 kPairs, pitch]          storage: A, and what rounding left of it
//   pooled_gradient  [2, 16 kPairs, pitch]          storage: of dA
//   plan             [kWarps, 16, 16 kPairs + 8]    storage
//   rows             [kWarps, kRounds, kSlots, 16, pitch]  storage
//   steps            [max(T, 1), 2, kReferences]    float: what steps know of the references
template <class S>
struct StripMemory {
  static constexpr int kOfReferences = S::kReferences * 4;
  static constexpr int kGradients = Memory<S>::kSums;
  static constexpr int kEta = kGradients + 384;
  static_assert(sizeof(GradientsOfBlock<typename S::Storage>) <= kEta - kGradients);
  static constexpr int kDistribution = kEta + kOfReferences;
  static constexpr int kCollection = kDistribution + kOfReferences;
  static constexpr int kTotals = kCollection + kOfReferences;
  static constexpr int kUnitsOfPlans = kTotals + kOfReferences;
  static constexpr int kLengths = kUnitsOfPlans + 4 * S::kWarps * kRanges<S>;
  static constexpr int kFixed = (kLengths + 4 * 16 * S::kWarps + 15) / 16 * 16;
  static constexpr int kPlanPitch = 16 * S::kPairs + 8;

  static StripSizes sizes(const BackwardParams& p) {
    StripSizes sizes;
    sizes.groups = int(divide_up(p.depth, kColumns));
    sizes.value_groups = int(divide_up(p.value_depth, kColumns));
    const int most = sizes.groups > sizes.value_groups ? sizes.groups : sizes.value_groups;
    sizes.units = S::kPairs * most;
    sizes.pitch = kColumns * most + 8;
    int end = kFixed;
    const auto take = [&](int bytes) {
      end += bytes;
      return end - bytes;
    };
    sizes.references = take(16 * S::kPairs * sizes.pitch * kElement);
    sizes.pooled = take(2 * 16 * S::kPairs * sizes.pitch * kElement);
    sizes.pooled_gradient = take(2 * 16 * S::kPairs * sizes.pitch * kElement);
    sizes.plan = take(S::kWarps * 16 * kPlanPitch * kElement);
    sizes.rows = take(S::kWarps * kRounds<S> * kSlots * 16 * sizes.pitch * kElement);
    sizes.steps = take(int(steps_kept(p)) * 2 * kOfReferences);
    sizes.total = end;
    return sizes;
  }
};

// Whether backward can go strip by strip, whatever the shape.
inline bool can_go_by_strips(const BackwardParams& p) {
  constexpr int64_t kMostColumns = kMostGroups * kColumns;
  return p.kernel == Kernel::kGaussian && p.iterations <= kMostSteps && p.depth <= kMostColumns &&
         p.value_depth <= kMostColumns;
}

template <class S>
__device__ __forceinline__ GradientsOfBlock<typename S::Storage>& shared_gradients() {
  return *shared_at<GradientsOfBlock<typename S::Storage>>(StripMemory<S>::kGradients);
}
// The numbers of a range's references in a lane's accumulators: pair 4 n + c belongs to block n.
template <class S>
__device__ __forceinline__ const float2* pairs_at(int offset, const Place& at, int range) {
  return shared_at<float2>(offset) + 4 * kRangeBlocks<S> * range + at.c;
}
// Where the references' numbers of step t begin: `which` = 0 for C^t, 1 for R^{t-1}.
template <class S>
__device__ __forceinline__ int step_offset(const StripParams& p, int64_t t, int which) {
  const int step = int(t > 0 ? t - 1 : 0);
  return p.sizes.steps + (2 * step + which) * StripMemory<S>::kOfReferences;
}

__device__ __forceinline__ int slot_bytes(const StripParams& p) {
  return 16 * p.sizes.pitch * kElement;
}
// One of the slots of a round, of any warp.
template <class S>
__device__ __forceinline__ int slot_offset(const StripParams& p, int warp, int round, int slot) {
  const int of_round = warp * kRounds<S> + round % kRounds<S>;
  return p.sizes.rows + (of_round * kSlots + slot) * slot_bytes(p);
}

// Starts copying 16 rows, from `first` on, into a slot; rows whose bit in `valid` is 0 become 0.
template <class Storage>
__device__ __forceinline__ void stage_strip(const StripParams& p, const Place& at,
                                            const Rows<Storage>& rows, int first, uint32_t valid,
                                            int slot) {
  const Piece own(p.sizes.pitch == kShortPitch, p.sizes.pitch, at);
  const int left = rows.depth - own.column, next = own.at_once * p.sizes.pitch * kElement;
  const int64_t step = own.at_once * rows.row_stride;
  const Storage* from =
      rows.data + (first + own.row) * rows.row_stride + own.column * rows.column_stride;
  int to = slot + own.bytes;
  valid >>= own.row;
  if (rows.vectors && left >= 8) {
    uint32_t address = shared_address(to);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i * own.at_once >= 16) break;
      copy_async(address, from, valid & 1u ? 16 : 0);
      valid >>= own.at_once;
      from += step;
      address += next;
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 16; i += own.at_once) {
    *shared_at<uint4>(to) = gather_piece(from, rows.column_stride, valid & 1u ? left : 0);
    valid >>= own.at_once;
    from += step;
    to += next;
  }
}

// Stores the rows of a slot in their tensor.
template <class Storage>
__device__ __forceinline__ void store_strip(const StripParams& p, const Place& at,
                                            const Rows<Storage>& rows, int first, int slot) {
  store_rows(at, rows, first, min(16, int(rows.count) - first), 0, p.sizes.pitch, slot);
}

}  // namespace setformer::cuda::on_chip
