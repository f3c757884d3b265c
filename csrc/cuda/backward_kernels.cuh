// The kernels of backward: one per pass for heads that many blocks share, a single one for small
// heads.
#pragma once

#include "gradient.cuh"
#include "launch.cuh"
#include "unit_length.cuh"

namespace setformer::cuda {

template <class Storage>
struct SelectBackward {
  const BackwardParams& p;
  const BackwardWorkspace& parts;
  Accumulate<Storage>* workspace;
  bool of_queries;
  int needs;
  float least = kPassesOnChip;  // from which on the head is left to kernels on chip
  bool resident = false;
  __device__ bool operator()(int64_t index, int64_t split) const {
    if (is_on_chip(parts, workspace, index, least)) return false;
    BackwardHead<Storage>& head = shared_head<BackwardHead<Storage>>();
    if (thread_index() == 0) {
      const Span span =
          head.select(p, side(), needs, resident, index, split, workspace + parts.partial);
      head.select_gradients(p, parts, workspace, head, span, head.shares_before, of_queries);
    }
    head.find_center();
    return head.split < head.splits;
  }
  __device__ Side side() const { return of_queries ? queries_of(p) : keys_of(p); }
  __device__ int64_t shares() const { return most_shares<Storage>(p, side()); }
};

// The step of the keys that collects multiplies a plan with an operand, as distribution does.
__host__ __device__ inline int step_needs(const ForwardParams& p, bool of_queries, int64_t t) {
  return !of_queries && t == p.iterations ? kDistributes : kScoresOnly;
}

// One launch gives the gradients of tokens and of references if the references are one tile and the
// columns one group.
template <class Storage>
__host__ __device__ inline bool gradient_in_one(const ForwardParams& p) {
  using S = Shape<Storage>;
  return p.references <= S::kRows && p.depth <= S::kGroup * S::kDepth;
}

template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    output_product_kernel(const int64_t first, const BackwardParams p,
                          const BackwardWorkspace parts, Accumulate<Storage>* const workspace) {
  const SelectBackward<Storage> select{p, parts, workspace, p.cross, kHeadAlone};
  at_work(first, select.shares(), 1, select, [&](int64_t) { output_product<Storage>(); });
}

template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    distribute_backward_kernel(const int64_t first, const BackwardParams p,
                               const BackwardWorkspace parts,
                               Accumulate<Storage>* const workspace) {
  using S = Shape<Storage>;
  const SelectBackward<Storage> select{p, parts, workspace, p.cross, kPools};
  const int64_t groups = divide_up(p.value_depth, S::kGroup * S::kDepth);
  at_work(first, select.shares(), groups * divide_up(p.references, S::kRows), select,
          [&](int64_t part) {
            distribute_backward<Storage, false>(int(part / groups), int(part % groups));
          });
}

template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    sinkhorn_step_backward_kernel(const int64_t first, const BackwardParams p,
                                  const BackwardWorkspace parts,
                                  Accumulate<Storage>* const workspace, const bool of_queries,
                                  const int64_t t) {
  const SelectBackward<Storage> select{p, parts, workspace, of_queries,
                                       step_needs(p, of_queries, t)};
  at_work(first, select.shares(), 1, select,
          [&](int64_t) { sinkhorn_step_backward<Storage, false>(t); });
}

template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    gradient_kernel(const int64_t first, const BackwardParams p, const BackwardWorkspace parts,
                    Accumulate<Storage>* const workspace, const bool of_queries,
                    const bool to_tokens, const bool to_references) {
  using S = Shape<Storage>;
  const SelectBackward<Storage> select{p, parts, workspace, of_queries, kDifferentiates};
  const int64_t groups = divide_up(p.depth, S::kGroup * S::kDepth);
  at_work(first, select.shares(), to_references ? groups * divide_up(p.references, S::kRows) : 1,
          select, [&](int64_t part) {
            gradient<Storage, false>(to_tokens, to_references, int(part / groups),
                                     int(part % groups));
          });
}

// dA, eta and gbar^T: a warp per reference. Adds up to `splits` sums: none where nothing is
// distributed, one where those of all blocks are merged already.
template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    merge_pooled_gradient_kernel(const int64_t first, const BackwardParams p,
                                 const BackwardWorkspace parts,
                                 Accumulate<Storage>* const workspace, const int64_t splits) {
  constexpr int kWarps = Shape<Storage>::kWarps;
  const SelectBackward<Storage> select{p, parts, workspace, p.cross, kHeadAlone, kAllOnChip};
  at_work(first, 1, divide_up(p.references, kWarps), select, [&](int64_t group) {
    const int64_t j = group * kWarps + thread_index() / 32;
    const int64_t own = shared_head<BackwardHead<Storage>>().splits;
    if (j < p.references) finish_pooled_gradient<Storage>(j, splits < own ? splits : own);
  });
}

// gbar^t from the sums of all blocks that share a head, in the order of their tokens; a block that
// has its head alone has written it.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_sums_kernel(const int64_t first, const ForwardParams p, const Side side, T* const results,
                      const int64_t results_of_head, const BackwardWorkspace parts,
                      const T* const workspace) {
  const T* const partial = workspace + parts.partial;
  const int64_t references = p.references;
  const int64_t at = (first + blockIdx.x) * kMergeThreads + threadIdx.x;
  if (at >= p.batch * p.heads * references) return;
  const int64_t head = at / references, j = at % references;
  if (is_on_chip(parts, workspace, head, kAllOnChip)) return;
  const int64_t b = head / p.heads;
  const Share share = share_of<T>(p, side, side.span(b), b, head % p.heads);
  if (share.count == 1) return;
  T sum = 0;
  for (int64_t split = 0; split < share.count; ++split) {
    sum += partial[(share.before + split) * references + j];
  }
  results[head * results_of_head + j] = sum;
}

