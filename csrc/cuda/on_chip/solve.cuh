// The Sinkhorn steps of a head whose entries are in registers (equations in transport.cuh).
//
// Where entries are the factors K_ij = 2^(s_ij - scale), plans are u_i K_ij v_j, and a step is
//
//   u_i = a_i / sum_j K_ij v_j,   c_j = sum_i u_i K_ij,   v_j = b_j c_0 / c_j
//
// with a and b divided by their largest entries. K is at least 2^-46.2, so v lies between 2^-46 and
// 2^46 and sums over references between 2^-92 and M 2^46. If masses differ by less than 2^34, all
// other numbers stay within float32's range too. Without factors, entries are scores and steps are
// log-sum-exps.
//
// Rows and columns are kept for backward as in problem.cuh, where potentials g are relative to g_0:
// therefore v_0 is taken out of the rows.
#pragma once

#include "cluster.cuh"

namespace setformer::cuda::on_chip {

// The result of a solve: u_i, c_j and v_j if entries are factors, else their base-2 logarithms.
template <class S>
struct Solution {
  OfTokens<S> tokens;
  Spread<S> columns;
  Spread<S> references;
  float log_first;  // log2 v_0, if entries are factors
};

// The marginals: masses a_i in the warp's own shared memory, b_j spread over the warp.
template <class S>
struct Marginals {
  Spread<S> references;  // b_j / the largest b, or log2 b_j; 0, or -inf, beyond the last
  float log_first;       // log2 b_0, relative to the same number
  float log_largest;     // log2 of the largest mass, to be added to log2 a_i
};

// b_j up to a constant; a mass that is not positive makes the head NaN.
__device__ __forceinline__ float reference_mass(const ForwardParams& p, int64_t b, int64_t h,
                                                int j) {
  const Tensor& mass = p.reference_mass;
  if (mass.data == nullptr) return 1.0f;
  const float x = static_cast<const float*>(
      mass.data)[b * mass.stride[0] + h * mass.stride[1] + j * mass.stride[2]];
  return x > 0.0f ? x : NAN;
}

// g^t_j log2(e), relative to g^t_0, from the columns that are kept.
template <class S>
__device__ __forceinline__ float potential(const ForwardParams& p, int64_t t, int j) {
  const auto& head = shared_head<S>();
  if (t == 0) return 0.0f;
  const float* columns = head.columns + (t - 1) * p.references;
  if (columns[j] == -infinity<float>()) return 0.0f;  // a head without mass has g = 0
  return (log_two(reference_mass(p, head.b, head.h, j)) - columns[j]) -
         (log_two(reference_mass(p, head.b, head.h, 0)) - columns[0]);
}

// a_i up to a constant; 0 for a hidden token. A negative mass makes the head NaN.
template <class S>
__device__ __forceinline__ float token_mass(const Tokens<S>& tokens, int i, bool valid) {
  if (!valid) return 0.0f;
  const auto& head = shared_head<S>();
  if (head.mass.absent()) return 1.0f;
  const float x = head.mass[(tokens.first + i) * head.mass_stride];
  return x >= 0.0f ? x : NAN;
}

__device__ __forceinline__ float most_of_warp(float x) {
  return across_lanes<32>(x, [](float a, float b) { return most(a, b); });
}

// Stores the masses of the warp's tokens in its own shared memory: divided by the largest if
// entries are factors, else their logarithms. Returns log2 of the largest mass, of the block or of
// all that share the head; 0 for logarithms, and where no masses are given.
template <class S>
__device__ __forceinline__ float find_masses(const Place& at, const Tokens<S>& tokens,
                                             Exchange& exchange) {
  const auto& head = shared_head<S>();
  const bool factored = head.similarity.factored, given = !head.mass.absent();
  float* masses = shared_at<float>(Memory<S>::kMasses) + at.warp * S::kWarpTokens;
  float own[(S::kStrips + 1) / 2], top = 0, log_largest = 0;
#pragma unroll
  for (int word = 0; word < (S::kStrips + 1) / 2; ++word) {
    own[word] = token_mass<S>(tokens, 32 * word + at.lane, tokens.valid[word] >> at.lane & 1);
    top = most(top, own[word]);
  }
  if (factored && given) {
    float* largest = shared_at<float>(Memory<S>::kLargest);
    top = most_of_warp(top);
    if (at.lane == 0) largest[at.warp] = top;
    meet<S>();
    top = largest[0];
    for (int warp = 1; warp < S::kWarps; ++warp) top = most(top, largest[warp]);
    if constexpr (S::kClustered) top = most_of_ranks<S>(at, exchange, top);
    log_largest = log_two(top);
  }
#pragma unroll
  for (int word = 0; word < (S::kStrips + 1) / 2; ++word) {
    float x = own[word];
    if (!factored) {
      x = log_two(x);
    } else if (given) {
      x = top == 0.0f ? 0.0f : x / top;
    }
    if (32 * word + at.lane < S::kWarpTokens) masses[32 * word + at.lane] = x;
  }
  __syncwarp();
  return log_largest;
}

template <class S>
__device__ __forceinline__ Marginals<S> find_marginals(const Params& p, const Place& at,
                                                       const Tokens<S>& tokens,
                                                       Exchange& exchange) {
  const auto& head = shared_head<S>();
  Marginals<S> marginals{};
  marginals.log_largest = find_masses<S>(at, tokens, exchange);
  const float first = reference_mass(p, head.b, head.h, 0);
  float top_reference = 0;
  for_each_own(at, marginals.references, [&](int j, float& b) {
    b = j < p.references ? reference_mass(p, head.b, head.h, j) : 0.0f;
    top_reference = most(top_reference, b);
  });
  if (!head.similarity.factored) {
    marginals.log_first = log_two(first);
    for_each_own(at, marginals.references, [](int, float& b) { b = log_two(b); });
  } else if (p.reference_mass.data != nullptr) {
    top_reference = most_of_warp(top_reference);
    marginals.log_first = log_two(first) - log_two(top_reference);
    for_each_own(at, marginals.references, [&](int, float& b) { b = b / top_reference; });
  }
  return marginals;
}

__device__ __forceinline__ float shuffled(float x, int distance) {
  return __shfl_xor_sync(kFullWarp, x, distance);
}
using cuda::shuffled;

// Turns sums [8][2] over a lane's own rows into sums over all rows, spread over the warp. Three
// times each lane gives half of its sums to another lane and adds the half that it receives.
template <class Sum>
__device__ __forceinline__ Two<Sum> fold(const Place& at, Sum (&sums)[8][2]) {
#pragma unroll
  for (int left = 4; left > 0; left /= 2) {
    const bool upper = at.lane & (4 * left);
#pragma unroll
    for (int n = 0; n < left; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Sum given = upper ? sums[n][e] : sums[n + left][e];
        const Sum kept = upper ? sums[n + left][e] : sums[n][e];
        sums[n][e] = combined(kept, shuffled(given, 4 * left));
      }
    }
  }
  return {sums[0][0], sums[0][1]};
}

