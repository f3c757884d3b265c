// Scores of tokens against the references of one head, a tile of tokens at a time, and their
// gradient.
//
// Keys and references are scaled to unit length if the problem asks for it. For the gaussian kernel
// the mean reference is then subtracted from all: the expansion |k|^2 + |y|^2 - 2 k.y would
// otherwise cancel for data far from the origin.
#pragma once

#include "gemm.h"
#include "references.h"
#include "team.h"

namespace setformer::cpu::SETFORMER_ISA {

// Turns the gradient by a row of unit length, u = centred + center, into that by the row as given:
// (du - u <u, du>) / length.
template <class T>
void through_unit_length(const T* centred, const T* center, T length, int64_t width, T* gradient) {
  Vector<T> products{};
  for (int64_t d = 0; d < width; d += kLanes<T>) {
    products += (load(centred + d) + load(center + d)) * load(gradient + d);
  }
  const Vector<T> along = splat(sum_of<T>(products)), factor = splat(1 / length);
  for (int64_t d = 0; d < width; d += kLanes<T>) {
    const Vector<T> u = load(centred + d) + load(center + d);
    store<T>(gradient + d, (load(gradient + d) - along * u) * factor);
  }
}

template <class Storage>
class Similarity {
  using T = Accumulate<Storage>;

 public:
  // Of head (b, h), whose prepared references are `references`.
  Similarity(const ForwardParams& p, const Tokens& tokens, int64_t b, int64_t h,
             const References<Storage>& references)
      : p_(p), tokens_(tokens), b_(b), h_(h), references_(references) {}

  // Once the references are prepared. `worker` is the scratch memory of any thread.
  void prepare(const Worker<T>& worker) {
    const T epsilon = references_.epsilon;
    scale_ = T(kLog2E) / epsilon;
    position_scale_ = T(-T(kLog2E) / (p_.position_bandwidth * p_.position_bandwidth));

    // The range of S / epsilon bounds the potentials. Up to the ranges below, solving by scaling
    // can neither overflow nor underflow (transport.h); everything else, NaN included, is solved in
    // the log domain.
    const T largest = gaussian_ || p_.normalize ? T(1) : largest_product(worker);
    const T range = (gaussian_ ? T(1) : T(2) * largest) / epsilon;
    log_domain_ = !(range <= (sizeof(T) == 4 ? T(32) : T(256)));
    // All ranks of a group must choose the same, although their keys differ.
    if (p_.group != nullptr && !gaussian_) log_domain_ = true;
    shift_ = gaussian_ && !log_domain_ ? scale_ / 2 : T(0);  // the middle of (0, 1 / epsilon]
  }

  // Is this head solved in the log domain, or by scaling? That follows from the options and the
  // head's data, in a group from the options alone.
  bool log_domain() const { return log_domain_; }
  const Validity& valid() const { return valid_; }

  // worker.keys = the tile's keys, scaled and centred.
  void load_keys(const Tile<T>& tile) const {
    T *keys = tile.worker.keys, *lengths = tile.worker.lengths;
    const T* center = references_.center;
    const int64_t width = widths_.depth;
    if (!p_.normalize) {
      rows_.load(tile.begin, tile.count, valid_, keys,
                 [center](Vector<T> key, int64_t, int64_t d)
                     SETFORMER_LAMBDA { return key - load(center + d); });
      return;
    }
    rows_.load(tile.begin, tile.count, valid_, keys);
    lengths_of(keys, tile.count, width, lengths);
    for (int64_t i = 0; i < tile.count; ++i) {
      const Vector<T> factor = splat(1 / lengths[i]);
      for (int64_t at = i * width, d = 0; d < width; at += kLanes<T>, d += kLanes<T>) {
        store<T>(keys + at, load(keys + at) * factor - load(center + d));
      }
    }
  }

  // scores[i][j] = 2^(s_ij - shift) for scaling, s_ij log2(e) for the log domain; factors[i][j]
  // (optional) = what dS_ij must be multiplied by, see add_gradient.
  void compute(const Tile<T>& tile, T* scores, T* factors) const {
    if constexpr (kInPairs<Storage>) {
      multiply_in_pairs(tile, scores);
    } else {
      multiply_centred(tile, scores);
    }
    int64_t i = 0;
    for (; i + kPack <= tile.count; i += kPack) finish_rows<kPack>(tile, i, scores, factors);
    for (; i < tile.count; ++i) finish_rows<1>(tile, i, scores, factors);
  }