// Adds up the sums of all blocks that share a head, [heads, splits, numbers], in the place of the
// first block's.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_blocks_kernel(const int64_t first, const int64_t heads, const int64_t splits,
                        const int64_t numbers, T* const partial) {
  const int64_t at = (first + blockIdx.x) * kMergeThreads + threadIdx.x;
  if (at >= heads * numbers) return;
  T* of_head = partial + at / numbers * splits * numbers + at % numbers;
  T sum = 0;
  for (int64_t split = 0; split < splits; ++split) sum += of_head[split * numbers];
  *of_head = sum;
}

// dy: a warp per reference.
template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    merge_gradient_kernel(const int64_t first, const BackwardParams p,
                          const BackwardWorkspace parts, Accumulate<Storage>* const workspace,
                          const bool of_queries) {
  constexpr int kWarps = Shape<Storage>::kWarps;
  const SelectBackward<Storage> select{p, parts, workspace, of_queries, kHeadAlone, kAllOnChip};
  at_work(first, 1, divide_up(p.references, kWarps), select, [&](int64_t group) {
    const int64_t j = group * kWarps + thread_index() / 32;
    if (j < p.references) finish_reference_gradient<Storage>(j, of_queries);
  });
}

// d epsilon, d bandwidth and d reference mass: a warp per head.
template <class Storage>
__global__ void __launch_bounds__(kMergeThreads)
    head_gradient_kernel(const int64_t first, const BackwardParams p, const BackwardWorkspace parts,
                         const Accumulate<Storage>* const workspace) {
  constexpr int kWarps = kMergeThreads / 32;
  const int64_t head = (first + blockIdx.x) * kWarps + thread_index() / 32;
  if (head >= p.batch * p.heads || is_on_chip(parts, workspace, head, kAllOnChip)) return;
  const int64_t b = head / p.heads, h = head % p.heads;
  const Side keys = keys_of(p), queries = queries_of(p);
  const Share of_keys = share_of<Storage>(p, keys, keys.span(b), b, h);
  Share of_queries{};
  if (p.cross) of_queries = share_of<Storage>(p, queries, queries.span(b), b, h);
  finish_head<Storage>(p, parts, workspace, b, h, of_keys, of_queries);
}