// Adds the sums of all warps, in the order of the warps. `parity` alternates between calls, so that
// no warp overwrites what another still reads.
template <class S, class Sum>
__device__ __forceinline__ void add_warps(const Place& at, int parity, Sums<S, Sum>& sums) {
  if constexpr (S::kWarps == 1) return;
  Two<Sum>* room =
      shared_at<Two<Sum>>(Memory<S>::kColumns) + parity * S::kWarps * S::kLanePairs * 32 + at.lane;
#pragma unroll
  for (int h = 0; h < S::kLanePairs; ++h) room[(at.warp * S::kLanePairs + h) * 32] = sums[h];
  meet<S>();
#pragma unroll
  for (int h = 0; h < S::kLanePairs; ++h) {
    sums[h] = room[h * 32];
#pragma unroll
    for (int warp = 1; warp < S::kWarps; ++warp) {
      const Two<Sum> other = room[(warp * S::kLanePairs + h) * 32];
      sums[h] = {combined(sums[h].x, other.x), combined(sums[h].y, other.y)};
    }
  }
}

// The sums over all tokens of the block, spread over the warp. of(n, e) is the lane's own part of
// the sum for its column e (0 or 1) in block n.
template <class S, class Sum, class Of>
__device__ __forceinline__ void sum_columns(const Place& at, int parity, Of of,
                                            Sums<S, Sum>& totals) {
#pragma unroll
  for (int h = 0; h < S::kLanePairs; ++h) {
    Sum sums[8][2] = {};
#pragma unroll
    for (int n = 0; n < 8 && 8 * h + n < S::kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[n][e] = of(8 * h + n, e);
    }
    totals[h] = fold(at, sums);
  }
  add_warps<S>(at, parity, totals);
}

