// What Sinkhorn does with a tile of scores: products with vectors over rows and columns, and
// their log-domain counterparts. A tile is [count][columns], columns padded to whole vectors.
#pragma once

#include "simd.h"

namespace setformer::cpu::SETFORMER_ISA {

// Tokens of a tile. With 64 references and depths of 64 in float32, a tile of scores, of keys or of
// values has 12 KiB: all three fit a first-level cache of 48 KiB, two of them one of 32 KiB.
// (Between 32 and 96 tokens no difference could be measured.) The last tile also takes the tokens
// that would form a small tile after it: a window of 7 x 7 is one tile.
inline constexpr int64_t kTileTokens = 48;
// A multiple of every vector's lanes: buffers of one number per token have this length, so whole
// vectors may be stored to them.
inline constexpr int64_t kMostTileTokens = 64;
inline int64_t tokens_of_tile(int64_t left) { return left > kMostTileTokens ? kTileTokens : left; }

// Of as many rows as there are lanes; step(i) is the distance from row i to the next.
template <class T, class Term, class Step, int... R>
SETFORMER_INLINE Vector<T> row_block_sums(const T* matrix, int64_t columns, const T* weights,
                                          Term term, Step step, std::integer_sequence<int, R...>) {
  Vector<T> sum[] = {((void)R, Vector<T>{})...};
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    const Vector<T> weight = load(weights + j);
    const T* row = matrix + j;
    ((sum[R] += term(load(row), weight), row += step(R)), ...);
  }
  return sums_of<T>(sum);
}

// sums[i] = sum_j term(matrix[i][j], weights[j]); whole vectors are stored to `sums`.
template <class T, class Term>
SETFORMER_INLINE void row_sums(const T* matrix, int64_t count, int64_t columns, const T* weights,
                               T* sums, Term term) {
  constexpr int64_t lanes = kLanes<T>;
  constexpr auto rows = std::make_integer_sequence<int, lanes>{};
  int64_t i = 0;
  const auto whole = [columns](int) SETFORMER_LAMBDA { return columns; };
  for (; i + lanes <= count; i += lanes) {
    store<T>(sums + i, row_block_sums(matrix + i * columns, columns, weights, term, whole, rows));
  }
  if (const int64_t left = count - i; left > lanes / 4) {
    // The last row is added again for the rows that are missing; those sums are not used.
    const auto step = [=](int row) SETFORMER_LAMBDA { return row + 1 < left ? columns : 0; };
    store<T>(sums + i, row_block_sums(matrix + i * columns, columns, weights, term, step, rows));
    return;
  }
  for (; i < count; ++i) {
    Vector<T> sum{};
    for (int64_t j = 0; j < columns; j += lanes) {
      sum += term(load(matrix + i * columns + j), load(weights + j));
    }
    sums[i] = sum_of<T>(sum);
  }
}

// products[i] = sum_j matrix[i][j] weights[j].
template <class T>
void multiply_vector(const T* matrix, int64_t count, int64_t columns, const T* weights,
                     T* products) {
  row_sums(matrix, count, columns, weights, products,
           [](Vector<T> x, Vector<T> weight) SETFORMER_LAMBDA { return x * weight; });
}

// sums[i] = sum_j matrix[i][j].
template <class T>
void row_sums(const T* matrix, int64_t count, int64_t columns, T* sums) {
  row_sums(matrix, count, columns, matrix, sums,
           [](Vector<T> x, Vector<T>) SETFORMER_LAMBDA { return x; });
}

// norms[i] = sum_j matrix[i][j]^2 weights[j].
template <class T>
void weighted_squares(const T* matrix, int64_t count, int64_t columns, const T* weights, T* norms) {
  row_sums(matrix, count, columns, weights, norms,
           [](Vector<T> x, Vector<T> weight) SETFORMER_LAMBDA { return x * x * weight; });
}

template <class T, int... V>
SETFORMER_INLINE void column_block_sums(const T* matrix, int64_t count, int64_t columns,
                                        const T* weights, T* sums,
                                        std::integer_sequence<int, V...>) {
  constexpr int lanes = kLanes<T>;
  // Two chains of additions per vector hide the latency of one.
  Vector<T> even[] = {load(sums + V * lanes)...};
  Vector<T> odd[] = {((void)V, Vector<T>{})...};
  int64_t i = 0;
  for (; i + 1 < count; i += 2) {
    const T* row = matrix + i * columns;
    const Vector<T> first = splat(weights[i]), second = splat(weights[i + 1]);
    ((even[V] += first * load(row + V * lanes)), ...);
    ((odd[V] += second * load(row + columns + V * lanes)), ...);
  }
  if (i < count) {
    const Vector<T> first = splat(weights[i]);
    ((even[V] += first * load(matrix + i * columns + V * lanes)), ...);
  }
  (store<T>(sums + V * lanes, even[V] + odd[V]), ...);
}

