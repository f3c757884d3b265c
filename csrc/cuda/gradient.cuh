// The last pass of backward over the tokens of one head: ds of all terms (equations and counts in
// backward.cuh), and from it the gradients of tokens, references, their masses, bandwidth and
// epsilon.
#pragma once

#include "backward.cuh"

namespace setformer::cuda {

// dk of a warp's 16 rows from sum_j E_ij y_j and sum_j E_ij; returns this thread's part of sum_i
// k_i.dk_i. `stage` may hold the keys, because a warp reads and writes only its own rows.
template <class Storage>
__device__ __forceinline__ Accumulate<Storage> store_token_gradient(
    const BackwardHead<Storage>& head, int64_t tile, int column, int width,
    const Plain<Storage>& keys, const Accumulate<Storage> (&row_sums)[2],
    Accumulate<Storage> (&sums)[Shape<Storage>::kDepth / 8][4], Storage* stage) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const Lane lane;
  T key_sum = 0;
  if (head.gaussian) {
#pragma unroll
    for (int n = 0; n < S::kDepth / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (8 * n + lane.column >= width) continue;
        const int row = 16 * lane.warp + lane.row + 8 * (e / 2);
        const T key = widen(keys.data[row * keys.pitch + 8 * n + lane.column + e % 2]);
        sums[n][e] -= key * row_sums[e / 2];
        key_sum += key * sums[n][e];
      }
    }
  }
  store_rows<Storage>(head.token_gradients, tile, column, sums, stage);
  return key_sum;
}

// Loads what steps top, top - 1, ... need of the references of a chunk, three rows [kRows] for each
// step: -columns^t, gbar^t and g^{t-1}. If factored: 2^(-columns^t - l) gbar^t, then the numbers l
// and m, then 2^(g^{t-1} - m), where l is the chunk's largest -columns^t and m its largest g^{t-1}.
template <class Storage>
__device__ void load_steps(const ForwardParams& p, const BackwardHead<Storage>& head, int chunk,
                           int64_t top, int count, const Accumulate<Storage>* scales,
                           Accumulate<Storage>* terms) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const Lane lane;
  constexpr int kOwn = S::kRows / 32;
#pragma unroll 1
  for (int u = lane.warp; u < count; u += S::kWarps) {
    const int64_t t = top - u;
    T* to = terms + u * 3 * S::kRows + thread_index() % 32;
    T collection[kOwn], weight[kOwn], distribution[kOwn];
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      const int64_t j = int64_t(chunk) * S::kRows + thread_index() % 32 + 32 * e;
      const bool inside = j < p.references;
      collection[e] = inside ? collection_term(head.column(t, j)) : -infinity<T>();
      weight[e] = !inside            ? T(0)
                  : t < p.iterations ? head.column_adjoint(t, j)
                                     : head.column_adjoint(t, j) * scales[j];
      distribution[e] = inside ? potential<Storage>(p, head, t - 1, j) : -infinity<T>();
    }
    if (kFactors<Storage> && head.factored) {
      T tops[2] = {collection[0], distribution[0]};
#pragma unroll
      for (int e = 1; e < kOwn; ++e) {
        tops[0] = maximum(tops[0], collection[e]);
        tops[1] = maximum(tops[1], distribution[e]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        tops[i] = warp_maximum(tops[i]);
        if (tops[i] == -infinity<T>()) tops[i] = T(0);
      }
#pragma unroll
      for (int e = 0; e < kOwn; ++e) {
        to[32 * e] = power_of_two(collection[e] - tops[0]) * weight[e];
        to[2 * S::kRows + 32 * e] = power_of_two(distribution[e] - tops[1]);
      }
      if (lane.row == 0 && lane.column < 4) to[S::kRows] = lane.column == 0 ? tops[0] : tops[1];
    } else {
#pragma unroll
      for (int e = 0; e < kOwn; ++e) {
        to[32 * e] = collection[e];
        to[S::kRows + 32 * e] = weight[e];
        to[2 * S::kRows + 32 * e] = distribution[e];
      }
    }
  }
}

