// What the passes of forward and backward share: marginals, potentials, sums over tokens.
//
// Everything that is kept between passes is a base-2 logarithm, so any epsilon and any similarity
// give finite results. With rows^t and columns^t as in problem.cuh, f^t = log a - rows^{t-1} and
// g^t = log b - columns^t up to a constant, and
//
//   distribution of step t   R^t_ij = 2^(s_ij + g^t_j - rows^t_i)                 its rows sum to 1
//   collection of step t     C^t_ij = a_i 2^(s_ij - rows^{t-1}_i - columns^t_j)   its columns do
//
// (rows = 0 in C for t = T = 0). The masses enter as given: a factor common to all of a or b
// cancels in both plans, hence in every output and gradient. A head without mass has columns =
// -inf; its plans C are 0 and its R are those of g = 0.
//
// An entry of a plan is an exponential. If scores lie in [0, 46.2] (Head::factored) it is instead
// the product of 2^s_ij, a factor of the token and a factor of the reference: then one 2^s_ij
// serves all steps, and the sums over rows as well as over columns. With g taken relative to its
// largest, rows^t - max g lies in [0, 46.2 + log2 M]; with columns taken relative to their least,
// log a - rows - min columns is at most 0. Factors and products stay within float32's range, and
// only entries below 2^-80 are lost, which need masses that differ by as much.
#pragma once

#include "similarity.cuh"

namespace setformer::cuda {

// log2 b_j up to a constant. A mass that is not positive makes the head NaN.
template <class T>
__device__ __forceinline__ T log_reference_mass(const ForwardParams& p, int64_t b, int64_t h,
                                                int64_t j) {
  const Tensor& mass = p.reference_mass;
  if (mass.data == nullptr) return T(0);
  const T x = static_cast<const T*>(
      mass.data)[b * mass.stride[0] + h * mass.stride[1] + j * mass.stride[2]];
  return x > T(0) ? log_two(x) : T(NAN);
}

// g^t_j log2(e), relative to g^t_0; otherwise it would drift by log2(M / N) a step.
template <class Storage>
__device__ __forceinline__ Accumulate<Storage> potential(const ForwardParams& p,
                                                         const Head<Storage>& head, int64_t t,
                                                         int64_t j) {
  using T = Accumulate<Storage>;
  if (t == 0) return T(0);
  const T first = head.column(t, 0), column = head.column(t, j);
  if (column == -infinity<T>()) return T(0);
  return (log_reference_mass<T>(p, head.b, head.h, j) - column) -
         (log_reference_mass<T>(p, head.b, head.h, 0) - first);
}

// The largest of the block's values, in all threads; `scratch` [kWarps]. Synchronises.
template <class Storage, class T>
__device__ __forceinline__ T block_maximum(T x, T* scratch) {
  const Lane lane;
  x = warp_maximum(x);
  __syncthreads();
  if (thread_index() % 32 == 0) scratch[lane.warp] = x;
  __syncthreads();
  x = scratch[0];
  for (int warp = 1; warp < Shape<Storage>::kWarps; ++warp) x = maximum(x, scratch[warp]);
  return x;
}

// Fills values [chunks kRows] in shared memory with of(j) for each reference and `beyond` for the
// padding of the last tile.
template <class Storage, class Of>
__device__ void fill_terms(const ForwardParams& p, Accumulate<Storage>* values,
                           Accumulate<Storage> beyond, Of of) {
  using S = Shape<Storage>;
  const int padded = int(divide_up(p.references, S::kRows)) * S::kRows;
#pragma unroll 1
  for (int j = thread_index(); j < padded; j += S::kThreads) {
    values[j] = j < p.references ? of(j) : beyond;
  }
}

// The largest of values [chunks kRows] of fill_terms, 0 where all are -inf. Synchronises, also
// after its use of `scratch`.
template <class Storage>
__device__ Accumulate<Storage> largest_term(const ForwardParams& p,
                                            const Accumulate<Storage>* values,
                                            Accumulate<Storage>* scratch) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const int padded = int(divide_up(p.references, S::kRows)) * S::kRows;
  T top = -infinity<T>();
#pragma unroll 1
  for (int j = thread_index(); j < padded; j += S::kThreads) top = maximum(top, values[j]);
  top = block_maximum<Storage>(top, scratch);
  __syncthreads();
  return top == -infinity<T>() ? T(0) : top;
}

