// One Sinkhorn solve: the tokens of one head against its references.
//
// A step is, with normalisers r of rows and c of columns (f = log a - log r, g = log b - log c),
//
//   r_i = sum_j exp(s_ij + g_j),    c_j = sum_i exp(s_ij + f_i)
//
// in one of two forms with the same interface:
//
//   scaling     the tile holds K_ij = exp(s_ij - shift); r = K w with w = exp(g), c = K^T (a / r).
//               No exponential inside the iterations, but only safe for a bounded range of s:
//               with range h, K is within exp(+-h/2) and r within exp(+-3h/2).
//   log domain  the tile holds s_ij; every sum is a log-sum-exp. For any s. All potentials and
//               normalisers are base-2 logarithms.
//
// Either way the two plans of the method are a matrix times a factor per row and per column,
//
//   distribution(t)  R_ij       = exp(s_ij + g^t_j) / r^t_i           rows sum to 1
//   collection(t)    C_ij / a_i = exp(s_ij) / (r^{t-1}_i c^t_j)       columns of C sum to 1
//
// With scaling, the matrix is the tile of K. In the log domain it is the plan itself, formed from
// s, and the factors are 1. A logarithm of size 1000 is off by up to 1e-4, so the sums of plans
// formed in the log domain would be off by as much, and gradients, which are differences of such
// sums, by far more. Therefore the sums that must be 1 are computed again and divided out.
//
// Dividing C by a keeps everything finite where a_i = 0, and gives the exact derivative with
// respect to such a mass.
#pragma once

#include <initializer_list>

#include "similarity.h"

namespace setformer::cpu::SETFORMER_ISA {

template <class Storage>
class Transport {
  using T = Accumulate<Storage>;

 public:
  // Of head (b, h), whose prepared references are `references`.
  Transport(const ForwardParams& p, const Tokens& tokens, int64_t b, int64_t h,
            const References<Storage>& references, bool backward)
      : p_(p), tokens_(tokens), b_(b), h_(h), references_(references), backward_(backward) {}

  void place(Arena& arena) {
    a_ = arena.take<T>(tokens_.count);
    potentials_ = arena.take<T>((p_.iterations + 1) * widths_.references);
    column_potentials_ = arena.take<T>(larger<int64_t>(p_.iterations, 1) * widths_.references);
    collection_scale_ = arena.take<T>(widths_.references);
    column_sums_.place(arena, spans_, 2 * widths_.references);
    // Scores are kept while they fit a constant amount of fast memory and recomputed beyond it.
    const int64_t row = widths_.references * (backward_ ? 2 : 1);
    // The heads of a group's problem are all at work at once.
    const int64_t heads = p_.group == nullptr ? 1 : larger<int64_t>(p_.batch * p_.heads, 1);
    const int64_t bytes = smaller(kCacheBytes, kGroupCacheBytes / heads);
    const int64_t tiles = bytes / (kTileTokens * row * int64_t{sizeof(T)});
    cached_ = smaller(tiles * kTileTokens, round_up(tokens_.count, kTileTokens));
    const int64_t rows = cached_ + kMostTileTokens - kTileTokens;  // the last tile may be longer
    score_cache_ = arena.take<T>(rows * widths_.references);
    if (backward_) factor_cache_ = arena.take<T>(rows * widths_.references);
  }

  // Prepares everything except what normalize_masses does; the references must be prepared.
  // token_mass (optional) [B, H, N]; this head's normalisers, rows [T + 1, N] and columns [max(T,
  // 1), M], are written by the steps and read by all else.
  Status prepare(const Tensor& token_mass, T* rows, T* columns, const Worker<T>& worker) {
    similarity_.prepare(worker);
    rows_ = rows;
    columns_ = columns;
    fresh_ = true;
    fill(collection_scale_, widths_.references, T(1));
    fill(potentials_, widths_.references, log_domain() ? T(0) : T(1));
    for (int64_t j = p_.references; j < widths_.references; ++j) {
      potentials_[j] = log_domain() ? -T(__builtin_inf()) : T(0);
    }
    return load_masses(token_mass);
  }

