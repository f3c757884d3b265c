// The gradient through one side of the problem (keys, or queries of cross attention): the exact
// gradient of the T unrolled steps.
//
// With R the distribution and C^t the collection of step t, G_ij = dO_i.A_j and H_ij = v_i.dA_j:
//
//   distribute  dA_j = sum_i R_ij dO_i                 delta_i = dO_i.O_i
//               ds  += R (G - delta_i)                 gbar_j  = sum_i R_ij (G_ij - delta_i)
//   collect     dv_i = sum_j C_ij dA_j                 eta_j   = dA_j.A_j
//               ds  += C (H - eta_j)                   fbar_i  = sum_j C_ij (H_ij - eta_j)
//   t = T..1    ds  -= C^t_ij gbar_j                   fbar_i -= sum_j C^t_ij gbar_j
//               ds  -= R^{t-1}_ij fbar_i               gbar_j  = -sum_i R^{t-1}_ij fbar_i, fbar = 0
//
// No term needs G or H as a matrix of its own: gbar_j = dA_j.A_j - sum_i R_ij delta_i and
// fbar_i = v_i.dv_i - sum_j C_ij eta_j. And since every plan is the same matrix K with factors per
// row and column (scaling form), all of ds is one product of inner depth 2 Dv + 2 + 2 T,
//
// clang-format off
//   ds = K * (left right),  left  [N, L]: v a r_C | -a r_C | a r_C^t..      | dO r_R | -delta r_R | h^t..
//                           right [L, M]: dA c_C  | eta c_C | -gbar c_C^t.. | A c_R  | c_R        | -c_R^t..
// clang-format on
//
// computed a tile at a time in the last pass. In the log domain these columns are used in groups,
// one group per plan. f enters as fhat = fbar / a, which is the step's dL/da_i and finite where a_i
// = 0.
#pragma once

#include "head.h"

namespace setformer::cpu::SETFORMER_ISA {

// The columns of `left` (rows of `right`) that belong to one plan.
struct Group {
  int64_t offset, depth;
};

// Where each plan's columns are. The columns of collection(T) for H and for gbar are next to each
// other. A side that does not collect (queries) has none for H; one that does not distribute (keys
// of cross attention) has none for R^T.
struct Columns {
  int64_t value_depth, steps;
  bool collects, distributes;

  int64_t collect() const { return 0; }
  int64_t step(int64_t t) const { return (collects ? value_depth + 1 : 0) + (steps - t); }
  int64_t distribute() const { return step(0); }
  int64_t row_step(int64_t t) const {
    return distribute() + (distributes ? value_depth + 1 : 0) + (steps - t);
  }
  int64_t total() const { return row_step(0); }

  // The plans, in the order of their columns.
  Group collection(int64_t t) const {
    if (t == steps) return {0, step(t) + (t > 0 ? 1 : 0)};
    return {step(t), 1};
  }
  Group distribution(int64_t t) const {
    if (t == steps) return {distribute(), distributes ? value_depth + 1 : 0};
    return {row_step(t + 1), 1};
  }
};

// One side of the problem in backward: its solve and the gradient through it.
template <class Storage>
class SideGradient {
  using T = Accumulate<Storage>;

 public:
  // The references' outputs A, the gradient dA, and the inner products of both.
  struct Pooled {
    T* values;    // [M, value_depth] A
    T* gradient;  // [M, value_depth] dA
    T* eta;       // [references] dA_j.A_j
  };

  // `transport` is this side's solve of head (b, h).
  SideGradient(const BackwardParams& p, int64_t b, int64_t h, Transport<Storage>& transport,
               const Tensor& grad_tokens, bool collects, bool distributes)
      : p_(p),
        values_(p.value, b, h, p.value_depth),
        outputs_(p.output, b, h, p.value_depth),
        grad_outputs_(p.grad_output, b, h, p.value_depth),
        grad_values_(p.grad_value, b, h, p.value_depth),
        grad_tokens_(grad_tokens, b, h, p.depth),
        collects_(collects),
        distributes_(distributes),
        transport_(transport),
        widths_(p),
        columns_{p.value_depth, p.iterations, collects, distributes} {}

