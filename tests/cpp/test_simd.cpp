// exp2, log2, sums and conversions of the vector layer, against the C library and known values.
#define SETFORMER_ISA test
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/gemm.h"
#include "cpu/scalar_types.h"
#include "cpu/tile_ops.h"

namespace {

using namespace setformer::cpu::SETFORMER_ISA;

template <class T>
void test_exp2_and_log2() {
  // The polynomial adds 2.6e-9 (float32) or 1.8e-17 to a few roundings of Horner's rule.
  const double tolerance = 4 * std::numeric_limits<T>::epsilon();
  const T lowest = T(1 - Simd<T>::kExponentBias), highest = T(Simd<T>::kExponentBias);
  for (int i = 0; i <= 100000; ++i) {
    const T x = lowest + (highest - lowest) * T(i) / T(100000);
    const double expected = std::exp2(double(x));
    CHECK_CLOSE(double(exp2_bounded<T>(splat(x))[0]) / expected, 1.0, tolerance);
    const double y = double(log2<T>(splat(T(expected)))[0]);
    CHECK_CLOSE(y, std::log2(double(T(expected))), tolerance * (1 + std::abs(double(x)) / 4));
  }
  const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  CHECK(exp2_bounded<T>(splat(-infinity))[0] == T(0));
  CHECK(exp2_bounded<T>(splat(2 * lowest))[0] == T(0));
  CHECK(std::isnan(exp2_bounded<T>(splat(nan))[0]));
  CHECK(exp2_bounded<T>(splat(T(0)))[0] == T(1));
  CHECK(log2<T>(splat(T(0)))[0] == -infinity);
  CHECK(log2<T>(splat(infinity))[0] == infinity);
  CHECK(std::isnan(log2<T>(splat(nan))[0]));
  CHECK(log2<T>(splat(T(1)))[0] == T(0));
  CHECK(log2<T>(splat(T(8)))[0] == T(3));
}

template <class T>
void test_sums() {
  Vector<T> rows[kLanes<T>];
  for (int r = 0; r < kLanes<T>; ++r) {
    for (int lane = 0; lane < kLanes<T>; ++lane) rows[r][lane] = T(100 * r + lane);
  }
  const Vector<T> sums = sums_of<T>(rows);
  const int lanes = kLanes<T>;
  for (int r = 0; r < lanes; ++r) {
    const T expected = T(100 * r * lanes + lanes * (lanes - 1) / 2);
    CHECK(sums[r] == expected);
    CHECK(sum_of<T>(rows[r]) == expected);
    CHECK(max_of<T>(rows[r]) == T(100 * r + lanes - 1));
  }
}

// Products of small integers are exact in any order.
template <class T>
void test_products() {
  std::mt19937 random(1);
  std::uniform_int_distribution<int> small(-4, 4);
  for (int64_t rows : {1, 2, 5, 7, 13, 48}) {
    for (int64_t blocks : {1, 2, 3, 5}) {
      for (int64_t depth : {0, 1, 3, 17}) {
        const int64_t columns = blocks * kLanes<T>;
        std::vector<T> a(rows * depth), b(depth * columns), c(rows * columns), expected;
        for (auto* matrix : {&a, &b, &c}) {
          for (T& x : *matrix) x = T(small(random));
        }
        for (bool accumulate : {false, true}) {
          expected = c;
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < columns; ++j) {
              T sum = accumulate ? c[i * columns + j] : T(0);
              for (int64_t k = 0; k < depth; ++k) sum += a[i * depth + k] * b[k * columns + j];
              expected[i * columns + j] = sum;
            }
          }
          multiply<T>(rows, columns, depth, a.data(), depth, 1, b.data(), c.data(), accumulate);
          CHECK(c == expected);
        }
      }
    }
  }
}