// What a pass over ds knows of the references: in shared memory numbers [chunks kRows] each. If
// factored, potentials and terms are factors relative to their largest.
template <class Storage>
struct ReferenceTerms {
  using T = Accumulate<Storage>;
  T *potentials, *terms, *scales, *etas;  // g^T, -columns^T, 1 / sum_i C_ij, eta
  T* steps;                               // of load_steps
  T* scratch;
  bool factored;
  T top_term = 0, top_potential = 0;

  __device__ __forceinline__ explicit ReferenceTerms(const BackwardHead<Storage>& head) {
    using S = Shape<Storage>;
    const ForwardParams& p = head.p;
    const int padded = head.layout.chunks * S::kRows;
    scratch = head.numbers() + head.layout.sums();
    potentials = head.numbers() + head.layout.terms();
    terms = potentials + padded;
    scales = terms + padded;
    etas = scales + padded;
    steps = head.numbers() + head.layout.steps();
    fill_terms<Storage>(p, potentials, -infinity<T>(),
                        [&](int64_t j) { return potential<Storage>(p, head, p.iterations, j); });
    fill_terms<Storage>(p, terms, -infinity<T>(),
                        [&](int64_t j) { return collection_term(head.column(p.iterations, j)); });
    fill_terms<Storage>(p, scales, T(0),
                        [&](int64_t j) { return head.collects ? head.collection_scale[j] : T(1); });
    fill_terms<Storage>(p, etas, T(0), [&](int64_t j) { return head.eta[j]; });
    __syncthreads();
    factored = kFactors<Storage> && head.factored;
    if (!factored) return;
    top_term = largest_term<Storage>(p, terms, scratch);
    top_potential = largest_term<Storage>(p, potentials, scratch);
    to_factors<Storage>(p, terms, top_term);
    to_factors<Storage>(p, potentials, top_potential);
  }
};

// The tiles of shared memory that a pass over ds uses beside those of the scores.
template <class Storage>
struct GradientTiles {
  using S = Shape<Storage>;
  using Element = typename Formed<Storage>::Element;
  Formed<Storage> exchange, operand;  // E; a tile of A or dA
  Storage* rows;                      // of values, gradients of outputs, keys or references
  Plain<Storage> staged;              // the same

  __device__ __forceinline__ explicit GradientTiles(const BackwardHead<Storage>& head)
      : exchange{reinterpret_cast<Element*>(shared_memory + head.layout.plan), S::kWidePitch},
        operand{reinterpret_cast<Element*>(shared_memory + head.layout.operand), S::kDeepPitch},
        rows(reinterpret_cast<Storage*>(shared_memory + head.layout.rows)),
        staged{rows, S::kDepth + S::kPerVector} {}
};

// One tile of tokens against one chunk of references.
template <class T>
struct TileOfScores {
  int64_t tile;
  T log_mass[2];       // of the thread's two tokens
  int chunk, columns;  // columns: of the chunk
};

// The exponents of R (or, `of_values`, of C) that belong to the thread's two tokens, as factors if
// terms are, and delta.
template <class Storage>
__device__ __forceinline__ void token_terms(const BackwardHead<Storage>& head,
                                            const ReferenceTerms<Storage>& of,
                                            const TileOfScores<Accumulate<Storage>>& at,
                                            bool of_values, Accumulate<Storage> (&offsets)[2],
                                            Accumulate<Storage> (&deltas)[2]) {
  using T = Accumulate<Storage>;
  const OwnRows<Storage> rows(at.tile);
  const int64_t steps = head.p.iterations;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = rows.token[half];
    deltas[half] = T(0);
    if (of_values) {
      offsets[half] = at.log_mass[half] - head.row(steps - 1, i);
    } else {
      offsets[half] = head.tokens.valid(i) ? -head.row(steps, i) : -infinity<T>();
      deltas[half] = i < head.tokens.count ? head.delta[i] : T(0);
    }
    if (of.factored) {
      offsets[half] = power_of_two(offsets[half] + (of_values ? of.top_term : of.top_potential));
    }
  }
}

