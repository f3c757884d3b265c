// The passes of forward over the tokens of one head (equations in transport.cuh).
//
// Bytes and operations, per head, with e bytes an element, P = tokens x references padded to tiles:
//
//   sinkhorn_step  reads N D e, writes N + M numbers   P (2 D flop, 2 exponentials)
//   collect        reads N (D + Dv) e                  P (2 D + 2 Dv flop, 2 exponentials)
//   distribute     reads N D e, writes N Dv e          P (2 D + 2 Dv flop, 2 exponentials)
//
// In all T + 2 passes, 2 P (D (T + 2) + 2 Dv) flop (the plan's products count twice on tensor
// cores, see product.cuh), 2 P (T + 2) exponentials and e N (D (T + 2) + 2 Dv) bytes; a resident
// head reads its keys once, e N (D + 2 Dv) bytes. In the log domain (transport.cuh) a step takes
// 7/2 exponentials and distribute 3. With more than one tile of references, a pass that needs sums
// over the references and then uses them takes a second sweep over the tokens.
//
// Each Sinkhorn step needs the columns of the step before, so every step is at least one pass.
// Keeping scores instead of forming them again would move N M numbers a pass, more than the N D of
// the keys wherever M >= D. Collecting in step T with running maxima would save one pass, but needs
// registers for [M, Dv] beside the state of the columns. Of the two exponentials of a pair in a
// pass, one is the Gaussian kernel and the other 2^s.
#pragma once

#include "transport.cuh"

