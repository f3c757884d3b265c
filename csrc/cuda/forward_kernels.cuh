// The kernels of forward: one per pass for heads that many blocks share, a single one for small
// heads.
#pragma once

#include "forward.cuh"
#include "merge_ranks.cuh"
#include "unit_length.cuh"

namespace setformer::cuda {

template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    sinkhorn_step_kernel(const int64_t first, const ForwardParams p, const Side side,
                         const int64_t t, Accumulate<Storage>* const partial) {
  at_work(first, most_shares<Storage>(p, side), 1, Select<Storage>{p, side, kScoresOnly, partial},
          [&](int64_t) { sinkhorn_step<Storage, false>(t); });
}

template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    collect_kernel(const int64_t first, const ForwardParams p, Accumulate<Storage>* const partial) {
  using S = Shape<Storage>;
  const int64_t groups = divide_up(p.value_depth, S::kGroup * S::kDepth);
  const Select<Storage> select{p, keys_of(p), kPools, partial};
  at_work(first, most_shares<Storage>(p, select.side), groups * divide_up(p.references, S::kRows),
          select,
          [&](int64_t part) { collect<Storage, false>(int(part / groups), int(part % groups)); });
}

template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    distribute_kernel(const int64_t first, const ForwardParams p) {
  const Select<Storage> select{p, receivers_of(p), kDistributes};
  at_work(first, most_shares<Storage>(p, select.side), 1, select,
          [&](int64_t) { distribute<Storage, false>(); });
}

// All of a small head: its keys stay in shared memory from the first step to the output.
template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    attention_forward_resident_kernel(const int64_t first, const ForwardParams p) {
  using S = Shape<Storage>;
  const int chunks = int(divide_up(p.references, S::kRows));
  const int groups = int(divide_up(p.value_depth, S::kGroup * S::kDepth));
  const int64_t index = first + blockIdx.x;
  for (int of_queries = 0; of_queries <= int(p.cross && p.distribute); ++of_queries) {
    __syncthreads();
    Select<Storage>{p, of_queries ? queries_of(p) : keys_of(p), kDistributes, nullptr, true}(index,
                                                                                             0);
    load_resident<Storage>();
    for (int64_t t = p.iterations > 0; t <= p.iterations; ++t) {
      sinkhorn_step<Storage, true>(t);
    }
    for (int part = 0; !of_queries && part < chunks * groups; ++part) {
      collect<Storage, true>(part / groups, part % groups);
    }
    if (p.distribute && bool(of_queries) == p.cross) distribute<Storage, true>();
  }
}

// columns^t from the states of all blocks that share a head, in the order of their tokens; a block
// that has its head alone has written them.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_columns_kernel(const int64_t first, const ForwardParams p, const Side side,
                         const int64_t t, const T* const partial) {
  const int64_t references = p.references;
  const int64_t at = (first + blockIdx.x) * kMergeThreads + threadIdx.x;
  if (at >= p.batch * p.heads * references) return;
  const int64_t head = at / references, j = at % references;
  const int64_t b = head / p.heads;
  const Share share = share_of<T>(p, side, side.span(b), b, head % p.heads);
  if (share.count == 1) return;
  LogSum<T> state;
  for (int64_t split = 0; split < share.count; ++split) {
    const T* from = partial + (share.before + split) * 2 * references + j;
    LogSum<T> other;
    other.largest = from[0];
    other.sum = from[references];
    state.merge(other);
  }
  const int64_t row = head * side.column_rows + (t > 0 ? t - 1 : 0);
  static_cast<T*>(side.columns)[row * references + j] = state.logarithm();
}

// A and the scale of the collection from the sums of all blocks that share a head.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_pooled_kernel(const int64_t first, const ForwardParams p, T* const scales,
                        const int64_t scales_of_head, const T* const partial) {
  const int64_t references = p.references, width = p.value_depth;
  const int64_t of_share = references * (width + 1);
  const int64_t at = (first + blockIdx.x) * kMergeThreads + threadIdx.x;
  if (at >= p.batch * p.heads * references * width) return;
  const int64_t head = at / (references * width), j = at / width % references;
  const int64_t b = head / p.heads;
  const Side keys = keys_of(p);
  const Share share = share_of<T>(p, keys, keys.span(b), b, head % p.heads);
  if (share.count == 1) return;
  const T* from = partial + share.before * of_share + j * (width + 1);
  T sum = 0, total = 0;
  for (int64_t split = 0; split < share.count; ++split) {
    sum += from[split * of_share + at % width];
    total += from[split * of_share + width];
  }
  const T scale = inverse(total);
  static_cast<T*>(p.pooled.data)[at] = sum * scale;
  if (at % width == 0) scales[head * scales_of_head + j] = scale;
}

