#include "sequences.h"

#include <algorithm>

namespace setformer {
namespace {

// Moves the start by `elements` elements of `bytes` bytes each.
void advance(Tensor& tensor, int64_t elements, int64_t bytes) {
  if (tensor.data != nullptr) tensor.data = static_cast<char*>(tensor.data) + elements * bytes;
}

int64_t storage_bytes(ScalarType type) {
  if (type == ScalarType::kFloat64) return 8;
  return type == ScalarType::kFloat32 ? 4 : 2;
}
int64_t accumulate_bytes(ScalarType type) { return type == ScalarType::kFloat64 ? 8 : 4; }

// Cuts p down to sequence `s`, whose first key is `key` and whose first query is `query`.
void cut(ForwardParams& p, int64_t s, int64_t key, int64_t query) {
  const int64_t storage = storage_bytes(p.type), accumulate = accumulate_bytes(p.type);
  const int64_t steps = p.iterations, column_rows = std::max<int64_t>(steps, 1);
  const int64_t output = p.cross ? query : key;
  // storage [1, H, tokens, *]
  advance(p.query, query * p.query.stride[2], storage);
  advance(p.key, key * p.key.stride[2], storage);
  advance(p.value, key * p.value.stride[2], storage);
  advance(p.output, output * p.output.stride[2], storage);
  // accumulate [1, H, tokens] and [tokens, P]
  advance(p.token_mass, key * p.token_mass.stride[2], accumulate);
  advance(p.token_positions, key * p.token_positions.stride[0], accumulate);
  advance(p.query_positions, query * p.query_positions.stride[0], accumulate);
  // one for each sequence
  advance(p.reference, s * p.reference.stride[0], storage);
  advance(p.reference_mass, s * p.reference_mass.stride[0], accumulate);
  // contiguous, sequence after sequence
  advance(p.pooled, s * p.heads * p.references * p.value_depth, accumulate);
  advance(p.rows, p.heads * (steps + 1) * key, accumulate);
  advance(p.columns, s * p.heads * (column_rows + 1) * p.references, accumulate);
  advance(p.query_rows, p.heads * (steps + 1) * query, accumulate);
  advance(p.query_columns, s * p.heads * column_rows * p.references, accumulate);
}

void cut(BackwardParams& p, int64_t s, int64_t key, int64_t query) {
  const int64_t storage = storage_bytes(p.type), accumulate = accumulate_bytes(p.type);
  cut(static_cast<ForwardParams&>(p), s, key, query);
  advance(p.grad_output, (p.cross ? query : key) * p.grad_output.stride[2], storage);
  advance(p.grad_query, query * p.grad_query.stride[2], storage);
  advance(p.grad_key, key * p.grad_key.stride[2], storage);
  advance(p.grad_value, key * p.grad_value.stride[2], storage);
  advance(p.grad_token_mass, key, accumulate);
  advance(p.grad_pooled, s * p.grad_pooled.stride[0], accumulate);
  advance(p.grad_reference, s * p.heads * p.references * p.depth, accumulate);
  advance(p.grad_reference_mass, s * p.heads * p.references, accumulate);
  advance(p.grad_bandwidth, s * p.heads, accumulate);
  advance(p.grad_epsilon, s * p.heads, accumulate);
}

}  // namespace

template <class Params>
Params sequence(const Params& packed, int64_t s) {
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
Params longest_sequence(const Params& packed) {
  Params p = packed;
  p.tokens = p.queries = 0;
  for (int64_t s = 0; s < p.batch; ++s) {
    p.tokens = std::max(p.tokens, p.offsets[s + 1] - p.offsets[s]);
    if (p.cross) p.queries = std::max(p.queries, p.query_offsets[s + 1] - p.query_offsets[s]);
  }
  return p;
}

template ForwardParams sequence(const ForwardParams&, int64_t);
template BackwardParams sequence(const BackwardParams&, int64_t);
template ForwardParams longest_sequence(const ForwardParams&);
template BackwardParams longest_sequence(const BackwardParams&);

}  // namespace setformer