// The parts of backward of a resident head.
template <class Storage>
__device__ __forceinline__ void resident_distribution() {
  using S = Shape<Storage>;
  const BackwardHead<Storage>& head = shared_head<BackwardHead<Storage>>();
  const int groups = int(divide_up(head.p.value_depth, S::kGroup * S::kDepth));
  if (head.distributes) {
    output_product<Storage>();
    __syncthreads();
    for (int part = 0; part < head.layout.chunks * groups; ++part) {
      distribute_backward<Storage, true>(part / groups, part % groups);
    }
  }
  __syncthreads();
  for (int j = thread_index() / 32; j < head.p.references; j += S::kWarps) {
    finish_pooled_gradient<Storage>(j, head.distributes ? 1 : 0);
  }
}

template <class Storage>
__device__ __forceinline__ void resident_steps() {
  const BackwardHead<Storage>& head = shared_head<BackwardHead<Storage>>();
  const int64_t last = head.p.iterations > 0 || !head.collects ? 1 : 0;
  for (int64_t t = head.p.iterations; t >= last; --t) sinkhorn_step_backward<Storage, true>(t);
}

template <class Storage>
__device__ __forceinline__ void resident_gradient() {
  using S = Shape<Storage>;
  const BackwardHead<Storage>& head = shared_head<BackwardHead<Storage>>();
  const int groups = int(divide_up(head.p.depth, S::kGroup * S::kDepth));
  // only one call in the source, because the function is inlined
  const bool in_one = gradient_in_one<Storage>(head.p);
  const int rounds = in_one ? 1 : 1 + head.layout.chunks * groups;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const int part = round > 0 ? round - 1 : 0;
    gradient<Storage, true>(round == 0, in_one || round > 0, part / groups, part % groups);
    __syncthreads();
  }
  for (int j = thread_index() / 32; j < head.p.references; j += S::kWarps) {
    finish_reference_gradient<Storage>(j, !head.collects);
  }
}

// All of backward for a small head, unless attention_backward_on_chip_kernel has done it: first
// through the distribution to A and the last potentials, then through the steps of each side to its
// gradients.
template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    attention_backward_resident_kernel(const int64_t first, const BackwardParams p,
                                       const BackwardWorkspace parts,
                                       Accumulate<Storage>* const workspace) {
  const int64_t index = first + blockIdx.x;
  if (is_on_chip(parts, workspace, index, kAllOnChip)) return;
#pragma unroll 1
  for (int phase = 0; phase < (p.cross ? 3 : 2); ++phase) {
    __syncthreads();
    if (phase == 0 || p.cross) {
      const bool of_queries = p.cross && phase != 1;
      SelectBackward<Storage>{p,          parts, anew(workspace), of_queries, kDifferentiates,
                              kAllOnChip, true}(index, 0);
      load_resident<Storage>();
    }
    if (phase == 0) {
      resident_distribution<Storage>();
    } else {
      resident_steps<Storage>();
      resident_gradient<Storage>();
    }
  }
  __syncthreads();
  if (thread_index() < 32) {
    const Share alone{index, 1};
    finish_head<Storage>(p, parts, anew(workspace), index / p.heads, index % p.heads, alone, alone);
  }
}

template <class Storage>
BackwardWorkspace BackwardKernels<Storage>::workspace(const BackwardParams& p) {
  const int64_t heads = p.batch * p.heads, references = p.references;
  BackwardWorkspace parts;
  int64_t most = 0;
  const auto take = [&](int64_t numbers) {
    const int64_t at = parts.total;
    parts.total += divide_up(numbers, 64) * 64;  // whole 256 bytes
    return at;
  };
  parts.delta = take(p.heads * all_tokens(receivers_of(p)));
  parts.pooled_gradient = take(heads * references * p.value_depth);
  parts.eta = take(heads * references);
  for (int of_queries = 0; of_queries <= int(p.cross); ++of_queries) {
    const Side side = of_queries ? queries_of(p) : keys_of(p);
    const int64_t shares = all_shares<Storage>(p, side);
    if (most < shares) most = shares;
    parts.row_adjoints[of_queries] = take(p.heads * steps_kept(p) * all_tokens(side));
    parts.column_adjoints[of_queries] = take(heads * (p.iterations + 1) * references);
    parts.scalars[of_queries] = take(shares * 2);
    parts.reference_products[of_queries] = take(heads * references);
  }
  parts.on_chip = take(heads);
  const int64_t width = p.depth > p.value_depth ? p.depth : p.value_depth;
  parts.partial = take(most * references * (width + 1));
  parts.scaled = unit_length_workspace<Storage>(p, parts.total);
  return parts;
}

