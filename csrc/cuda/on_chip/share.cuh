// A share: some of a head's strips, which one block takes. As many as its registers hold are
// computed at once, one part of the share after the other.
#pragma once

#include "forward.cuh"

namespace setformer::cuda::on_chip {

// What a launch does with the shares of all heads: step t, with A if it `collects`, or the output
// if it `distributes`.
struct ShareParams : Params {
  float*
      partial;  // [shares, M, Dv + 1], of each share A and then columns^t; not for one share alone
  int64_t blocks;  // of a head: at least as many as it has shares
  int strips;      // of a warp in each part: the device has room for them
  int least;       // strips of a share
  int64_t t;
  bool of_queries, collects, distributes;

  __host__ __device__ int64_t numbers_of_share() const { return references * (value_depth + 1); }
  __host__ __device__ Side side() const { return of_queries ? queries_of(*this) : keys_of(*this); }
};

// How a head's tokens are shared. This depends on their number alone (or on a knob), so that
// results do not depend on the batch.
struct Shares {
  static constexpr int kMost = 128;
  int each, count;  // strips of a share, and shares

  __host__ __device__ Shares(const ForwardParams& p, int least, int64_t tokens) {
    const int strips = int((tokens + 15) / 16);
    constexpr int kDefaultShift = 2;  // of SETFORMER_CUDA_TILES
    each = least << (p.tiles_shift > kDefaultShift ? p.tiles_shift - kDefaultShift : 0);
    while (strips > kMost * each) each *= 2;
    count = (strips + each - 1) / each;
    if (count == 0) count = 1;
  }
  // At least as many as share any sequence that is not longer. (A longer one may have fewer.)
  static int64_t most(const ForwardParams& p, int least, const Side& side) {
    const Shares shares(p, least, side.count);
    return side.offsets != nullptr && shares.each > least ? kMost : shares.count;
  }
};

// Shares of all heads before a sample's, if its heads have `count` each; of packed sequences at
// least so many.
__host__ __device__ inline int64_t shares_before(const ForwardParams& p, int least,
                                                 const Side& side, int64_t b, int64_t tokens_before,
                                                 int64_t count) {
  return p.heads * (side.offsets == nullptr ? b * count : b + tokens_before / (16 * least));
}

// To be called by one thread. Where there is no share for the block, first_strip becomes -1.
template <class S>
__device__ void select_share(const ShareParams& p, int64_t work) {
  auto& head = shared_head<S>();
  const Side side = p.side();
  const Span span = head.select(p, work / p.blocks, p.of_queries);
  const Shares shares(p, p.least, span.count);
  const int share = int(work % p.blocks);
  head.first_strip = share < shares.count ? share * shares.each : -1;
  head.last_strip = min(head.first_strip + shares.each, all_strips<S>());
  if (shares.count == 1 || p.distributes) return;
  const int64_t before =
      shares_before(p, p.least, side, head.b, span.before, shares.count) + head.h * shares.count;
  head.pooled = p.partial + (before + share) * p.numbers_of_share();
}

// v and log2 v_0, or g, of the step before.
template <class S>
__device__ __forceinline__ void begin_share(const ShareParams& p, const Place& at,
                                            Solution<S>& solution) {
  const int64_t t = p.distributes ? p.iterations : p.t > 0 ? p.t - 1 : 0;
  float top = -infinity<float>();
  for_each_own(at, solution.references, [&](int j, float& x) {
    x = j < p.references ? potential<S>(p, t, j) : -infinity<float>();
    top = most(top, x);
  });
  solution.log_first = 0;
  if (!shared_head<S>().similarity.factored) return;
  top = most_of_warp(top);
  for_each_own(at, solution.references, [&](int, float& x) { x = power_of_two(x - top); });
  solution.log_first = -top;
}

// Fills the operand of distribute with A, times v where plans are without it: as keep_pooled does.
template <class S>
__device__ __forceinline__ void load_pooled(const ShareParams& p, const Place& at,
                                            const Solution<S>& solution) {
  using Storage = typename S::Storage;
  const auto& head = shared_head<S>();
  const bool weighs = head.similarity.factored && !p.cross && !kFewExponents<Storage>;
  const float2* factors = in_room<S>(at, solution.references);
  const int width = int(p.value_depth);
  const int tiles = p.sizes.value_bands * S::kPairs;
#pragma unroll 1
  for (int tile = at.warp; tile < tiles; tile += S::kWarps) {
    const int column = 16 * (tile / S::kPairs) + at.g;
    uint2* to = shared_at<uint2>(Memory<S>::kOperand) + tile * 64 + at.lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[2][kParts<Storage>];
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        const int pair = 4 * (tile % S::kPairs * 2 + block) + at.c;
        const float* from = head.pooled + (2 * pair * width + column + 8 * half);
        const int left = column + 8 * half < width ? int(p.references) - 2 * pair : 0;
        float2 x = {left > 0 ? from[0] : 0.0f, left > 1 ? from[width] : 0.0f};
        if (weighs) x = {x.x * factors[pair].x, x.y * factors[pair].y};
        pack_parts<Storage>(x.x, x.y, words[block]);
      }
#pragma unroll
      for (int part = 0; part < kParts<Storage>; ++part) {
        to[32 * half + part * tiles * 64] = {words[0][part], words[1][part]};
      }
    }
  }
}