  void place(Arena& arena) {
    const Spans& spans = transport_.spans();
    right_ = arena.take<T>(columns_.total() * widths_.references);
    if constexpr (kInPairs<Storage>) {
      right_pairs_ = arena.take<Pair>(2 * pairs_of(p_.value_depth) * widths_.references);
      gradient_pairs_ = arena.take<Pair>(pairs_of(p_.references) * widths_.value_depth);
    }
    factors_ = arena.take<T>(widths_.references);
    gbar_ = arena.take<T>(widths_.references);
    weights_ = arena.take<T>(widths_.references);
    delta_ = arena.take<T>(spans.tokens);
    row_adjoints_ = arena.take<T>(p_.iterations * spans.tokens);
    da_ = arena.take<T>(spans.tokens);
    sums_.place(arena, spans, widths_.references);
    matrix_sums_.place(arena, spans, p_.references * larger(widths_.value_depth, widths_.depth));
    scalar_sums_.place(arena, spans, 2);
  }

  void begin() {
    transport_.normalize_masses();
    fill(gbar_, widths_.references, T(0));
    fill(da_, transport_.spans().tokens, T(0));
    if (!transport_.empty()) transport_.restore_potentials();
  }

  // Sums of a pass over the tokens: [M], and for distribute also [M, value_depth]. Those of other
  // ranks may be merged into them before the pass's finish_ function is called.
  T* sums() const { return sums_.of(0); }
  T* matrix_sums() const { return matrix_sums_.of(0); }

  // Backward through distribute; finish_distribute then adds to pooled.gradient and sets gbar.
  void distribute(const Team<T>& team) {
    const int64_t depth = widths_.value_depth, steps = p_.iterations;
    transport_.sum_pass(team, {&sums_, &matrix_sums_}, [&](const Tile<T>& tile, const T* scores) {
      const Worker<T>& worker = tile.worker;
      const T* matrix = transport_.distribution(steps, tile, scores);
      if constexpr (kInPairs<Storage>) return distribute_in_pairs(tile, matrix);
      load_rows(grad_outputs_, tile, worker.values);
      load_rows(outputs_, tile, worker.outputs);
      Upcoming outputs = outputs_.next_tile(tile.begin);
      T* delta = delta_ + tile.begin;
      for (int64_t i = 0; i < tile.count; ++i) {
        outputs.ask_for(1);
        delta[i] = dot(worker.values + i * depth, worker.outputs + i * depth, depth);
        worker.row_terms[i] = delta[i] * worker.row_factors[i];
      }
      scale_rows(worker.values, tile.count, depth, worker.row_factors);
      multiply(p_.references, depth, tile.count, matrix, 1, widths_.references, worker.values,
               matrix_sums_.of(tile.span), true, grad_outputs_.next_tile(tile.begin));
      add_transposed_product(matrix, tile.count, widths_.references, worker.row_terms,
                             sums_.of(tile.span));
    });
  }
  void finish_distribute(const Pooled& pooled) {
    const int64_t depth = widths_.value_depth;
    T* grad = matrix_sums();  // dA before its column factors
    const T* delta_sums = sums();
    transport_.distribution_columns(p_.iterations, factors_);
    scale_rows(grad, p_.references, depth, factors_);
    for (int64_t j = 0; j < p_.references; ++j) {
      const T* values = pooled.values + j * depth;
      gbar_[j] = dot(grad + j * depth, values, depth) - delta_sums[j] * factors_[j];
      for (int64_t c = 0; c < depth; ++c) pooled.gradient[j * depth + c] += grad[j * depth + c];
    }
    T* ones = set_right(columns_.distribute(), pooled.values, factors_);
    for (int64_t j = 0; j < widths_.references; ++j) ones[j] = factors_[j];
  }

