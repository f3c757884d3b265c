// Scores of tokens against the references of one head, a tile of tokens at a time, and their
// gradient.
//
// Keys and references are scaled to unit length where the problem asks for it. Gaussian ones are
// then centred on the mean reference: the expansion |k|^2 + |y|^2 - 2 k.y would otherwise cancel
// where the data lies far from the origin.
#pragma once

#include "../set_attention.h"
#include "gemm.h"
#include "scalar_types.h"
#include "tile_ops.h"
#include "workspace.h"

namespace setformer::cpu::SETFORMER_ISA {

// The tensor's elements from [i, j, 0, 0] on; null where the tensor is absent.
template <class Element>
SETFORMER_INLINE Element* at(const Tensor& tensor, int64_t i, int64_t j = 0) {
  if (tensor.data == nullptr) return nullptr;
  return static_cast<Element*>(tensor.data) + i * tensor.stride[0] + j * tensor.stride[1];
}

// Row widths in whole vectors.
template <class T>
struct Widths {
  int64_t references, depth, value_depth;

  explicit Widths(const ForwardParams& p)
      : references(round_up(p.references, kLanes<T>)),
        depth(round_up(p.depth, kLanes<T>)),
        value_depth(round_up(p.value_depth, kLanes<T>)) {}
};

// The tokens of one side: the keys, or the queries of cross attention.
struct Tokens {
  int64_t count = 0;
  Tensor rows;       // storage [B, H, count, D]
  Tensor mask;       // bool [B, count], optional
  Tensor positions;  // accumulate [count, P], optional
};

// The valid tokens of one batch item.
class Validity {
 public:
  Validity() = default;
  Validity(const Tensor& mask, int64_t b)
      : mask_(at<const bool>(mask, b)), stride_(mask.stride[1]) {}
  bool operator[](int64_t i) const { return mask_ == nullptr || mask_[i * stride_]; }

 private:
  const bool* mask_ = nullptr;
  int64_t stride_ = 0;
};

// Copies tokens [begin, begin + count) of tensor[b, h] into rows `width` apart, as accumulate type;
// invalid tokens and the padding become 0, whatever they hold.
template <class Storage, class T = Accumulate<Storage>>
void load_tokens(const Tensor& tensor, int64_t b, int64_t h, int64_t begin, int64_t count,
                 int64_t depth, const Validity& valid, T* rows, int64_t width) {
  const Storage* from = at<const Storage>(tensor, b, h) + begin * tensor.stride[2];
  for (int64_t i = 0; i < count; ++i, from += tensor.stride[2], rows += width) {
    if (valid[begin + i]) {
      load_row(from, tensor.stride[3], depth, rows, width);
    } else {
      fill(rows, width, T(0));
    }
  }
}

// The tile after the one that begins at `begin`.
template <class Storage>
Upcoming next_tile(const Tensor& tensor, int64_t b, int64_t h, int64_t begin, int64_t depth) {
  if (tensor.stride[3] != 1) return {};
  return {at<const Storage>(tensor, b, h), begin + kTileTokens, kTileTokens, tensor.stride[2],
          depth};
}

template <class Storage, class T = Accumulate<Storage>>
void store_tokens(const T* rows, int64_t width, const Tensor& tensor, int64_t b, int64_t h,
                  int64_t begin, int64_t count, int64_t depth) {
  Storage* to = at<Storage>(tensor, b, h) + begin * tensor.stride[2];
  for (int64_t i = 0; i < count; ++i, to += tensor.stride[2], rows += width) {
    store_row(rows, depth, to, tensor.stride[3]);
  }
}

// What one thread needs for the tile it is at.
template <class T>
struct TileBuffers {
  T* keys;     // [tile, depth] scaled, centred
  T* lengths;  // [tile] what keys were divided by, where they are scaled
  T* norms;    // [tile]
  T* scores;   // [tile, references]
  T* factors;  // [tile, references]

