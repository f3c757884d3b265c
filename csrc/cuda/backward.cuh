// The passes of backward over the tokens of one head: the exact gradient of the T unrolled steps.
//
// With G_ij = dO_i.A_j, H_ij = v_i.dA_j and c_ij = C_ij / a_i, fhat = fbar / a (finite where a =
// 0):
//
//   distribute  delta_i = dO_i.O_i        dA_j  = sum_i R_ij dO_i  (+ what pooling is given)
//               gbar^T_j = dA_j.A_j - sum_i R_ij delta_i           ds += R (G - delta)
//   collect     eta_j = dA_j.A_j          dv_i  = sum_j C_ij dA_j
//               fhat^T_i = v_i.dv_i / a_i - sum_j c_ij eta_j       ds += C (H - eta)
//   t = T..1    fhat^t_i -= sum_j c^t_ij gbar^t_j                  ds -= C^t gbar^t
//               gbar^{t-1}_j = -sum_i R^{t-1}_ij a_i fhat^t_i      ds -= R^{t-1} a fhat^t
//   similarity  E = ds S / (epsilon bandwidth^2)  (linear: ds w / epsilon)
//               dk_i = sum_j E_ij (y_j - k_i), dy_j = sum_i E_ij (k_i - y_j)  (linear: E y, E^T k)
//
// Steps pass only vectors of tokens and of references to each other. Bytes and operations per head,
// counted as in forward.cuh:
//
//   output_product          reads 2 N Dv e
//   distribute_backward     reads N (D + Dv) e          P (2 D + 2 Dv flop, 2 exponentials)
//   sinkhorn_step_backward  reads N D e                 P (2 D flop, 2 exponentials); step T reads
//                           and writes N Dv e, P (2 Dv flop, 1 exponential) more
//   gradient                reads N (D + 2 Dv) e,       P (6 D + 4 Dv flop, 2 exponentials)
//                           writes N D e
//
// so T + 3 passes, 2 P (D (T + 4) + 4 Dv) flop and e N (D (T + 3) + 7 Dv) bytes; a resident head
// reads its keys once, e N (2 D + 7 Dv) bytes. In the log domain a step takes 3 exponentials and
// gradient 2 T + 3: the steps' part of ds is a sum of 2 T terms. Each is 2^s times a factor of the
// token and a factor of the reference, or is formed from an entry of a plan. The tensors must be
// read once before the steps and once after them, because the steps need sums over all tokens from
// the passes before.
#pragma once

#include "forward.cuh"
#include "gradient_tensors.cuh"