  // The marginal a, from the mass of all tokens, those of other ranks included.
  void normalize_masses() {
    const double scale = empty() ? 0 : 1 / total_mass_;
    for (int64_t i = 0; i < tokens_.count; ++i) a_[i] = T(double(a_[i]) * scale);
  }

  // No valid token holds mass: nothing to transport, all outputs and gradients are 0.
  bool empty() const { return total_mass_ == 0; }
  double total_mass() const { return total_mass_; }
  void set_total_mass(double total) { total_mass_ = total; }
  bool log_domain() const { return similarity_.log_domain(); }
  const Similarity<Storage>& similarity() const { return similarity_; }
  const Spans& spans() const { return spans_; }
  const T* a() const { return a_; }

  // One pass over the tokens: begin_span(span), then body(tile, scores) for every tile of the span.
  // The first pass fills the cache.
  template <class BeginSpan, class Body>
  void pass(const Team<T>& team, BeginSpan begin_span, Body body) {
    team.for_each_tile(spans_, begin_span, [&](const Tile<T>& tile) { body(tile, scores(tile)); });
    fresh_ = false;
  }
  // A pass in which each span adds to its own part of `sums`; the first span's part then gets the
  // totals.
  template <class Body>
  void sum_pass(const Team<T>& team, std::initializer_list<const Partials<T>*> sums, Body body) {
    const auto clear = [sums](int64_t span) {
      for (const Partials<T>* partials : sums) partials->clear(span);
    };
    pass(team, clear, body);
    for (const Partials<T>* partials : sums) partials->total(spans_);
  }
  // The factors of the current tile, in backward: from the cache, or computed with its scores.
  const T* factors(const Tile<T>& tile) const {
    return tile.begin < cached_ ? factor_cache_ + tile.begin * widths_.references
                                : tile.worker.factors;
  }
  // Are the tile's keys in worker.keys? They are if this pass computed its scores, rather than took
  // them from the cache.
  bool keys_loaded(const Tile<T>& tile) const {
    return !kInPairs<Storage> && (fresh_ || tile.begin >= cached_);
  }

  // Step t, 1 <= t <= T (t = 0 if T = 0): computes rows^{t-1}, and in column_sums() the columns^t
  // of these tokens. If `pooled` is given, pool(tile, scores) is called for every tile to add to
  // it, with a_i * row factor in worker.row_factors: with scaling, collection(T) has the same
  // matrix as the step, so the last step can also collect.
  template <class Pool>
  void step(int64_t t, const Team<T>& team, const Partials<T>* pooled, Pool pool) {
    const int64_t width = widths_.references;
    const auto begin = [&](int64_t span) {
      if (log_domain()) {
        log_sums(span).clear(width);
      } else {
        column_sums_.clear(span);
      }
      if (pooled != nullptr) pooled->clear(span);
    };
    pass(team, begin, [&](const Tile<T>& tile, const T* scores) {
      T* factors = tile.worker.row_factors;
      if (t > 0) normalize_rows(t - 1, tile, scores);
      row_potentials(t, tile, factors);
      if (log_domain()) {
        log_sums(tile.span).add(scores, tile.count, width, factors);
      } else {
        add_transposed_product(scores, tile.count, width, factors, column_sums_.of(tile.span));
      }
      if (pooled != nullptr) pool(tile, scores);
    });
    if (pooled != nullptr) pooled->total(spans_);
    if (!log_domain()) {
      column_sums_.total(spans_);
      return;
    }
    for (int64_t span = 1; span < spans_.count; ++span) {
      log_sums(0).merge(log_sums(span), width);
    }
    log_sums(0).normalizers(width, column_sums_.data);
  }
  // Where nothing is transported.
  void clear_normalizers() const {
    fill(rows_, (p_.iterations + 1) * tokens_.count, T(0));
    fill(columns_, larger<int64_t>(p_.iterations, 1) * p_.references, T(0));
  }
  void clear_last_rows() const { fill(row_normalizers(p_.iterations, 0), tokens_.count, T(0)); }