// sum_j K_ij v_j; 1 for strips that the warp does not have.
template <class S>
__device__ __forceinline__ void sum_rows(const Tokens<S>& tokens, const Entries<S>& entries,
                                         const OfReferences<S>& factors, OfTokens<S>& sums) {
#pragma unroll
  for (int s = 0; s < S::kStrips; ++s) {
    sums[s][0] = sums[s][1] = 1.0f;
    if (s >= tokens.strips) continue;
    float even[2] = {}, odd[2] = {};
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        even[half] = fmaf(entries[s][n][2 * half], factors[n][0], even[half]);
        odd[half] = fmaf(entries[s][n][2 * half + 1], factors[n][1], odd[half]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) sums[s][half] = quad_sum(even[half] + odd[half]);
  }
}

// log2 sum_j 2^(s_ij + g_j)
template <class S>
__device__ __forceinline__ void log_sum_rows(const Tokens<S>& tokens, const Entries<S>& entries,
                                             const OfReferences<S>& potentials, OfTokens<S>& sums) {
#pragma unroll
  for (int s = 0; s < S::kStrips; ++s) {
    sums[s][0] = sums[s][1] = 0.0f;
    if (s >= tokens.strips) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      LogSum<float> row;
#pragma unroll
      for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          row.largest = maximum(row.largest, entries[s][n][2 * half + e] + potentials[n][e]);
        }
      }
      row.largest = quad_maximum(row.largest);
#pragma unroll
      for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          row.sum += power_of_two(entries[s][n][2 * half + e] + potentials[n][e] - row.largest);
        }
      }
      row.sum = quad_sum(row.sum);
      sums[s][half] = row.logarithm();
    }
  }
}

// Stores rows^t of the warp's tokens for backward.
template <class S>
__device__ __forceinline__ void keep_rows(const Place& at, const Tokens<S>& tokens, int t,
                                          const OfTokens<S>& logarithms) {
  const auto& head = shared_head<S>();
  const int count = int(head.tokens.count);
  float* to = head.rows + int64_t(t) * count + tokens.first + at.g;
  const int left = at.c != 0 ? 0 : min(16 * tokens.strips, count - tokens.first) - at.g;
#pragma unroll
  for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 16 * s + 8 * half;
      if (i < left) to[i] = logarithms[s][half];
    }
  }
}

// The first warp stores columns^t.
template <class S>
__device__ __forceinline__ void keep_columns(const Params& p, const Place& at, int t,
                                             const Spread<S>& logarithms) {
  if (!is_first_warp<S>(at)) return;
  float* to = shared_head<S>().columns + (t > 0 ? t - 1 : 0) * p.references;
  for_each_own(at, logarithms, [&](int j, float x) {
    if (j < p.references) to[j] = x;
  });
}

// The masses of the lane's tokens, as a solution before rows are known.
template <class S>
__device__ __forceinline__ void begin_tokens(const Place& at, Solution<S>& solution) {
  const float* masses = shared_at<float>(Memory<S>::kMasses) + at.warp * S::kWarpTokens + at.g;
  for_each_token<S>([&](int s, int half) { solution.tokens[s][half] = masses[16 * s + 8 * half]; });
}

// The state before the first step: `value` for each reference, `beyond` for those after the last.
template <class S>
__device__ __forceinline__ void begin(const Params& p, const Place& at, float value, float beyond,
                                      Solution<S>& solution) {
  for_each_own(at, solution.references,
               [&](int j, float& x) { x = j < p.references ? value : beyond; });
  begin_tokens<S>(at, solution);
  solution.log_first = 0;
}

// Step t: u and the columns, from v of the step before.
template <class S>
__device__ __forceinline__ void step_by_factors(const Params& p, const Place& at,
                                                const Tokens<S>& tokens, float log_largest,
                                                const Entries<S>& entries, int t, int parity,
                                                Exchange& exchange, Solution<S>& solution,
                                                Spread<S>& logarithms) {
  const float* masses = shared_at<float>(Memory<S>::kMasses) + at.warp * S::kWarpTokens + at.g;
  const float scale = shared_head<S>().similarity.scale;
  if (t > 0) {
    OfReferences<S> factors;
    to_fragments<S>(at, solution.references, factors);
    OfTokens<S> sums;
    sum_rows<S>(tokens, entries, factors, sums);
    for_each_token<S>([&](int s, int half) {
      solution.tokens[s][half] = masses[16 * s + 8 * half] * reciprocal(sums[s][half]);
      sums[s][half] = logarithm(sums[s][half]) + (scale - solution.log_first);
    });
    keep_rows<S>(at, tokens, t - 1, sums);
  }
  Sums<S, float> columns;
  sum_columns<S>(
      at, parity,
      [&](int n, int e) {
        float sum = 0;
        for_each_token<S>([&](int s, int half) {
          sum = fmaf(entries[s][n][2 * half + e], solution.tokens[s][half], sum);
        });
        return sum;
      },
      columns);
  add_ranks<S>(at, exchange, columns);
  const float unit = log_largest + (t > 0 ? solution.log_first : scale);
#pragma unroll
  for (int h = 0; h < S::kLanePairs; ++h) {
    solution.columns[h] = {columns[h].x, columns[h].y};
    logarithms[h] = {logarithm(columns[h].x) + unit, logarithm(columns[h].y) + unit};
  }
}

