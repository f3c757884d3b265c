// Who computes what: heads over threads, or the spans of one head over threads.
//
// How the tokens of a head are cut into spans depends only on their number. Every sum over tokens
// is first taken within each span, then over the spans in their order, whichever threads computed
// them: the result is bitwise the same for any number of threads.
#pragma once

#include <omp.h>

#include "tokens.h"
#include "workspace.h"

namespace setformer::cpu::SETFORMER_ISA {

struct Spans {
  int64_t tokens;  // of the head
  int64_t count;
  int64_t length;  // a whole number of tiles

  explicit Spans(int64_t tokens_of_head)
      : tokens(tokens_of_head),
        count(larger<int64_t>(1, smaller<int64_t>(kMost, tokens_of_head / kLeastLength))),
        length(round_up((tokens_of_head + count - 1) / count, kTileTokens)) {}

  // Enough for many cores; few enough that their partial sums stay small.
  static constexpr int64_t kMost = 64;
  static constexpr int64_t kLeastLength = 512;
};

// What one thread needs for the tile it is at.
template <class T>
struct Worker {
  T* keys;         // [tile, depth] scaled, centred
  T* lengths;      // [tile] what keys were divided by, where they are scaled
  T* norms;        // [tile]
  T* scores;       // [tile, references]
  T* factors;      // [tile, references]
  T* matrix;       // [tile, references] a plan, in the log domain
  T* values;       // [tile, value_depth]
  T* outputs;      // [tile, value_depth]
  T* row_factors;  // [tile]
  T* row_terms;    // [tile]
  // Where products are computed in pairs.
  Pair* key_pairs;     // [tile, pair width of the depth]
  Pair* matrix_pairs;  // [tile, references / 2] or [tile / 2, references]
  Pair* value_pairs;   // [tile / 2, value_depth] or [tile, pair width of the value depth]
  Pair* output_pairs;  // [tile, pair width of the value depth]
  // In backward.
  T* gradient;   // [tile, references] ds and then E
  T* product;    // [tile, references] left right (side_gradient.h)
  T* grad_keys;  // [tile, depth]
  T* left;       // [tile, left_width]

  // left_width: 0 in forward.
  void place(Arena& arena, const Widths<T>& widths, int64_t left_width) {
    const auto take = [&arena](int64_t width) { return arena.take<T>(kMostTileTokens * width); };
    keys = take(widths.depth);
    values = take(widths.value_depth);
    outputs = take(widths.value_depth);
    for (T** of_tokens : {&lengths, &norms, &row_factors, &row_terms}) *of_tokens = take(1);
    for (T** of_pairs : {&scores, &factors, &matrix}) *of_pairs = take(widths.references);
    if constexpr (kInPairs<BFloat16>) {
      key_pairs = arena.take<Pair>(kMostTileTokens * round_up(widths.depth, 32) / 2);
      matrix_pairs = arena.take<Pair>(kMostTileTokens * widths.references / 2);
      const int64_t of_values = kMostTileTokens * round_up(widths.value_depth, 32) / 2;
      value_pairs = arena.take<Pair>(of_values);
      output_pairs = arena.take<Pair>(of_values);
    }
    if (left_width == 0) return;
    gradient = take(widths.references);
    product = take(widths.references);
    grad_keys = take(widths.depth);
    left = take(left_width);
  }
};

// Tokens [begin, begin + count) of a span, and the thread that is at them.
template <class T>
struct Tile {
  int64_t span, begin, count;
  const Worker<T>& worker;
};

// The threads that work on one head.
template <class T>
struct Team {
  Worker<T>* workers;
  int threads;

  // body(tile) for every tile, those of a span in order by one thread, after begin_span(span).
  template <class BeginSpan, class Body>
  void for_each_tile(const Spans& spans, BeginSpan begin_span, Body body) const {
    if (threads == 1 || spans.count == 1) {
      for (int64_t span = 0; span < spans.count; ++span) {
        run_span(spans, span, workers[0], begin_span, body);
      }
      return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t span = 0; span < spans.count; ++span) {
      run_span(spans, span, workers[omp_get_thread_num()], begin_span, body);
    }
  }

 private:
  template <class BeginSpan, class Body>
  static void run_span(const Spans& spans, int64_t span, const Worker<T>& worker,
                       BeginSpan& begin_span, Body& body) {
    begin_span(span);
    const int64_t end = smaller((span + 1) * spans.length, spans.tokens);
    for (int64_t begin = span * spans.length, count; begin < end; begin += count) {
      count = tokens_of_tile(end - begin);
      body(Tile<T>{span, begin, count, worker});
    }
  }
};

// Partial sums, one array of `size` elements per span.
template <class T>
struct Partials {
  T* data;
  int64_t size;

  void place(Arena& arena, const Spans& spans, int64_t elements) {
    size = round_up(elements, kLanes<T>);
    data = arena.take<T>(spans.count * size);
  }
  T* of(int64_t span) const { return data + span * size; }
  void clear(int64_t span) const { fill(of(span), size, T(0)); }

  // The sum over spans, in order; left in the first span's array.
  T* total(const Spans& spans) const {
    for (int64_t span = 1; span < spans.count; ++span) {
      for (int64_t i = 0; i < size; ++i) data[i] += of(span)[i];
    }
    return data;
  }
};

}  // namespace setformer::cpu::SETFORMER_ISA