// Adds R (G - delta) or, `of_values`, C (H - eta) to ds; if factored, without their factor 2^s.
template <class Storage>
__device__ __forceinline__ void add_average_gradient(const BackwardHead<Storage>& head,
                                                     const ReferenceTerms<Storage>& of,
                                                     const GradientTiles<Storage>& tiles,
                                                     const TileOfScores<Accumulate<Storage>>& at,
                                                     bool of_values, Accumulators<Storage>& s,
                                                     Accumulators<Storage>& ds) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const ForwardParams& p = head.p;
  const Lane lane;
  const Rows<Storage>& source = of_values ? head.values : head.output_gradients;
  const int value_parts = int(divide_up(p.value_depth, S::kDepth)), begin = at.chunk * S::kRows;
  T unit = 1, offsets[2], deltas[2];
  token_terms(head, of, at, of_values, offsets, deltas);
  // A part of the references at a time: the other accumulators leave few registers.
  constexpr bool kNarrow = S::kDouble || (kIsHalf<Storage> && !kTensorCores<Storage>);
  constexpr int kSides = kNarrow ? 4 : 2, kBlocks = S::kRows / 8 / kSides;
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    const int columns = at.columns - side * 8 * kBlocks;
    if (columns <= 0) break;
    T products[kBlocks][4];
    clear(products);
    for (int part = 0; part < value_parts; ++part) {
      if (side == 0 || value_parts > 1) {
        __syncthreads();
        stage_rows(source, at.tile * S::kRows, part * S::kDepth, tiles.rows, tiles.staged.pitch);
        commit_copies();
        unit =
            load_operand<Storage>(tiles.operand, of_values ? head.pooled_gradient : head.pooled,
                                  int64_t(begin), p.references, part * S::kDepth,
                                  int(p.value_depth), static_cast<const T*>(nullptr), of.scratch);
        wait_for_copies<0>();
        __syncthreads();
      }
      const Formed<Storage> rows_of_side{
          tiles.operand.data + side * 8 * kBlocks * tiles.operand.pitch, tiles.operand.pitch};
      multiply_scaled<false, false, Storage>(
          products, tiles.staged, 16 * lane.warp, rows_of_side,
          padded_depth<Storage>(int(p.value_depth), part * S::kDepth), columns, unit);
    }
    const auto add = [&](auto plan_of) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int block = side * kBlocks + n;
          const int column = begin + 8 * block + lane.column + e % 2;
          const T plan =
              plan_of(s[block][e], (of_values ? of.terms : of.potentials)[column], offsets[e / 2]);
          ds[block][e] += of_values ? plan * of.scales[column] * (products[n][e] - of.etas[column])
                                    : plan * (products[n][e] - deltas[e / 2]);
        }
      }
    };
    if (of.factored) {
      add([](T, T term, T offset) { return term * offset; });
    } else {
      add([](T score, T term, T offset) { return power_of_two(score + term + offset); });
    }
  }
}

// Subtracts C^t gbar^t + R^{t-1} a fhat^t of a step, whose numbers of the references are in
// `step_terms` (load_steps).
template <class Storage>
__device__ __forceinline__ void subtract_step(const BackwardHead<Storage>& head,
                                              const ReferenceTerms<Storage>& of,
                                              const TileOfScores<Accumulate<Storage>>& at,
                                              int64_t t, const Accumulate<Storage>* step_terms,
                                              Accumulators<Storage>& s, Accumulators<Storage>& ds) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const Lane lane;
  const OwnRows<Storage> rows(at.tile);
  const T* column_terms = step_terms + lane.column;
  T collected[2], distributed[2], flows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = rows.token[half];
    const T log_mass = at.log_mass[half];
    const bool massless = log_mass == -infinity<T>();
    distributed[half] = massless ? infinity<T>() : head.row(t - 1, i);
    collected[half] = log_mass - distributed[half];
    flows[half] = massless ? T(0) : head.row_adjoint(t, i) * power_of_two(log_mass);
  }
  if (of.factored) {
    const T* tops = step_terms + S::kRows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      collected[half] = power_of_two(collected[half] + tops[0]);
      flows[half] *= power_of_two(tops[1] - distributed[half]);
    }
  }
#pragma unroll
  for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const T* terms_of = column_terms + 8 * n + e % 2;
      if (of.factored) {
        ds[n][e] -= collected[e / 2] * terms_of[0];
        ds[n][e] -= flows[e / 2] * terms_of[2 * S::kRows];
      } else {
        ds[n][e] -=
            power_of_two(s[n][e] + collected[e / 2] + terms_of[0]) * terms_of[S::kRows] +
            power_of_two(s[n][e] - distributed[e / 2] + terms_of[2 * S::kRows]) * flows[e / 2];
      }
    }
  }
}

