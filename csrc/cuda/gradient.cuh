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

// From ds through the similarity. With `to_references` the block handles one chunk of references
// and one group of columns; it writes sum_i E_ij k_i and, in the last column, sum_i E_ij to partial
// [shares, M, D + 1]. With `to_tokens` it handles all references; it writes dk, and sum_ij
// ds_ij s_ij log2(e) and sum_i k_i.dk_i to scalars [splits, 2]. A head of a single chunk and group
// does both at once.
template <class Storage, bool resident>
__device__ __forceinline__ void gradient(bool to_tokens, bool to_references, int own_chunk,
                                         int own_group) {
  const BackwardHead<Storage>& head = shared_head<BackwardHead<Storage>>();
  const ForwardParams& p = head.p;
  Scores<Storage, resident> scores(head);
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  using Element = typename Formed<Storage>::Element;
  const int64_t steps = p.iterations;
  const int groups = int(divide_up(p.depth, S::kGroup * S::kDepth));
  const int value_parts = int(divide_up(p.value_depth, S::kDepth));
  const int first = to_references ? own_chunk : 0;
  const int last = to_references ? own_chunk + 1 : head.layout.chunks;
  const int first_group = to_references ? own_group : 0;
  const int last_group = to_references ? own_group + 1 : groups;
  const int padded = head.layout.chunks * S::kRows;
  T* scratch = head.numbers() + head.layout.sums();
  T* potentials = head.numbers() + head.layout.terms();
  T* terms = potentials + padded;
  T* scales = terms + padded;
  fill_terms<Storage>(p, potentials, -infinity<T>(),
                      [&](int64_t j) { return potential<Storage>(p, head, steps, j); });
  fill_terms<Storage>(p, terms, -infinity<T>(),
                      [&](int64_t j) { return collection_term(head.column(steps, j)); });
  fill_terms<Storage>(p, scales, T(0),
                      [&](int64_t j) { return head.collects ? head.collection_scale[j] : T(1); });
  T* etas = scales + padded;
  fill_terms<Storage>(p, etas, T(0), [&](int64_t j) { return head.eta[j]; });
  __syncthreads();
  const bool factored = kFactors<Storage> && head.factored;
  T top_term = 0, top_potential = 0;
  if (factored) {
    top_term = largest_term<Storage>(p, terms, scratch);
    top_potential = largest_term<Storage>(p, potentials, scratch);
    to_factors<Storage>(p, terms, top_term);
    to_factors<Storage>(p, potentials, top_potential);
  }

  const Formed<Storage> e_tile{reinterpret_cast<Element*>(shared_memory + head.layout.plan),
                               S::kWidePitch};
  const Formed<Storage> operand{reinterpret_cast<Element*>(shared_memory + head.layout.operand),
                                S::kDeepPitch};
  Storage* row_tile = reinterpret_cast<Storage*>(shared_memory + head.layout.rows);
  const Plain<Storage> staged{row_tile, S::kDepth + S::kPerVector};
  const Lane lane;
  T* step_terms = head.numbers() + head.layout.steps();
  bool steps_loaded = false;
  T product_sum = 0, key_sum = 0;  // sum_ij ds_ij s_ij, sum_i k_i.dk_i
  for (int group = first_group; group < last_group; ++group) {
    const int first_column = group * S::kGroup * S::kDepth;
    // sums for the references over all tiles or, without to_references, for the tokens over all
    // chunks
    T kept[S::kGroup][S::kDepth / 8][4];
#pragma unroll
    for (int part = 0; part < S::kGroup; ++part) clear(kept[part]);
    T column_sum = 0;  // of reference thread_index()
    for (int64_t tile = head.first_tile; tile < head.last_tile; ++tile) {
      const OwnRows<Storage> rows(tile);
      T log_mass[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) log_mass[half] = head.log_mass(rows.token[half]);
      T row_sums[2] = {T(0), T(0)};
      for (int chunk = first; chunk < last; ++chunk) {
        const bool ends = chunk + 1 == last;
        const int at = chunk * S::kRows;
        Accumulators<Storage> s, ds;
        scores.compute(tile, chunk,
                       !ends                       ? tile
                       : tile + 1 < head.last_tile ? tile + 1
                                                   : -1,
                       ends ? first : chunk + 1, s);
        clear(ds);
        // R (G - delta), then C (H - eta); if factored, without their factor 2^s
#pragma unroll 1
        for (int of_values = 0; of_values < 2; ++of_values) {
          if (!(of_values ? head.collects : head.distributes)) continue;
          const Rows<Storage>& source = of_values ? head.values : head.output_gradients;
          T unit = 1;
          T offsets[2], deltas[2] = {T(0), T(0)};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int64_t i = rows.token[half];
            if (of_values) {
              offsets[half] = log_mass[half] - head.row(steps - 1, i);
            } else {
              offsets[half] = head.tokens.valid(i) ? -head.row(steps, i) : -infinity<T>();
              deltas[half] = i < head.tokens.count ? head.delta[i] : T(0);
            }
            if (factored) {
              offsets[half] = power_of_two(offsets[half] + (of_values ? top_term : top_potential));
            }
          }
          // A part of the references at a time: the other accumulators leave few registers.
          constexpr bool kNarrow = S::kDouble || (kIsHalf<Storage> && !kTensorCores<Storage>);
          constexpr int kSides = kNarrow ? 4 : 2, kBlocks = S::kRows / 8 / kSides;
#pragma unroll
          for (int side = 0; side < kSides; ++side) {
            const int columns = scores.columns(chunk) - side * 8 * kBlocks;
            if (columns <= 0) break;
            T products[kBlocks][4];
            clear(products);
            for (int part = 0; part < value_parts; ++part) {
              if (side == 0 || value_parts > 1) {
                __syncthreads();
                stage_rows(source, tile * S::kRows, part * S::kDepth, row_tile, staged.pitch);
                commit_copies();
                unit = load_operand<Storage>(
                    operand, of_values ? head.pooled_gradient : head.pooled, int64_t(at),
                    p.references, part * S::kDepth, int(p.value_depth),
                    static_cast<const T*>(nullptr), scratch);
                wait_for_copies<0>();
                __syncthreads();
              }
              const Formed<Storage> rows_of_side{operand.data + side * 8 * kBlocks * operand.pitch,
                                                 operand.pitch};
              multiply_scaled<false, false, Storage>(
                  products, staged, 16 * lane.warp, rows_of_side,
                  padded_depth<Storage>(int(p.value_depth), part * S::kDepth), columns, unit);
            }
            const auto add = [&](auto plan_of) {
#pragma unroll
              for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                  const int block = side * kBlocks + n;
                  const int column = at + 8 * block + lane.column + e % 2;
                  const T plan = plan_of(s[block][e], (of_values ? terms : potentials)[column],
                                         offsets[e / 2]);
                  ds[block][e] += of_values
                                      ? plan * scales[column] * (products[n][e] - etas[column])
                                      : plan * (products[n][e] - deltas[e / 2]);
                }
              }
            };
            if (factored) {
              add([](T, T term, T offset) { return term * offset; });
            } else {
              add([](T score, T term, T offset) { return power_of_two(score + term + offset); });
            }
          }
        }
        // - C^t gbar^t - R^{t-1} a fhat^t
        for (int64_t top = steps; top >= 1; top -= head.layout.steps_at_once) {
          const int at_once = head.layout.steps_at_once;
          const int count = int(top < at_once ? top : at_once);
          if (!steps_loaded) {
            __syncthreads();
            load_steps(p, head, chunk, top, count, scales, step_terms);
            __syncthreads();
            steps_loaded = steps == count && last - first == 1;
          }
#pragma unroll 1
          for (int u = 0; u < count; ++u) {
            const int64_t t = top - u;
            const T* column_terms = step_terms + u * 3 * S::kRows + lane.column;
            T collected[2], distributed[2], flows[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int64_t i = rows.token[half];
              const bool massless = log_mass[half] == -infinity<T>();
              distributed[half] = massless ? infinity<T>() : head.row(t - 1, i);
              collected[half] = log_mass[half] - distributed[half];
              flows[half] = massless ? T(0) : head.row_adjoint(t, i) * power_of_two(log_mass[half]);
            }
            if (factored) {
              const T* tops = step_terms + u * 3 * S::kRows + S::kRows;
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                collected[half] = power_of_two(collected[half] + tops[0]);
                flows[half] *= power_of_two(tops[1] - distributed[half]);
              }
#pragma unroll
              for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                  const T* terms_of = column_terms + 8 * n + e % 2;
                  ds[n][e] -= collected[e / 2] * terms_of[0];
                  ds[n][e] -= flows[e / 2] * terms_of[2 * S::kRows];
                }
              }
              continue;
            }
