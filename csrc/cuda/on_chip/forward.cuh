// Forward of a head that stays on the chip from its keys to its output: one block a head, one
// launch a call, keys (in the log domain twice), values and output through device memory once.
#pragma once

#include "../launch.cuh"
#include "averages.cuh"

namespace setformer::cuda {
namespace on_chip {

// The first warp stores 1 / sum_i C_ij, by which backward multiplies the collection.
template <class S>
__device__ __forceinline__ void keep_scales(const Params& p, const Place& at,
                                            const Spread<S>& scales) {
  if (!is_first_warp<S>(at)) return;
  float* to = shared_head<S>().collection_scale;
  for_each_own(at, scales, [&](int j, float scale) {
    if (j < p.references) to[j] = scale;
  });
}

// Turns scores into C, and computes 1 / its sums over the tokens, to correct for the rounding of
// exponents.
template <class S>
__device__ __forceinline__ void form_collection(const Place& at, Entries<S>& entries,
                                                Solution<S>& solution, Exchange& exchange,
                                                Spread<S>& weights) {
  OfReferences<S> columns;
  to_fragments<S>(at, solution.columns, columns);
  for_each_entry<S>(entries, [&](float& x, int s, int half, int n, int e) {
    const float column = columns[n][e];
    // the plan of a head without mass is 0
    x = power_of_two(column == -infinity<float>() ? column : x + solution.tokens[s][half] - column);
  });
  for_each_token<S>([&](int s, int half) { solution.tokens[s][half] = 1.0f; });
  meet<S>();  // the sums below overwrite those of the last step, which others may still read
  Sums<S, float> sums;
  sum_columns<S>(
      at, 0,
      [&](int n, int e) {
        float sum = 0;
        for_each_token<S>([&](int s, int half) { sum += entries[s][n][2 * half + e]; });
        return sum;
      },
      sums);
  add_ranks<S>(at, exchange, sums);
#pragma unroll
  for (int h = 0; h < S::kLanePairs; ++h) {
    weights[h] = {reciprocal_or_zero(sums[h].x), reciprocal_or_zero(sums[h].y)};
  }
}

// Computes A from the entries and the solution of the keys' side.
template <class S>
__device__ __forceinline__ void collect_side(const Params& p, const Place& at,
                                             const Tokens<S>& tokens, Entries<S>& entries,
                                             Solution<S>& solution, Exchange& exchange) {
  Spread<S> weights, ones, of_operand;
  for_each_own(at, ones, [](int, float& x) { x = 1.0f; });
  for_each_own(at, of_operand, [](int, float& x) { x = 1.0f; });
  if (shared_head<S>().similarity.factored) {
    Spread<S> scales;
#pragma unroll
    for (int h = 0; h < S::kLanePairs; ++h) {
      const float2 column = solution.columns[h];
      weights[h] = {reciprocal_or_zero(column.x), reciprocal_or_zero(column.y)};
      scales[h] = {column.x == 0.0f ? 0.0f : 1.0f, column.y == 0.0f ? 0.0f : 1.0f};
      if (!p.cross && !kFewExponents<typename S::Storage>) of_operand[h] = solution.references[h];
    }
    keep_scales<S>(p, at, scales);
  } else {
    form_collection<S>(at, entries, solution, exchange, weights);
    keep_scales<S>(p, at, weights);
  }
  collect<S>(p, at, tokens, entries, solution.tokens, weights, ones, of_operand, exchange);
}

// Computes the output and rows^T from the entries and the solution of the receivers' side.
template <class S>
__device__ __forceinline__ void distribute_side(const Params& p, const Place& at,
                                                const Tokens<S>& tokens, float log_first,
                                                Entries<S>& entries,
                                                const Spread<S>& of_references) {
  using Storage = typename S::Storage;
  const Similarity<float>& similarity = shared_head<S>().similarity;
  OfReferences<S> factors;
  to_fragments<S>(at, of_references, factors);
  OfTokens<S> rows, scales;
  if (similarity.factored) {
    sum_rows<S>(tokens, entries, factors, rows);
    for_each_token<S>([&](int s, int half) {
      scales[s][half] = reciprocal(rows[s][half]);
      rows[s][half] = logarithm(rows[s][half]) + (similarity.scale - log_first);
    });
    if constexpr (kFewExponents<Storage>) {
      for_each_entry<S>(entries, [&](float& x, int s, int half, int n, int e) {
        x *= factors[n][e] * (scales[s][half] * kPlanScale<Storage>);
      });
      for_each_token<S>([&](int s, int half) { scales[s][half] = 1.0f / kPlanScale<Storage>; });
    } else if (p.cross) {  // else A has the factors
      for_each_entry<S>(entries, [&](float& x, int, int, int n, int e) { x *= factors[n][e]; });
    }
  } else {
    constexpr float kShift = kFewExponents<Storage> ? kPlanShift : 0;
    log_sum_rows<S>(tokens, entries, factors, rows);
    for_each_entry<S>(entries, [&](float& x, int s, int half, int n, int e) {
      x = power_of_two(x + factors[n][e] - rows[s][half] + kShift);
    });
    for_each_token<S>([&](int s, int half) { scales[s][half] = 1.0f / kPlanScale<Storage>; });
  }
  keep_rows<S>(at, tokens, int(p.iterations), rows);
  for_each_token<S>([&](int s, int half) {
    if (!tokens.is_valid(s, half, at.g)) scales[s][half] = 0.0f;
  });
  distribute<S>(p, at, tokens, entries, scales);
}

// If queries are keys and entries are factors, one pass over the tokens gives both averages.
// Otherwise distributing takes a second pass, which forms entries again: the plan of collection has
// overwritten the scores, or the queries have entries of their own.
template <class S>
__device__ __forceinline__ void attend(const Params& p, const Place& at, int64_t index) {
  const Similarity<float>& similarity = shared_head<S>().similarity;
  Spread<S> of_references{};
  float log_first = 0;
  int passes = 1;
  Exchange exchange;
  if constexpr (S::kClustered) begin_exchanges<S>(at);
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    meet<S>();
    if (at.thread == 0) shared_head<S>().select(p, index, pass == 1 && p.cross);
    meet<S>();
    if (p.distribute && (p.cross || !similarity.factored)) passes = 2;
    const Tokens<S> tokens(at);
    if constexpr (kParts<typename S::Storage> > 1) find_center<S>(p, at);
    stage<S>(p, at, tokens, shared_head<S>().tokens, 0, true);
    stage_references<S>(p, at);
    if (p.normalize) scale_tokens<S>(p, at, tokens);
    meet<S>();
    Entries<S> entries;
    form_entries<S>(p, at, tokens, entries);
    if (pass == 0) {  // values are copied while the steps are computed
      __syncwarp();
      stage<S>(p, at, tokens, shared_head<S>().values, 0);
    }
    if (pass == 0 || p.cross) {
      const Marginals<S> marginals = find_marginals<S>(p, at, tokens, exchange);
      Solution<S> solution;
      if (similarity.factored) {
        solve_by_factors<S>(p, at, tokens, marginals, entries, exchange, solution);
      } else {
        solve_in_log_domain<S>(p, at, tokens, marginals, entries, exchange, solution);
      }
      log_first = solution.log_first;
#pragma unroll
      for (int h = 0; h < S::kLanePairs; ++h) of_references[h] = solution.references[h];
      if (pass == 0) {
        collect_side<S>(p, at, tokens, entries, solution, exchange);
        meet<S>();  // all of A is there
      }
    }
    if (p.distribute && pass == passes - 1) {
      distribute_side<S>(p, at, tokens, log_first, entries, of_references);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksAtOnce)
    attention_forward_on_chip_kernel(const int64_t first, const Params p) {
#if __CUDA_ARCH__ >= 800
  attend<S>(p, place(), first + blockIdx.x);
#endif
}

// Whether rows can be scaled to unit length on the chip, where this is wanted: a warp's room must
// hold them whole.
template <class Storage>
bool can_scale(const ForwardParams& p) {
  return !p.normalize || kParts<Storage> > 1 || p.depth <= 16 * kMostBands<Storage>;
}

// Calls launch(shape, sizes) with the smallest shape that holds the tokens and references of a
// head. Returns false if there is none, or if the device has no room for it.
template <class Storage, int blocks, int strips, class Launch>
bool visit_warps(const ForwardParams& p, int64_t block_bytes, Launch launch) {
  const int64_t tokens = p.cross && p.queries > p.tokens ? p.queries : p.tokens;
  const auto fits = [&](auto shape) {
    using S = decltype(shape);
    if (tokens > S::kTokens) return false;
    const Sizes sizes = Memory<S>::sizes(p);
    if (sizes.total > block_bytes) return false;
    launch(shape, sizes);
    return true;
  };
  if constexpr (blocks == 7) {  // windows of 7 x 7: with one warp a head needs no barrier
    if (fits(Shape<Storage, blocks, 4, 1>{})) return true;
  }
  return fits(Shape<Storage, blocks, strips, 2>{}) || fits(Shape<Storage, blocks, strips, 8>{});
}

// Blocks of references, and the most strips of which a warp's registers hold the entries: fewer
// where operands have parts.
template <class Storage, int blocks_, int strips_, int strips_in_parts>
struct WarpSize {
  static constexpr int blocks = blocks_;
  static constexpr int strips = kParts<Storage> > 1 ? strips_in_parts : strips_;
};

// Calls visit(WarpSize) with the smallest that holds the references. Returns what it returns, or
// false if there is none.
template <class Storage, class Visit>
bool visit_references(const ForwardParams& p, Visit visit) {
  if (p.references <= 32) return visit(WarpSize<Storage, 4, 7, 6>{});
  if (p.references <= 56) return visit(WarpSize<Storage, 7, 7, 4>{});
  if (p.references <= 64) return visit(WarpSize<Storage, 8, 6, 4>{});
  if (p.references <= 128) return visit(WarpSize<Storage, 16, 3, 2>{});
  return false;
}

template <class Storage, class Launch>
bool visit_shape(const ForwardParams& p, int64_t block_bytes, Launch launch) {
  return visit_references<Storage>(p, [&](auto size) {
    return visit_warps<Storage, size.blocks, size.strips>(p, block_bytes, launch);
  });
}

}  // namespace on_chip

template <class Storage>
bool OnChipForward<Storage>::run(const ForwardParams& p, Stream& stream) {
  if (stream.stages == 1 || !stream.resident || p.group != nullptr) return false;
  if (!on_chip::can_scale<Storage>(p)) return false;
  bool launched = false;
  on_chip::visit_shape<Storage>(
      p, stream.block_bytes, [&](auto shape, const on_chip::Sizes& sizes) {
        using S = decltype(shape);
        constexpr auto kKernel = on_chip::attention_forward_on_chip_kernel<S>;
        // newer devices can also run compute_75's PTX, in which this kernel has no body
        launched = ptx_version<kKernel>(stream) >= 80;
        if (!launched) return;
        launch<kKernel>(stream, "attention_forward_on_chip_kernel", p.batch * p.heads, S::kThreads,
                        sizes.total, on_chip::Params{p, sizes});
      });
  return launched;
}

}  // namespace setformer::cuda