// The same for all steps. Where shared memory has the numbers of all of them, they are loaded once.
template <class Storage>
__device__ __forceinline__ void subtract_steps(const BackwardHead<Storage>& head,
                                               const ReferenceTerms<Storage>& of,
                                               const TileOfScores<Accumulate<Storage>>& at,
                                               bool one_chunk, bool& loaded,
                                               Accumulators<Storage>& s,
                                               Accumulators<Storage>& ds) {
  using S = Shape<Storage>;
  const int64_t steps = head.p.iterations;
  for (int64_t top = steps; top >= 1; top -= head.layout.steps_at_once) {
    const int at_once = head.layout.steps_at_once;
    const int count = int(top < at_once ? top : at_once);
    if (!loaded) {
      __syncthreads();
      load_steps(head.p, head, at.chunk, top, count, of.scales, of.steps);
      __syncthreads();
      loaded = steps == count && one_chunk;
    }
#pragma unroll 1
    for (int u = 0; u < count; ++u) {
      subtract_step(head, of, at, top - u, of.steps + u * 3 * S::kRows, s, ds);
    }
  }
}

// Turns ds into E, in a tile of shared memory. Adds sum_ij ds_ij s_ij to `product_sum`, if wanted,
// and the sums of E over its rows. Returns the number by which products with the tile must be
// multiplied.
template <class Storage, bool resident>
__device__ __forceinline__ Accumulate<Storage> form_exchange(
    const BackwardHead<Storage>& head, Scores<Storage, resident>& scores,
    const ReferenceTerms<Storage>& of, const GradientTiles<Storage>& tiles,
    const TileOfScores<Accumulate<Storage>>& at, bool adds_products, Accumulators<Storage>& s,
    Accumulators<Storage>& ds, Accumulate<Storage>& product_sum,
    Accumulate<Storage> (&row_sums)[2]) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const int begin = at.chunk * S::kRows;
  const auto each = [&](auto visit) {
#pragma unroll
    for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(ds[n][e], s[n][e]);
    }
  };
  if (of.factored) each([](T& x, T score) { x *= power_of_two(score); });
  if (begin + S::kRows > head.p.references) {  // 0 beyond the last reference
    for_each<Storage>(ds, [&](int, int column, T& x) {
      if (begin + column >= head.p.references) x = T(0);
    });
  }
  if (adds_products) each([&](T& x, T score) { product_sum += x * score; });
  const T factor = head.gaussian ? quotient(T(kLn2), head.bandwidth * head.bandwidth)
                                 : quotient(T(1), head.epsilon);
  each([&](T& x, T score) { x *= head.gaussian ? score * factor : factor; });
  if (!head.gaussian) {
    scores.for_each_axis(at.tile, at.chunk, ds,
                         [](T& x, T exponent) { x *= power_of_two(exponent); });
  }
  T largest = 0, scale = 1;
  for_each<Storage>(ds, [&](int half, int, T& x) {
    row_sums[half] += x;
    largest = maximum(largest, x < T(0) ? -x : x);
  });
  if constexpr (kTensorCores<Storage> && std::is_same_v<Storage, __half>) {
    scale = fitting_scale<Storage>(block_maximum<Storage>(largest, of.scratch));
  }
  store_accumulators<Storage>(ds, tiles.exchange, scale);
  __syncthreads();
  return T(1) / scale;
}

// Which gradients a pass over ds computes, and its sums. kept: for the references over all tiles
// or, without to_references, for the tokens over all chunks.
template <class Storage>
struct GradientSums {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  bool to_tokens, to_references;
  int first_column;  // of a group of kGroup depth tiles
  T kept[S::kGroup][S::kDepth / 8][4];
  T column_sum;                    // sum_i E_ij of reference thread_index()
  T product_sum = 0, key_sum = 0;  // sum_ij ds_ij s_ij, sum_i k_i.dk_i

  __device__ __forceinline__ void begin_group(int group) {
    first_column = group * S::kGroup * S::kDepth;
#pragma unroll
    for (int part = 0; part < S::kGroup; ++part) clear(kept[part]);
    column_sum = 0;
  }

