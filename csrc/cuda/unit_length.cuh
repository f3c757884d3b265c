// Scaling to unit length, for kernels that do not scale rows themselves (on_chip/unit_length.cuh).
// Before them queries, keys and references are scaled into the workspace; after them gradients by
// the scaled rows are turned into gradients by the rows as given. A warp per row.
#pragma once

#include "launch.cuh"

namespace setformer::cuda {

inline constexpr int64_t kRowsOfBlock = 512;  // rows of one head that a block scales

// Which heads need no scaled rows: those whose flags are at least `least`.
struct Done {
  const void* flags = nullptr;  // accumulate [B, H], optional
  float least = 0;
};

// Those whose rows kernels on chip scale, by BackwardWorkspace::on_chip of all heads (optional).
struct DoneOnChip {
  Done tokens, references;
  explicit DoneOnChip(const void* flags)
      : tokens{flags, kPassesOnChip}, references{flags, kAllOnChip} {}
};

// The part of a head's rows that a block scales, and the head.
template <class Storage>
struct PartOfHead {
  using T = Accumulate<Storage>;
  int64_t b, h, begin, end;
  Span span;
  Rows<Storage> rows;

  __device__ PartOfHead(int64_t index, const Side& side, int64_t heads, int64_t depth,
                        const Done& done) {
    const int64_t parts = divide_up(side.count, kRowsOfBlock), head = index / parts;
    b = head / heads;
    h = head % heads;
    span = side.span(b);
    rows.select(side.tokens, span.start, h, span.count, depth);
    rows.hide(side.mask, b);
    begin = index % parts * kRowsOfBlock;
    end = begin + kRowsOfBlock < span.count ? begin + kRowsOfBlock : span.count;
    if (done.flags != nullptr && static_cast<const T*>(done.flags)[head] >= T(done.least)) {
      end = begin;
    }
  }