// The same in pairs of bfloat16, packed in each of the ways. Small integers are exact in it; 257 is
// not.
void test_products_in_pairs() {
  std::mt19937 random(3);
  std::uniform_int_distribution<int> small(-4, 4);
  constexpr int64_t lanes = kLanes<float>;
  const auto twice = [](int64_t) { return 2.0f; };
  for (int64_t rows : {1, 2, 7, 13}) {
    for (int64_t depth : {1, 2, 3, 17}) {
      const int64_t columns = 4 * lanes, width = round_up(17, 2 * lanes);  // of A^T and A
      std::vector<float> a(rows * width), transposed(depth * columns), b(depth * columns);
      for (auto* matrix : {&a, &transposed, &b}) {
        for (float& x : *matrix) x = float(small(random));
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t k = 0; k < depth; ++k) a[i * width + k] = transposed[k * columns + i];
        for (int64_t k = depth; k < width; ++k) a[i * width + k] = 0;
      }
      std::vector<Pair> along(rows * width / 2), across(pairs_of(depth) * columns);
      std::vector<Pair> right(pairs_of(depth) * columns);
      store_pairs_along(a.data(), rows * width, along.data());
      store_pairs_across(transposed.data(), depth, columns, across.data(), twice);
      store_pairs_across(b.data(), depth, columns, right.data(), [](int64_t) { return 1.0f; });
      std::vector<float> c(rows * columns), doubled(rows * columns), squares(round_up(rows, lanes));
      multiply(Product<float, Pair>{along.data(), width / 2, 1, right.data(), c.data(), columns,
                                    pairs_of(depth)},
               rows);
      multiply(Product<float, Pair>{across.data(), 1, columns, right.data(), doubled.data(),
                                    columns, pairs_of(depth)},
               rows);
      const PairRows left{along.data(), width / 2, width / 2};
      inner_products(left, left, rows, squares.data());
      for (int64_t i = 0; i < rows; ++i) {
        float square = 0;
        for (int64_t k = 0; k < depth; ++k) square += a[i * width + k] * a[i * width + k];
        CHECK(squares[i] == square);
        for (int64_t j = 0; j < columns; ++j) {
          float sum = 0;
          for (int64_t k = 0; k < depth; ++k) sum += a[i * width + k] * b[k * columns + j];
          CHECK(c[i * columns + j] == sum);
          CHECK(doubled[i * columns + j] == 2 * sum);
        }
      }
    }
  }
  float row[lanes];
  for (float& x : row) x = 257;
  round_to_bfloat16(row, lanes);
  for (float x : row) CHECK(x == 256);
}

// Row and column sums of a tile, and their logarithms, against plain loops in double.
template <class T>
void test_tile_sums() {
  const int64_t count = 13, columns = 3 * kLanes<T>;
  const double tolerance = 30 * std::numeric_limits<T>::epsilon();
  std::mt19937 random(2);
  std::uniform_real_distribution<double> uniform(-20, 20);
  std::vector<T> tile(count * columns), by_column(columns), by_row(kMostTileTokens);
  for (auto* values : {&tile, &by_column, &by_row}) {
    for (T& x : *values) x = T(uniform(random));
  }
  T logs[kMostTileTokens];
  row_log_sums(tile.data(), count, columns, by_column.data(), logs);
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < columns; ++j) {
      sum += std::exp2(double(tile[i * columns + j] + by_column[j]));
    }
    CHECK_CLOSE(double(logs[i]), std::log2(sum), 40 * tolerance);
  }
  std::vector<T> maxima(columns), sums(columns), other_maxima(columns), other_sums(columns);
  const ColumnLogSums<T> state{maxima.data(), sums.data()};
  const ColumnLogSums<T> other{other_maxima.data(), other_sums.data()};
  state.clear(columns);
  other.clear(columns);
  state.merge(other, columns);  // nothing and nothing is nothing, not NaN
  for (T sum : sums) CHECK(sum == T(0));
  state.add(tile.data(), 5, columns, by_row.data());
  other.add(tile.data() + 5 * columns, count - 5, columns, by_row.data() + 5);
  state.merge(other, columns);
  std::vector<T> normalizers(columns);
  state.normalizers(columns, normalizers.data());
  for (int64_t j = 0; j < columns; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      sum += std::exp2(double(tile[i * columns + j] + by_row[i]));
    }
    CHECK_CLOSE(double(normalizers[j]), std::log2(sum), 40 * tolerance);
  }
}

