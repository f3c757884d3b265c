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
// taken a tile at a time in the last pass. In the log domain the same columns are taken in groups,
// one per plan. f enters as fhat = fbar / a, which is dL/da_i of the step and finite at a_i = 0.
#pragma once

#include "forward.h"

namespace setformer::cpu::SETFORMER_ISA {

// The columns of `left` (rows of `right`) that belong to one plan.
struct Group {
  int64_t offset, depth;
};

// Where each plan's columns are. The collection of step T has its H part and its gbar part side by
// side; a side that does not collect (queries) or distribute (keys of cross attention) lacks it.
class Columns {
 public:
  Columns(const ForwardParams& p, bool collects, bool distributes)
      : value_depth_(p.value_depth),
        steps_(p.iterations),
        collects_(collects),
        distributes_(distributes) {}

  int64_t collect() const { return 0; }
  int64_t step(int64_t t) const { return (collects_ ? value_depth_ + 1 : 0) + (steps_ - t); }
  int64_t distribute() const { return step(0); }
  int64_t row_step(int64_t t) const {
    return distribute() + (distributes_ ? value_depth_ + 1 : 0) + (steps_ - t);
  }
  int64_t total() const { return row_step(0); }

  // The plans, in the order of their columns.
  Group collection(int64_t t) const {
    if (t == steps_) return {0, step(t) + (t > 0 ? 1 : 0)};
    return {step(t), 1};
  }
  Group distribution(int64_t t) const {
    if (t == steps_) return {distribute(), distributes_ ? value_depth_ + 1 : 0};
    return {row_step(t + 1), 1};
  }

 private:
  int64_t value_depth_, steps_;
  bool collects_, distributes_;
};

// One side of the problem in backward: its solve and the gradient through it.
template <class Storage>
class SideGradient {
  using T = Accumulate<Storage>;
  using Crew = Team<Worker<T>>;

 public:
  // Of the references' outputs A: themselves, their gradient, and their inner products.
  struct Pooled {
    T* values;    // [M, value_depth] A
    T* gradient;  // [M, value_depth] dA
    T* eta;       // [references] dA_j.A_j
  };

  SideGradient(const BackwardParams& p, const Tokens& tokens, const Tensor& grad_tokens,
               bool collects, bool distributes)
      : p_(p),
        grad_tokens_(grad_tokens),
        collects_(collects),
        distributes_(distributes),
        transport_(p, tokens, true),
        widths_(p),
        columns_(p, collects, distributes) {}

  void place(Arena& arena) {
    const Spans& spans = transport_.spans();
    transport_.place(arena);
    right_ = arena.take<T>(columns_.total() * widths_.references);
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

  Transport<Storage>& transport() { return transport_; }
  const Transport<Storage>& transport() const { return transport_; }

  // The first pass, for the log domain. Between each pass and what finishes it, the sums of other
  // ranks may be merged into what it leaves in sums() and matrix_sums().
  void begin(int64_t b, int64_t h, const Crew& crew) {
    b_ = b;
    head_ = h;
    fill(gbar_, widths_.references, T(0));
    fill(da_, transport_.spans().tokens, T(0));
    if (transport_.empty()) return;
    transport_.restore_potentials();
    if (collects_ && transport_.log_domain()) transport_.sum_collection(crew);
  }
  void finish_begin() {
    if (collects_ && transport_.log_domain() && !transport_.empty()) transport_.finish_collection();
  }

  // [M], and [M, value_depth] of distribute.
  T* sums() const { return sums_.of(0); }
  T* matrix_sums() const { return matrix_sums_.of(0); }

  // Through distribute: finish_distribute adds to pooled.gradient and leaves gbar.
  void distribute(const Crew& crew) {
    const int64_t depth = widths_.value_depth, steps = p_.iterations;
    crew.for_each_tile(
        transport_.spans(),
        [&](int64_t span) {
          sums_.clear(span);
          matrix_sums_.clear(span);
        },
        [&](int64_t span, int64_t begin, int64_t count, const Worker<T>& worker) {
          const T* scores = transport_.scores(begin, count, worker);
          const T* matrix = transport_.distribution(steps, begin, count, scores, worker);
          transport_.distribution_rows(steps, begin, count, worker.row_factors);
          load(p_.grad_output, begin, count, worker.values);
          load(p_.output, begin, count, worker.outputs);
          Upcoming outputs = next(p_.output, begin);
          for (int64_t i = 0; i < count; ++i) {
            outputs.ask_for(1);
            delta_[begin + i] = dot(worker.values + i * depth, worker.outputs + i * depth, depth);
            worker.row_terms[i] = delta_[begin + i] * worker.row_factors[i];
          }
          scale_rows(worker.values, count, depth, worker.row_factors);
          multiply(p_.references, depth, count, matrix, int64_t{1}, widths_.references,
                   worker.values, depth, matrix_sums_.of(span), depth, true,
                   next(p_.grad_output, begin));
          add_transposed_product(matrix, count, widths_.references, worker.row_terms,
                                 sums_.of(span));
        });
    transport_.pass_done();
    matrix_sums_.total(transport_.spans());
    sums_.total(transport_.spans());
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
      for (int64_t c = 0; c < p_.value_depth; ++c) {
        right(columns_.distribute() + c)[j] = values[c] * factors_[j];
      }
    }
    clear_padding(columns_.distribute(), p_.value_depth);
    copy(factors_, right(columns_.distribute() + p_.value_depth));
  }