  void place(Arena& arena, const Widths<T>& widths) {
    keys = arena.take<T>(kMostTileTokens * widths.depth);
    lengths = arena.take<T>(kMostTileTokens);
    norms = arena.take<T>(kMostTileTokens);
    scores = arena.take<T>(kMostTileTokens * widths.references);
    factors = arena.take<T>(kMostTileTokens * widths.references);
  }
};

// Divides rows by their lengths.
template <class T>
void to_unit_length(T* rows, int64_t count, int64_t width, T* lengths) {
  T factors[kMostTileTokens];
  for (int64_t first = 0; first < count; first += kMostTileTokens) {
    const int64_t some = smaller(kMostTileTokens, count - first);
    row_sums(rows + first * width, some, width, rows + first * width, factors,
             [](Vector<T> x, Vector<T>) SETFORMER_LAMBDA { return x * x; });
    for (int64_t i = 0; i < some; ++i) {
      const T length = T(__builtin_sqrt(factors[i]));
      lengths[first + i] = length <= T(kShortest) ? T(1) : length;
      factors[i] = 1 / lengths[first + i];
    }
    scale_rows(rows + first * width, some, width, factors);
  }
}

// From the gradient by a row of unit length, u = centred + center, to that by the row itself:
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
  void place(Arena& arena, const ForwardParams& p, const Widths<T>& widths) {
    references_ = arena.take<T>(p.references * widths.depth);
    reference_lengths_ = arena.take<T>(p.references);
    center_ = arena.take<T>(widths.depth);
    square_weights_ = arena.take<T>(widths.depth);
    right_ = arena.take<T>(p.depth * widths.references);
    reference_norms_ = arena.take<T>(widths.references);
    reference_positions_ = arena.take<T>(p.position_depth * widths.references);
  }

  // Makes ready for head (b, h). `buffers` are any thread's, free for use.
  void prepare(const ForwardParams& p, const Widths<T>& widths, const Tokens& tokens, int64_t b,
               int64_t h, const TileBuffers<T>& buffers) {
    p_ = &p;
    widths_ = widths;
    tokens_ = &tokens;
    b_ = b;
    h_ = h;
    valid_ = Validity(tokens.mask, b);
    gaussian_ = p.kernel == Kernel::kGaussian;
    has_positions_ = tokens.positions.data != nullptr && p.reference_positions.data != nullptr;
    epsilon_ = at<const T>(p.epsilon, h)[0];
    bandwidth_ = p.bandwidth.data == nullptr ? T(1) : at<const T>(p.bandwidth, h)[0];
    scale_ = kLog2E / epsilon_;
    load_references();

    // Potentials are bounded by the range of S / epsilon: up to these ranges solving by scaling
    // cannot leave the exponents of the type (transport.h); all else, NaN included, takes the log
    // domain.
    const T largest = gaussian_ || p.normalize ? T(1) : largest_product(buffers);
    const T range = (gaussian_ ? T(1) : T(2) * largest) / epsilon_;
    log_domain_ = !(range <= (sizeof(T) == 4 ? T(32) : T(256)));
    // The ranks of a group must agree, whatever keys each has.
    if (p.group != nullptr && !gaussian_) log_domain_ = true;
    shift_ = gaussian_ && !log_domain_ ? scale_ / 2 : T(0);  // the middle of (0, 1 / epsilon]
  }

  // Solve in the log domain, or by scaling? Follows from the options and this head's data alone, in
  // a group from the options alone.
  bool log_domain() const { return log_domain_; }
  const Validity& valid() const { return valid_; }

  // buffers.keys = the tile's keys, scaled and centred.
  void load_keys(int64_t begin, int64_t count, const TileBuffers<T>& buffers) const {
    load_tokens<Storage>(tokens_->rows, b_, h_, begin, count, p_->depth, valid_, buffers.keys,
                         widths_.depth);
    if (p_->normalize) to_unit_length(buffers.keys, count, widths_.depth, buffers.lengths);
    if (!gaussian_) return;
    for (int64_t i = 0; i < count; ++i) {
      T* key = buffers.keys + i * widths_.depth;
      for (int64_t d = 0; d < widths_.depth; d += kLanes<T>) {
        store<T>(key + d, load(key + d) - load(center_ + d));
      }
    }
  }