  // Sums over the tokens for each reference, [M]. Those of other ranks may be merged into them
  // before finish_step or finish_collection is called.
  T* column_sums() const { return column_sums_.data; }
  Merge merge_of_columns() const { return log_domain() ? Merge::kLogSum : Merge::kSum; }
  void finish_step(int64_t t) {
    T* columns = column_normalizers(t);
    for (int64_t j = 0; j < p_.references; ++j) columns[j] = column_sums()[j];
    set_potentials(t);
  }

  // rows^t = sum_j exp(s_ij + g^t_j); of `rounded` matrices, as products in pairs take them, where
  // the rows of R must sum to 1.
  void normalize_rows(int64_t t, const Tile<T>& tile, const T* scores, bool rounded = false) const {
    T normalizers[kMostTileTokens];
    if (kInPairs<Storage> && rounded && !log_domain()) {
      multiply_rounded_vector(scores, tile.count, widths_.references, potential(t), normalizers);
    } else if (log_domain()) {
      row_log_sums(scores, tile.count, widths_.references, potential(t), normalizers);
    } else {
      multiply_vector(scores, tile.count, widths_.references, potential(t), normalizers);
    }
    T* rows = row_normalizers(t, tile.begin);
    for (int64_t i = 0; i < tile.count; ++i) rows[i] = normalizers[i];
  }

  // In the log domain: computes the column sums of collection(T), which finish_collection divides
  // out. pool_collection then calls pool for every tile as `step` does, with the matrix of
  // collection(T).
  void sum_collection(const Team<T>& team) {
    sum_pass(team, {&column_sums_}, [&](const Tile<T>& tile, const T* scores) {
      add_transposed_product(collection(p_.iterations, tile, scores), tile.count,
                             widths_.references, a_ + tile.begin, column_sums_.of(tile.span));
    });
  }
  template <class Pool>
  void pool_collection(const Team<T>& team, const Partials<T>& pooled, Pool pool) {
    sum_pass(team, {&pooled}, [&](const Tile<T>& tile, const T* scores) {
      const T* matrix = collection(p_.iterations, tile, scores);
      for (int64_t i = 0; i < tile.count; ++i) tile.worker.row_factors[i] = a_[tile.begin + i];
      pool(tile, matrix);
    });
  }
  void finish_collection() {
    for (int64_t j = 0; j < p_.references; ++j) collection_scale_[j] = 1 / column_sums()[j];
  }

  // For backward: computes the potentials from the rows and columns that forward wrote.
  void restore_potentials() {
    for (int64_t t = smaller<int64_t>(1, p_.iterations); t <= p_.iterations; ++t) {
      set_potentials(t);
    }
  }

  // The matrices and factors of distribution(t), t in 0..T, and of collection(t), t in 1..T (t = 0
  // if T = 0: then f = log a has no normaliser). The functions that return a matrix also set
  // worker.row_factors to the factors of the tile.
  const T* distribution(int64_t t, const Tile<T>& tile, const T* scores) const {
    T *matrix = tile.worker.matrix, *factors = tile.worker.row_factors;
    if (log_domain()) {
      form_plan(row_normalizers(t, tile.begin), potential(t), tile.count, scores, matrix);
      row_sums(matrix, tile.count, widths_.references, factors);
      for (int64_t i = 0; i < tile.count; ++i) factors[i] = 1 / factors[i];
      scale_rows(matrix, tile.count, widths_.references, factors);
    }
    distribution_rows(t, tile, factors);
    return log_domain() ? matrix : scores;
  }
  void distribution_rows(int64_t t, const Tile<T>& tile, T* factors) const {
    row_factors(row_normalizers(t, tile.begin), tile.count, factors);
  }
  void distribution_columns(int64_t t, T* factors) const { column_factors(potential(t), factors); }