// Of every number of rows that a tile may have; small integers are exact in any order.
template <class T>
void test_row_sums() {
  const int64_t columns = 2 * kLanes<T>;
  std::mt19937 random(3);
  std::uniform_int_distribution<int> small(-4, 4);
  std::vector<T> weights(columns), products(kMostTileTokens);
  for (T& x : weights) x = T(small(random));
  for (int64_t count = 1; count <= kMostTileTokens; ++count) {
    std::vector<T> tile(count * columns);
    for (T& x : tile) x = T(small(random));
    multiply_vector(tile.data(), count, columns, weights.data(), products.data());
    for (int64_t i = 0; i < count; ++i) {
      T expected = 0;
      for (int64_t j = 0; j < columns; ++j) expected += tile[i * columns + j] * weights[j];
      CHECK(products[i] == expected);
    }
  }
}

// All 65536 numbers of each 16-bit type, decoded by the definition of their fields.
template <class Storage>
double decode(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

template <class Storage>
void test_conversions(int exponent_bits) {
  const int lanes = kLanes<float>;
  std::vector<Storage> all(65536), back(65536);
  std::vector<float> values(65536);
  for (int i = 0; i < 65536; ++i) all[i].bits = uint16_t(i);
  for (int i = 0; i < 65536; i += 64) {
    load_row(&all[i], 1, 64, &values[i], 64);
    store_row(&values[i], 64, &back[i], 1);
  }
  int wrong = 0;
  for (int i = 0; i < 65536; ++i) {
    const double expected = decode<Storage>(uint16_t(i), exponent_bits);
    const double scalar = double(to_accumulate(all[i]));
    if (std::isnan(expected)) {
      const double again = decode<Storage>(back[i].bits, exponent_bits);
      wrong += !std::isnan(values[i]) || !std::isnan(scalar) || !std::isnan(again);
    } else {
      wrong += double(values[i]) != expected || scalar != expected || back[i].bits != i;
    }
  }
  CHECK(wrong == 0);
  // Between neighbours: to the nearer, and from the middle to the even one.
  const int largest = ((1 << exponent_bits) - 1) << (15 - exponent_bits);
  for (int i = 0; i + 1 < largest; ++i) {
    const double low = decode<Storage>(uint16_t(i), exponent_bits);
    const double high = decode<Storage>(uint16_t(i + 1), exponent_bits);
    const float middle = float((low + high) / 2);
    const float inputs[] = {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)};
    const int expected[] = {i + (i & 1), i, i + 1};
    for (int k = 0; k < 3; ++k) {
      Storage scalar, vector[64];
      to_storage(-inputs[k], &scalar);
      store_vector(splat(inputs[k]), vector);
      wrong += scalar.bits != (expected[k] | 0x8000);
      wrong += vector[lanes - 1].bits != expected[k];
    }
  }
  CHECK(wrong == 0);
  Storage overflown;
  to_storage(std::numeric_limits<float>::max(), &overflown);
  CHECK(std::isinf(decode<Storage>(overflown.bits, exponent_bits)));
}

}  // namespace

int main() {
  test_exp2_and_log2<float>();
  test_exp2_and_log2<double>();
  test_sums<float>();
  test_sums<double>();
  test_products<float>();
  test_products<double>();
  test_products_in_pairs();
  test_row_sums<float>();
  test_row_sums<double>();
  test_tile_sums<float>();
  test_tile_sums<double>();
  test_conversions<Float16>(5);
  test_conversions<BFloat16>(8);
  return check::report("test_simd");
}