template <class S>
__device__ __forceinline__ void solve_by_factors(const Params& p, const Place& at,
                                                 const Tokens<S>& tokens,
                                                 const Marginals<S>& marginals,
                                                 const Entries<S>& entries, Exchange& exchange,
                                                 Solution<S>& solution) {
  begin<S>(p, at, 1.0f, 0.0f, solution);
#pragma unroll 1
  for (int t = p.iterations > 0; t <= int(p.iterations); ++t) {
    Spread<S> logarithms;
    step_by_factors<S>(p, at, tokens, marginals.log_largest, entries, t, t & 1, exchange, solution,
                       logarithms);
    keep_columns<S>(p, at, t, logarithms);
    if (t == 0) return;
    const float first = __shfl_sync(kFullWarp, solution.columns[0].x, 0);
    if (first == 0.0f) continue;  // a head without mass has g = 0
#pragma unroll
    for (int h = 0; h < S::kLanePairs; ++h) {
      const float2 b = marginals.references[h], column = solution.columns[h];
      solution.references[h] = {b.x * (first * reciprocal(column.x)),
                                b.y * (first * reciprocal(column.y))};
    }
    solution.log_first = marginals.log_first;
  }
}

// Step t: log2 u and the columns, from g of the step before.
template <class S>
__device__ __forceinline__ void step_in_log_domain(const Params& p, const Place& at,
                                                   const Tokens<S>& tokens,
                                                   const Entries<S>& entries, int t, int parity,
                                                   Exchange& exchange, Solution<S>& solution) {
  const float* masses = shared_at<float>(Memory<S>::kMasses) + at.warp * S::kWarpTokens + at.g;
  if (t > 0) {
    OfReferences<S> potentials;
    to_fragments<S>(at, solution.references, potentials);
    OfTokens<S> sums;
    log_sum_rows<S>(tokens, entries, potentials, sums);
    for_each_token<S>([&](int s, int half) {
      solution.tokens[s][half] = masses[16 * s + 8 * half] - sums[s][half];
    });
    keep_rows<S>(at, tokens, t - 1, sums);
  }
  Sums<S, LogSum<float>> columns;
  sum_columns<S>(
      at, parity,
      [&](int n, int e) {
        LogSum<float> sum;
        const auto each = [&](auto visit) {
          for_each_token<S>([&](int s, int half) {
            visit(entries[s][n][2 * half + e] + solution.tokens[s][half]);
          });
        };
        each([&](float x) { sum.largest = maximum(sum.largest, x); });
        const float base = sum.largest == -infinity<float>() ? 0.0f : sum.largest;
        each([&](float x) { sum.sum += power_of_two(x - base); });
        return sum;
      },
      columns);
  add_ranks<S>(at, exchange, columns);
#pragma unroll
  for (int h = 0; h < S::kLanePairs; ++h) {
    solution.columns[h] = {columns[h].x.logarithm(), columns[h].y.logarithm()};
  }
}

template <class S>
__device__ __forceinline__ void solve_in_log_domain(const Params& p, const Place& at,
                                                    const Tokens<S>& tokens,
                                                    const Marginals<S>& marginals,
                                                    const Entries<S>& entries, Exchange& exchange,
                                                    Solution<S>& solution) {
  begin<S>(p, at, 0.0f, -infinity<float>(), solution);
#pragma unroll 1
  for (int t = p.iterations > 0; t <= int(p.iterations); ++t) {
    step_in_log_domain<S>(p, at, tokens, entries, t, t & 1, exchange, solution);
    keep_columns<S>(p, at, t, solution.columns);
    if (t == 0) return;
    const float first = __shfl_sync(kFullWarp, solution.columns[0].x, 0);
    if (first == -infinity<float>()) continue;  // a head without mass has g = 0
#pragma unroll
    for (int h = 0; h < S::kLanePairs; ++h) {
      const float2 b = marginals.references[h], column = solution.columns[h];
      solution.references[h] = {b.x - column.x - (marginals.log_first - first),
                                b.y - column.y - (marginals.log_first - first)};
    }
  }
}

}  // namespace setformer::cuda::on_chip