  const T* collection(int64_t t, const Tile<T>& tile, const T* scores) const {
    collection_rows(t, tile, tile.worker.row_factors);
    if (!log_domain()) return scores;
    T* matrix = tile.worker.matrix;
    form_plan(row_normalizers(t - 1, tile.begin), column_potential(t), tile.count, scores, matrix);
    if (t == p_.iterations) scale_columns(matrix, tile.count, collection_scale_);
    return matrix;
  }
  void collection_rows(int64_t t, const Tile<T>& tile, T* factors) const {
    row_factors(row_normalizers(t - 1, tile.begin), tile.count, factors);
  }
  void collection_columns(int64_t t, T* factors) const {
    column_factors(column_potential(t), factors);
  }

 private:
  // Two matrices share it in backward: 16,384 tokens by 128 references just fit in float32.
  static constexpr int64_t kCacheBytes = int64_t{16} << 20;
  static constexpr int64_t kGroupCacheBytes = int64_t{128} << 20;  // of all heads of a side

  // The tile's scores (and, for backward, factors), from the cache or recomputed.
  const T* scores(const Tile<T>& tile) const {
    const bool cached = tile.begin < cached_;
    T* scores = cached ? score_cache_ + tile.begin * widths_.references : tile.worker.scores;
    if (fresh_ || !cached) {
      similarity_.compute(tile, scores, backward_ ? const_cast<T*>(factors(tile)) : nullptr);
    }
    return scores;
  }

  // w^t or log2 g^t, [references]; t in 0..T. The padding transports nothing: 0 or -inf.
  T* potential(int64_t t) const { return potentials_ + t * widths_.references; }
  // 1 / c^t or -log2 c^t, [references]; t in 1..T, and t = 0 where T = 0.
  T* column_potential(int64_t t) const {
    return column_potentials_ + larger<int64_t>(t - 1, 0) * widths_.references;
  }
  // r^t of the tokens from `begin` on; null for t < 0.
  T* row_normalizers(int64_t t, int64_t begin) const {
    return t < 0 ? nullptr : rows_ + t * tokens_.count + begin;
  }
  T* column_normalizers(int64_t t) const {
    return columns_ + larger<int64_t>(t - 1, 0) * p_.references;
  }
  ColumnLogSums<T> log_sums(int64_t span) const {
    return {column_sums_.of(span), column_sums_.of(span) + widths_.references};
  }

  // Into a_, and their sum.
  Status load_masses(const Tensor& token_mass) {
    const T* mass = at<const T>(token_mass, b_, h_);
    double total = 0;  // a float32 sum of a million masses would lose digits
    for (int64_t i = 0; i < tokens_.count; ++i) {
      const bool valid = similarity_.valid()[i];
      a_[i] = !valid ? T(0) : mass == nullptr ? T(1) : mass[i * token_mass.stride[2]];
      if (a_[i] < T(0)) return Status::kNegativeTokenMass;
      total += double(a_[i]);
    }
    total_mass_ = total;
    return Status::kOk;
  }

  // exp(f^t) = a / r^{t-1}, or f^t as a logarithm.
  void row_potentials(int64_t t, const Tile<T>& tile, T* potentials) const {
    const T* rows = row_normalizers(t - 1, tile.begin);
    const T* a = a_ + tile.begin;
    if (!log_domain()) {
      row_factors(rows, tile.count, potentials);
      for (int64_t i = 0; i < tile.count; ++i) potentials[i] *= a[i];
      return;
    }
    for (int64_t i = 0; i < kMostTileTokens; ++i) potentials[i] = i < tile.count ? a[i] : T(0);
    for (int64_t i = 0; i < kMostTileTokens; i += kLanes<T>) {
      store<T>(potentials + i, log2<T>(load(potentials + i)));
    }
    for (int64_t i = 0; i < tile.count && rows != nullptr; ++i) potentials[i] -= rows[i];
  }