namespace setformer::cuda {

// The data of one head and side that a block keeps in shared memory in backward.
template <class Storage>
struct BackwardHead : WithGradients<Storage, Head<Storage>> {};

// delta_i = dO_i.O_i, a warp per token. 0 for a hidden token.
template <class Storage>
__device__ __forceinline__ void output_product() {
  const BackwardHead<Storage>& head = shared_head<BackwardHead<Storage>>();
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const Lane lane;
  for (int64_t i = head.first_tile * S::kRows + lane.warp;
       i < head.last_tile * S::kRows && i < head.tokens.count; i += S::kWarps) {
    T sum = 0;
    if (head.tokens.valid(i)) {
      const Rows<Storage>&x = head.output_gradients, &y = head.outputs;
      for (int64_t c = thread_index() % 32; c < x.depth; c += 32) {
        sum += widen(x.data[i * x.row_stride + c * x.column_stride]) *
               widen(y.data[i * y.row_stride + c * y.column_stride]);
      }
    }
    sum = lanes_sum<32>(sum);
    if (thread_index() % 32 == 0) head.delta[i] = sum;
  }
}

// sum_i R_ij dO_i and, in the last column, sum_i R_ij delta_i: partial [shares, M, Dv + 1].
template <class Storage, bool resident>
__device__ __forceinline__ void distribute_backward(int chunk, int group) {
  const BackwardHead<Storage>& head = shared_head<BackwardHead<Storage>>();
  const ForwardParams& p = head.p;
  Scores<Storage, resident> scores(head);
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  T* potentials = head.numbers() + head.layout.terms();
  const int64_t steps = p.iterations, width = p.value_depth;
  fill_terms<Storage>(p, potentials, -infinity<T>(),
                      [&](int64_t j) { return potential<Storage>(p, head, steps, j); });
  __syncthreads();
  T* sums = head.partials(width + 1) + head.split * p.references * (width + 1);
  pool<Storage, resident>(
      head, scores, head.output_gradients, chunk, group,
      [&](int64_t tile, Accumulators<Storage>& s) {
        form_distribution(head, steps, tile, potentials + chunk * S::kRows, s);
      },
      [&](int64_t tile, Accumulators<Storage>& plan, ColumnSums<Storage>& weights) {
        const OwnRows<Storage> rows(tile);
        T delta[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t i = rows.token[half];
          delta[half] = i < head.tokens.count ? head.delta[i] : T(0);
        }
        weights.add(plan, [&](int half, int, T x) { return x * delta[half]; });
      },
      [&](int64_t j, int64_t column, T sum, T) { sums[j * (width + 1) + column] = sum; },
      [&](int64_t j, T total) { sums[j * (width + 1) + width] = total; });
}

// dA_j, eta_j and gbar^T_j of reference j from the sums of all blocks, by one warp. If queries
// receive the output, gbar^T belongs to their side, and the keys' gbar^T is 0.
template <class Storage>
__device__ __forceinline__ void finish_pooled_gradient(int64_t j, int64_t splits) {
  using T = Accumulate<Storage>;
  const BackwardHead<Storage>& head = shared_head<BackwardHead<Storage>>();
  const int64_t width = head.p.value_depth, of_split = head.p.references * (width + 1);
  const T* sums = head.partials(width + 1) + j * (width + 1);
  const T* pooled = head.pooled + j * width;
  T distributed = 0, total = 0;
  for (int64_t c = thread_index() % 32; c < width; c += 32) {
    T sum = 0;
    for (int64_t split = 0; split < splits; ++split) sum += sums[split * of_split + c];
    distributed += sum * pooled[c];
    if (!head.given.absent()) {
      sum += head.given[j * head.given_row_stride + c * head.given_column_stride];
    }
    total += sum * pooled[c];
    head.pooled_gradient[j * width + c] = sum;
  }
  distributed = lanes_sum<32>(distributed);
  total = lanes_sum<32>(total);
  if (thread_index() % 32 != 0) return;
  for (int64_t split = 0; split < splits; ++split) distributed -= sums[split * of_split + width];
  head.eta[j] = total;
  head.key_column_adjoints[head.p.iterations * head.p.references + j] = T(0);
  head.column_adjoint(head.p.iterations, j) = distributed;
}

// Entries of plans are at most 1; only C / a of a token of little or no mass can be arbitrarily
// large.
template <class T>
__device__ __forceinline__ T bounded(T exponent) {
  return exponent > T(100) ? T(100) : exponent;
}

// What step t needs of the references: in shared memory numbers [chunks kRows] each. If factored,
// terms and potentials are factors relative to their largest, and weights are multiplied by terms.
template <class Storage>
struct StepTerms {
  using T = Accumulate<Storage>;
  int64_t t;
  bool collects;                    // step T of the keys
  T *terms, *potentials, *weights;  // -columns^t; g^{t-1}; gbar^t, in the step that collects + eta
  T* scratch;
  bool factored;
  T top_term = 0, top_potential = 0;

