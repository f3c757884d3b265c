// Scaling to unit length. Before the other kernels queries, keys and references are scaled into the
// workspace; after them gradients by the scaled rows are turned into gradients by the rows as
// given. A warp per row.
#pragma once

#include "launch.cuh"

namespace setformer::cuda {

// A row [D] of a tensor [B, H, count, D], for the lanes of a warp.
template <class Storage>
struct UnitRow {
  using T = Accumulate<Storage>;
  int64_t b, i;
  const Storage* data;
  int64_t stride;
  T length;

  __device__ UnitRow(int64_t index, const Tensor& rows, int64_t heads, int64_t count, int64_t depth)
      : b(index / count / heads), i(index % count), stride(rows.stride[3]) {
    data = static_cast<const Storage*>(rows.data) + b * rows.stride[0] +
           index / count % heads * rows.stride[1] + i * rows.stride[2];
    T squares = 0;
    for (int64_t d = threadIdx.x % 32; d < depth; d += 32) {
      const T x = widen(data[d * stride]);
      squares += x * x;
    }
    length = sqrt(lanes_sum<32>(squares));
    if (length <= T(kShortest)) length = T(1);
  }
  __device__ T operator[](int64_t d) const { return widen(data[d * stride]) / length; }
};

__device__ __forceinline__ int64_t row_of_warp(int64_t first) {
  return (first + blockIdx.x) * (kMergeThreads / 32) + threadIdx.x / 32;
}

template <class Storage>
__global__ void __launch_bounds__(kMergeThreads)
    unit_length_kernel(const int64_t first, const Tensor rows, const int64_t batch,
                       const int64_t heads, const int64_t count, const int64_t depth,
                       Storage* const unit) {
  const int64_t index = row_of_warp(first);
  if (index >= batch * heads * count) return;
  const UnitRow<Storage> u(index, rows, heads, count, depth);
  for (int64_t d = threadIdx.x % 32; d < depth; d += 32) {
    unit[index * depth + d] = narrow<Storage>(u[d]);
  }
}

// In place: (du - u <u, du>) / length. Hidden rows, whose gradient is 0, may hold anything.
template <class Storage, class Gradient>
__global__ void __launch_bounds__(kMergeThreads)
    unit_length_backward_kernel(const int64_t first, const Tensor rows, const Tensor mask,
                                const int64_t batch, const int64_t heads, const int64_t count,
                                const int64_t depth, const Tensor gradients) {
  using T = Accumulate<Storage>;
  const int64_t index = row_of_warp(first);
  if (index >= batch * heads * count) return;
  const UnitRow<Storage> u(index, rows, heads, count, depth);
  if (mask.data != nullptr &&
      !static_cast<const bool*>(mask.data)[u.b * mask.stride[0] + u.i * mask.stride[1]]) {
    return;
  }
  Gradient* gradient = static_cast<Gradient*>(gradients.data) + u.b * gradients.stride[0] +
                       index / count % heads * gradients.stride[1] + u.i * gradients.stride[2];
  T along = 0;
  for (int64_t d = threadIdx.x % 32; d < depth; d += 32) {
    along += u[d] * widen(gradient[d * gradients.stride[3]]);
  }
  along = lanes_sum<32>(along);
  for (int64_t d = threadIdx.x % 32; d < depth; d += 32) {
    Gradient& x = gradient[d * gradients.stride[3]];
    x = narrow<Gradient>((widen(x) - along * u[d]) / u.length);
  }
}

inline int64_t blocks_of_rows(int64_t rows) { return divide_up(rows, kMergeThreads / 32); }

// 1 for learned references, which are the same for all samples.
inline int64_t batch_of_references(const ForwardParams& p) {
  return p.reference.stride[0] == 0 && p.batch > 0 ? 1 : p.batch;
}

// Where the scaled rows go in the workspace: after `total` numbers of the accumulate type. Adds
// their size to `total`.
template <class Storage>
UnitLengthWorkspace unit_length_workspace(const ForwardParams& p, int64_t& total) {
  UnitLengthWorkspace parts;
  if (!p.normalize) return parts;
  const auto take = [&](int64_t rows) {
    constexpr int64_t kPerLine = 256 / int64_t(sizeof(Storage));  // rows start at such multiples
    const int64_t at = total;
    total += divide_up(rows * p.depth, kPerLine) * 256 / int64_t(sizeof(Accumulate<Storage>));
    return at;
  };
  total = divide_up(total, 64) * 64;
  parts.key = take(p.heads * all_tokens(keys_of(p)));
  if (p.cross) parts.query = take(p.heads * all_tokens(queries_of(p)));
  parts.reference = take(batch_of_references(p) * p.heads * p.references);
  return parts;
}

// The problem with its rows scaled.
template <class Storage, class Params>
Params scaled(const Params& given, const UnitLengthWorkspace& parts, Accumulate<Storage>* workspace,
              Stream& stream) {
  Params p = given;
  p.normalize = false;
  const auto scale = [&](Tensor& rows, int64_t batch, int64_t count, int64_t at) {
    Storage* const unit = reinterpret_cast<Storage*>(workspace + at);
    launch<unit_length_kernel<Storage>>(stream, "unit_length_kernel",
                                        blocks_of_rows(batch * p.heads * count), kMergeThreads, 0,
                                        rows, batch, p.heads, count, p.depth, unit);
    rows = {unit, {p.heads * count * p.depth, count * p.depth, p.depth, 1}};
  };
  const auto scale_tokens = [&](Tensor& rows, const Side& side, int64_t at) {
    if (side.offsets == nullptr) return scale(rows, p.batch, side.count, at);
    scale(rows, 1, side.packed, at);
    rows.stride[0] = rows.stride[2];
  };
  scale_tokens(p.key, keys_of(p), parts.key);
  if (p.cross) scale_tokens(p.query, queries_of(p), parts.query);
  scale(p.reference, batch_of_references(p), p.references, parts.reference);
  if (batch_of_references(given) < p.batch) p.reference.stride[0] = 0;
  return p;
}

// Turns gradients by scaled rows into gradients by the rows that were given.
template <class Storage>
void finish_gradients(const BackwardParams& p, Stream& stream) {
  const auto finish = [&](auto kind, const Tensor& rows, const Tensor& mask, int64_t batch,
                          int64_t count, const Tensor& gradient) {
    launch<unit_length_backward_kernel<Storage, decltype(kind)>>(
        stream, "unit_length_backward_kernel", blocks_of_rows(batch * p.heads * count),
        kMergeThreads, 0, rows, mask, batch, p.heads, count, p.depth, gradient);
  };
  const auto finish_tokens = [&](const Side& side, const Tensor& gradient) {
    const bool packed = side.offsets != nullptr;
    finish(Storage{}, side.tokens, side.mask, packed ? 1 : p.batch,
           packed ? side.packed : side.count, gradient);
  };
  finish_tokens(keys_of(p), p.grad_key);
  if (p.cross) finish_tokens(queries_of(p), p.grad_query);
  const int64_t of_head = p.references * p.depth;
  finish(Accumulate<Storage>{}, p.reference, Tensor{}, p.batch, p.references,
         {p.grad_reference.data, {p.heads * of_head, of_head, p.depth, 1}});
}

}  // namespace setformer::cuda