  // Through step t, of T..1, or 0 where T = 0; through collect with the first, where this side
  // does. dlog b is added to `grad_log_b`.
  void step(int64_t t, const Crew& crew, const Pooled& pooled, T* grad_log_b) {
    if (t == 0) fill(gbar_, widths_.references, T(0));  // g^0 = 0 depends on nothing
    const bool collects = collects_ && t == p_.iterations;
    contracts_ = !collects;
    transport_.collection_columns(t, factors_);
    for (int64_t j = 0; j < widths_.references; ++j) {
      const T gbar = gbar_[j] * factors_[j];
      weights_[j] = collects ? pooled.eta[j] * factors_[j] + gbar : gbar;
      if (t > 0) right(columns_.step(t))[j] = -gbar;
      grad_log_b[j] += gbar_[j];
    }
    if (collects) collect_columns(pooled);
    if (t > 0) {
      transport_.distribution_columns(t - 1, factors_);
      for (int64_t j = 0; j < widths_.references; ++j) {
        right(columns_.row_step(t))[j] = -factors_[j];
      }
    }
    crew.for_each_tile(
        transport_.spans(), [&](int64_t span) { sums_.clear(span); },
        [&](int64_t span, int64_t begin, int64_t count, const Worker<T>& worker) {
          step_of_tile(t, collects, span, begin, count, worker, pooled);
        });
    transport_.pass_done();
    sums_.total(transport_.spans());
  }
  // But for the step that collects, sum_j |gbar_j| cannot grow: rows of R and columns of C sum
  // to 1. Where potentials are so large that rounding undoes this, hundreds of steps would leave
  // the exponents of the type; what it has grown by is taken out.
  void finish_step() {
    T before = 0, after = 0;
    for (int64_t j = 0; j < p_.references; ++j) before += __builtin_fabs(gbar_[j]);
    for (int64_t j = 0; j < widths_.references; ++j) gbar_[j] = -factors_[j] * sums()[j];
    for (int64_t j = 0; j < p_.references; ++j) after += __builtin_fabs(gbar_[j]);
    if (!contracts_ || !(after > T(1.001) * before)) return;
    const T scale = before / after;
    for (int64_t j = 0; j < widths_.references; ++j) gbar_[j] *= scale;
  }

  // ds, and through the similarity to the tokens and to `results`.
  void finish(const Crew& crew, const typename Similarity<Storage>::Results& results,
              bool accumulate) {
    crew.for_each_tile(
        transport_.spans(),
        [&](int64_t span) {
          sums_.clear(span);
          matrix_sums_.clear(span);
          scalar_sums_.clear(span);
        },
        [&](int64_t span, int64_t begin, int64_t count, const Worker<T>& worker) {
          const T* scores = transport_.scores(begin, count, worker);
          fill_left(begin, count, worker);
          score_gradient(begin, count, scores, worker);
          const Similarity<Storage>& similarity = transport_.similarity();
          if (!transport_.keys_loaded(begin)) similarity.load_keys(begin, count, worker.tile);
          similarity.add_gradient(begin, count, worker.tile, worker.gradient, worker.row_terms,
                                  worker.grad_keys,
                                  {matrix_sums_.of(span), sums_.of(span), scalar_sums_.of(span)},
                                  next(p_.grad_output, begin));
          similarity.finish_gradient(count, worker.tile, worker.grad_keys);
          store_tokens<Storage>(worker.grad_keys, widths_.depth, grad_tokens_, b_, head_, begin,
                                count, p_.depth);
        });
    transport_.pass_done();
    const Spans& spans = transport_.spans();
    transport_.similarity().store_gradient(
        {matrix_sums_.total(spans), sums_.total(spans), scalar_sums_.total(spans)}, results,
        accumulate);
  }

