// The kernels of backward: one per pass for heads that many blocks share, one in all for small
// heads.
#pragma once

#include "backward.cuh"
#include "forward_kernels.cuh"

namespace setformer::cuda {

template <class Storage>
struct SelectBackward {
  const BackwardParams& p;
  const BackwardWorkspace& parts;
  Accumulate<Storage>* workspace;
  bool of_queries;
  bool resident = false;
  __device__ void operator()(int64_t index, int64_t split) const {
    BackwardHead<Storage>& head = shared_head<BackwardHead<Storage>>();
    if (threadIdx.x == 0) {
      if (of_queries) {
        head.select(p, queries_of(p), resident, index, split);
      } else {
        head.select(p, keys_of(p), resident, index, split);
      }
      head.select_gradients(p, parts, workspace, of_queries);
    }
    head.find_center();
  }
  __device__ int64_t splits() const {
    return Splits<Storage>(of_queries ? p.queries : p.tokens).count;
  }
};

// A head whose references are one tile, and its columns one group, is done in one go.
template <class Storage>
__host__ __device__ inline bool gradient_in_one(const BackwardParams& p) {
  using S = Shape<Storage>;
  return p.references <= S::kRows && p.depth <= S::kGroup * S::kDepth;
}

template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    output_product_kernel(const BackwardParams p, const BackwardWorkspace parts,
                          Accumulate<Storage>* const workspace) {
  const SelectBackward<Storage> select{p, parts, workspace, p.cross};
  for_each_work(p, select.splits(), 1, select,
                [&](int64_t) { output_product<Storage>(workspace + parts.delta); });
}

template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    distribute_backward_kernel(const BackwardParams p, const BackwardWorkspace parts,
                               Accumulate<Storage>* const workspace) {
  using S = Shape<Storage>;
  const SelectBackward<Storage> select{p, parts, workspace, p.cross};
  const int64_t groups = divide_up(p.value_depth, S::kGroup * S::kDepth);
  for_each_work(p, select.splits(), groups * divide_up(p.references, S::kRows), select,
                [&](int64_t part) {
                  distribute_backward<Storage>(int(part / groups), int(part % groups),
                                               workspace + parts.partial);
                });
}

template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    normalize_collection_kernel(const BackwardParams p, const BackwardWorkspace parts,
                                Accumulate<Storage>* const workspace) {
  const SelectBackward<Storage> select{p, parts, workspace, false};
  for_each_work(
      p, select.splits(), divide_up(p.references, Shape<Storage>::kRows), select,
      [&](int64_t chunk) { normalize_collection<Storage>(int(chunk), workspace + parts.partial); });
}

template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    sinkhorn_step_backward_kernel(const BackwardParams p, const BackwardWorkspace parts,
                                  Accumulate<Storage>* const workspace, const bool of_queries,
                                  const int64_t t) {
  const SelectBackward<Storage> select{p, parts, workspace, of_queries};
  for_each_work(p, select.splits(), 1, select,
                [&](int64_t) { sinkhorn_step_backward<Storage>(t, workspace + parts.partial); });
}

template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    gradient_kernel(const BackwardParams p, const BackwardWorkspace parts,
                    Accumulate<Storage>* const workspace, const bool of_queries,
                    const bool to_tokens, const bool to_references) {
  using S = Shape<Storage>;
  const SelectBackward<Storage> select{p, parts, workspace, of_queries};
  const int64_t groups = divide_up(p.depth, S::kGroup * S::kDepth);
  for_each_work(p, select.splits(), to_references ? groups * divide_up(p.references, S::kRows) : 1,
                select, [&](int64_t part) {
                  gradient<Storage>(to_tokens, to_references, int(part / groups),
                                    int(part % groups), workspace + parts.partial,
                                    workspace + parts.scalars);
                });
}

// dA, eta and gbar^T: a warp per reference.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_pooled_gradient_kernel(const BackwardParams p, const BackwardWorkspace parts,
                                 T* const workspace, const int64_t splits) {
  constexpr int kWarps = kMergeThreads / 32;
  const int64_t heads = p.batch * p.heads, references = p.references;
  for (int64_t at = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; at < heads * references;
       at += int64_t(gridDim.x) * kWarps) {
    const int64_t head = at / references, j = at % references;
    const int64_t adjoint = (head * (p.iterations + 1) + p.iterations) * references + j;
    finish_pooled_gradient<T>(p, head, j, splits, workspace + parts.partial,
                              workspace + parts.pooled_gradient + head * references * p.value_depth,
                              workspace + parts.eta + head * references,
                              workspace + parts.column_adjoints[0] + adjoint,
                              p.cross ? workspace + parts.column_adjoints[1] + adjoint : nullptr);
  }
}