// Turns values of fill_terms into the factors 2^(value - top). Synchronises.
template <class Storage>
__device__ void to_factors(const ForwardParams& p, Accumulate<Storage>* values,
                           Accumulate<Storage> top) {
  using S = Shape<Storage>;
  const int padded = int(divide_up(p.references, S::kRows)) * S::kRows;
#pragma unroll 1
  for (int j = thread_index(); j < padded; j += S::kThreads) {
    values[j] = power_of_two(values[j] - top);
  }
  __syncthreads();
}

// 2^s of all scores.
template <class Storage>
__device__ __forceinline__ void to_factors(Accumulators<Storage>& s) {
#pragma unroll
  for (int n = 0; n < Shape<Storage>::kRows / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = power_of_two(s[n][e]);
  }
}

// The two rows of a tile that a thread's accumulators belong to.
template <class Storage>
struct OwnRows {
  int64_t token[2];
  __device__ explicit OwnRows(int64_t tile) {
    const Lane lane;
    token[0] = tile * Shape<Storage>::kRows + 16 * lane.warp + lane.row;
    token[1] = token[0] + 8;
  }
};

// Sums over the rows of all tiles of a block, for each column: each thread adds its own rows; at
// the end the threads' sums are added once, in a fixed order.
template <class Storage>
class ColumnSums {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;

 public:
  __device__ ColumnSums() {
#pragma unroll
    for (int n = 0; n < S::kRows / 8; ++n) sums_[n][0] = sums_[n][1] = T(0);
  }
  // Adds `value(half, column, accumulator)` for each of the thread's accumulators.
  template <class Value>
  __device__ __forceinline__ void add(Accumulators<Storage>& accumulators, Value value) {
    const Lane lane;
#pragma unroll
    for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums_[n][e % 2] += value(e / 2, 8 * n + lane.column + e % 2, accumulators[n][e]);
      }
    }
  }
  // totals [kRows] in shared memory, visible to all.
  __device__ void total(T* scratch, T* totals) {
    const Lane lane;
#pragma unroll
    for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        T x = sums_[n][e];
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
          x += __shfl_xor_sync(kFullWarp, x, distance);
        }
        if (lane.row == 0) scratch[lane.warp * S::kRows + 8 * n + lane.column + e] = x;
      }
    }
    __syncthreads();
    for (int j = thread_index(); j < S::kRows; j += S::kThreads) {
      T x = scratch[j];
      for (int warp = 1; warp < S::kWarps; ++warp) x += scratch[warp * S::kRows + j];
      totals[j] = x;
    }
    __syncthreads();
  }

 private:
  T sums_[S::kRows / 8][2];
};

// The same for log-sum-exps.
template <class Storage>
class ColumnLogSums {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;

 public:
  template <class Exponent>
  __device__ __forceinline__ void add(Accumulators<Storage>& accumulators, Exponent exponent) {
#pragma unroll
    for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const T x = exponent(0, accumulators[n][e]), y = exponent(1, accumulators[n][2 + e]);
        LogSum<T>& state = states_[n][e];
        const T top = maximum(state.largest, maximum(x, y));
        const T base = top == -infinity<T>() ? T(0) : top;
        state.sum = state.sum * power_of_two(state.largest - base) + power_of_two(x - base) +
                    power_of_two(y - base);
        state.largest = top;
      }
    }
  }
  // The same for factors 2^s. The exponent of an entry is s plus its row's offset, so the largest
  // offset can be the maximum of all columns. Do not mix with add.
  __device__ __forceinline__ void add_factors(Accumulators<Storage>& factors,
                                              const T (&offsets)[2]) {
    const T before = states_[0][0].largest;
    const T top = maximum(before, maximum(offsets[0], offsets[1]));
    const T base = top == -infinity<T>() ? T(0) : top;
    const T kept = power_of_two(before - base);
    const T rows[2] = {power_of_two(offsets[0] - base), power_of_two(offsets[1] - base)};
#pragma unroll
    for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        LogSum<T>& state = states_[n][e];
        state.sum = state.sum * kept + factors[n][e] * rows[0] + factors[n][2 + e] * rows[1];
        state.largest = top;
      }
    }
  }
  // Calls emit(column, state) from one thread for each column.
  template <class Emit>
  __device__ void total(T* scratch, Emit emit) {
    const Lane lane;
    T* sums = scratch + S::kWarps * S::kRows;
#pragma unroll
    for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        LogSum<T> state = states_[n][e];
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
          state.merge(shuffled(state, distance));
        }
        const int at = lane.warp * S::kRows + 8 * n + lane.column + e;
        if (lane.row == 0) {
          scratch[at] = state.largest;
          sums[at] = state.sum;
        }
      }
    }
    __syncthreads();
    for (int j = thread_index(); j < S::kRows; j += S::kThreads) {
      LogSum<T> state;
      for (int warp = 0; warp < S::kWarps; ++warp) {
        LogSum<T> other;
        other.largest = scratch[warp * S::kRows + j];
        other.sum = sums[warp * S::kRows + j];
        state.merge(other);
      }
      emit(j, state);
    }
    __syncthreads();
  }

 private:
  LogSum<T> states_[S::kRows / 8][2];
};