  // Backward through step t: T..1, or 0 if T = 0. The call for t = T also goes through collect, if
  // this side collects. Adds dlog b to `grad_log_b`.
  void step(int64_t t, const Team<T>& team, const Pooled& pooled, T* grad_log_b) {
    if (t == 0) fill(gbar_, widths_.references, T(0));  // g^0 = 0 depends on nothing
    const bool collects = collects_ && t == p_.iterations;
    contracts_ = !collects;
    transport_.collection_columns(t, factors_);
    if (collects) scale_pooled(pooled);
    for (int64_t j = 0; j < widths_.references; ++j) {
      const T gbar = gbar_[j] * factors_[j];
      weights_[j] = collects ? pooled.eta[j] + gbar : gbar;
      if (t > 0) right(columns_.step(t))[j] = -gbar;
      grad_log_b[j] += gbar_[j];
    }
    if (t > 0) {
      transport_.distribution_columns(t - 1, factors_);
      for (int64_t j = 0; j < widths_.references; ++j) {
        right(columns_.row_step(t))[j] = -factors_[j];
      }
    }
    transport_.sum_pass(team, {&sums_}, [&](const Tile<T>& tile, const T* scores) {
      step_of_tile(t, collects, tile, scores, pooled);
    });
  }
  // Except in the step that collects, sum_j |gbar_j| cannot grow: the rows of R and columns of C
  // sum to 1. With very large potentials rounding breaks this, and gbar would overflow after
  // hundreds of steps; therefore any growth is divided out.
  void finish_step() {
    T before = 0, after = 0;
    for (int64_t j = 0; j < p_.references; ++j) before += __builtin_fabs(gbar_[j]);
    for (int64_t j = 0; j < widths_.references; ++j) gbar_[j] = -factors_[j] * sums()[j];
    for (int64_t j = 0; j < p_.references; ++j) after += __builtin_fabs(gbar_[j]);
    if (!contracts_ || !(after > T(1.001) * before)) return;
    const T scale = before / after;
    for (int64_t j = 0; j < widths_.references; ++j) gbar_[j] *= scale;
  }

  // Computes ds, and from it the gradients of the tokens and of `results`.
  void finish(const Team<T>& team, const typename Similarity<Storage>::Results& results,
              bool accumulate) {
    const Similarity<Storage>& similarity = transport_.similarity();
    if constexpr (kInPairs<Storage>) pack_right();
    const auto body = [&](const Tile<T>& tile, const T* scores) {
      fill_left(tile);
      score_gradient(tile, scores);
      if (!transport_.keys_loaded(tile)) similarity.load_keys(tile);
      similarity.add_gradient(tile, sums_of(tile.span), grad_outputs_.next_tile(tile.begin));
      similarity.finish_gradient(tile);
      grad_tokens_.store(tile.begin, tile.count, tile.worker.grad_keys);
    };
    transport_.sum_pass(team, {&sums_, &matrix_sums_, &scalar_sums_}, body);
    similarity.store_gradient(sums_of(0), results, accumulate);
  }

  // dmass_i = da_i / total mass, 0 for masked tokens. The division by the total mass would add a
  // term with sum_i a_i da_i, but that sum is 0: a factor common to all of a changes no result.
  void store_mass_gradient(T* grad_mass) const {
    for (int64_t i = 0; i < transport_.spans().tokens; ++i) {
      const bool valid = transport_.similarity().valid()[i];
      grad_mass[i] = valid ? T(double(da_[i]) / transport_.total_mass()) : T(0);
    }
  }