  __device__ __forceinline__ StepTerms(const BackwardHead<Storage>& head, int64_t step) : t(step) {
    using S = Shape<Storage>;
    const ForwardParams& p = head.p;
    const int padded = head.layout.chunks * S::kRows;
    collects = head.collects && t == p.iterations;
    scratch = head.numbers() + head.layout.sums();
    terms = head.numbers() + head.layout.terms();
    potentials = terms + padded;
    weights = potentials + padded;
    fill_terms<Storage>(p, terms, -infinity<T>(),
                        [&](int64_t j) { return collection_term(head.column(t, j)); });
    fill_terms<Storage>(p, weights, T(0), [&](int64_t j) {
      const T weight = t > 0 ? head.column_adjoint(t, j) : T(0);
      return collects ? (weight + head.eta[j]) * head.collection_scale[j] : weight;
    });
    if (t > 1) {
      fill_terms<Storage>(p, potentials, -infinity<T>(),
                          [&](int64_t j) { return potential<Storage>(p, head, t - 1, j); });
    }
    __syncthreads();
    // No factors in the step that collects, which needs each row of C / a scaled to numbers up to
    // 1, nor where masses are so small that C / a is large for all tokens.
    factored = kFactors<Storage> && head.factored && !collects;
    if (!factored) return;
    top_term = largest_term<Storage>(p, terms, scratch);
    factored = top_term <= T(40);
    if (!factored) return;
    to_factors<Storage>(p, terms, top_term);
    for (int j = thread_index(); j < padded; j += S::kThreads) weights[j] *= terms[j];
    if (t > 1) {
      top_potential = largest_term<Storage>(p, potentials, scratch);
      to_factors<Storage>(p, potentials, top_potential);
    }
    __syncthreads();
  }
};

// The part of fhat^t that a chunk of references gives, from factors.
template <class Storage>
__device__ __forceinline__ void add_rows_by_factors(const BackwardHead<Storage>& head,
                                                    const StepTerms<Storage>& of,
                                                    const OwnRows<Storage>& rows, int chunk,
                                                    Accumulators<Storage>& s,
                                                    Accumulate<Storage> (&adjoint)[2]) {
  using T = Accumulate<Storage>;
  T sums[2] = {T(0), T(0)};
  for_each<Storage>(s, [&](int half, int column, T& x) {
    sums[half] += x * of.weights[chunk * Shape<Storage>::kRows + column];
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // 2^46 moves to the other factor, because products of factors can be as large
    const T exponent = of.top_term - head.row(of.t - 1, rows.token[half]) + T(46);
    adjoint[half] -=
        quad_sum(sums[half]) * (T(1) / T(int64_t(1) << 46)) * power_of_two(bounded(exponent));
  }
}

// The same from scores: leaves C / a, each row divided by its largest entry, in `c`; `factors` undo
// that.
template <class Storage>
__device__ __forceinline__ void add_rows_by_scores(
    const BackwardHead<Storage>& head, const StepTerms<Storage>& of, const OwnRows<Storage>& rows,
    int chunk, bool counts, Accumulators<Storage>& s, Accumulators<Storage>& c,
    Accumulate<Storage> (&factors)[2], Accumulate<Storage> (&adjoint)[2]) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const Lane lane;
  T offsets[2], tops[2] = {-infinity<T>(), -infinity<T>()}, sums[2] = {T(0), T(0)};
#pragma unroll
  for (int half = 0; half < 2; ++half) offsets[half] = head.row(of.t - 1, rows.token[half]);
  for_each<Storage>(s, [&](int half, int column, T& x) {
    tops[half] = maximum(tops[half], x - offsets[half] + of.terms[chunk * S::kRows + column]);
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    tops[half] = quad_maximum(tops[half]);
    if (tops[half] == -infinity<T>()) tops[half] = T(0);
  }
#pragma unroll
  for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = chunk * S::kRows + 8 * n + lane.column + e % 2;
      c[n][e] = power_of_two(s[n][e] - offsets[e / 2] + of.terms[column] - tops[e / 2]);
      sums[e / 2] += c[n][e] * of.weights[column];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    factors[half] = power_of_two(bounded(tops[half]));
    if (counts) adjoint[half] -= quad_sum(sums[half]) * factors[half];
  }
}

// dv / a of a tile of tokens, and v.(dv / a), in the step that collects.
template <class Storage>
struct ValueGradient {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  using Element = typename Formed<Storage>::Element;
  static constexpr int kPitch = S::kDepth + S::kPerVector;  // of the tile of values
  Formed<Storage> plan, operand;
  Storage* values;
  T out[S::kDepth / 8][4], dots[2];

  __device__ __forceinline__ explicit ValueGradient(const BackwardHead<Storage>& head)
      : plan{reinterpret_cast<Element*>(shared_memory + head.layout.plan), S::kWidePitch},
        operand{reinterpret_cast<Element*>(shared_memory + head.layout.operand), S::kDeepPitch},
        values(reinterpret_cast<Storage*>(shared_memory + head.layout.rows)) {}

