// Products of small matrices: C (+)= A B with C's columns in vectors.
//
// A tile of R rows x V vectors of C stays in registers while the depth is walked once; per step
// that is V vector loads and R broadcasts for R * V multiply-adds. The tile is expanded by
// templates so that every accumulator is a named register (indexed arrays spill).
#pragma once

#include "pairs.h"
#include "prefetch.h"

namespace setformer::cpu::SETFORMER_ISA {

// Accumulators that leave registers for V vectors of B and one broadcast of A.
inline constexpr int kAccumulators = kVectorRegisters == 32 ? 24 : 12;
inline constexpr int kWidestTile = kVectorRegisters == 32 ? 4 : 2;  // vectors
constexpr int most_rows(int vectors) { return smaller(kAccumulators / vectors, 8); }

// C [rows, columns] = start + A B [depth, columns]. The strides of A are free, so that the same
// product serves A and its transpose. Factors are numbers of type T, or pairs of bfloat16 along the
// depth (pairs.h).
template <class T, class Factor = T>
struct Product {
  const Factor* a;
  int64_t a_row, a_depth;
  const Factor* b;
  T* c;
  int64_t columns, depth;
  const T* start = nullptr;  // C itself, a row that all rows of C start from, or null for 0
  int64_t start_row = 0;
};

template <class T, class Factor, int Rows, int Vectors>
struct RegisterTile {
  // The tile of C that begins at row i and column j.
  static void compute(const Product<T, Factor>& p, int64_t i, int64_t j) {
    expand(std::make_integer_sequence<int, Rows * Vectors>{},
           std::make_integer_sequence<int, Rows>{}, std::make_integer_sequence<int, Vectors>{}, p,
           i, j);
  }

 private:
  template <int Row, int... V>
  static SETFORMER_INLINE void add_row(Vector<T>* sum, Vector<Factor> left,
                                       const Vector<Factor>* right,
                                       std::integer_sequence<int, V...>) {
    (add_product(sum[Row * Vectors + V], left, right[V]), ...);
  }