 private:
  void distribute_in_pairs(const Tile<T>& tile, const T* matrix) const {
    const Worker<T>& worker = tile.worker;
    const Validity& valid = transport_.similarity().valid();
    const int64_t columns = widths_.references;
    T* delta = delta_ + tile.begin;
    T products[kMostTileTokens];
    inner_products(grad_outputs_.pairs_along(tile.begin, tile.count, valid, worker.value_pairs),
                   outputs_.pairs_along(tile.begin, tile.count, valid, worker.output_pairs),
                   tile.count, products);
    for (int64_t i = 0; i < tile.count; ++i) {
      delta[i] = products[i];
      worker.row_terms[i] = delta[i] * worker.row_factors[i];
    }
    grad_outputs_.load_pairs_across(tile.begin, tile.count, valid, worker.value_pairs);
    add_transposed(
        {matrix, tile.count, columns, worker.matrix_pairs},
        [&](int64_t i) { return worker.row_factors[i]; }, worker.value_pairs, p_.references,
        matrix_sums_.of(tile.span), widths_.value_depth, grad_outputs_.next_tile(tile.begin));
    add_transposed_product(matrix, tile.count, columns, worker.row_terms, sums_.of(tile.span));
  }
  T* right(int64_t column) const { return right_ + column * widths_.references; }
  // dA and eta times factors_, and the columns of `right` that are made of them. Products in pairs
  // round dA: eta must be that of the rounded one, for gradients are differences of both.
  void scale_pooled(const Pooled& pooled) const {
    const int64_t depth = widths_.value_depth;
    scale_rows(pooled.gradient, p_.references, depth, factors_);
    if constexpr (kInPairs<Storage>) {
      round_to_bfloat16(pooled.gradient, p_.references * depth);
      store_pairs_across(pooled.gradient, p_.references, depth, gradient_pairs_);
    }
    for (int64_t j = 0; j < p_.references; ++j) {
      const int64_t row = j * depth;
      pooled.eta[j] = kInPairs<Storage> ? dot(pooled.values + row, pooled.gradient + row, depth)
                                        : pooled.eta[j] * factors_[j];
    }
    T* eta = set_right(columns_.collect(), pooled.gradient);
    for (int64_t j = 0; j < widths_.references; ++j) eta[j] = pooled.eta[j];
  }
  // Sets columns of `right`, from `first` on, to rows [M, value_depth], times factors if given;
  // returns the column after them.
  T* set_right(int64_t first, const T* rows, const T* factors = nullptr) const {
    for (int64_t c = 0; c < p_.value_depth; ++c) {
      T* column = right(first + c);
      for (int64_t j = 0; j < p_.references; ++j) {
        const T x = rows[j * widths_.value_depth + c];
        column[j] = factors == nullptr ? x : x * factors[j];
      }
      fill(column + p_.references, widths_.references - p_.references, T(0));
    }
    return right(first + p_.value_depth);
  }
  typename Similarity<Storage>::Gradient sums_of(int64_t span) const {
    return {matrix_sums_.of(span), sums_.of(span), scalar_sums_.of(span)};
  }
  void load_rows(const TokenRows<Storage>& rows, const Tile<T>& tile, T* to) const {
    rows.load(tile.begin, tile.count, transport_.similarity().valid(), to);
  }

  // Step t of one tile: fhat, da, h and the tile's share of the next gbar. If it collects also dv,
  // for which pooled.gradient must already be scaled by the column factors.
  void step_of_tile(int64_t t, bool collects, const Tile<T>& tile, const T* scores,
                    const Pooled& pooled) const {
    const Worker<T>& worker = tile.worker;
    const int64_t count = tile.count, depth = widths_.value_depth;
    const T* a = transport_.a() + tile.begin;
    const T* matrix = transport_.collection(t, tile, scores);
    T* fhat = worker.row_terms;
    if (kInPairs<Storage> && collects) {  // of the same rounded matrix as dv
      multiply_rounded_vector(matrix, count, widths_.references, weights_, fhat);
    } else {
      multiply_vector(matrix, count, widths_.references, weights_, fhat);
    }
    if (collects) {
      load_rows(values_, tile, worker.values);
      if constexpr (kInPairs<Storage>) {
        multiply({matrix, count, widths_.references, worker.matrix_pairs}, gradient_pairs_,
                 p_.references, worker.outputs, depth, values_.next_tile(tile.begin));
      } else {
        multiply(count, depth, p_.references, matrix, widths_.references, 1, pooled.gradient,
                 worker.outputs, false, values_.next_tile(tile.begin));
      }
      for (int64_t i = 0; i < count; ++i) {
        fhat[i] -= dot(worker.values + i * depth, worker.outputs + i * depth, depth);
      }
    }
    for (int64_t i = 0; i < count; ++i) fhat[i] *= -worker.row_factors[i];
    if (collects) {
      for (int64_t i = 0; i < count; ++i) worker.row_factors[i] *= a[i];
      grad_values_.store_scaled(tile.begin, count, Validity(), worker.row_factors, worker.outputs);
    }
    for (int64_t i = 0; i < count; ++i) da_[tile.begin + i] += fhat[i];
    if (t == 0) return;

    matrix = transport_.distribution(t - 1, tile, scores);
    T* h = row_adjoints(t, tile);
    for (int64_t i = 0; i < count; ++i) h[i] = a[i] * fhat[i] * worker.row_factors[i];
    if (t > 1) add_transposed_product(matrix, count, widths_.references, h, sums_.of(tile.span));
  }
  T* row_adjoints(int64_t t, const Tile<T>& tile) const {
    return row_adjoints_ + (t - 1) * transport_.spans().tokens + tile.begin;
  }