// sums[j] += sum_i weights[i] matrix[i][j].
template <class T>
void add_transposed_product(const T* matrix, int64_t count, int64_t columns, const T* weights,
                            T* sums) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t j = 0;
  for (; j + 4 * lanes <= columns; j += 4 * lanes) {
    column_block_sums(matrix + j, count, columns, weights, sums + j,
                      std::make_integer_sequence<int, 4>{});
  }
  for (; j < columns; j += lanes) {
    column_block_sums(matrix + j, count, columns, weights, sums + j,
                      std::make_integer_sequence<int, 1>{});
  }
}

// Of rows of whole vectors.
template <class T>
T dot(const T* x, const T* y, int64_t width) {
  Vector<T> sum{};
  for (int64_t c = 0; c < width; c += kLanes<T>) sum += load(x + c) * load(y + c);
  return sum_of<T>(sum);
}

// matrix[i][:] *= factors[i].
template <class T>
void scale_rows(T* matrix, int64_t count, int64_t width, const T* factors) {
  for (int64_t i = 0; i < count; ++i) {
    const Vector<T> factor = splat(factors[i]);
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      store<T>(matrix + i * width + c, load(matrix + i * width + c) * factor);
    }
  }
}

// logs[i] = log2 sum_j 2^(scores[i][j] + potential[j]), shifted by each row's maximum.
template <class T>
void row_log_sums(const T* scores, int64_t count, int64_t columns, const T* potential, T* logs) {
  constexpr int64_t lanes = kLanes<T>;
  T maxima[kMostTileTokens], sums[kMostTileTokens];
  for (int64_t i = 0; i < kMostTileTokens; ++i) maxima[i] = sums[i] = T(0);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = scores + i * columns;
    Vector<T> largest = load(row) + load(potential);
    for (int64_t j = lanes; j < columns; j += lanes) {
      const Vector<T> x = load(row + j) + load(potential + j);
      largest = largest > x ? largest : x;
    }
    const T maximum = max_of<T>(largest);
    // All terms -inf: (-inf) - (-inf) would be NaN; the sum is 0 and its logarithm -inf.
    const T shift = maximum == -T(__builtin_inf()) ? T(0) : maximum;
    Vector<T> sum{};
    for (int64_t j = 0; j < columns; j += lanes) {
      sum += exp2_bounded<T>(load(row + j) + load(potential + j) - splat(shift));
    }
    maxima[i] = shift;
    sums[i] = sum_of<T>(sum);
  }
  for (int64_t i = 0; i < kMostTileTokens; i += lanes) {
    store<T>(logs + i, log2<T>(load(sums + i)) + load(maxima + i));
  }
}

// The state of log2 sum_i 2^(x_ij) per column: maxima and sums scaled by 2^-maximum, mergeable.
template <class T>
struct ColumnLogSums {
  T* maxima;  // [columns]
  T* sums;    // [columns]

  void clear(int64_t columns) const {
    for (int64_t j = 0; j < columns; ++j) {
      maxima[j] = -T(__builtin_inf());
      sums[j] = T(0);
    }
  }

  // Adds the tile's rows, x_ij = scores[i][j] + row_potential[i].
  void add(const T* scores, int64_t count, int64_t columns, const T* row_potential) const {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      Vector<T> largest = load(maxima + j);
      for (int64_t i = 0; i < count; ++i) {
        const Vector<T> x = load(scores + i * columns + j) + splat(row_potential[i]);
        largest = x > largest ? x : largest;
      }
      const Vector<T> shift = finite_shift(largest);
      Vector<T> sum = load(sums + j) * exp2_bounded<T>(load(maxima + j) - shift);
      for (int64_t i = 0; i < count; ++i) {
        sum += exp2_bounded<T>(load(scores + i * columns + j) + splat(row_potential[i]) - shift);
      }
      store<T>(maxima + j, largest);
      store<T>(sums + j, sum);
    }
  }

  void merge(const ColumnLogSums& other, int64_t columns) const {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const Vector<T> mine = load(maxima + j), theirs = load(other.maxima + j);
      const Vector<T> largest = theirs > mine ? theirs : mine;
      const Vector<T> shift = finite_shift(largest);
      store<T>(sums + j, load(sums + j) * exp2_bounded<T>(mine - shift) +
                             load(other.sums + j) * exp2_bounded<T>(theirs - shift));
      store<T>(maxima + j, largest);
    }
  }

  void normalizers(int64_t columns, T* logs) const {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      store<T>(logs + j, log2<T>(load(sums + j)) + load(maxima + j));
    }
  }

 private:
  // Where nothing has been added the maximum is -inf, and (-inf) - (-inf) would be NaN.
  static SETFORMER_INLINE Vector<T> finite_shift(Vector<T> largest) {
    return largest == splat(-T(__builtin_inf())) ? Vector<T>{} : largest;
  }
};

}  // namespace setformer::cpu::SETFORMER_ISA