  // The potentials that follow from the normalisers of step t.
  void set_potentials(int64_t t) {
    const T* columns = column_normalizers(t);
    T* column_terms = column_potential(t);
    if (log_domain()) {
      for (int64_t j = 0; j < p_.references; ++j) column_terms[j] = -columns[j];
    } else {
      for (int64_t j = 0; j < p_.references; ++j) column_terms[j] = 1 / columns[j];
    }
    fill(column_terms + p_.references, widths_.references - p_.references,
         log_domain() ? -T(__builtin_inf()) : T(0));
    if (t == 0) return;
    T* w = potential(t);
    for (int64_t j = 0; j < widths_.references; j += kLanes<T>) {
      const Vector<T> term = load(column_terms + j);
      store<T>(w + j,
               log_domain() ? load(references_.log2_b + j) + term : load(references_.b + j) * term);
    }
  }

  // matrix_ij = 2^(s_ij - rows_i + column_terms_j), rows = 0 where null.
  void form_plan(const T* rows, const T* column_terms, int64_t count, const T* scores,
                 T* matrix) const {
    // Entries of plans are at most 1; only C / a of a token without mass can exceed this bound.
    const Vector<T> bound = splat(T(100));
    for (int64_t i = 0; i < count; ++i) {
      const Vector<T> row = splat(rows == nullptr ? T(0) : rows[i]);
      for (int64_t j = 0; j < widths_.references; j += kLanes<T>) {
        const int64_t at = i * widths_.references + j;
        const Vector<T> exponent = (load(scores + at) - row) + load(column_terms + j);
        store<T>(matrix + at, exp2_bounded<T>(at_most<T>(exponent, bound)));
      }
    }
  }
  void scale_columns(T* matrix, int64_t count, const T* factors) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < widths_.references; j += kLanes<T>) {
        const int64_t at = i * widths_.references + j;
        store<T>(matrix + at, load(matrix + at) * load(factors + j));
      }
    }
  }
  // The row and column factors that go with a plan's matrix: 1 in the log domain.
  void row_factors(const T* rows, int64_t count, T* factors) const {
    if (log_domain() || rows == nullptr) {
      fill(factors, count, T(1));
    } else {
      for (int64_t i = 0; i < count; ++i) factors[i] = 1 / rows[i];
    }
  }
  void column_factors(const T* column_terms, T* factors) const {
    for (int64_t j = 0; j < widths_.references; ++j) {
      factors[j] = log_domain() ? T(j < p_.references) : column_terms[j];
    }
  }

  const ForwardParams& p_;
  const Tokens tokens_;
  const int64_t b_, h_;
  const References<Storage>& references_;
  const bool backward_;
  const Widths<T> widths_{p_};
  const Spans spans_{tokens_.count};
  Similarity<Storage> similarity_{p_, tokens_, b_, h_, references_};
  double total_mass_ = 0;
  bool fresh_ = true;   // no pass over the tokens is complete yet: the cache is not filled
  int64_t cached_ = 0;  // the scores of tiles that begin before this token are kept
  T* rows_ = nullptr;
  T* columns_ = nullptr;

  T* a_ = nullptr;                  // [N]
  T* potentials_ = nullptr;         // [T + 1, references]
  T* column_potentials_ = nullptr;  // [max(T, 1), references]
  T* collection_scale_ = nullptr;   // [references] of the log domain's collection(T)
  Partials<T> column_sums_{};       // [2, references] per span
  T* score_cache_ = nullptr;        // [cached_ and the rest of the last tile, references]
  T* factor_cache_ = nullptr;       // as the scores, in backward
};

}  // namespace setformer::cpu::SETFORMER_ISA