  Upcoming next_keys(int64_t begin) const {
    return next_tile<Storage>(tokens_->rows, b_, h_, begin, p_->depth);
  }

  // scores[i][j] = 2^(s_ij - shift) for scaling, s_ij log2(e) for the log domain; factors[i][j]
  // (optional) = what dS_ij must be multiplied by, see add_gradient.
  void compute(int64_t begin, int64_t count, const TileBuffers<T>& buffers, T* scores,
               T* factors) const {
    load_keys(begin, count, buffers);
    const int64_t columns = widths_.references;
    multiply(count, columns, p_->depth, buffers.keys, widths_.depth, int64_t{1}, right_, columns,
             scores, columns, false, next_keys(begin));
    if (gaussian_) {
      weighted_squares(buffers.keys, count, widths_.depth, square_weights_, buffers.norms);
    }
    int64_t i = 0;
    for (; i + kPack <= count; i += kPack) finish_rows<kPack>(begin, i, buffers, scores, factors);
    for (; i < count; ++i) finish_rows<1>(begin, i, buffers, scores, factors);
  }

  // With E_ij = ds_ij factors_ij gradient_scale():
  //   gaussian  dk_i = sum_j E_ij (y_j - k_i),  dy_j = sum_i E_ij (k_i - y_j)
  //   linear    dk_i = sum_j E_ij y_j,          dy_j = sum_i E_ij k_i
  T gradient_scale() const {
    return gaussian_ ? 1 / (epsilon_ * bandwidth_ * bandwidth_) : 1 / epsilon_;
  }

  // Sums over tokens, of a span or of all.
  struct Gradient {
    T* references;  // [M, depth] sum_i E_ij k_i
    T* columns;     // [references] sum_i E_ij
    T* scalars;     // [2] sum_ij E_ij, sum_i <k_i, dk_i>
  };

  // Adds the tile's share to `gradient` and writes dk to `grad_keys` [tile, depth]; buffers.keys
  // must hold the tile's keys. `row_totals` [tile] is scratch.
  void add_gradient(int64_t begin, int64_t count, const TileBuffers<T>& buffers, const T* e,
                    T* row_totals, T* grad_keys, const Gradient& gradient,
                    const Upcoming& upcoming) const {
    const int64_t columns = widths_.references, depth = widths_.depth;
    multiply(count, depth, p_->references, e, columns, int64_t{1}, references_, depth, grad_keys,
             depth, false, next_keys(begin));
    multiply(p_->references, depth, count, e, int64_t{1}, columns, buffers.keys, depth,
             gradient.references, depth, true, upcoming);
    if (gaussian_) {
      T ones[kMostTileTokens];
      fill(ones, kMostTileTokens, T(1));
      add_transposed_product(e, count, columns, ones, gradient.columns);
      row_sums(e, count, columns, row_totals);
      for (int64_t i = 0; i < count; ++i) {
        const Vector<T> row_total = splat(row_totals[i]);
        for (int64_t d = 0; d < depth; d += kLanes<T>) {
          const int64_t at = i * depth + d;
          store<T>(grad_keys + at, load(grad_keys + at) - row_total * load(buffers.keys + at));
        }
        gradient.scalars[0] += row_totals[i];
      }
    }
    Vector<T> products{};
    for (int64_t at = 0; at < count * depth; at += kLanes<T>) {
      products += load(grad_keys + at) * load(buffers.keys + at);
    }
    gradient.scalars[1] += sum_of<T>(products);
  }