  // Adds the products of C / a, in `plan`, with dA for one depth tile; with the last chunk the
  // results are complete, and dv is stored.
  __device__ __forceinline__ void add(const BackwardHead<Storage>& head,
                                      const StepTerms<Storage>& of, int64_t tile, int chunk,
                                      int columns, bool ends, int part, const T (&factors)[2],
                                      const T (&log_mass)[2]) {
    const ForwardParams& p = head.p;
    const Lane lane;
    __syncthreads();
    if (ends) {
      stage_rows(head.values, tile * S::kRows, part * S::kDepth, values, kPitch);
      commit_copies();
    }
    const T unit = load_operand<Storage>(operand, head.pooled_gradient, int64_t(chunk) * S::kRows,
                                         p.references, part * S::kDepth, int(p.value_depth),
                                         head.collection_scale, of.scratch);
    __syncthreads();
    T product[S::kDepth / 8][4];
    clear(product);
    const int width = padded_depth<Storage>(int(p.value_depth), part * S::kDepth);
    multiply<false, true, Storage>(product, plan, 16 * lane.warp, operand, columns, width);
    if (chunk == 0) clear(out);
#pragma unroll
    for (int n = 0; n < S::kDepth / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        out[n][e] += product[n][e] * (factors[e / 2] * unit / S::kPlanScale);
      }
    }
    if (ends) finish(head, tile, part, width, log_mass);
  }

 private:
  __device__ __forceinline__ void finish(const BackwardHead<Storage>& head, int64_t tile, int part,
                                         int width, const T (&log_mass)[2]) {
    const Lane lane;
    wait_for_copies<0>();
    __syncthreads();
    T masses[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) masses[half] = power_of_two(log_mass[half]);
#pragma unroll
    for (int n = 0; n < S::kDepth / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * n + lane.column + e % 2;
        if (column >= width) continue;
        const int row = 16 * lane.warp + lane.row + 8 * (e / 2);
        dots[e / 2] += out[n][e] * widen(values[row * kPitch + column]);
        out[n][e] = masses[e / 2] == T(0) ? T(0) : out[n][e] * masses[e / 2];
      }
    }
    store_rows<Storage>(head.value_gradients, tile, part * S::kDepth, out, values);
  }
};

// Keeps fhat^t of the thread's two tokens, in the first of several sweeps or added to what those
// before have kept, and adds it to the gradient of masses. 0 for a hidden token.
template <class Storage>
__device__ __forceinline__ void keep_row_adjoints(const BackwardHead<Storage>& head, int64_t t,
                                                  const OwnRows<Storage>& rows, bool is_first,
                                                  Accumulate<Storage> (&adjoint)[2]) {
  using T = Accumulate<Storage>;
  const Lane lane;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = rows.token[half];
    if (i >= head.tokens.count || !head.tokens.valid(i)) adjoint[half] = T(0);
    if (lane.column != 0 || i >= head.tokens.count) continue;
    T& kept = head.row_adjoint(t, i);
    kept = is_first ? adjoint[half] : kept + adjoint[half];
    if (head.mass_gradients.absent()) continue;
    T& gradient = head.mass_gradients[i];
    gradient = t == head.p.iterations && is_first ? adjoint[half] : gradient + adjoint[half];
  }
}

// Adds sum_i R^{t-1}_ij a_i fhat^t_i of a tile, if factored without the factors of the references.
template <class Storage>
__device__ __forceinline__ void add_column_adjoints(
    const BackwardHead<Storage>& head, const StepTerms<Storage>& of, const OwnRows<Storage>& rows,
    int chunk, const Accumulate<Storage> (&log_mass)[2], const Accumulate<Storage> (&adjoint)[2],
    Accumulators<Storage>& s, ColumnSums<Storage>& columns) {
  using T = Accumulate<Storage>;
  T offsets[2], flows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // no gradient flows through a token without mass, however large its entries
    const bool massless = log_mass[half] == -infinity<T>();
    offsets[half] = massless ? infinity<T>() : head.row(of.t - 1, rows.token[half]);
    flows[half] = massless ? T(0) : adjoint[half] * power_of_two(log_mass[half]);
  }
  if (of.factored) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      flows[half] *= power_of_two(of.top_potential - offsets[half]);
    }
    columns.add(s, [&](int half, int, T x) { return x * flows[half]; });
    return;
  }
  const T* potentials = of.potentials + chunk * Shape<Storage>::kRows;
  columns.add(s, [&](int half, int column, T x) {
    return power_of_two(x + potentials[column] - offsets[half]) * flows[half];
  });
}