#pragma unroll
            for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const T* terms_of = column_terms + 8 * n + e % 2;
                ds[n][e] -=
                    power_of_two(s[n][e] + collected[e / 2] + terms_of[0]) * terms_of[S::kRows] +
                    power_of_two(s[n][e] - distributed[e / 2] + terms_of[2 * S::kRows]) *
                        flows[e / 2];
              }
            }
          }
        }
        if (factored) {
#pragma unroll
          for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) ds[n][e] *= power_of_two(s[n][e]);
          }
        }
        // E, in place of ds; 0 beyond the last reference
        if (at + S::kRows > p.references) {
          for_each<Storage>(ds, [&](int, int column, T& x) {
            if (at + column >= p.references) x = T(0);
          });
        }
        if (group == first_group) {
#pragma unroll
          for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) product_sum += ds[n][e] * s[n][e];
          }
        }
        const T factor = head.gaussian ? quotient(T(kLn2), head.bandwidth * head.bandwidth)
                                       : quotient(T(1), head.epsilon);
        T largest = 0;
#pragma unroll
        for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) ds[n][e] *= head.gaussian ? s[n][e] * factor : factor;
        }
        if (!head.gaussian) {
          scores.for_each_axis(tile, chunk, ds,
                               [](T& x, T exponent) { x *= power_of_two(exponent); });
        }
        for_each<Storage>(ds, [&](int half, int, T& x) {
          row_sums[half] += x;
          largest = maximum(largest, x < T(0) ? -x : x);
        });
        T scale = 1;
        if constexpr (kTensorCores<Storage> && std::is_same_v<Storage, __half>) {
          scale = fitting_scale<Storage>(block_maximum<Storage>(largest, scratch));
        }
        store_accumulators<Storage>(ds, e_tile, scale);
        __syncthreads();
        const T unit = T(1) / scale;
        if (to_references && thread_index() < S::kRows) {
          for (int row = 0; row < S::kRows; ++row) {
            for (int i = 0; i < Formed<Storage>::kParts; ++i) {
              column_sum += unit * widen(e_tile.part(i)[row * e_tile.pitch + thread_index()]);
            }
          }
        }
        if (ends) {
#pragma unroll
          for (int half = 0; half < 2; ++half) row_sums[half] = quad_sum(row_sums[half]);
        }
