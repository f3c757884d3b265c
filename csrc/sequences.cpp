#include "sequences.h"

#include <algorithm>

namespace setformer {
namespace {

template <class Element>
void advance(Tensor& tensor, int64_t elements) {
  if (tensor.data != nullptr) tensor.data = static_cast<Element*>(tensor.data) + elements;
}

// Moves on by whole elements of a type that only `type` knows.
void advance(Tensor& tensor, int64_t elements, ScalarType type) {
  switch (type) {
    case ScalarType::kFloat32:
      return advance<float>(tensor, elements);
    case ScalarType::kFloat64:
      return advance<double>(tensor, elements);
    case ScalarType::kBFloat16:
    case ScalarType::kFloat16:
      return advance<uint16_t>(tensor, elements);
  }
}

ScalarType accumulate_type(ScalarType storage) {
  return storage == ScalarType::kFloat64 ? storage : ScalarType::kFloat32;
}

// The part of sequence `s`, whose first key is `key` and whose first query is `query`.
void cut(ForwardParams& p, int64_t s, int64_t key, int64_t query) {
  const ScalarType type = p.type, accumulate = accumulate_type(type);
  const int64_t steps = p.iterations, column_rows = std::max<int64_t>(steps, 1);
  const int64_t output = p.cross ? query : key;
  // storage [1, H, tokens, *]
  advance(p.query, query * p.query.stride[2], type);
  advance(p.key, key * p.key.stride[2], type);
  advance(p.value, key * p.value.stride[2], type);
  advance(p.output, output * p.output.stride[2], type);
  // accumulate [1, H, tokens] and [tokens, P]
  advance(p.token_mass, key * p.token_mass.stride[2], accumulate);
  advance(p.token_positions, key * p.token_positions.stride[0], accumulate);
  advance(p.query_positions, query * p.query_positions.stride[0], accumulate);
  // one for each sequence
  advance(p.reference, s * p.reference.stride[0], type);
  advance(p.reference_mass, s * p.reference_mass.stride[0], accumulate);
  // contiguous, sequence after sequence
  advance(p.pooled, s * p.heads * p.references * p.value_depth, accumulate);
  advance(p.rows, p.heads * (steps + 1) * key, accumulate);
  advance(p.columns, s * p.heads * (column_rows + 1) * p.references, accumulate);
  advance(p.query_rows, p.heads * (steps + 1) * query, accumulate);
  advance(p.query_columns, s * p.heads * column_rows * p.references, accumulate);
}

void cut(BackwardParams& p, int64_t s, int64_t key, int64_t query) {
  const ScalarType type = p.type, accumulate = accumulate_type(type);
  cut(static_cast<ForwardParams&>(p), s, key, query);
  advance(p.grad_output, (p.cross ? query : key) * p.grad_output.stride[2], type);
  advance(p.grad_query, query * p.grad_query.stride[2], type);
  advance(p.grad_key, key * p.grad_key.stride[2], type);
  advance(p.grad_value, key * p.grad_value.stride[2], type);
  advance(p.grad_pooled, s * p.grad_pooled.stride[0], accumulate);
  advance(p.grad_reference, s * p.heads * p.references * p.depth, accumulate);
  advance(p.grad_token_mass, p.heads * key, accumulate);
  advance(p.grad_reference_mass, s * p.heads * p.references, accumulate);
  advance(p.grad_bandwidth, s * p.heads, accumulate);
  advance(p.grad_epsilon, s * p.heads, accumulate);
}

template <class Params>
Params part(const Params& packed, int64_t s) {
  Params p = packed;
  const int64_t query = p.cross ? p.query_offsets[s] : 0;
  p.batch = 1;
  p.tokens = p.offsets[s + 1] - p.offsets[s];
  p.queries = p.cross ? p.query_offsets[s + 1] - query : 0;
  cut(p, s, packed.offsets[s], query);
  p.offsets = p.query_offsets = nullptr;
  return p;
}

template <class Params>
Params longest(const Params& packed) {
  Params p = packed;
  p.tokens = p.queries = 0;
  for (int64_t s = 0; s < p.batch; ++s) {
    p.tokens = std::max(p.tokens, p.offsets[s + 1] - p.offsets[s]);
    if (p.cross) p.queries = std::max(p.queries, p.query_offsets[s + 1] - p.query_offsets[s]);
  }
  return p;
}

}  // namespace

ForwardParams sequence(const ForwardParams& p, int64_t s) { return part(p, s); }
BackwardParams sequence(const BackwardParams& p, int64_t s) { return part(p, s); }

ForwardParams longest_sequence(const ForwardParams& p) { return longest(p); }
BackwardParams longest_sequence(const BackwardParams& p) { return longest(p); }

}  // namespace setformer
