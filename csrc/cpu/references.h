// The references of one head, prepared for the solves of its keys and its queries: all that does
// not depend on the tokens. Samples that share learned references share what is prepared.
#pragma once

#include "tokens.h"
#include "workspace.h"

namespace setformer::cpu::SETFORMER_ISA {

inline constexpr double kLog2E = 1.4426950408889634074;

// What a row with this |x|^2 is divided by to have unit length.
template <class T>
T length_of(T square) {
  const T length = T(__builtin_sqrt(square));
  return length <= T(kShortest) ? T(1) : length;
}
// The same of rows; whole vectors are stored to `lengths`.
template <class T>
void lengths_of(const T* rows, int64_t count, int64_t width, T* lengths) {
  row_sums(rows, count, width, rows, lengths,
           [](Vector<T> x, Vector<T>) SETFORMER_LAMBDA { return x * x; });
  for (int64_t i = 0; i < count; ++i) lengths[i] = length_of(lengths[i]);
}

template <class Storage>
class References {
  using T = Accumulate<Storage>;

 public:
  T bandwidth = 1, epsilon = 1;
  // In base 2: -|k - y|^2 c = k.(2 c y) - c |k|^2 - c |y|^2 with c = log2(e) / (2 bandwidth^2).
  T* rows = nullptr;            // [M, depth] y, scaled, centred
  T* lengths = nullptr;         // [references] what they were divided by
  T* center = nullptr;          // [depth] 0 for the linear kernel
  T* square_weights = nullptr;  // [depth] -c
  T* right = nullptr;           // [D, references] 2 c y transposed (gaussian), y (linear)
  T* norms = nullptr;           // [references] -c |y_j|^2
  // Of products in pairs, whose factors are rows as they are given:
  Pair* row_pairs = nullptr;     // [pairs_of(M), depth]
  Pair* pairs = nullptr;         // [pairs_of(D), references]
  T* inverse_lengths = nullptr;  // [references]
  T* column_scales = nullptr;    // [references] 2 c / length (gaussian), 1 / length (linear)
  T* column_terms = nullptr;     // [references] -c |y_j|^2, scaled but not centred (gaussian), 0
  T* positions = nullptr;        // [P, references]
  T* b = nullptr;                // [references] the marginal b, 0 in the padding
  T* log2_b = nullptr;           // [references] -inf in the padding
  T total_mass = 0;              // of the masses as given

  void place(Arena& arena, const ForwardParams& p) {
    const Widths<T> widths(p);
    rows = arena.take<T>(p.references * widths.depth);
    lengths = arena.take<T>(widths.references);
    center = arena.take<T>(widths.depth);
    square_weights = arena.take<T>(widths.depth);
    right = arena.take<T>(p.depth * widths.references);
    norms = arena.take<T>(widths.references);
    if constexpr (kInPairs<Storage>) {
      row_pairs = arena.take<Pair>(pairs_of(p.references) * widths.depth);
      pairs = arena.take<Pair>(pairs_of(p.depth) * widths.references);
      inverse_lengths = arena.take<T>(widths.references);
      column_scales = arena.take<T>(widths.references);
      column_terms = arena.take<T>(widths.references);
    }
    positions = arena.take<T>(p.position_depth * widths.references);
    b = arena.take<T>(widths.references);
    log2_b = arena.take<T>(widths.references);
  }

  // Those of head h of sample b.
  Status prepare(const ForwardParams& p, int64_t sample, int64_t h) {
    const Status status = load_marginal(p, at<const T>(p.reference_mass, sample, h));
    if (status != Status::kOk) return status;
    const auto is_good = [](T x) { return x > 0 && __builtin_isfinite(x); };
    if (p.bandwidth.data != nullptr) bandwidth = *at<const T>(p.bandwidth, h);
    if (!is_good(bandwidth)) return Status::kNonPositiveBandwidth;
    epsilon = *at<const T>(p.epsilon, h);
    if (!is_good(epsilon)) return Status::kNonPositiveEpsilon;
    load_rows(p, sample, h);
    if (p.reference_positions.data != nullptr) load_positions(p);
    return Status::kOk;
  }

  // Do all samples have the same?
  static bool are_shared(const ForwardParams& p) {
    return p.batch > 1 && p.reference.stride[0] == 0 && p.reference_mass.stride[0] == 0;
  }