  // dmass_i = da_i / total mass, 0 for masked tokens: what dividing by the total adds is
  // sum_i a_i da_i, which is 0, for a factor common to all of a changes nothing.
  void store_mass_gradient(T* grad_mass) const {
    for (int64_t i = 0; i < transport_.spans().tokens; ++i) {
      const bool valid = transport_.similarity().valid()[i];
      grad_mass[i] = valid ? T(double(da_[i]) / transport_.total_mass()) : T(0);
    }
  }

 private:
  T* right(int64_t column) const { return right_ + column * widths_.references; }
  void copy(const T* from, T* to) const {
    for (int64_t j = 0; j < widths_.references; ++j) to[j] = from[j];
  }
  void clear_padding(int64_t first, int64_t count) const {
    for (int64_t c = first; c < first + count; ++c) {
      fill(right(c) + p_.references, widths_.references - p_.references, T(0));
    }
  }
  void load(const Tensor& tensor, int64_t begin, int64_t count, T* rows) const {
    load_tokens<Storage>(tensor, b_, head_, begin, count, p_.value_depth,
                         transport_.similarity().valid(), rows, widths_.value_depth);
  }
  Upcoming next(const Tensor& tensor, int64_t begin) const {
    return next_tile<Storage>(tensor, b_, head_, begin, p_.value_depth);
  }
  static T dot(const T* x, const T* y, int64_t width) {
    Vector<T> sum{};
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      sum += SETFORMER_ISA::load(x + c) * SETFORMER_ISA::load(y + c);
    }
    return sum_of<T>(sum);
  }

  // The columns of collect, with the column factors of collection(T) in factors_. The rows
  // dA_j c_C replace pooled.gradient, where `step` multiplies by them.
  void collect_columns(const Pooled& pooled) {
    const int64_t depth = widths_.value_depth;
    scale_rows(pooled.gradient, p_.references, depth, factors_);
    for (int64_t c = 0; c < p_.value_depth; ++c) {
      for (int64_t j = 0; j < p_.references; ++j) {
        right(columns_.collect() + c)[j] = pooled.gradient[j * depth + c];
      }
    }
    clear_padding(columns_.collect(), p_.value_depth);
    T* eta = right(columns_.collect() + p_.value_depth);
    for (int64_t j = 0; j < widths_.references; ++j) eta[j] = pooled.eta[j] * factors_[j];
  }

  // Step t of one tile: fhat, da, h and the tile's share of the next gbar; dv where it collects.
  void step_of_tile(int64_t t, bool collects, int64_t span, int64_t begin, int64_t count,
                    const Worker<T>& worker, const Pooled& pooled) {
    const int64_t depth = widths_.value_depth;
    const T* a = transport_.a() + begin;
    const T* scores = transport_.scores(begin, count, worker);
    const T* matrix = transport_.collection(t, begin, count, scores, worker);
    transport_.collection_rows(t, begin, count, worker.row_factors);
    T* fhat = worker.row_terms;
    multiply_vector(matrix, count, widths_.references, weights_, fhat);
    if (collects) {
      load(p_.value, begin, count, worker.values);
      multiply(count, depth, p_.references, matrix, widths_.references, int64_t{1}, pooled.gradient,
               depth, worker.outputs, depth, false, next(p_.value, begin));
      for (int64_t i = 0; i < count; ++i) {
        fhat[i] -= dot(worker.values + i * depth, worker.outputs + i * depth, depth);
      }
    }
    for (int64_t i = 0; i < count; ++i) fhat[i] *= -worker.row_factors[i];
    if (collects) {
      for (int64_t i = 0; i < count; ++i) worker.row_factors[i] *= a[i];
      scale_rows(worker.outputs, count, depth, worker.row_factors);
      store_tokens<Storage>(worker.outputs, depth, p_.grad_value, b_, head_, begin, count,
                            p_.value_depth);
    }
    for (int64_t i = 0; i < count; ++i) da_[begin + i] += fhat[i];
    if (t == 0) return;

    matrix = transport_.distribution(t - 1, begin, count, scores, worker);
    transport_.distribution_rows(t - 1, begin, count, worker.row_factors);
    T* h = row_adjoints_ + (t - 1) * transport_.spans().tokens + begin;
    for (int64_t i = 0; i < count; ++i) h[i] = a[i] * fhat[i] * worker.row_factors[i];
    if (t > 1) add_transposed_product(matrix, count, widths_.references, h, sums_.of(span));
  }