template <class Storage>
void launch_solve(const ForwardParams& p, const Side& side, Accumulate<Storage>* partial,
                  Stream& stream) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const int64_t heads = p.batch * p.heads, references = p.references;
  const int64_t shares = most_shares<Storage>(p, side);
  const int64_t bytes = streaming_bytes<Storage>(p, kScoresOnly, stream);
  for (int64_t t = p.iterations > 0; t <= p.iterations; ++t) {
    launch<sinkhorn_step_kernel<Storage>>(stream, "sinkhorn_step_kernel", heads * shares,
                                          S::kThreads, bytes, p, side, t, partial);
    T* columns = static_cast<T*>(side.columns) + (t > 0 ? t - 1 : 0) * references;
    const int64_t columns_of_head = side.column_rows * references;
    if (shares > 1) {
      launch<merge_columns_kernel<T>>(stream, "merge_columns_kernel",
                                      divide_up(heads * references, kMergeThreads), kMergeThreads,
                                      0, p, side, t, static_cast<const T*>(partial));
    }
    const Shared shared{columns, heads, references, columns_of_head, Merge::kLogSum};
    merge(p, stream, &shared, 1);
  }
}

template <class Storage>
ForwardWorkspace ForwardKernels<Storage>::workspace(const ForwardParams& p) {
  // Numbers for each share of one side, if blocks share any of its heads.
  const auto wanted = [&](const Side& side, int64_t numbers) {
    return most_shares<Storage>(p, side) > 1 ? all_shares<Storage>(p, side) * numbers : 0;
  };
  ForwardWorkspace parts;
  const int64_t states = 2 * p.references, sums = p.references * (p.value_depth + 1);
  parts.total = wanted(keys_of(p), states > sums ? states : sums);
  const int64_t of_queries = p.cross ? wanted(queries_of(p), states) : 0;
  if (parts.total < of_queries) parts.total = of_queries;
  if constexpr (kRunsOnChip<Storage>) {
    const int64_t of_shares = SharedForward<Storage>::workspace(p);
    if (parts.total < of_shares) parts.total = of_shares;
  }
  parts.scaled = unit_length_workspace<Storage>(p, parts.total);
  return parts;
}

template <class Storage>
void ForwardKernels<Storage>::run(const ForwardParams& p, void* workspace, Stream& stream) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const int64_t heads = p.batch * p.heads;
  T* partial = static_cast<T*>(workspace);
  if constexpr (kRunsOnChip<Storage>) {
    if (OnChipForward<Storage>::run(p, stream)) return;
    if constexpr (kIsHalf<Storage>) {
      if (OnClusterForward<Storage>::run(p, stream)) return;
    }
    if (SharedForward<Storage>::run(p, partial, stream)) return;
  }
  if (p.normalize) {
    const UnitLengthWorkspace parts = ForwardKernels::workspace(p).scaled;
    return run(scaled<Storage>(p, parts, partial, nullptr, stream), workspace, stream);
  }
  if constexpr (kResident<Storage> && !kIsHalf<Storage>) {
    if (fits_one_block<Storage>(p, kDistributes, stream)) {
      launch<attention_forward_resident_kernel<Storage>>(
          stream, "attention_forward_resident_kernel", heads, S::kThreads,
          resident_bytes<Storage>(p, kDistributes, stream), p);
      return;
    }
  }
  const int64_t shares = most_shares<Storage>(p, keys_of(p));
  launch_solve<Storage>(p, keys_of(p), partial, stream);
  launch<collect_kernel<Storage>>(stream, "collect_kernel",
                                  heads * shares * divide_up(p.value_depth, S::kGroup * S::kDepth) *
                                      divide_up(p.references, S::kRows),
                                  S::kThreads, streaming_bytes<Storage>(p, kPools, stream), p,
                                  partial);
  T* scales = static_cast<T*>(p.columns.data) + steps_kept(p) * p.references;
  const int64_t scales_of_head = keys_of(p).column_rows * p.references;
  if (shares > 1) {
    launch<merge_pooled_kernel<T>>(stream, "merge_pooled_kernel",
                                   divide_up(heads * p.references * p.value_depth, kMergeThreads),
                                   kMergeThreads, 0, p, scales, scales_of_head,
                                   static_cast<const T*>(partial));
  }
  merge_pooled(p, scales, scales_of_head, stream);
  if (!p.distribute) return;
  if (p.cross) launch_solve<Storage>(p, queries_of(p), partial, stream);
  launch<distribute_kernel<Storage>>(stream, "distribute_kernel",
                                     heads * most_shares<Storage>(p, receivers_of(p)), S::kThreads,
                                     streaming_bytes<Storage>(p, kDistributes, stream), p);
}

}  // namespace setformer::cuda