// 2^(part - all), of logarithms; 0 for a part of nothing.
__device__ __forceinline__ float part_of(float part, float all) {
  return all == -infinity<float>() ? 0.0f : power_of_two(part - all);
}

// Step t for a part of the share. A and the columns of all parts so far are an average and its
// weights, so that parts with other masses can be added: columns are logarithms.
template <class S>
__device__ __forceinline__ void step_of_part(const ShareParams& p, const Place& at,
                                             const Tokens<S>& tokens, Entries<S>& entries,
                                             int parity, Exchange& exchange, Solution<S>& solution,
                                             Spread<S>& columns) {
  const bool factored = shared_head<S>().similarity.factored;
  const float log_largest = find_masses<S>(at, tokens, exchange);
  begin_tokens<S>(at, solution);
  Spread<S> of_part, kept;
  if (factored) {
    step_by_factors<S>(p, at, tokens, log_largest, entries, int(p.t), parity, exchange, solution,
                       of_part);
  } else {
    step_in_log_domain<S>(p, at, tokens, entries, int(p.t), parity, exchange, solution);
#pragma unroll
    for (int h = 0; h < S::kLanePairs; ++h) of_part[h] = solution.columns[h];
  }
#pragma unroll
  for (int h = 0; h < S::kLanePairs; ++h) {
    const auto add = [](float& all, float& part, float& kept) {
      LogSum<float> sum{all, 1.0f};
      sum.merge({part, 1.0f});
      const float both = sum.logarithm();
      kept = part_of(all, both);
      part = part_of(part, both);
      all = both;
    };
    add(columns[h].x, of_part[h].x, kept[h].x);
    add(columns[h].y, of_part[h].y, kept[h].y);
  }
  if (!p.collects) return;
  Spread<S> weights;
  if (factored) {
#pragma unroll
    for (int h = 0; h < S::kLanePairs; ++h) {
      const float2 column = solution.columns[h];
      weights[h] = {reciprocal_or_zero(column.x), reciprocal_or_zero(column.y)};
    }
  } else {
    form_collection<S>(at, entries, solution, exchange, weights);
  }
  collect<S>(p, at, tokens, entries, solution.tokens, weights, of_part, kept, exchange);
}

// What backward multiplies C by. A group needs the rank's own columns first (SharedForward).
__device__ __forceinline__ float collection_scale(const ForwardParams& p, float column) {
  return p.group != nullptr ? column : column == -infinity<float>() ? 0.0f : 1.0f;
}

// The first warp stores columns^t of the share, or of the head if it has no other.
template <class S>
__device__ __forceinline__ void keep_share(const ShareParams& p, const Place& at,
                                           const Spread<S>& columns) {
  if (at.warp != 0) return;
  const auto& head = shared_head<S>();
  const bool alone = head.first_strip == 0 && head.last_strip == all_strips<S>();
  if (p.collects && head.first_strip == head.last_strip) {  // no tokens: A is 0
    for (int i = at.lane; i < int(p.references * p.value_depth); i += 32) head.pooled[i] = 0.0f;
  }
  float* to = alone ? head.columns + (p.t > 0 ? p.t - 1 : 0) * p.references
                    : head.pooled + p.references * p.value_depth;
  for_each_own(at, columns, [&](int j, float column) {
    if (j >= p.references) return;
    to[j] = column;
    if (alone && p.collects) head.collection_scale[j] = collection_scale(p, column);
  });
}

template <class S>
__device__ __forceinline__ void attend_share(const ShareParams& p, const Place& at, int64_t work) {
  const auto& head = shared_head<S>();
  if (at.thread == 0) select_share<S>(p, work);
  meet<S>();
  if (head.first_strip < 0) return;
  if constexpr (kParts<typename S::Storage> > 1) find_center<S>(p, at);
  stage_references<S>(p, at);
  Exchange exchange;
  Solution<S> solution;
  Spread<S> columns;
  for_each_own(at, columns, [](int, float& x) { x = -infinity<float>(); });
  begin_share<S>(p, at, solution);
  if (p.distributes) load_pooled<S>(p, at, solution);
  meet<S>();
  int parity = 0;
  const int at_once = S::kWarps * p.strips;
#pragma unroll 1
  for (int from = head.first_strip; from < head.last_strip; from += at_once) {
    __syncwarp();
    const Tokens<S> tokens(at, from, min(head.last_strip - from, at_once), at.warp, S::kWarps);
    stage<S>(p, at, tokens, head.tokens, 0, true);
    if (p.normalize) scale_tokens<S>(p, at, tokens);
    Entries<S> entries;
    form_entries<S>(p, at, tokens, entries);
    if (p.distributes) {
      distribute_side<S>(p, at, tokens, solution.log_first, entries, solution.references);
      continue;
    }
    if (p.collects) {
      __syncwarp();
      stage<S>(p, at, tokens, head.values, 0);
    }
    step_of_part<S>(p, at, tokens, entries, parity, exchange, solution, columns);
    parity ^= 1;
  }
  if (!p.distributes) keep_share<S>(p, at, columns);
}

}  // namespace setformer::cuda::on_chip