  void fill_left(int64_t begin, int64_t count, const Worker<T>& worker) const {
    const int64_t width = columns_.total(), depth = p_.value_depth, steps = p_.iterations;
    const T* a = transport_.a() + begin;
    T* factors = worker.row_factors;
    for (int64_t t = smaller<int64_t>(1, steps); t <= steps; ++t) {
      transport_.collection_rows(t, begin, count, factors);
      for (int64_t i = 0; i < count; ++i) factors[i] *= a[i];
      if (t == 0) break;
      for (int64_t i = 0; i < count; ++i) worker.left[i * width + columns_.step(t)] = factors[i];
    }
    if (collects_) {  // factors are those of collection(T)
      load(p_.value, begin, count, worker.values);
      for (int64_t i = 0; i < count; ++i) {
        T* left = worker.left + i * width + columns_.collect();
        const T* value = worker.values + i * widths_.value_depth;
        for (int64_t c = 0; c < depth; ++c) left[c] = value[c] * factors[i];
        left[depth] = -factors[i];
      }
    }
    if (distributes_) {
      transport_.distribution_rows(steps, begin, count, factors);
      load(p_.grad_output, begin, count, worker.values);
      for (int64_t i = 0; i < count; ++i) {
        T* left = worker.left + i * width + columns_.distribute();
        const T* grad = worker.values + i * widths_.value_depth;
        for (int64_t c = 0; c < depth; ++c) left[c] = grad[c] * factors[i];
        left[depth] = -delta_[begin + i] * factors[i];
      }
    }
    for (int64_t t = 1; t <= steps; ++t) {
      const T* h = row_adjoints_ + (t - 1) * transport_.spans().tokens + begin;
      for (int64_t i = 0; i < count; ++i) worker.left[i * width + columns_.row_step(t)] = h[i];
    }
  }

  // worker.gradient = E_ij = ds_ij factor_ij scale (similarity.h).
  void score_gradient(int64_t begin, int64_t count, const T* scores,
                      const Worker<T>& worker) const {
    const int64_t size = count * widths_.references, steps = p_.iterations;
    const T* ds = worker.gradient;
    if (!transport_.log_domain()) {
      multiply_group(count, {0, columns_.total()}, worker, next(p_.value, begin));
      ds = scores;
    } else {
      fill(worker.gradient, size, T(0));
      for (int64_t t = smaller<int64_t>(1, steps); t <= steps; ++t) {
        const T* matrix = transport_.collection(t, begin, count, scores, worker);
        add_group(count, columns_.collection(t), matrix, worker);
      }
      for (int64_t t = 0; t <= steps; ++t) {
        const T* matrix = transport_.distribution(t, begin, count, scores, worker);
        add_group(count, columns_.distribution(t), matrix, worker);
      }
      fill(worker.product, size, T(1));  // its share is in the gradient already
    }
    const T* factors = transport_.factors(begin, worker);
    const Vector<T> scale = splat(transport_.similarity().gradient_scale());
    for (int64_t at = 0; at < size; at += kLanes<T>) {
      store<T>(worker.gradient + at, SETFORMER_ISA::load(ds + at) *
                                         SETFORMER_ISA::load(worker.product + at) *
                                         (SETFORMER_ISA::load(factors + at) * scale));
    }
  }

  // worker.product = left right over the group's columns.
  void multiply_group(int64_t count, const Group& group, const Worker<T>& worker,
                      const Upcoming& upcoming = {}) const {
    const int64_t width = widths_.references;
    multiply(count, width, group.depth, worker.left + group.offset, columns_.total(), int64_t{1},
             right(group.offset), width, worker.product, width, false, upcoming);
  }

  // worker.gradient += matrix * (left right) over the group's columns, if it has any.
  void add_group(int64_t count, const Group& group, const T* matrix,
                 const Worker<T>& worker) const {
    if (group.depth == 0) return;
    multiply_group(count, group, worker);
    for (int64_t at = 0; at < count * widths_.references; at += kLanes<T>) {
      store<T>(worker.gradient + at,
               SETFORMER_ISA::load(worker.gradient + at) +
                   SETFORMER_ISA::load(matrix + at) * SETFORMER_ISA::load(worker.product + at));
    }
  }

  const BackwardParams& p_;
  const Tensor& grad_tokens_;
  bool collects_, distributes_;
  Transport<Storage> transport_;
  Widths<T> widths_;
  Columns columns_;
  int64_t b_ = 0, head_ = 0;
  bool contracts_ = false;  // the step at hand

  T* right_ = nullptr;         // [L, references]
  T* factors_ = nullptr;       // [references]
  T* gbar_ = nullptr;          // [references] dL/dg of the step at hand
  T* weights_ = nullptr;       // [references]
  T* delta_ = nullptr;         // [tokens]
  T* row_adjoints_ = nullptr;  // [T, tokens] fbar^t r_R^{t-1}
  T* da_ = nullptr;            // [tokens] dL/da
  Partials<T> sums_{};         // [references] per span
  Partials<T> matrix_sums_{};  // [M, value_depth or depth] per span
  Partials<T> scalar_sums_{};  // [2] per span
};

}  // namespace setformer::cpu::SETFORMER_ISA