// Stores gbar^{t-1} of a chunk, or the block's part of it.
template <class Storage, bool resident>
__device__ __forceinline__ void store_column_adjoints(const BackwardHead<Storage>& head,
                                                      const StepTerms<Storage>& of, int chunk,
                                                      ColumnSums<Storage>& columns) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  T* totals = of.scratch + S::kWarps * S::kRows;
  columns.total(of.scratch, totals);
  for (int column = thread_index(); column < S::kRows; column += S::kThreads) {
    const int64_t j = int64_t(chunk) * S::kRows + column;
    if (j >= head.p.references) continue;
    const T sum = of.factored ? totals[column] * of.potentials[j] : totals[column];
    if (resident || head.splits == 1) {
      head.column_adjoint(of.t - 1, j) = -sum;
    } else {
      head.partials(1)[head.split * head.p.references + j] = -sum;
    }
  }
}

// fhat^t and, for t > 1, the sums for gbar^{t-1}: partial [shares, M]. Step T of the keys is
// the one that collects: it also writes dv. t = 0 if T = 0.
template <class Storage, bool resident>
__device__ __forceinline__ void sinkhorn_step_backward(int64_t t) {
  const BackwardHead<Storage>& head = shared_head<BackwardHead<Storage>>();
  Scores<Storage, resident> scores(head);
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const StepTerms<Storage> of(head, t);
  ValueGradient<Storage> value_gradient(head);
  const bool single = head.layout.chunks == 1;
  const int parts = of.collects ? int(divide_up(head.p.value_depth, S::kDepth)) : 1;
  // Sweeps over the tokens: a single one if the references are one tile; else one for each depth
  // tile of the values, then one for each tile of references.
  const int row_sweeps = single ? 1 : parts;
  const int sweeps = row_sweeps + (single || t <= 1 ? 0 : head.layout.chunks);
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    const bool rows_now = sweep < row_sweeps;
    const bool columns_now = t > 1 && (single || !rows_now);
    const int first = rows_now ? 0 : sweep - row_sweeps;
    const int last = rows_now ? head.layout.chunks : first + 1;
    const int first_part = single ? 0 : sweep, last_part = single ? parts : sweep + 1;
    ColumnSums<Storage> columns;
    for (int64_t tile = head.first_tile; tile < head.last_tile; ++tile) {
      const OwnRows<Storage> rows(tile);
      T log_mass[2], adjoint[2] = {T(0), T(0)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        log_mass[half] = head.log_mass(rows.token[half]);
        value_gradient.dots[half] = T(0);
      }
      Accumulators<Storage> s;
      for (int chunk = first; chunk < last; ++chunk) {
        const bool ends = chunk + 1 == last;
        scores.compute(tile, chunk,
                       !ends                       ? tile
                       : tile + 1 < head.last_tile ? tile + 1
                                                   : -1,
                       ends ? first : chunk + 1, s);
        if (of.factored) {
          to_factors<Storage>(s);
          if (rows_now) add_rows_by_factors(head, of, rows, chunk, s, adjoint);
          continue;
        }
        if (!rows_now) continue;
        Accumulators<Storage> c;
        T factors[2];
        add_rows_by_scores(head, of, rows, chunk, first_part == 0, s, c, factors, adjoint);
        if (!of.collects) continue;
        store_accumulators<Storage>(c, value_gradient.plan, S::kPlanScale);
        for (int part = first_part; part < last_part; ++part) {
          value_gradient.add(head, of, tile, chunk, scores.columns(chunk), ends, part, factors,
                             log_mass);
        }
        if (Scores<Storage, resident>::kLean) {
          __syncthreads();  // the next keys and references overwrite rows and operand
        } else {
          __syncwarp();  // the warp's lanes have read the rows of the plan that the next ones fill
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t i = rows.token[half];
        if (rows_now) {
          adjoint[half] += quad_sum(value_gradient.dots[half]);
        } else {
          adjoint[half] = i < head.tokens.count ? head.row_adjoint(t, i) : T(0);
        }
      }
      if (rows_now) keep_row_adjoints(head, t, rows, first_part == 0, adjoint);
      if (columns_now) {
        add_column_adjoints(head, of, rows, first, log_mass, adjoint, s, columns);
      }
    }
    if (columns_now) store_column_adjoints<Storage, resident>(head, of, first, columns);
    __syncthreads();
  }
}

}  // namespace setformer::cuda