  // With E_ij = ds_ij factors_ij gradient_scale():
  //   gaussian  dk_i = sum_j E_ij (y_j - k_i),  dy_j = sum_i E_ij (k_i - y_j)
  //   linear    dk_i = sum_j E_ij y_j,          dy_j = sum_i E_ij k_i
  T gradient_scale() const {
    const T bandwidth = references_.bandwidth;
    return 1 / (references_.epsilon * (gaussian_ ? bandwidth * bandwidth : T(1)));
  }

  // Sums over tokens, of a span or of all.
  struct Gradient {
    T* references;  // [M, depth] sum_i E_ij k_i
    T* columns;     // [references] sum_i E_ij
    T* scalars;     // [2] sum_ij E_ij, sum_i <k_i, dk_i>
  };

  // worker.gradient = E, from e(index). In pairs it is E_ij / |y_j|, rounded: then it is multiplied
  // by references as they are given, exactly, and all sums are of the same numbers. (Both cancel.)
  template <class E>
  SETFORMER_INLINE void finish_score_gradient(const Tile<T>& tile, E e) const {
    const int64_t columns = widths_.references;
    for (int64_t i = 0; i < tile.count; ++i) {
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        const int64_t at = i * columns + j;
        Vector<T> x = e(at);
        if constexpr (kInPairs<Storage>) {
          x = rounded_to_bfloat16(x * load(references_.inverse_lengths + j));
        }
        store<T>(tile.worker.gradient + at, x);
      }
    }
  }

  // Adds the share of the tile, whose E is worker.gradient, and writes dk to worker.grad_keys;
  // worker.keys must hold its keys.
  void add_gradient(const Tile<T>& tile, const Gradient& gradient, const Upcoming& upcoming) const {
    const int64_t count = tile.count, columns = widths_.references, depth = widths_.depth;
    const Worker<T>& worker = tile.worker;
    const T* e = worker.gradient;
    T* grad_keys = worker.grad_keys;
    if constexpr (kInPairs<Storage>) {
      multiply_gradient_in_pairs(tile, gradient, upcoming);
    } else {
      multiply(count, depth, p_.references, e, columns, 1, references_.rows, grad_keys, false,
               rows_.next_tile(tile.begin));
      multiply(p_.references, depth, count, e, 1, columns, worker.keys, gradient.references, true,
               upcoming);
    }
    if (gaussian_) {
      T ones[kMostTileTokens];
      fill(ones, kMostTileTokens, T(1));
      add_transposed_product(e, count, columns, ones, gradient.columns);
      if (kInPairs<Storage>) {
        multiply_vector(e, count, columns, references_.lengths, worker.row_terms);
      } else {
        row_sums(e, count, columns, worker.row_terms);
      }
      for (int64_t i = 0; i < count; ++i) {
        const Vector<T> row_total = splat(worker.row_terms[i]);
        for (int64_t d = 0; d < depth; d += kLanes<T>) {
          const int64_t at = i * depth + d;
          Vector<T> key = load(worker.keys + at);
          if (kInPairs<Storage>) key += load(references_.center + d);
          store<T>(grad_keys + at, load(grad_keys + at) - row_total * key);
        }
        gradient.scalars[0] += worker.row_terms[i];
      }
    }
    Vector<T> products{};
    for (int64_t at = 0; at < count * depth; at += kLanes<T>) {
      products += load(grad_keys + at) * load(worker.keys + at);
    }
    gradient.scalars[1] += sum_of<T>(products);
  }