  // In pairs, with scaling, worker.product gets what rows add to it at once.
  void fill_left(const Tile<T>& tile) const {
    if (kInPairs<Storage> && !transport_.log_domain()) {
      fill(tile.worker.product, tile.count * widths_.references, T(0));
    }
    const int64_t steps = p_.iterations;
    const T* a = transport_.a() + tile.begin;
    T* factors = tile.worker.row_factors;
    for (int64_t t = smaller<int64_t>(1, steps); t <= steps; ++t) {
      transport_.collection_rows(t, tile, factors);
      for (int64_t i = 0; i < tile.count; ++i) factors[i] *= a[i];
      if (t > 0) set_left(columns_.step(t), tile, factors);
    }
    if (collects_) {  // factors are those of collection(T)
      set_left(columns_.collect(), tile, values_, factors);
      for (int64_t i = 0; i < tile.count; ++i) factors[i] = -factors[i];
      set_left(columns_.collect() + p_.value_depth, tile, factors);
    }
    if (distributes_) {
      transport_.distribution_rows(steps, tile, factors);
      set_left(columns_.distribute(), tile, grad_outputs_, factors);
      for (int64_t i = 0; i < tile.count; ++i) factors[i] *= -delta_[tile.begin + i];
      set_left(columns_.distribute() + p_.value_depth, tile, factors);
    }
    for (int64_t t = 1; t <= steps; ++t) {
      set_left(columns_.row_step(t), tile, row_adjoints(t, tile));
    }
  }
  // Sets a column of `left` to numbers, or columns from `first` on to the tokens' rows times
  // factors.
  void set_left(int64_t column, const Tile<T>& tile, const T* numbers) const {
    T* left = tile.worker.left + column;
    for (int64_t i = 0; i < tile.count; ++i) left[i * columns_.total()] = numbers[i];
  }
  void set_left(int64_t first, const Tile<T>& tile, const TokenRows<Storage>& rows,
                const T* factors) const {
    if constexpr (kInPairs<Storage>) {
      if (!transport_.log_domain()) return add_rows_in_pairs(first, tile, rows, factors);
    }
    load_rows(rows, tile, tile.worker.values);
    for (int64_t i = 0; i < tile.count; ++i) {
      T* left = tile.worker.left + i * columns_.total() + first;
      const T* row = tile.worker.values + i * widths_.value_depth;
      for (int64_t c = 0; c < p_.value_depth; ++c) left[c] = row[c] * factors[i];
    }
  }

  // worker.gradient = E_ij = ds_ij factor_ij scale (similarity.h).
  void score_gradient(const Tile<T>& tile, const T* scores) const {
    const Worker<T>& worker = tile.worker;
    const int64_t size = tile.count * widths_.references, steps = p_.iterations;
    const T* ds = worker.gradient;
    if (!transport_.log_domain()) {
      const Upcoming upcoming = values_.next_tile(tile.begin);
      if constexpr (kInPairs<Storage>) {
        add_numbers(tile, upcoming);
      } else {
        multiply_group({0, columns_.total()}, tile, upcoming);
      }
      ds = scores;
    } else {
      fill(worker.gradient, size, T(0));
      for (int64_t t = smaller<int64_t>(1, steps); t <= steps; ++t) {
        add_group(columns_.collection(t), transport_.collection(t, tile, scores), tile);
      }
      for (int64_t t = 0; t <= steps; ++t) {
        add_group(columns_.distribution(t), transport_.distribution(t, tile, scores), tile);
      }
      fill(worker.product, size, T(1));  // its share is in the gradient already
    }
    const T* factors = transport_.factors(tile);
    const Vector<T> scale = splat(transport_.similarity().gradient_scale());
    transport_.similarity().finish_score_gradient(tile, [&](int64_t at) SETFORMER_LAMBDA {
      return load(ds + at) * load(worker.product + at) * (load(factors + at) * scale);
    });
  }