// Launches the passes on shares, if there are any: those of the problem with rows as given.
template <class Storage>
struct OnShares {
  const BackwardParams* problem;  // null where there are none
  const BackwardWorkspace& parts;
  Accumulate<Storage>* workspace;
  Stream& stream;
  void operator()(Pass pass, bool of_queries, int64_t t = 0) const {
    if constexpr (kIsHalf<Storage>) {
      if (problem == nullptr) return;
      SharedBackward<Storage>::run(*problem, parts, workspace, pass, of_queries, t, stream);
    }
  }
};

// The steps of one side and the gradient of its tokens, references, bandwidth and epsilon.
template <class Storage>
void launch_side_backward(const BackwardParams& p, const BackwardWorkspace& parts,
                          Accumulate<Storage>* workspace, bool of_queries,
                          const OnShares<Storage>& on_shares, Stream& stream) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const int64_t heads = p.batch * p.heads, references = p.references;
  const Side side = of_queries ? queries_of(p) : keys_of(p);
  const int64_t shares = most_shares<Storage>(p, side);
  const int64_t chunks = divide_up(references, S::kRows);
  const auto bytes = [&](int needs) { return streaming_bytes<Storage>(p, needs, stream); };
  for (int64_t t = p.iterations; t >= (p.iterations > 0 ? 1 : 0); --t) {
    if (t == 0 && of_queries) break;
    on_shares(Pass::kStep, of_queries, t);
    launch<sinkhorn_step_backward_kernel<Storage>>(
        stream, "sinkhorn_step_backward_kernel", heads * shares, S::kThreads,
        bytes(step_needs(p, of_queries, t)), p, parts, workspace, of_queries, t);
    if (t <= 1) continue;
    T* adjoints = workspace + parts.column_adjoints[of_queries] + (t - 1) * references;
    const int64_t adjoints_of_head = (p.iterations + 1) * references;
    if (shares > 1) {
      launch<merge_sums_kernel<T>>(
          stream, "merge_sums_kernel", divide_up(heads * references, kMergeThreads), kMergeThreads,
          0, p, side, adjoints, adjoints_of_head, parts, static_cast<const T*>(workspace));
    }
    const Shared shared{adjoints, heads, references, adjoints_of_head, Merge::kSum};
    merge(p, stream, &shared, 1);
  }
  on_shares(Pass::kGradients, of_queries);
  const bool in_one = gradient_in_one<Storage>(p);
  const int64_t groups = divide_up(p.depth, S::kGroup * S::kDepth);
  launch<gradient_kernel<Storage>>(stream, "gradient_kernel", heads * shares, S::kThreads,
                                   bytes(kDifferentiates), p, parts, workspace, of_queries, true,
                                   in_one);
  if (!in_one) {
    launch<gradient_kernel<Storage>>(stream, "gradient_kernel", heads * shares * chunks * groups,
                                     S::kThreads, bytes(kDifferentiates), p, parts, workspace,
                                     of_queries, false, true);
  }
  launch<merge_gradient_kernel<Storage>>(stream, "merge_gradient_kernel",
                                         heads * divide_up(references, S::kWarps), S::kThreads,
                                         kHeadBytes<Storage>, p, parts, workspace, of_queries);
}