  // Turns dk by scaled keys into dk by the keys as they were given.
  void finish_gradient(const Tile<T>& tile) const {
    if (!p_.normalize) return;
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t at = i * widths_.depth;
      through_unit_length(tile.worker.keys + at, references_.center, tile.worker.lengths[i],
                          widths_.depth, tile.worker.grad_keys + at);
    }
  }

  // Where the gradients of one head are written.
  struct Results {
    T* reference;  // [M, D]
    T* bandwidth;  // optional
    T* epsilon;
  };

  // From the sums of add_gradient over all tokens, which it overwrites. E is homogeneous in k and
  // y, so that
  //   gaussian  dL/dbandwidth = sum E |k - y|^2 / bandwidth
  //                           = -(sum <k, dk> + sum <y, dy>) / bandwidth
  //             dL/depsilon   = -sum E bandwidth^2 / epsilon
  //   linear    dL/depsilon   = -sum <k, dk> / epsilon
  void store_gradient(const Gradient& gradient, const Results& results, bool accumulate) const {
    const auto put = [accumulate](T value, T* to) { *to = accumulate ? *to + value : value; };
    const int64_t width = widths_.depth;
    const T bandwidth = references_.bandwidth, epsilon = references_.epsilon;
    Vector<T> inner{};  // lanes of sum <y, dy>
    for (int64_t j = 0; j < p_.references; ++j) {
      const T* reference = references_.rows + j * width;
      T *row = gradient.references + j * width, *result = results.reference + j * p_.depth;
      const Vector<T> total = splat(gaussian_ ? gradient.columns[j] : T(0));
      for (int64_t d = 0; d < width; d += kLanes<T>) {
        const Vector<T> y = load(reference + d);
        Vector<T> dy = load(row + d) - total * y;
        if (kInPairs<Storage>) dy *= splat(references_.lengths[j]);
        inner += dy * y;
        store<T>(row + d, dy);
      }
      if (p_.normalize) {
        through_unit_length(reference, references_.center, references_.lengths[j], width, row);
      }
      if (accumulate) {
        for (int64_t d = 0; d < p_.depth; ++d) result[d] += row[d];
      } else {
        store_row(row, p_.depth, result, 1);
      }
    }
    // Of the linear kernel, dk gives the same sum.
    const T products = gradient.scalars[1] + (gaussian_ ? sum_of<T>(inner) : T(0));
    if (results.bandwidth != nullptr) {
      put(gaussian_ ? -products / bandwidth : T(0), results.bandwidth);
    }
    put(gaussian_ ? -gradient.scalars[0] * bandwidth * bandwidth / epsilon : -products / epsilon,
        results.epsilon);
  }

 private:
  void multiply_centred(const Tile<T>& tile, T* scores) const {
    load_keys(tile);
    const Worker<T>& worker = tile.worker;
    multiply(Product<T>{worker.keys, widths_.depth, 1, references_.right, scores,
                        widths_.references, p_.depth, gaussian_ ? references_.norms : nullptr},
             tile.count, rows_.next_tile(tile.begin));
    if (gaussian_) {
      weighted_squares(worker.keys, tile.count, widths_.depth, references_.square_weights,
                       worker.norms);
    }
  }
  // Of keys and references as they are given: their products are exact, and are scaled
  // afterwards. worker.row_terms = 1 / length.
  void multiply_in_pairs(const Tile<T>& tile, T* scores) const {
    const Worker<T>& worker = tile.worker;
    const auto keys = rows_.pairs_along(tile.begin, tile.count, valid_, worker.key_pairs);
    multiply(Product<T, Pair>{keys.first, keys.stride, 1, references_.pairs, scores,
                              widths_.references, pairs_of(p_.depth)},
             tile.count, rows_.next_tile(tile.begin));
    T* squares = worker.norms;
    inner_products(keys, keys, tile.count, squares);
    const T c = gaussian_ ? -references_.square_weights[0] : T(0);
    for (int64_t i = 0; i < tile.count; ++i) {
      const T factor = p_.normalize ? 1 / length_of(squares[i]) : T(1);
      worker.row_terms[i] = factor;
      worker.norms[i] = -c * squares[i] * factor * factor;
    }
  }

  void multiply_gradient_in_pairs(const Tile<T>& tile, const Gradient& gradient,
                                  const Upcoming& upcoming) const {
    const Worker<T>& worker = tile.worker;
    const int64_t count = tile.count, columns = widths_.references, depth = widths_.depth;
    const RoundedMatrix e{worker.gradient, count, columns, worker.matrix_pairs};
    multiply(e, references_.row_pairs, p_.references, worker.grad_keys, depth,
             rows_.next_tile(tile.begin));
    store_pairs_across(worker.keys, count, depth, worker.key_pairs);
    add_transposed(e, as_it_is, worker.key_pairs, p_.references, gradient.references, depth,
                   upcoming);
  }

  // A bound of |<k, y>| over the valid keys, by Cauchy-Schwarz.
  T largest_product(const Worker<T>& worker) const {
    T key_square = 0;
    for (int64_t begin = 0, count; begin < tokens_.count; begin += count) {
      count = tokens_of_tile(tokens_.count - begin);
      load_keys({0, begin, count, worker});
      key_square = largest_square(worker.keys, count, key_square);
    }
    const T reference_square = largest_square(references_.rows, p_.references, 0);
    return T(__builtin_sqrt(double(key_square) * double(reference_square)));
  }

  // NaN where a row holds one.
  T largest_square(const T* rows, int64_t count, T largest) const {
    for (int64_t i = 0; i < count; ++i) {
      Vector<T> squares{};
      for (int64_t d = 0; d < widths_.depth; d += kLanes<T>) {
        const Vector<T> x = load(rows + i * widths_.depth + d);
        squares += x * x;
      }
      const T square = sum_of<T>(squares);
      largest = square <= largest ? largest : square;
      if (largest != largest) return largest;
    }
    return largest;
  }

  // log2 w_ij of a token for the references from j on: -|p_i - r_j|^2 log2(e) /
  // position_bandwidth^2.
  SETFORMER_INLINE Vector<T> position_exponent(int64_t token, int64_t j) const {
    const T* position = at<const T>(tokens_.positions, token);
    Vector<T> squares{};
    for (int64_t axis = 0; axis < p_.position_depth; ++axis) {
      const Vector<T> difference = splat(position[axis * tokens_.positions.stride[1]]) -
                                   load(references_.positions + axis * widths_.references + j);
      squares += difference * difference;
    }
    return squares * position_scale_;
  }

  // From k.(2 c y) - c |y|^2 (gaussian) or k.y (linear) to the scores of `Count` of a tile's rows.
  template <int Count>
  SETFORMER_INLINE void finish_rows(const Tile<T>& tile, int64_t row, T* scores, T* factors) const {
    // Local copies: the compiler then knows that stores to `score` do not change them.
    const int64_t columns = widths_.references;
    const bool gaussian = gaussian_, has_positions = has_positions_, log_domain = log_domain_;
    const Vector<T> scale = splat(scale_), shift = splat(shift_);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      T* score = scores + row * columns + j;
      // The similarity itself (gaussian) or the factor w_ij of the product (linear); first its
      // log2.
      Vector<T> x[Count], weight[Count] = {};
      SETFORMER_EACH x[i] = load(score + i * columns);
      if constexpr (kInPairs<Storage>) {
        const Vector<T> of_column = load(references_.column_scales + j);
        const Vector<T> term = load(references_.column_terms + j);
        SETFORMER_EACH x[i] = x[i] * (of_column * splat(tile.worker.row_terms[row + i])) + term;
      }
      if (gaussian) {
        SETFORMER_EACH weight[i] = x[i] + splat(tile.worker.norms[row + i]);
        // Rounding may leave a distance just below 0, but solving by scaling relies on S <= 1.
        SETFORMER_EACH weight[i] = at_most<T>(weight[i], Vector<T>{});
      }
      if (has_positions) {
        SETFORMER_EACH weight[i] += position_exponent(tile.begin + row + i, j);
      }
      if (gaussian || has_positions) {
        exp2_bounded<T>(weight);
      } else {
        SETFORMER_EACH weight[i] = splat(T(1));
      }
      if (factors != nullptr) {
        SETFORMER_EACH store<T>(factors + (row + i) * columns + j, weight[i]);
      }
      SETFORMER_EACH x[i] = gaussian ? weight[i] : x[i] * weight[i];
      SETFORMER_EACH x[i] = x[i] * scale - shift;
      if (!log_domain) exp2_in_range<T>(x);
      SETFORMER_EACH store<T>(score + i * columns, x[i]);
    }
  }

  const ForwardParams& p_;
  const Tokens tokens_;
  const int64_t b_, h_;
  const References<Storage>& references_;
  const Widths<T> widths_{p_};
  const TokenRows<Storage> rows_{tokens_.rows, b_, h_, p_.depth};
  const Validity valid_{tokens_.mask, b_};
  const bool gaussian_ = p_.kernel == Kernel::kGaussian;
  const bool has_positions_ =
      tokens_.positions.data != nullptr && p_.reference_positions.data != nullptr;
  bool log_domain_ = false;
  T scale_ = 1, shift_ = 0, position_scale_ = 0;
};

}  // namespace setformer::cpu::SETFORMER_ISA