  // Calls visit(i, row, length) for the rows that are not hidden, by the lanes of a warp.
  template <class Visit>
  __device__ void for_each_row(Visit visit) const {
    for (int64_t i = begin + threadIdx.x / 32; i < end; i += kMergeThreads / 32) {
      if (!rows.valid(i)) continue;
      const Storage* row = rows.data + i * rows.row_stride;
      T squares = 0;
#pragma unroll 1
      for (int64_t d = threadIdx.x % 32; d < rows.depth; d += 32) {
        const T x = widen(row[d * rows.column_stride]);
        squares += x * x;
      }
      const T length = sqrt(lanes_sum<32>(squares));
      visit(i, row, length <= T(kShortest) ? T(1) : length);
    }
  }
};

template <class Storage>
__global__ void __launch_bounds__(kMergeThreads)
    unit_length_kernel(const int64_t first, const Side side, const int64_t heads,
                       const int64_t depth, const Done done, const Tensor scaled) {
  using T = Accumulate<Storage>;
  const PartOfHead<Storage> part(first + blockIdx.x, side, heads, depth, done);
  Rows<Storage> to;
  to.select(scaled, part.span.start, part.h, part.span.count, depth);
  part.for_each_row([&](int64_t i, const Storage* row, T length) {
#pragma unroll 1
    for (int64_t d = threadIdx.x % 32; d < depth; d += 32) {
      const T x = widen(row[d * part.rows.column_stride]);
      to.data[i * to.row_stride + d * to.column_stride] = narrow<Storage>(x / length);
    }
  });
}

// In place: (du - u <u, du>) / length. Hidden rows, whose gradient is 0, may hold anything.
template <class Storage, class Gradient>
__global__ void __launch_bounds__(kMergeThreads)
    unit_length_backward_kernel(const int64_t first, const Side side, const int64_t heads,
                                const int64_t depth, const Done done, const Tensor gradients) {
  using T = Accumulate<Storage>;
  const PartOfHead<Storage> part(first + blockIdx.x, side, heads, depth, done);
  Rows<Gradient> of_rows;
  of_rows.select(gradients, part.span.start, part.h, part.span.count, depth);
  part.for_each_row([&](int64_t i, const Storage* row, T length) {
    Gradient* const gradient = of_rows.data + i * of_rows.row_stride;
    const T factor = T(1) / length;  // one quotient: each is a function call, which may spill
    const auto unit = [&](int64_t d) { return widen(row[d * part.rows.column_stride]) * factor; };
    T along = 0;
#pragma unroll 1
    for (int64_t d = threadIdx.x % 32; d < depth; d += 32) {
      along += unit(d) * widen(gradient[d * of_rows.column_stride]);
    }
    along = lanes_sum<32>(along);
#pragma unroll 1
    for (int64_t d = threadIdx.x % 32; d < depth; d += 32) {
      Gradient& x = gradient[d * of_rows.column_stride];
      x = narrow<Gradient>((widen(x) - along * unit(d)) * factor);
    }
  });
}

// References as rows to be scaled: of each sample, or those that all samples share.
inline Side references_of(const ForwardParams& p, int64_t samples) {
  Side side{};
  side.tokens = p.reference;
  side.count = p.references;
  side.samples = samples;
  return side;
}
inline int64_t blocks_of_rows(const Side& side, int64_t heads) {
  return side.samples * heads * divide_up(side.count, kRowsOfBlock);
}

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

// The problem with its rows scaled, but for those that kernels on chip scale themselves. `flags`
// are BackwardWorkspace::on_chip of all heads, optional.
template <class Storage, class Params>
Params scaled(const Params& given, const UnitLengthWorkspace& parts, Accumulate<Storage>* workspace,
              const Accumulate<Storage>* flags, Stream& stream) {
  const DoneOnChip done(flags);
  Params p = given;
  p.normalize = false;
  const auto scale = [&](Tensor& rows, const Side& side, int64_t at, const Done& done) {
    const int64_t count = side.offsets != nullptr ? side.packed : side.count;
    rows = {reinterpret_cast<Storage*>(workspace + at),
            {p.heads * count * p.depth, count * p.depth, p.depth, 1}};
    if (side.offsets != nullptr) rows.stride[0] = p.depth;
    launch<unit_length_kernel<Storage>>(stream, "unit_length_kernel", blocks_of_rows(side, p.heads),
                                        kMergeThreads, 0, side, p.heads, p.depth, done, rows);
  };
  scale(p.key, keys_of(given), parts.key, done.tokens);
  if (p.cross) scale(p.query, queries_of(given), parts.query, done.tokens);
  const int64_t samples = batch_of_references(given);
  const bool shared = samples < p.batch;
  scale(p.reference, references_of(given, samples), parts.reference,
        shared ? Done{} : done.references);
  if (shared) p.reference.stride[0] = 0;
  return p;
}

// Turns gradients by rows that `scaled` has scaled into gradients by the rows that were given.
template <class Storage>
void finish_gradients(const BackwardParams& p, const Accumulate<Storage>* flags, Stream& stream) {
  const DoneOnChip done(flags);
  const auto finish = [&](auto kind, const Side& side, const Tensor& gradient, const Done& done) {
    launch<unit_length_backward_kernel<Storage, decltype(kind)>>(
        stream, "unit_length_backward_kernel", blocks_of_rows(side, p.heads), kMergeThreads, 0,
        side, p.heads, p.depth, done, gradient);
  };
  finish(Storage{}, keys_of(p), p.grad_key, done.tokens);
  if (p.cross) finish(Storage{}, queries_of(p), p.grad_query, done.tokens);
  const int64_t of_head = p.references * p.depth;
  finish(Accumulate<Storage>{}, references_of(p, p.batch),
         {p.grad_reference.data, {p.heads * of_head, of_head, p.depth, 1}}, done.references);
}

}  // namespace setformer::cuda