  // Adds sum_i E_ij of a tile of tokens.
  __device__ __forceinline__ void add_columns(const GradientTiles<Storage>& tiles, T unit) {
    if (!to_references || thread_index() >= S::kRows) return;
    const Formed<Storage>& tile = tiles.exchange;
    for (int row = 0; row < S::kRows; ++row) {
      for (int i = 0; i < Formed<Storage>::kParts; ++i) {
        column_sum += unit * widen(tile.part(i)[row * tile.pitch + thread_index()]);
      }
    }
  }

  // Multiplies E with the references and, for the last chunk, with the keys; stores dk then. With
  // several chunks there is no to_references.
  template <bool resident>
  __device__ __forceinline__ void add_exchange(const BackwardHead<Storage>& head,
                                               Scores<Storage, resident>& scores,
                                               const GradientTiles<Storage>& tiles,
                                               const TileOfScores<Accumulate<Storage>>& at,
                                               bool ends, T unit, const T (&row_sums)[2]) {
    const Lane lane;
    const ForwardParams& p = head.p;
#pragma unroll
    for (int part = 0; part < S::kGroup; ++part) {
      const int column = first_column + part * S::kDepth;
      if (column >= p.depth) break;
      const int width = padded_depth<Storage>(int(p.depth), column);
      // The columns of keys or references: compute() left them in shared memory, or they are
      // loaded again.
      const auto tile_of = [&](const Rows<Storage>& source, int64_t from,
                               const Plain<Storage>& whole) {
        if (scores.whole_rows()) return whole;
        __syncthreads();
        scores.load_part(source, from, column / S::kDepth, tiles.rows, tiles.staged.pitch);
        return tiles.staged;
      };
      T sums[S::kDepth / 8][4];  // of the tokens, up to this chunk
      clear(sums);
      if (to_tokens) {
        if (!to_references) copy(sums, kept[part]);
        multiply_scaled<false, true, Storage>(sums, tiles.exchange, 16 * lane.warp,
                                              tile_of(head.references, int64_t(at.chunk) * S::kRows,
                                                      scores.last_references(at.chunk)),
                                              at.columns, width, unit);
        if (!to_references) copy(kept[part], sums);
      }
      if (!ends) continue;
      const Plain<Storage> keys =
          tile_of(head.tokens, at.tile * S::kRows, scores.last_keys(at.tile));
      if (to_references) {
        multiply_scaled<true, true, Storage>(kept[part], tiles.exchange, 16 * lane.warp, keys,
                                             S::kRows, width, unit);
      }
      if (to_tokens) {
        if (!scores.whole_rows()) __syncthreads();  // the keys lie where the gradient goes
        key_sum +=
            store_token_gradient(head, at.tile, column, width, keys, row_sums, sums, tiles.rows);
        if (!to_references) clear(kept[part]);
      }
    }
  }

  // Stores sum_i E_ij k_i of a chunk and, in the last column, sum_i E_ij.
  __device__ __forceinline__ void store(const BackwardHead<Storage>& head, int chunk) {
    const Lane lane;
    const int64_t depth = head.p.depth, references = head.p.references;
    T* to = head.partials(depth + 1) + head.split * references * (depth + 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t j = int64_t(chunk) * S::kRows + 16 * lane.warp + lane.row + 8 * half;
      if (j >= references) continue;
#pragma unroll
      for (int part = 0; part < S::kGroup; ++part) {
#pragma unroll
        for (int n = 0; n < S::kDepth / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int64_t column = first_column + part * S::kDepth + 8 * n + lane.column + e;
            if (column < depth) to[j * (depth + 1) + column] = kept[part][n][2 * half + e];
          }
        }
      }
    }
    const int64_t j = int64_t(chunk) * S::kRows + thread_index();
    if (first_column == 0 && thread_index() < S::kRows && j < references) {
      to[j * (depth + 1) + depth] = column_sum;
    }
  }
};