  // worker.product = left right over the group's columns.
  void multiply_group(const Group& group, const Tile<T>& tile,
                      const Upcoming& upcoming = {}) const {
    multiply(tile.count, widths_.references, group.depth, tile.worker.left + group.offset,
             columns_.total(), 1, right(group.offset), tile.worker.product, false, upcoming);
  }
  // worker.product += left right over the columns from `first` on that are rows of values or of dO.
  // These are taken as they are, and what they are multiplied by afterwards.
  void add_rows_in_pairs(int64_t first, const Tile<T>& tile, const TokenRows<Storage>& rows,
                         const T* factors) const {
    const Worker<T>& worker = tile.worker;
    const int64_t columns = widths_.references;
    const auto left = rows.pairs_along(tile.begin, tile.count, transport_.similarity().valid(),
                                       worker.value_pairs);
    multiply(Product<T, Pair>{left.first, left.stride, 1, right_pairs_ + pair_rows(first) * columns,
                              worker.matrix, columns, pairs_of(p_.value_depth)},
             tile.count);
    for (int64_t i = 0; i < tile.count; ++i) {
      const Vector<T> factor = splat(factors[i]);
      for (int64_t at = i * columns; at < (i + 1) * columns; at += kLanes<T>) {
        store<T>(worker.product + at,
                 load(worker.product + at) + load(worker.matrix + at) * factor);
      }
    }
  }
  // worker.product += left right over all others: numbers of the tokens.
  void add_numbers(const Tile<T>& tile, const Upcoming& upcoming) const {
    const auto add = [&](int64_t first, int64_t end, const Upcoming& upcoming) {
      multiply(tile.count, widths_.references, end - first, tile.worker.left + first,
               columns_.total(), 1, right(first), tile.worker.product, true, upcoming);
    };
    const int64_t depth = p_.value_depth;
    add(collects_ ? depth : 0, columns_.distribute(), {});
    add(columns_.distribute() + (distributes_ ? depth : 0), columns_.total(), upcoming);
  }
  // Where the pairs of rows of `right` begin that go with these columns of `left`, in pairs of
  // columns.
  int64_t pair_rows(int64_t first) const { return first == 0 ? 0 : pairs_of(p_.value_depth); }
  void pack_right() const {
    const auto pack = [&](int64_t first) {
      store_pairs_across(right(first), p_.value_depth, widths_.references,
                         right_pairs_ + pair_rows(first) * widths_.references);
    };
    if (collects_) pack(columns_.collect());
    if (distributes_) pack(columns_.distribute());
  }

  // worker.gradient += matrix * (left right) over the group's columns, if it has any.
  void add_group(const Group& group, const T* matrix, const Tile<T>& tile) const {
    if (group.depth == 0) return;
    multiply_group(group, tile);
    T *gradient = tile.worker.gradient, *product = tile.worker.product;
    for (int64_t at = 0; at < tile.count * widths_.references; at += kLanes<T>) {
      store<T>(gradient + at, load(gradient + at) + load(matrix + at) * load(product + at));
    }
  }

  const BackwardParams& p_;
  const TokenRows<Storage> values_, outputs_, grad_outputs_, grad_values_, grad_tokens_;
  const bool collects_, distributes_;
  Transport<Storage>& transport_;
  Widths<T> widths_;
  Columns columns_;
  bool contracts_ = false;  // the current step cannot make gbar grow

  T* right_ = nullptr;              // [L, references]
  Pair* right_pairs_ = nullptr;     // [2 pairs_of(Dv), references] of dA and of A
  Pair* gradient_pairs_ = nullptr;  // [pairs_of(M), value_depth] dA times factors
  T* factors_ = nullptr;            // [references]
  T* gbar_ = nullptr;               // [references] dL/dg of the current step
  T* weights_ = nullptr;            // [references]
  T* delta_ = nullptr;              // [tokens]
  T* row_adjoints_ = nullptr;       // [T, tokens] fbar^t r_R^{t-1}
  T* da_ = nullptr;                 // [tokens] dL/da
  Partials<T> sums_{};              // [references] per span
  Partials<T> matrix_sums_{};       // [M, value_depth or depth] per span
  Partials<T> scalar_sums_{};       // [2] per span
};

}  // namespace setformer::cpu::SETFORMER_ISA