#pragma unroll
        for (int part = 0; part < S::kGroup; ++part) {
          const int column = first_column + part * S::kDepth;
          if (column >= p.depth) break;
          const int width = padded_depth<Storage>(int(p.depth), column);
          const int d = column / S::kDepth;
          // The columns of keys or references: compute() left them in shared memory, or they are
          // loaded again.
          const auto tile_of = [&](const Rows<Storage>& source, int64_t from,
                                   const Plain<Storage>& whole) {
            if (scores.whole_rows()) return whole;
            __syncthreads();
            scores.load_part(source, from, d, row_tile, staged.pitch);
            return staged;
          };
          T sums[S::kDepth / 8][4];  // of the tokens, up to this chunk
          clear(sums);
          if (to_tokens) {
            if (!to_references) copy(sums, kept[part]);
            multiply_scaled<false, true, Storage>(
                sums, e_tile, 16 * lane.warp,
                tile_of(head.references, int64_t(at), scores.last_references(chunk)),
                scores.columns(chunk), width, unit);
            if (!to_references) copy(kept[part], sums);
          }
          if (!ends) continue;  // not yet the last chunk; with several, there is no to_references
          const Plain<Storage> keys = tile_of(head.tokens, tile * S::kRows, scores.last_keys(tile));
          if (to_references) {
            multiply_scaled<true, true, Storage>(kept[part], e_tile, 16 * lane.warp, keys, S::kRows,
                                                 width, unit);
          }
          if (to_tokens) {
            if (!scores.whole_rows()) __syncthreads();  // the keys lie where the gradient goes
            key_sum +=
                store_token_gradient(head, tile, column, width, keys, row_sums, sums, row_tile);
            if (!to_references) clear(kept[part]);
          }
        }
        __syncthreads();
      }
    }
    if (to_references) {
      T* to = head.partials(p.depth + 1) + head.split * p.references * (p.depth + 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t j = int64_t(first) * S::kRows + 16 * lane.warp + lane.row + 8 * half;
        if (j >= p.references) continue;
#pragma unroll
        for (int part = 0; part < S::kGroup; ++part) {
#pragma unroll
          for (int n = 0; n < S::kDepth / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int64_t column = first_column + part * S::kDepth + 8 * n + lane.column + e;
              if (column < p.depth) {
                to[j * (p.depth + 1) + column] = kept[part][n][2 * half + e];
              }
            }
          }
        }
      }
      const int64_t j = int64_t(first) * S::kRows + thread_index();
      if (group == 0 && thread_index() < S::kRows && j < p.references) {
        to[j * (p.depth + 1) + p.depth] = column_sum;
      }
    }
  }
  if (!to_tokens) return;
  product_sum = block_sum<Storage>(product_sum, scratch);
  key_sum = block_sum<Storage>(key_sum, scratch);
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