// All of backward by kernels of one pass, or by the resident one, for the heads that
// attention_backward_on_chip_kernel has left. Where there are passes on shares, those of other
// kernels leave heads to them, and their sums are merged with all others.
template <class Storage>
void stream_backward(const BackwardParams& p, const BackwardWorkspace& parts,
                     Accumulate<Storage>* workspace, const OnShares<Storage>& on_shares,
                     Stream& stream) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const int64_t heads = p.batch * p.heads, references = p.references;
  if constexpr (kResident<Storage>) {
    if (on_shares.problem == nullptr && fits_one_block<Storage>(p, kDifferentiates, stream)) {
      launch<attention_backward_resident_kernel<Storage>>(
          stream, "attention_backward_resident_kernel", heads, S::kThreads,
          resident_bytes<Storage>(p, kDifferentiates, stream), p, parts, workspace);
      return;
    }
  }
  const auto bytes = [&](int needs) { return streaming_bytes<Storage>(p, needs, stream); };
  const int64_t shares = most_shares<Storage>(p, receivers_of(p));
  const bool distributes = p.distribute && p.grad_output.data != nullptr;
  if (distributes) {
    on_shares(Pass::kDistribution, p.cross);
    launch<output_product_kernel<Storage>>(stream, "output_product_kernel", heads * shares,
                                           S::kThreads, kHeadBytes<Storage>, p, parts, workspace);
    launch<distribute_backward_kernel<Storage>>(stream, "distribute_backward_kernel",
                                                heads * shares * divide_up(references, S::kRows) *
                                                    divide_up(p.value_depth, S::kGroup * S::kDepth),
                                                S::kThreads, bytes(kPools), p, parts, workspace);
  }
  int64_t partials = distributes ? shares : 0;
  if (distributes && p.group != nullptr) {
    const int64_t numbers = references * (p.value_depth + 1);
    launch<merge_blocks_kernel<T>>(stream, "merge_blocks_kernel",
                                   divide_up(heads * numbers, kMergeThreads), kMergeThreads, 0,
                                   heads, shares, numbers, workspace + parts.partial);
    const Shared shared{workspace + parts.partial, heads, numbers, shares * numbers, Merge::kSum};
    merge(p, stream, &shared, 1);
    partials = 1;
  }
  launch<merge_pooled_gradient_kernel<Storage>>(
      stream, "merge_pooled_gradient_kernel", heads * divide_up(references, S::kWarps), S::kThreads,
      kHeadBytes<Storage>, p, parts, workspace, partials);
  launch_side_backward<Storage>(p, parts, workspace, false, on_shares, stream);
  if (p.cross) launch_side_backward<Storage>(p, parts, workspace, true, on_shares, stream);
  launch<head_gradient_kernel<Storage>>(stream, "head_gradient_kernel",
                                        divide_up(heads, kMergeThreads / 32), kMergeThreads, 0, p,
                                        parts, static_cast<const T*>(workspace));
}

template <class Storage>
void BackwardKernels<Storage>::run(const BackwardParams& p, void* memory, Stream& stream) {
  using T = Accumulate<Storage>;
  BackwardWorkspace parts = workspace(p);
  T* workspace = static_cast<T*>(memory);
  bool on_chip = false, shared = false;
  if constexpr (kIsHalf<Storage>) {
    on_chip = OnChipBackward<Storage>::run(p, parts, workspace, stream);
    shared = !on_chip && SharedBackward<Storage>::begin(p, parts, workspace, stream);
  }
  if (!on_chip && !shared) parts.on_chip = -1;
  const OnShares<Storage> on_shares{shared ? &p : nullptr, parts, workspace, stream};
  if (!p.normalize) return stream_backward<Storage>(p, parts, workspace, on_shares, stream);
  const T* flags = on_chip || shared ? workspace + parts.on_chip : nullptr;
  stream_backward<Storage>(scaled<Storage>(p, parts.scaled, workspace, flags, stream), parts,
                           workspace, on_shares, stream);
  finish_gradients<Storage>(p, flags, stream);
}

}  // namespace setformer::cuda