  template <int... I, int... R, int... V>
  static SETFORMER_INLINE void expand(std::integer_sequence<int, I...>,
                                      std::integer_sequence<int, R...>,
                                      std::integer_sequence<int, V...>, const Product<T, Factor>& p,
                                      int64_t i, int64_t j) {
    constexpr int lanes = kLanes<T>;
    static_assert(lanes == kLanes<Factor>);
    const Factor *a = p.a + i * p.a_row, *b = p.b + j;
    T* c = p.c + i * p.columns + j;
    const int64_t columns = p.columns, a_depth = p.a_depth;
    Vector<T> sum[Rows * Vectors] = {((void)I, Vector<T>{})...};
    if (p.start != nullptr) {
      const T* start = p.start + i * p.start_row + j;
      ((sum[I] = load<T>(start + (I / Vectors) * p.start_row + (I % Vectors) * lanes)), ...);
    }
    const Factor* row[Rows] = {(a + R * p.a_row)...};
    for (int64_t k = 0; k < p.depth; ++k) {
      const Vector<Factor> right[Vectors] = {load<Factor>(b + V * lanes)...};
      // Row by row: broadcasting all of A's first would leave too few registers.
      (add_row<R>(sum, splat<Factor>(*row[R]), right, std::make_integer_sequence<int, Vectors>{}),
       ...);
      ((row[R] += a_depth), ...);
      b += columns;
    }
    (store<T>(c + (I / Vectors) * columns + (I % Vectors) * lanes, sum[I]), ...);
  }
};

template <class T, class Factor, int Vectors, int... R>
auto tile_of(int rows, std::integer_sequence<int, R...>) {
  static constexpr void (*by_rows[])(const Product<T, Factor>&, int64_t, int64_t) = {
      RegisterTile<T, Factor, R + 1, Vectors>::compute...};
  return by_rows[rows - 1];
}

// The columns [j, j + Vectors kLanes) of C.
template <int Vectors, class T, class Factor>
void multiply_panel(const Product<T, Factor>& p, int64_t rows, int64_t j, Upcoming& upcoming,
                    int64_t upcoming_rows) {
  // Blocks of nearly equal height: 49 rows are 7 x 7, not 6 x 8 + 1.
  const int64_t blocks = (rows + most_rows(Vectors) - 1) / most_rows(Vectors);
  const int64_t least = rows / larger<int64_t>(blocks, 1), higher = rows - blocks * least;
  for (int64_t block = 0, i = 0; block < blocks; ++block) {
    const int height = int(least + (block < higher ? 1 : 0));
    upcoming.ask_for(upcoming_rows);
    tile_of<T, Factor, Vectors>(height, std::make_integer_sequence<int, most_rows(Vectors)>{})(p, i,
                                                                                               j);
    i += height;
  }
}

// The product's `rows` rows; its columns are a multiple of the lanes. Prefetches the `upcoming`
// rows meanwhile.
template <class T, class Factor>
void multiply(const Product<T, Factor>& p, int64_t rows, Upcoming upcoming = {}) {
  constexpr int64_t lanes = kLanes<T>, tile = kAccumulators * lanes;
  const int64_t columns = p.columns;
  // An estimate: there are a few more if some are not full.
  const int64_t tiles = larger<int64_t>(1, (rows * columns + tile - 1) / tile);
  const int64_t share = (upcoming.rows() + tiles - 1) / tiles;
  int64_t j = 0;
  if constexpr (kWidestTile >= 4) {
    for (; j + 4 * lanes <= columns; j += 4 * lanes) {
      multiply_panel<4>(p, rows, j, upcoming, share);
    }
  }
  for (; j + 2 * lanes <= columns; j += 2 * lanes) {
    multiply_panel<2>(p, rows, j, upcoming, share);
  }
  if (j < columns) multiply_panel<1>(p, rows, j, upcoming, share);
}

// C[i][j] (+)= sum_k a[i * a_row + k * a_depth] * b[k * columns + j] for i < rows, k < depth.
template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row,
              int64_t a_depth, const T* b, T* c, bool accumulate, Upcoming upcoming = {}) {
  const T* start = accumulate ? c : nullptr;
  multiply(Product<T>{a, a_row, a_depth, b, c, columns, depth, start, columns}, rows, upcoming);
}

// A matrix [count, columns] of whole vectors whose products are computed in pairs, and room for
// them: count * columns / 2, one row more if count is odd.
struct RoundedMatrix {
  const float* numbers;
  int64_t count, columns;
  Pair* room;
};

// C [count, width] = matrix B, with B [pairs_of(depth), width] for the first `depth` columns.
inline void multiply(const RoundedMatrix& matrix, const Pair* b, int64_t depth, float* c,
                     int64_t width, Upcoming upcoming = {}) {
  store_pairs_along(matrix.numbers, matrix.count * matrix.columns, matrix.room);
  multiply(Product<float, Pair>{matrix.room, matrix.columns / 2, 1, b, c, width, pairs_of(depth)},
           matrix.count, upcoming);
}
// C [rows, width] += matrix^T B, with B [pairs_of(count), width] for the first `rows` columns;
// factor(i) is what row i of the matrix is multiplied by.
template <class Factor>
void add_transposed(const RoundedMatrix& matrix, Factor factor, const Pair* b, int64_t rows,
                    float* c, int64_t width, Upcoming upcoming) {
  store_pairs_across(matrix.numbers, matrix.count, matrix.columns, matrix.room, factor);
  multiply(Product<float, Pair>{matrix.room, 1, matrix.columns, b, c, width, pairs_of(matrix.count),
                                c, width},
           rows, upcoming);
}

}  // namespace setformer::cpu::SETFORMER_ISA