namespace setformer::cuda {

// The log-sum-exp over the references of a tile's rows, the same in all lanes of a quad.
template <class Storage>
__device__ __forceinline__ void add_rows(Accumulators<Storage>& s,
                                         const Accumulate<Storage>* potentials,
                                         LogSum<Accumulate<Storage>> (&sums)[2]) {
  using T = Accumulate<Storage>;
  LogSum<T> now[2];
  for_each<Storage>(s, [&](int half, int column, T& x) {
    now[half].largest = maximum(now[half].largest, x + potentials[column]);
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) now[half].largest = quad_maximum(now[half].largest);
  for_each<Storage>(s, [&](int half, int column, T& x) {
    now[half].sum += power_of_two(x + potentials[column] - now[half].largest);
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    now[half].sum = quad_sum(now[half].sum);
    sums[half].merge(now[half]);
  }
}

// The same for scores given as factors 2^s: `factors` [kRows] are 2^(g - top).
template <class Storage>
__device__ __forceinline__ void add_factor_rows(Accumulators<Storage>& s,
                                                const Accumulate<Storage>* factors,
                                                Accumulate<Storage> top,
                                                LogSum<Accumulate<Storage>> (&sums)[2]) {
  using T = Accumulate<Storage>;
  T now[2] = {T(0), T(0)};
  for_each<Storage>(s, [&](int half, int column, T& x) { now[half] += x * factors[column]; });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sums[half].largest = top;
    sums[half].sum += quad_sum(now[half]);
  }
}

// -columns^t_j; -inf for a head without mass, whose plan C is 0.
template <class T>
__device__ __forceinline__ T collection_term(T column) {
  return column == -infinity<T>() ? column : -column;
}

// C_ij from the scores.
template <class Storage>
__device__ __forceinline__ void form_collection(const Head<Storage>& head, int64_t steps,
                                                int64_t tile, const Accumulate<Storage>* terms,
                                                Accumulators<Storage>& s) {
  using T = Accumulate<Storage>;
  const OwnRows<Storage> rows(tile);
  T offsets[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    offsets[half] = head.log_mass(rows.token[half]) - head.row(steps - 1, rows.token[half]);
  }
  for_each<Storage>(
      s, [&](int half, int column, T& x) { x = power_of_two(x + offsets[half] + terms[column]); });
}

// R^t_ij from the scores; 0 for a hidden token, which receives nothing.
template <class Storage>
__device__ __forceinline__ void form_distribution(const Head<Storage>& head, int64_t t,
                                                  int64_t tile,
                                                  const Accumulate<Storage>* potentials,
                                                  Accumulators<Storage>& s) {
  using T = Accumulate<Storage>;
  const OwnRows<Storage> rows(tile);
  T offsets[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = rows.token[half];
    offsets[half] = head.tokens.valid(i) ? head.row(t, i) : infinity<T>();
  }
  for_each<Storage>(s, [&](int half, int column, T& x) {
    x = power_of_two(x + potentials[column] - offsets[half]);
  });
}

// g^t of all references in shared memory; if scores are used as factors, as factors relative to its
// largest. Nothing for t < 0.
template <class Storage>
struct Potentials {
  using T = Accumulate<Storage>;
  T* values;
  T top = 0;
  bool factored;

  __device__ __forceinline__ Potentials(const Head<Storage>& head, int64_t t) {
    values = head.numbers() + head.layout.terms();
    factored = kFactors<Storage> && head.factored;
    if (t >= 0) {
      fill_terms<Storage>(head.p, values, -infinity<T>(),
                          [&](int64_t j) { return potential(head.p, head, t, j); });
    }
    __syncthreads();
    if (!factored || t < 0) return;
    top = largest_term<Storage>(head.p, values, head.numbers() + head.layout.sums());
    to_factors<Storage>(head.p, values, top);
  }

  // Turns scores with a chunk of references into factors, where they are; adds them to the
  // log-sum-exps of the rows, if wanted.
  __device__ __forceinline__ void use(int chunk, bool sums_rows, Accumulators<Storage>& s,
                                      LogSum<T> (&sums)[2]) const {
    const T* own = values + chunk * Shape<Storage>::kRows;
    if (factored) {
      to_factors<Storage>(s);
      if (sums_rows) add_factor_rows<Storage>(s, own, top, sums);
    } else if (sums_rows) {
      add_rows<Storage>(s, own, sums);
    }
  }

  // Turns what use() has left into R^t, of rows whose log-sum-exps are `rows`.
  __device__ __forceinline__ void distribute(int chunk, const T (&rows)[2],
                                             Accumulators<Storage>& s) const {
    const T* own = values + chunk * Shape<Storage>::kRows;
    if (factored) {
      const T rows_of[2] = {power_of_two(top - rows[0]), power_of_two(top - rows[1])};
      for_each<Storage>(s, [&](int half, int column, T& x) { x *= own[column] * rows_of[half]; });
    } else {
      for_each<Storage>(
          s, [&](int half, int column, T& x) { x = power_of_two(x + own[column] - rows[half]); });
    }
  }
};

// Stores the log-sum-exps of a tile's rows as rows^t.
template <class Storage>
__device__ __forceinline__ void keep_rows(const Head<Storage>& head, int64_t t,
                                          const OwnRows<Storage>& rows,
                                          const LogSum<Accumulate<Storage>> (&sums)[2]) {
  const Lane lane;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = rows.token[half];
    if (lane.column == 0 && i < head.tokens.count) {
      head.rows[t * head.tokens.count + i] = sums[half].logarithm();
    }
  }
}

// rows^{t-1} and columns^t of step t, 1 <= t <= T; columns^0 where T = 0. Blocks that share a head
// leave their states in partial [shares, 2, M].
template <class Storage, bool resident>
__device__ __forceinline__ void sinkhorn_step(int64_t t) {
  const Head<Storage>& head = shared_head<Head<Storage>>();
  const ForwardParams& p = head.p;
  Scores<Storage, resident> scores(head);
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const Potentials<Storage> potentials(head, t - 1);

  // One tile of references: rows and columns in one sweep over the tokens. More: a sweep for the
  // rows, then one for each tile's columns.
  const bool single = scores.chunks() == 1;
  for (int sweep = single || t > 0 ? 0 : 1; sweep <= (single ? 0 : scores.chunks()); ++sweep) {
    const bool sums_rows = sweep == 0 && t > 0, sums_columns = single || sweep > 0;
    const int first = sweep > 0 ? sweep - 1 : 0, last = sweep > 0 ? sweep : scores.chunks();
    ColumnLogSums<Storage> columns;
    for (int64_t tile = head.first_tile; tile < head.last_tile; ++tile) {
      const OwnRows<Storage> rows(tile);
      Accumulators<Storage> s;
      LogSum<T> sums[2];
      for (int chunk = first; chunk < last; ++chunk) {
        const bool ends = chunk + 1 == last;
        scores.compute(tile, chunk,
                       !ends                       ? tile
                       : tile + 1 < head.last_tile ? tile + 1
                                                   : -1,
                       ends ? first : chunk + 1, s);
        potentials.use(chunk, sums_rows, s, sums);
      }
      T offsets[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t i = rows.token[half];
        offsets[half] =
            head.log_mass(i) - (sums_rows ? sums[half].logarithm() : head.row(t - 1, i));
      }
      if (sums_rows) keep_rows(head, t - 1, rows, sums);
      if (sums_columns && potentials.factored) {
        columns.add_factors(s, offsets);
      } else if (sums_columns) {
        columns.add(s, [&](int half, T x) { return x + offsets[half]; });
      }
    }
    if (sums_columns) {
      columns.total(head.numbers() + head.layout.sums(), [&](int column, const LogSum<T>& state) {
        const int64_t j = int64_t(first) * S::kRows + column;
        if (j >= p.references) return;
        if (resident || head.splits == 1) {
          head.column(t, j) = state.logarithm();
        } else {
          T* to = head.partials(2) + head.split * 2 * p.references;
          to[j] = state.largest;
          to[p.references + j] = state.sum;
        }
      });
    }
    __syncthreads();
  }
}

// sum_i plan_ij x_i for the references of one chunk and kGroup depth tiles of the rows x, and a
// weight per reference. form(tile, accumulators) turns scores into the plan, add(tile, plan,
// weights) adds to the weights; emit(j, column, sum, weight) and emit_weight(j, weight) receive the
// results.
template <class Storage, bool resident, class Form, class Add, class Emit, class EmitWeight>
__device__ __forceinline__ void pool(const Head<Storage>& head, Scores<Storage, resident>& scores,
                                     const Rows<Storage>& rows, int chunk, int group, Form form,
                                     Add add, Emit emit, EmitWeight emit_weight) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  Storage* row_tile = reinterpret_cast<Storage*>(shared_memory + head.layout.rows);
  const Plain<Storage> operand{row_tile, S::kDepth + S::kPerVector};
  const Formed<Storage> plan{
      reinterpret_cast<typename Formed<Storage>::Element*>(shared_memory + head.layout.plan),
      S::kWidePitch};
  const Lane lane;
  T sums[S::kGroup][S::kDepth / 8][4];
#pragma unroll
  for (int part = 0; part < S::kGroup; ++part) clear(sums[part]);
  ColumnSums<Storage> weights;
  const int first_column = group * S::kGroup * S::kDepth;
  for (int64_t tile = head.first_tile; tile < head.last_tile; ++tile) {
    const auto stage = [&] {
      stage_rows(rows, tile * S::kRows, first_column, row_tile, operand.pitch);
      commit_copies();
    };
    if (!Scores<Storage, resident>::kLean) stage();
    Accumulators<Storage> s;
    scores.compute(tile, chunk, tile + 1 < head.last_tile ? tile + 1 : -1, chunk, s);
    if (Scores<Storage, resident>::kLean) stage();
    form(tile, s);
    add(tile, s, weights);
    store_accumulators<Storage>(s, plan, S::kPlanScale);
    scores.arrive();
#pragma unroll
    for (int part = 0; part < S::kGroup; ++part) {
      const int column = first_column + part * S::kDepth;
      if (column >= rows.depth) break;
      if (part > 0) {
        __syncthreads();
        stage_rows(rows, tile * S::kRows, column, row_tile, operand.pitch);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
      }
      multiply<true, true, Storage>(sums[part], plan, 16 * lane.warp, operand, S::kRows,
                                    padded_depth<Storage>(rows.depth, column));
    }
    __syncthreads();
  }
  T* scratch = head.numbers() + head.layout.sums();
  T* totals = scratch + S::kWarps * S::kRows;
  weights.total(scratch, totals);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * lane.warp + lane.row + 8 * half;
    const int64_t j = int64_t(chunk) * S::kRows + row;
    if (j >= head.references.count) continue;
#pragma unroll
    for (int part = 0; part < S::kGroup; ++part) {
#pragma unroll
      for (int n = 0; n < S::kDepth / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t column = first_column + part * S::kDepth + 8 * n + lane.column + e;
          if (column < rows.depth) {
            emit(j, column, sums[part][n][2 * half + e] * (T(1) / S::kPlanScale), totals[row]);
          }
        }
      }
    }
    if (group == 0 && lane.column == 0) emit_weight(j, totals[row]);
  }
  __syncthreads();
}

