// A sweep over the block's tokens of one side: the data of each strip, and sums over all strips.
#pragma once

#include "strip_products.cuh"

namespace setformer::cuda::on_chip {

// Numbers that all tokens share.
struct Scales {
  float unit;     // dA is its operand times this power of two
  float largest;  // the largest mass of the block's tokens
};

// A lane's two tokens of a strip.
template <class S>
struct OwnTokens {
  int own;        // token g of the strip; g + 8 is the other
  uint32_t bits;  // a bit for each of the strip's tokens from g on: is it valid?

  __device__ __forceinline__ OwnTokens(const Place& at, int first, uint32_t valid)
      : own(first + at.g), bits(valid >> at.g) {}
  __device__ __forceinline__ int token(int half) const { return own + 8 * half; }
  __device__ __forceinline__ bool valid(int half) const { return bits >> (8 * half) & 1u; }

  // U^t; 0 for a hidden token. t = -1 is before the first step.
  __device__ __forceinline__ void factors(int64_t t, float (&factors)[2]) const {
    const auto& head = shared_head<S>();
    const float* rows = head.rows + t * head.tokens.count + own;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float row = t >= 0 && valid(half) ? rows[8 * half] : 0.0f;
      factors[half] = valid(half) ? power_of_two(head.similarity.scale - row) : 0.0f;
    }
  }
  // a U^t, with a divided by the largest mass.
  __device__ __forceinline__ void drawn(const float (&factors)[2], float largest,
                                        float (&drawn)[2]) const {
    const auto& head = shared_head<S>();
    if (head.mass.absent()) {
      drawn[0] = factors[0];
      drawn[1] = factors[1];
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = valid(half) ? head.mass[token(half) * head.mass_stride] : 0.0f;
      const float mass = !(x >= 0.0f) ? NAN : largest == 0.0f ? 0.0f : x / largest;
      drawn[half] = mass * factors[half];
    }
  }
};

// Combines a number of each thread over the block, to the largest or the sum.
template <class S, class Combine>
__device__ __forceinline__ float of_block(const Place& at, float x, Combine combine) {
  x = across_lanes<32>(x, combine);
  if constexpr (S::kWarps == 1) return x;
  float* room = shared_at<float>(Memory<S>::kLargest);
  meet<S>();
  if (at.lane == 0) room[at.warp] = x;
  meet<S>();
  x = room[0];
#pragma unroll
  for (int warp = 1; warp < S::kWarps; ++warp) x = combine(x, room[warp]);
  return x;
}

template <class S>
__device__ __forceinline__ float most_of_block(const Place& at, float x) {
  return of_block<S>(at, x, [](float a, float b) { return most(a, b); });
}

template <class S>
__device__ __forceinline__ float largest_mass(const Place& at) {
  const auto& head = shared_head<S>();
  if (head.mass.absent()) return 1.0f;
  float top = 0;
  const int end = min(16 * head.last_strip, int(head.tokens.count));
  for (int i = 16 * head.first_strip + at.thread; i < end; i += S::kThreads) {
    if (!head.tokens.valid(i)) continue;
    const float x = head.mass[i * head.mass_stride];
    top = most(top, x >= 0.0f ? x : NAN);
  }
  return most_of_block<S>(at, top);
}

// Which of a strip's 16 tokens are valid, a bit for each.
template <class S>
__device__ __forceinline__ uint32_t valid_tokens(const Place& at, int first) {
  return __ballot_sync(kFullWarp, at.lane < 16 && shared_head<S>().tokens.valid(first + at.lane));
}

// Calls visit(round, tokens, offset of slot 0), for a strip per warp in each round; rows beyond the
// last token are 0. Slot 0 holds the keys, scaled to unit length if wanted; slots 1 and 2 the rows
// `first` and `second`, if given.
template <class S, class Visit>
__device__ __forceinline__ void sweep(const StripParams& p, const Place& at,
                                      const Rows<typename S::Storage>* first,
                                      const Rows<typename S::Storage>* second, Visit visit) {
  constexpr int kAhead = kRounds<S> - 1;
  const auto& keys = shared_head<S>().tokens;
  const int begin = shared_head<S>().first_strip, strips = shared_head<S>().last_strip - begin;
  const int rounds = (strips + S::kWarps - 1) / S::kWarps;
  uint32_t valid = 0;
#pragma unroll 1
  for (int round = -kAhead; round < rounds; ++round) {
    const int next = 16 * (begin + (round + kAhead) * S::kWarps + at.warp);
    const int own = next - 16 * kAhead * S::kWarps;
    uint32_t valid_next = 0;
    if (round + kAhead < rounds) {
      valid_next = valid_tokens<S>(at, next);
      const int slot = slot_offset<S>(p, at.warp, round + kAhead, 0);
#pragma unroll 1
      for (int i = 0; i < kSlots; ++i) {
        const auto* rows = i == 0 ? &keys : i == 1 ? first : second;
        if (rows != nullptr) {
          stage_strip(p, at, *rows, next, valid_next, slot + i * slot_bytes(p));
        }
      }
    }
    commit_copies();
    if (kAhead == 0) valid = valid_next;
    if (round >= 0) {
      const int slot = slot_offset<S>(p, at.warp, round, 0);
      wait_for_copies<kAhead>();
      if (p.normalize) {
        scale_to_unit_length<typename S::Storage>(
            at, slot, 16, p.sizes.pitch, shared_at<float>(StripMemory<S>::kLengths) + 16 * at.warp);
      }
      __syncwarp();
      visit(round, OwnTokens<S>(at, own, valid), slot);
      __syncwarp();
    }
    valid = valid_next;
  }
}

// Adds a lane's share of sum_i K_ij x_i, for a range of references.
template <class S>
__device__ __forceinline__ void add_to_columns(const Strip<S>& entries, const float (&x)[2],
                                               int range, OfReferences<S>& columns) {
#pragma unroll
  for (int n = 0; n < kRangeBlocks<S>; ++n) {
    float (&of_block)[2] = columns[kRangeBlocks<S> * range + n];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      of_block[e % 2] = fmaf(entries[n][e], x[e / 2], of_block[e % 2]);
    }
  }
}

// Adds up the lanes' shares of sums over the tokens, into `totals`. The caller must call meet()
// before they are read, and before the next such call, which uses the same memory.
template <class S>
__device__ __forceinline__ void add_columns(const Place& at, const OfReferences<S>& columns) {
  Two<float> totals[S::kLanePairs];
  sum_columns<S>(at, 0, [&](int n, int e) { return columns[n][e]; }, totals);
  if (at.warp != 0) return;
  float2* to = shared_at<float2>(StripMemory<S>::kTotals);
#pragma unroll
  for (int h = 0; h < S::kLanePairs; ++h) {
    if (64 * h + 2 * at.lane < S::kReferences) to[32 * h + at.lane] = {totals[h].x, totals[h].y};
  }
}

}  // namespace setformer::cuda::on_chip