// The sum of the block's values, in a fixed order.
template <class Storage, class T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  const Lane lane;
  x = lanes_sum<32>(x);
  __syncthreads();
  if (thread_index() % 32 == 0) scratch[lane.warp] = x;
  __syncthreads();
  x = scratch[0];
  for (int warp = 1; warp < Shape<Storage>::kWarps; ++warp) x += scratch[warp];
  return x;
}

// Loads a tile of values that kernels computed, [references of chunk, columns of one depth tile],
// from `from` [references, width] of the accumulate type, times `factors` [references] (optional).
// Returns the number by which products with it must be multiplied. The caller synchronises before
// and after.
template <class Storage>
__device__ Accumulate<Storage> load_operand(const Formed<Storage>& tile,
                                            const Accumulate<Storage>* from, int64_t first,
                                            int64_t references, int first_column, int width,
                                            const Accumulate<Storage>* factors,
                                            Accumulate<Storage>* scratch) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const int padded = padded_depth<Storage>(width, first_column);
  const auto each = [&](auto visit) {
#pragma unroll 1
    for (int at = thread_index(); at < S::kRows * S::kDepth; at += S::kThreads) {
      const int row = at / S::kDepth, column = at % S::kDepth;
      if (column >= padded) continue;
      const bool inside = first + row < references && first_column + column < width;
      T x = inside ? from[(first + row) * width + first_column + column] : T(0);
      if (inside && factors != nullptr) x *= factors[first + row];
      visit(row, column, x);
    }
  };
  T scale = 1;
  if constexpr (kTensorCores<Storage> && std::is_same_v<Storage, __half>) {
    T largest = 0;
    each([&](int, int, T x) { largest = maximum(largest, x < T(0) ? -x : x); });
    scale = fitting_scale<Storage>(block_maximum<Storage>(largest, scratch));
  }
  each([&](int row, int column, T x) { tile.store(row, column, x * scale); });
  return T(1) / scale;
}

// Stores a warp's 16 rows of accumulators to columns [first_column, ...) of a tensor of the user,
// through `stage` [kRows, kDepth] in shared memory, so that whole 16-byte pieces are written.
template <class Storage, int blocks>
__device__ void store_rows(const Rows<Storage>& rows, int64_t tile, int first_column,
                           Accumulate<Storage> (&accumulators)[blocks][4], Storage* stage) {
  using S = Shape<Storage>;
  const Lane lane;
  constexpr int kPitch = S::kDepth + S::kPerVector;
  Storage* own = stage + 16 * lane.warp * kPitch;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < S::kDepth / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<Pair<Storage>*>(own + (lane.row + 8 * half) * kPitch + 8 * n +
                                        lane.column) = {
          narrow<Storage>(accumulators[n][2 * half]),
          narrow<Storage>(accumulators[n][2 * half + 1])};
    }
  }
  __syncwarp();
  const int left = rows.depth - first_column;
#pragma unroll 1
  for (int at = thread_index() % 32; at < 16 * S::kLanesPerRow; at += 32) {
    const int row = at / S::kLanesPerRow, column = at % S::kLanesPerRow * S::kPerVector;
    const int64_t token = tile * S::kRows + 16 * lane.warp + row;
    if (token >= rows.count || column >= left) continue;
    const Storage* from = own + row * kPitch + column;
    Storage* to =
        rows.data + token * rows.row_stride + (first_column + column) * rows.column_stride;
    if (rows.vectors && left - column >= S::kPerVector) {
      *reinterpret_cast<Vector16*>(to) = *reinterpret_cast<const Vector16*>(from);
    } else {
#pragma unroll 1
      for (int e = 0; e < S::kPerVector && column + e < left; ++e) {
        to[e * rows.column_stride] = from[e];
      }
    }
  }
}

}  // namespace setformer::cuda