// From ds through the similarity. With `to_references` the block handles one chunk of references
// and one group of columns; it writes sum_i E_ij k_i and, in the last column, sum_i E_ij to partial
// [shares, M, D + 1]. With `to_tokens` it handles all references; it writes dk, and sum_ij
// ds_ij s_ij log2(e) and sum_i k_i.dk_i to scalars [splits, 2]. A head of a single chunk and group
// does both at once.
template <class Storage, bool resident>
__device__ __forceinline__ void gradient(bool to_tokens, bool to_references, int own_chunk,
                                         int own_group) {
  const BackwardHead<Storage>& head = shared_head<BackwardHead<Storage>>();
  Scores<Storage, resident> scores(head);
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const int groups = int(divide_up(head.p.depth, S::kGroup * S::kDepth));
  const int first = to_references ? own_chunk : 0;
  const int last = to_references ? own_chunk + 1 : head.layout.chunks;
  const int first_group = to_references ? own_group : 0;
  const int last_group = to_references ? own_group + 1 : groups;
  const ReferenceTerms<Storage> of(head);
  const GradientTiles<Storage> tiles(head);
  GradientSums<Storage> sums;
  sums.to_tokens = to_tokens;
  sums.to_references = to_references;
  bool steps_loaded = false;
  for (int group = first_group; group < last_group; ++group) {
    sums.begin_group(group);
    for (int64_t tile = head.first_tile; tile < head.last_tile; ++tile) {
      const OwnRows<Storage> rows(tile);
      TileOfScores<T> at{tile, {head.log_mass(rows.token[0]), head.log_mass(rows.token[1])}};
      T row_sums[2] = {T(0), T(0)};
      for (int chunk = first; chunk < last; ++chunk) {
        const bool ends = chunk + 1 == last;
        at.chunk = chunk;
        at.columns = scores.columns(chunk);
        Accumulators<Storage> s, ds;
        scores.compute(tile, chunk,
                       !ends                       ? tile
                       : tile + 1 < head.last_tile ? tile + 1
                                                   : -1,
                       ends ? first : chunk + 1, s);
        clear(ds);
#pragma unroll 1
        for (int of_values = 0; of_values < 2; ++of_values) {
          if (!(of_values ? head.collects : head.distributes)) continue;
          add_average_gradient(head, of, tiles, at, of_values, s, ds);
        }
        subtract_steps(head, of, at, last - first == 1, steps_loaded, s, ds);
        const T unit = form_exchange(head, scores, of, tiles, at, group == first_group, s, ds,
                                     sums.product_sum, row_sums);
        sums.add_columns(tiles, unit);
        if (ends) {
#pragma unroll
          for (int half = 0; half < 2; ++half) row_sums[half] = quad_sum(row_sums[half]);
        }
        sums.add_exchange(head, scores, tiles, at, ends, unit, row_sums);
        __syncthreads();
      }
    }
    if (to_references) sums.store(head, first);
  }
  if (!to_tokens) return;
  const T product_sum = block_sum<Storage>(sums.product_sum, of.scratch);
  const T key_sum = block_sum<Storage>(sums.key_sum, of.scratch);
  if (thread_index() == 0) {
    head.scalars[head.split * 2] = product_sum;
    head.scalars[head.split * 2 + 1] = key_sum;
  }
}

// dy_j from the sums of all blocks that share a head, by one warp; the queries' dy_j is added to
// the keys'. Leaves y_j.dy_j for the derivative by the bandwidth.
template <class Storage>
__device__ __forceinline__ void finish_reference_gradient(int64_t j, bool accumulate) {
  using T = Accumulate<Storage>;
  const BackwardHead<Storage>& head = shared_head<BackwardHead<Storage>>();
  const int64_t depth = head.p.depth, of_split = head.p.references * (depth + 1);
  const T* sums = head.partials(depth + 1) + j * (depth + 1);
  const Rows<Storage>& references = head.references;
  T total = 0, product = 0;
  for (int64_t split = thread_index() % 32; split < head.splits; split += 32) {
    total += sums[split * of_split + depth];
  }
  total = lanes_sum<32>(total);
  for (int64_t column = thread_index() % 32; column < depth; column += 32) {
    T sum = 0;
    for (int64_t split = 0; split < head.splits; ++split) sum += sums[split * of_split + column];
    if (head.gaussian) {
      T y = widen(references.data[j * references.row_stride + column * references.column_stride]);
      if constexpr (!kIsHalf<Storage>) y -= head.center[column];
      sum -= y * total;
      product += y * sum;
    }
    T& gradient = head.reference_gradients[j * depth + column];
    gradient = accumulate ? gradient + sum : sum;
  }
  product = lanes_sum<32>(product);
  if (thread_index() % 32 == 0) head.reference_products[j] = product;
}

}  // namespace setformer::cuda