// The sums of all blocks that share a head, in the order of their tokens: -sum as gbar^t, or 1 /
// sum as the scale of the collection.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_sums_kernel(const int64_t heads, const int64_t references, const int64_t splits,
                      T* const results, const int64_t results_of_head, const bool inverse,
                      const T* const partial) {
  for (int64_t at = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x; at < heads * references;
       at += int64_t(gridDim.x) * kMergeThreads) {
    const int64_t head = at / references, j = at % references;
    T sum = 0;
    for (int64_t split = 0; split < splits; ++split) {
      sum += partial[(head * splits + split) * references + j];
    }
    results[head * results_of_head + j] = !inverse ? -sum : sum == T(0) ? T(0) : T(1) / sum;
  }
}

template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads)
    merge_gradient_kernel(const BackwardParams p, const BackwardWorkspace parts,
                          Accumulate<Storage>* const workspace, const bool of_queries) {
  __shared__ Accumulate<Storage> scratch[Shape<Storage>::kWarps];
  const SelectBackward<Storage> select{p, parts, workspace, of_queries};
  for (int64_t index = blockIdx.x; index < p.batch * p.heads; index += gridDim.x) {
    __syncthreads();
    select(index, 0);
    finish_gradient<Storage>(p, workspace + parts.partial, workspace + parts.scalars, of_queries,
                             scratch);
  }
}

template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    reference_mass_gradient_kernel(const BackwardParams p, const T* const of_keys,
                                   const T* const of_queries) {
  for (int64_t at = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
       at < p.batch * p.heads * p.references; at += int64_t(gridDim.x) * kMergeThreads) {
    store_reference_mass_gradient(p, at / p.references, at % p.references, of_keys, of_queries);
  }
}