// A_j = sum_i C_ij v_i of the references of one chunk and kGroup depth tiles of the values, divided
// by sum_i C_ij, which is not exactly 1 because exponents are rounded; backward divides by it too.
// Blocks that share a head leave their sums in partial [shares, M, Dv + 1]; the last column
// is sum_i C_ij.
template <class Storage, bool resident>
__device__ __forceinline__ void collect(int chunk, int group) {
  const Head<Storage>& head = shared_head<Head<Storage>>();
  const ForwardParams& p = head.p;
  Scores<Storage, resident> scores(head);
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  T* terms = head.numbers() + head.layout.terms();
  const int64_t steps = p.iterations, width = p.value_depth;
  fill_terms<Storage>(p, terms, -infinity<T>(),
                      [&](int64_t j) { return collection_term(head.column(steps, j)); });
  __syncthreads();
  const bool alone = resident || head.splits == 1;
  T* sums = head.partials(width + 1) + head.split * p.references * (width + 1);
  pool<Storage, resident>(
      head, scores, head.values, chunk, group,
      [&](int64_t tile, Accumulators<Storage>& s) {
        form_collection(head, steps, tile, terms + chunk * S::kRows, s);
      },
      [&](int64_t, Accumulators<Storage>& plan, ColumnSums<Storage>& weights) {
        weights.add(plan, [](int, int, T x) { return x; });
      },
      [&](int64_t j, int64_t column, T sum, T total) {
        if (alone) {
          head.pooled[j * width + column] = sum * inverse(total);
        } else {
          sums[j * (width + 1) + column] = sum;
        }
      },
      [&](int64_t j, T total) {
        if (alone) {
          head.collection_scale[j] = inverse(total);
        } else {
          sums[j * (width + 1) + width] = total;
        }
      });
}