 private:
  // b from the references' masses; uniform where none are given.
  Status load_marginal(const ForwardParams& p, const T* mass) {
    const int64_t count = p.references, width = Widths<T>(p).references;
    const auto given = [&](int64_t j) {
      return mass == nullptr ? T(1) : mass[j * p.reference_mass.stride[2]];
    };
    double total = 0;
    fill(b, width, T(0));
    for (int64_t j = 0; j < count; ++j) {
      b[j] = given(j);
      if (b[j] <= T(0)) return Status::kNonPositiveReferenceMass;
      total += double(b[j]);
    }
    total_mass = T(total);
    for (int64_t j = 0; j < count; ++j) b[j] = T(double(b[j]) / total);
    for (int64_t j = 0; j < width; j += kLanes<T>) store<T>(log2_b + j, log2<T>(load(b + j)));
    // The fast log2 gives -inf below the smallest normal number of T, but large similarities can
    // make even such a b count.
    for (int64_t j = 0; j < count; ++j) {
      if (b[j] >= kSmallestNormal<T>) continue;
      log2_b[j] = T(__builtin_log2(double(given(j))) - __builtin_log2(total));
    }
    return Status::kOk;
  }

  void load_rows(const ForwardParams& p, int64_t sample, int64_t h) {
    const int64_t count = p.references, depth = p.depth;
    const Widths<T> widths(p);
    TokenRows<Storage>(p.reference, sample, h, depth).load(0, count, Validity(), rows);
    if (p.normalize) {
      lengths_of(rows, count, widths.depth, lengths);
    } else {
      fill(lengths, widths.references, T(1));
    }
    if constexpr (kInPairs<Storage>) load_pairs(p);
    if (p.normalize) {
      for (int64_t j = 0; j < count; ++j) {
        const T factor = 1 / lengths[j];
        scale_rows(rows + j * widths.depth, 1, widths.depth, &factor);
      }
    }
    fill(center, widths.depth, T(0));
    T factor = 1;
    if (p.kernel == Kernel::kGaussian) {
      const T c = T(kLog2E) / (2 * bandwidth * bandwidth);
      factor = 2 * c;
      fill(square_weights, widths.depth, -c);
      center_rows(count, widths.depth);
      weighted_squares(rows, count, widths.depth, square_weights, norms);
    }
    fill(norms + count, widths.references - count, T(0));
    for (int64_t d = 0; d < depth; ++d) {
      T* row = right + d * widths.references;
      for (int64_t j = 0; j < count; ++j) row[j] = factor * rows[j * widths.depth + d];
      fill(row + count, widths.references - count, T(0));
    }
  }

  // From the rows as they are given: these are of bfloat16, so that their upper halves are all.
  void load_pairs(const ForwardParams& p) {
    const int64_t count = p.references, depth = p.depth;
    const Widths<T> widths(p);
    const T c = T(kLog2E) / (2 * bandwidth * bandwidth);
    const bool gaussian = p.kernel == Kernel::kGaussian;
    store_pairs_across(rows, count, widths.depth, row_pairs);
    for (int64_t j = 0; j < count; ++j) {
      const T* row = rows + j * widths.depth;
      const T factor = inverse_lengths[j] = 1 / lengths[j];
      column_scales[j] = gaussian ? 2 * c * factor : factor;
      column_terms[j] = gaussian ? -c * dot(row, row, widths.depth) * factor * factor : T(0);
      for (int64_t d = 0; d < depth; d += 2) {
        const auto bits = [&](int64_t at) { return bit_cast<uint32_t>(row[at]) >> 16; };
        const Pair second = d + 1 < depth ? bits(d + 1) : 0;
        pairs[d / 2 * widths.references + j] = bits(d) | second << 16;
      }
    }
    for (int64_t j = count; j < widths.references; ++j) {
      column_scales[j] = column_terms[j] = inverse_lengths[j] = T(0);
      lengths[j] = T(0);
      for (int64_t d = 0; d < pairs_of(depth); ++d) pairs[d * widths.references + j] = 0;
    }
  }

  void center_rows(int64_t count, int64_t width) {
    for (int64_t d = 0; d < width; d += kLanes<T>) {
      Vector<T> sum{};
      for (int64_t j = 0; j < count; ++j) sum += load(rows + j * width + d);
      const Vector<T> mean = sum / T(count);
      store<T>(center + d, mean);
      for (int64_t j = 0; j < count; ++j) {
        store<T>(rows + j * width + d, load(rows + j * width + d) - mean);
      }
    }
  }

  void load_positions(const ForwardParams& p) {
    const int64_t width = Widths<T>(p).references;
    for (int64_t axis = 0; axis < p.position_depth; ++axis) {
      load_row(at<const T>(p.reference_positions, 0, axis), p.reference_positions.stride[0],
               p.references, positions + axis * width, width);
    }
  }
};

}  // namespace setformer::cpu::SETFORMER_ISA