// All of a small head: first through the distribution, then each side's steps and gradient.
template <class Storage>
__global__ void __launch_bounds__(Shape<Storage>::kThreads, 2)
    attention_backward_resident_kernel(const BackwardParams p, const BackwardWorkspace parts,
                                       Accumulate<Storage>* const workspace) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const int chunks = int(divide_up(p.references, S::kRows));
  const int value_groups = int(divide_up(p.value_depth, S::kGroup * S::kDepth));
  const int groups = int(divide_up(p.depth, S::kGroup * S::kDepth));
  const int64_t references = p.references;
  for (int64_t index = blockIdx.x; index < p.batch * p.heads; index += gridDim.x) {
    const int64_t adjoints = index * (p.iterations + 1) * references;
    for (int phase = 0; phase < (p.cross ? 3 : 2); ++phase) {
      const SelectBackward<Storage> select{p, parts, workspace, p.cross && phase != 1, true};
      __syncthreads();
      select(index, 0);
      const BackwardHead<Storage>& head = shared_head<BackwardHead<Storage>>();
      Scores<Storage>(head).load_all();
      if (phase == 0) {
        if (head.distributes) {
          output_product<Storage>(workspace + parts.delta);
          __syncthreads();
          for (int part = 0; part < chunks * value_groups; ++part) {
            distribute_backward<Storage>(part / value_groups, part % value_groups,
                                         workspace + parts.partial);
          }
        }
        __syncthreads();
        for (int64_t j = threadIdx.x / 32; j < references; j += S::kWarps) {
          T* adjoint = workspace + parts.column_adjoints[0] + adjoints + p.iterations * references;
          T* of_queries =
              workspace + parts.column_adjoints[1] + adjoints + p.iterations * references;
          finish_pooled_gradient<T>(
              p, index, j, head.distributes ? 1 : 0, workspace + parts.partial,
              workspace + parts.pooled_gradient + index * references * p.value_depth,
              workspace + parts.eta + index * references, adjoint + j,
              p.cross ? of_queries + j : nullptr);
        }
        continue;
      }
      if (head.collects) {
        for (int chunk = 0; chunk < chunks; ++chunk) {
          normalize_collection<Storage>(chunk, static_cast<T*>(nullptr));
        }
      }
      for (int64_t t = p.iterations; t >= (p.iterations > 0 ? 1 : 0); --t) {
        if (t > 0 || head.collects) {
          sinkhorn_step_backward<Storage>(t, static_cast<T*>(nullptr));
        }
      }
      const bool in_one = gradient_in_one<Storage>(p);
      const int rounds = in_one ? 1 : 1 + chunks * groups;
      for (int round = 0; round < rounds; ++round) {
        const int part = in_one || round == 0 ? 0 : round - 1;
        gradient<Storage>(round == 0, in_one || round > 0, part / groups, part % groups,
                          workspace + parts.partial, workspace + parts.scalars);
        __syncthreads();
      }
      finish_gradient<Storage>(p, workspace + parts.partial, workspace + parts.scalars,
                               select.of_queries, head.numbers() + head.layout.sums());
    }
    __syncthreads();
    if (p.grad_reference_mass.data != nullptr) {
      for (int64_t j = threadIdx.x; j < references; j += S::kThreads) {
        store_reference_mass_gradient(p, index, j, workspace + parts.column_adjoints[0],
                                      p.cross ? workspace + parts.column_adjoints[1] : nullptr);
      }
    }
  }
}

template <class Storage>
BackwardWorkspace Kernels<Storage>::backward_workspace(const BackwardParams& p) {
  const int64_t heads = p.batch * p.heads, references = p.references;
  const int64_t keys = Splits<Storage>(p.tokens).count;
  const int64_t queries = p.cross ? Splits<Storage>(p.queries).count : 1;
  const int64_t splits = keys > queries ? keys : queries;
  BackwardWorkspace parts;
  const auto take = [&](int64_t numbers) {
    const int64_t at = parts.total;
    parts.total += divide_up(numbers, 64) * 64;  // whole 256 bytes
    return at;
  };
  parts.delta = take(heads * receivers_of(p).count);
  parts.pooled_gradient = take(heads * references * p.value_depth);
  parts.eta = take(heads * references);
  parts.collection_scale = take(heads * references);
  for (int of_queries = 0; of_queries <= int(p.cross); ++of_queries) {
    parts.row_adjoints[of_queries] =
        take(heads * steps_kept(p) * (of_queries ? p.queries : p.tokens));
    parts.column_adjoints[of_queries] = take(heads * (p.iterations + 1) * references);
  }
  parts.scalars = take(heads * splits * 2);
  const int64_t width = p.depth > p.value_depth ? p.depth : p.value_depth;
  parts.partial = take(heads * splits * references * (width + 1));
  return parts;
}