// O_i = sum_j R_ij A_j, and rows^T.
template <class Storage, bool resident>
__device__ __forceinline__ void distribute() {
  const Head<Storage>& head = shared_head<Head<Storage>>();
  const ForwardParams& p = head.p;
  Scores<Storage, resident> scores(head);
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  using Element = typename Formed<Storage>::Element;
  const Formed<Storage> plan{reinterpret_cast<Element*>(shared_memory + head.layout.plan),
                             S::kWidePitch};
  const Formed<Storage> operand{reinterpret_cast<Element*>(shared_memory + head.layout.operand),
                                S::kDeepPitch};
  Storage* stage = reinterpret_cast<Storage*>(shared_memory + head.layout.rows);
  const Lane lane;
  const int64_t steps = p.iterations;
  const Potentials<Storage> potentials(head, steps);

  const bool single = scores.chunks() == 1;
  const int parts = int(divide_up(p.value_depth, S::kDepth));
  T unit = 1;
  bool loaded = false;  // the operand holds all of A already
  for (int sweep = 0; sweep <= (single ? 0 : parts); ++sweep) {
    const bool sums_rows = sweep == 0;
    const int first = single || sweep == 0 ? 0 : sweep - 1;
    const int last = single ? parts : sweep;
    for (int64_t tile = head.first_tile; tile < head.last_tile; ++tile) {
      const OwnRows<Storage> rows(tile);
      LogSum<T> sums[2];
      T out[S::kDepth / 8][4];
      for (int chunk = 0; chunk < scores.chunks(); ++chunk) {
        const bool ends = chunk + 1 == scores.chunks();
        Accumulators<Storage> s;
        scores.compute(tile, chunk,
                       !ends                       ? tile
                       : tile + 1 < head.last_tile ? tile + 1
                                                   : -1,
                       ends ? 0 : chunk + 1, s);
        potentials.use(chunk, sums_rows, s, sums);
        if (first == last) continue;
        T offsets[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t i = rows.token[half];
          offsets[half] = sums_rows ? sums[half].logarithm() : head.row(steps, i);
          // a hidden token receives nothing
          if (!head.tokens.valid(i)) offsets[half] = infinity<T>();
        }
        potentials.distribute(chunk, offsets, s);
        store_accumulators<Storage>(s, plan, S::kPlanScale);
        for (int part = first; part < last; ++part) {
          if (chunk == 0) clear(out);
          if (!loaded) {
            unit = load_operand<Storage>(operand, head.pooled, int64_t(chunk) * S::kRows,
                                         p.references, part * S::kDepth, int(p.value_depth),
                                         static_cast<const T*>(nullptr),
                                         head.numbers() + head.layout.sums());
            loaded = single && parts == 1 && !Scores<Storage, resident>::kLean;
            __syncthreads();
          } else {
            __syncwarp();
          }
          multiply_scaled<false, true, Storage>(
              out, plan, 16 * lane.warp, operand, scores.columns(chunk),
              padded_depth<Storage>(int(p.value_depth), part * S::kDepth), unit / S::kPlanScale);
          if (ends) store_rows<Storage>(head.outputs, tile, part * S::kDepth, out, stage);
          if (!loaded) __syncthreads();
        }
      }
      if (sums_rows) keep_rows(head, steps, rows, sums);
    }
    __syncthreads();
  }
}

}  // namespace setformer::cuda