  // From dk of scaled keys to that of the keys as they were given.
  void finish_gradient(int64_t count, const TileBuffers<T>& buffers, T* grad_keys) const {
    if (!p_->normalize) return;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * widths_.depth;
      through_unit_length(buffers.keys + at, center_, buffers.lengths[i], widths_.depth,
                          grad_keys + at);
    }
  }

  // Where the gradient of one head goes.
  struct Results {
    T* reference;  // [M, D]
    T* bandwidth;  // optional
    T* epsilon;
  };

  // From the sums of add_gradient over all tokens, which it overwrites. E is homogeneous in k and
  // y, so that
  //   gaussian  dL/dbandwidth = sum E |k - y|^2 / bandwidth = -(sum <k, dk> + sum <y, dy>) /
  //   bandwidth
  //             dL/depsilon   = -sum E bandwidth^2 / epsilon
  //   linear    dL/depsilon   = -sum <k, dk> / epsilon
  void store_gradient(const Gradient& gradient, const Results& results, bool accumulate) const {
    const auto put = [accumulate](T value, T* to) { *to = accumulate ? *to + value : value; };
    T products = gradient.scalars[1];
    for (int64_t j = 0; j < p_->references; ++j) {
      const T* reference = references_ + j * widths_.depth;
      T* row = gradient.references + j * widths_.depth;
      for (int64_t d = 0; gaussian_ && d < p_->depth; ++d) {
        row[d] -= gradient.columns[j] * reference[d];
        products += row[d] * reference[d];
      }
      if (p_->normalize) {
        through_unit_length(reference, center_, reference_lengths_[j], widths_.depth, row);
      }
      for (int64_t d = 0; d < p_->depth; ++d) put(row[d], results.reference + j * p_->depth + d);
    }
    if (results.bandwidth != nullptr) {
      put(gaussian_ ? -products / bandwidth_ : T(0), results.bandwidth);
    }
    put(gaussian_ ? -gradient.scalars[0] * bandwidth_ * bandwidth_ / epsilon_
                  : -products / epsilon_,
        results.epsilon);
  }

 private:
  static constexpr T kLog2E = T(1.4426950408889634074);

  void load_references() {
    const int64_t count = p_->references, depth = p_->depth, width = widths_.depth;
    load_tokens<Storage>(p_->reference, b_, h_, 0, count, depth, Validity(), references_, width);
    if (p_->normalize) to_unit_length(references_, count, width, reference_lengths_);
    fill(center_, width, T(0));
    fill(reference_norms_, widths_.references, T(0));
    // In base 2: -|k - y|^2 c = k.(2 c y) - c |k|^2 - c |y|^2 with c = log2(e) / (2 bandwidth^2).
    T factor = 1;
    if (gaussian_) {
      const T c = kLog2E / (2 * bandwidth_ * bandwidth_);
      factor = 2 * c;
      fill(square_weights_, width, -c);
      center_references();
      for (int64_t j = 0; j < count; j += kMostTileTokens) {
        T norms[kMostTileTokens];
        const int64_t rows = smaller(kMostTileTokens, count - j);
        weighted_squares(references_ + j * width, rows, width, square_weights_, norms);
        for (int64_t i = 0; i < rows; ++i) reference_norms_[j + i] = norms[i];
      }
    }
    for (int64_t d = 0; d < depth; ++d) {
      T* row = right_ + d * widths_.references;
      for (int64_t j = 0; j < count; ++j) row[j] = factor * references_[j * width + d];
      fill(row + count, widths_.references - count, T(0));
    }
    if (!has_positions_) return;
    fill(reference_positions_, p_->position_depth * widths_.references, T(0));
    for (int64_t axis = 0; axis < p_->position_depth; ++axis) {
      for (int64_t j = 0; j < count; ++j) {
        reference_positions_[axis * widths_.references + j] =
            at<const T>(p_->reference_positions, j, axis)[0];
      }
    }
    position_scale_ = T(-kLog2E / (p_->position_bandwidth * p_->position_bandwidth));
  }

  void center_references() {
    const int64_t width = widths_.depth;
    for (int64_t d = 0; d < width; d += kLanes<T>) {
      Vector<T> sum{};
      for (int64_t j = 0; j < p_->references; ++j) sum += load(references_ + j * width + d);
      const Vector<T> mean = sum / T(p_->references);
      store<T>(center_ + d, mean);
      for (int64_t j = 0; j < p_->references; ++j) {
        store<T>(references_ + j * width + d, load(references_ + j * width + d) - mean);
      }
    }
  }

  // A bound of |<k, y>| over the valid keys, by Cauchy-Schwarz.
  T largest_product(const TileBuffers<T>& buffers) const {
    T ones[kMostTileTokens];
    fill(ones, kMostTileTokens, T(1));
    T key_square = 0, reference_square = 0;
    for (int64_t begin = 0, count; begin < tokens_->count; begin += count) {
      count = tokens_of_tile(tokens_->count - begin);
      load_keys(begin, count, buffers);
      key_square = largest_square(buffers.keys, count, key_square);
    }
    reference_square = largest_square(references_, p_->references, reference_square);
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
    const T* position = at<const T>(tokens_->positions, token);
    Vector<T> squares{};
    for (int64_t axis = 0; axis < p_->position_depth; ++axis) {
      const Vector<T> difference = splat(position[axis * tokens_->positions.stride[1]]) -
                                   load(reference_positions_ + axis * widths_.references + j);
      squares += difference * difference;
    }
    return squares * position_scale_;
  }

  // From the products k.(2 c y) (gaussian) or k.y (linear) to the scores of `Count` of a tile's
  // rows.
  template <int Count>
  SETFORMER_INLINE void finish_rows(int64_t begin, int64_t row, const TileBuffers<T>& buffers,
                                    T* scores, T* factors) const {
    // Copies, which no store to `score` can change.
    const int64_t columns = widths_.references;
    const bool gaussian = gaussian_, has_positions = has_positions_, log_domain = log_domain_;
    const Vector<T> scale = splat(scale_), shift = splat(shift_);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      T* score = scores + row * columns + j;
      T* factor = factors == nullptr ? nullptr : factors + row * columns + j;
      Vector<T> x[Count];
      SETFORMER_EACH x[i] = load(score + i * columns);
      if (gaussian) {
        const Vector<T> reference_norm = load(reference_norms_ + j);
        SETFORMER_EACH x[i] += reference_norm + splat(buffers.norms[row + i]);
        // Rounding may leave a distance just below 0, but S <= 1 is what makes scaling safe.
        SETFORMER_EACH x[i] = at_most<T>(x[i], Vector<T>{});
        if (has_positions) {
          SETFORMER_EACH x[i] += position_exponent(begin + row + i, j);
        }
        exp2_bounded<T>(x);
        if (factor != nullptr) {
          SETFORMER_EACH store<T>(factor + i * columns, x[i]);
        }
      } else {
        Vector<T> weight[Count];
        SETFORMER_EACH weight[i] = splat(T(1));
        if (has_positions) {
          SETFORMER_EACH weight[i] = position_exponent(begin + row + i, j);
          exp2_bounded<T>(weight);
          SETFORMER_EACH x[i] *= weight[i];
        }
        if (factor != nullptr) {
          SETFORMER_EACH store<T>(factor + i * columns, weight[i]);
        }
      }
      SETFORMER_EACH x[i] = x[i] * scale - shift;
      if (!log_domain) exp2_in_range<T>(x);
      SETFORMER_EACH store<T>(score + i * columns, x[i]);
    }
  }

  const ForwardParams* p_ = nullptr;
  Widths<T> widths_{ForwardParams{}};
  const Tokens* tokens_ = nullptr;
  int64_t b_ = 0, h_ = 0;
  Validity valid_;
  bool gaussian_ = true, has_positions_ = false, log_domain_ = false;
  T bandwidth_ = 1, epsilon_ = 1, scale_ = 1, shift_ = 0, position_scale_ = 0;

  T* references_ = nullptr;           // [M, depth] y, scaled, centred
  T* reference_lengths_ = nullptr;    // [M] what they were divided by, where they are scaled
  T* center_ = nullptr;               // [depth] 0 for the linear kernel
  T* square_weights_ = nullptr;       // [depth] -c
  T* right_ = nullptr;                // [D, references] 2 c y transposed (gaussian), y (linear)
  T* reference_norms_ = nullptr;      // [references] -c |y_j|^2
  T* reference_positions_ = nullptr;  // [P, references]
};

}  // namespace setformer::cpu::SETFORMER_ISA