// The steps of one side and the gradient of its tokens, references, bandwidth and epsilon.
template <class Storage>
void launch_side_backward(const BackwardParams& p, const BackwardWorkspace& parts,
                          Accumulate<Storage>* workspace, bool of_queries, int64_t bytes,
                          Stream& stream) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const int64_t heads = p.batch * p.heads, references = p.references;
  const Splits<Storage> splits((of_queries ? queries_of(p) : keys_of(p)).count);
  const int64_t chunks = divide_up(references, S::kRows);
  const T* partial = workspace + parts.partial;
  const auto merge_sums = [&](T* results, int64_t results_of_head, bool inverse) {
    if (splits.count == 1) return;
    launch(stream, "merge_sums_kernel", merge_sums_kernel<T>,
           divide_up(heads * references, kMergeThreads), kMergeThreads, 0, heads, references,
           splits.count, results, results_of_head, inverse, partial);
  };
  if (!of_queries) {
    launch(stream, "normalize_collection_kernel", normalize_collection_kernel<Storage>,
           heads * splits.count * chunks, S::kThreads, bytes, p, parts, workspace);
    merge_sums(workspace + parts.collection_scale, references, true);
  }
  for (int64_t t = p.iterations; t >= (p.iterations > 0 ? 1 : 0); --t) {
    if (t == 0 && of_queries) break;
    launch(stream, "sinkhorn_step_backward_kernel", sinkhorn_step_backward_kernel<Storage>,
           heads * splits.count, S::kThreads, bytes, p, parts, workspace, of_queries, t);
    if (t > 1) {
      merge_sums(workspace + parts.column_adjoints[of_queries] + (t - 1) * references,
                 (p.iterations + 1) * references, false);
    }
  }
  const bool in_one = gradient_in_one<Storage>(p);
  const int64_t groups = divide_up(p.depth, S::kGroup * S::kDepth);
  launch(stream, "gradient_kernel", gradient_kernel<Storage>, heads * splits.count, S::kThreads,
         bytes, p, parts, workspace, of_queries, true, in_one);
  if (!in_one) {
    launch(stream, "gradient_kernel", gradient_kernel<Storage>,
           heads * splits.count * chunks * groups, S::kThreads, bytes, p, parts, workspace,
           of_queries, false, true);
  }
  launch(stream, "merge_gradient_kernel", merge_gradient_kernel<Storage>, heads, S::kThreads,
         kHeadBytes<Storage>, p, parts, workspace, of_queries);
}

template <class Storage>
void Kernels<Storage>::backward(const BackwardParams& p, void* memory, Stream& stream) {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;
  const BackwardWorkspace parts = backward_workspace(p);
  T* workspace = static_cast<T*>(memory);
  const int64_t heads = p.batch * p.heads, references = p.references;
  if (fits_one_block<Storage>(p, stream)) {
    const int64_t tokens = p.cross && p.queries > p.tokens ? p.queries : p.tokens;
    launch(stream, "attention_backward_resident_kernel",
           attention_backward_resident_kernel<Storage>, heads, S::kThreads,
           Layout<Storage>(p, true, tokens, stream.stages).total, p, parts, workspace);
    return;
  }
  const int64_t bytes = Layout<Storage>(p, false, 0, stream.stages).total;
  const Splits<Storage> splits(receivers_of(p).count);
  const bool distributes = p.distribute && p.grad_output.data != nullptr;
  if (distributes) {
    launch(stream, "output_product_kernel", output_product_kernel<Storage>, heads * splits.count,
           S::kThreads, kHeadBytes<Storage>, p, parts, workspace);
    launch(stream, "distribute_backward_kernel", distribute_backward_kernel<Storage>,
           heads * splits.count * divide_up(references, S::kRows) *
               divide_up(p.value_depth, S::kGroup * S::kDepth),
           S::kThreads, bytes, p, parts, workspace);
  }
  launch(stream, "merge_pooled_gradient_kernel", merge_pooled_gradient_kernel<T>,
         divide_up(heads * references, kMergeThreads / 32), kMergeThreads, 0, p, parts, workspace,
         distributes ? splits.count : 0);
  launch_side_backward<Storage>(p, parts, workspace, false, bytes, stream);
  if (p.cross) launch_side_backward<Storage>(p, parts, workspace, true, bytes, stream);
  if (p.grad_reference_mass.data != nullptr) {
    launch(stream, "reference_mass_gradient_kernel", reference_mass_gradient_kernel<T>,
           divide_up(heads * references, kMergeThreads), kMergeThreads, 0, p,
           static_cast<const T*>(workspace + parts.column_adjoints[0]),
           p.cross ? static_cast<const T*>(workspace + parts.column_adjoints[1])
                   : static_cast<const T*>(nullptr));
  }
}

}  // namespace setformer::cuda
