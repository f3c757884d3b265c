// Where backward keeps the gradients of a head, and the last ones: d epsilon, d bandwidth and d
// reference mass.
#pragma once

#include "kernels.h"
#include "problem.cuh"

namespace setformer::cuda {

// Adds to Base the tensors of one head and side that only backward has. (They are no second base:
// the compiler would no longer see that they are in shared memory, and read them by generic loads.)
template <class Storage, class Base>
struct WithGradients : Base {
  using T = Accumulate<Storage>;

  int64_t token_count, reference_count;
  bool collects, distributes;      // does this side hold the values, does it receive the output?
  Rows<Storage> output_gradients;  // [count, Dv]
  Rows<Storage> token_gradients;   // [count, D]
  Rows<Storage> value_gradients;   // [N, Dv], on the keys' side
  Global<T> delta;                 // [count]
  Global<const T> given;           // [M, Dv] what pooling is given, optional
  int64_t given_row_stride, given_column_stride;
  Global<T> pooled_gradient;      // [M, Dv] dA
  Global<T> eta;                  // [M]
  Global<T> row_adjoints;         // [max(T, 1), count] fhat^t, t = 1..T
  Global<T> column_adjoints;      // [T + 1, M] gbar^t, t = 0..T
  Global<T> key_column_adjoints;  // those of the keys, whichever side this is
  Global<T> mass_gradients;       // [count], optional
  Global<T> scalars;              // [splits, 2] sum_ij ds_ij s_ij and sum_i k_i.dk_i
  Global<T> reference_gradients;  // [M, D]
  Global<T> reference_products;   // [M] y_j.dy_j

  // To be called by one thread; `tensors` are those of the head and side.
  __device__ void select_gradients(const BackwardParams& p, const BackwardWorkspace& parts,
                                   T* workspace, const HeadTensors<Storage>& tensors,
                                   const Span& span, int64_t shares_before, bool of_queries) {
    const int64_t head = tensors.index, b = tensors.b, h = tensors.h;
    const int64_t count = tensors.tokens.count, references = p.references;
    const int64_t tokens_before = p.heads * span.before + h * count;
    token_count = count;
    reference_count = references;
    collects = !of_queries;
    distributes = p.distribute && p.grad_output.data != nullptr && of_queries == p.cross;
    output_gradients.select(p.grad_output, span.start, h, count, p.value_depth);
    if (of_queries) {
      output_gradients.hide(p.query_mask, b);
      token_gradients.select(p.grad_query, span.start, h, count, p.depth);
    } else {
      output_gradients.hide(p.mask, b);
      token_gradients.select(p.grad_key, span.start, h, count, p.depth);
    }
    value_gradients.select(p.grad_value, span.start, h, count, p.value_depth);
    delta = workspace + parts.delta + tokens_before;
    pooled_gradient = workspace + parts.pooled_gradient + head * references * p.value_depth;
    eta = workspace + parts.eta + head * references;
    row_adjoints = workspace + (of_queries ? parts.row_adjoints[1] : parts.row_adjoints[0]) +
                   steps_kept(p) * tokens_before;
    column_adjoints = workspace +
                      (of_queries ? parts.column_adjoints[1] : parts.column_adjoints[0]) +
                      head * (p.iterations + 1) * references;
    scalars = workspace + (of_queries ? parts.scalars[1] : parts.scalars[0]) + shares_before * 2;
    reference_products = workspace +
                         (of_queries ? parts.reference_products[1] : parts.reference_products[0]) +
                         head * references;
    key_column_adjoints =
        workspace + parts.column_adjoints[0] + head * (p.iterations + 1) * references;
    given = p.grad_pooled.data == nullptr
                ? nullptr
                : static_cast<const T*>(p.grad_pooled.data) + b * p.grad_pooled.stride[0] +
                      h * p.grad_pooled.stride[1];
    given_row_stride = p.grad_pooled.stride[2];
    given_column_stride = p.grad_pooled.stride[3];
    reference_gradients = static_cast<T*>(p.grad_reference.data) + head * references * p.depth;
    mass_gradients = of_queries || p.grad_token_mass.data == nullptr
                         ? nullptr
                         : static_cast<T*>(p.grad_token_mass.data) +
                               span.start * p.grad_token_mass.stride[0] +
                               h * p.grad_token_mass.stride[1];
  }

  __device__ __forceinline__ T& row_adjoint(int64_t t, int64_t i) const {
    return row_adjoints[(t > 0 ? t - 1 : 0) * token_count + i];
  }
  __device__ __forceinline__ T& column_adjoint(int64_t t, int64_t j) const {
    return column_adjoints[t * reference_count + j];
  }
};

struct NoOtherTensors {};
template <class Storage>
using GradientTensors = WithGradients<Storage, NoOtherTensors>;

// Whether kernels on chip handle head b H + h: its scores must be factors, and
// no reference mass may differ by more than a factor of 2^30 from the first one, to which
// potentials are relative. To be called by all `threads` threads of a block.
template <class Storage>
__device__ __forceinline__ bool is_for_chip(const BackwardParams& p, int64_t index, int threads) {
  const int64_t b = index / p.heads, h = index % p.heads;
  Similarity<Accumulate<Storage>> similarity;
  const Side keys = keys_of(p);
  similarity.select_similarity(p, keys, keys.span(b), h);
  if (!similarity.factored) return false;
  const Tensor& mass = p.reference_mass;
  if (mass.data == nullptr) return true;
  const float* masses =
      static_cast<const float*>(mass.data) + b * mass.stride[0] + h * mass.stride[1];
  const float most = 1 << 30, first = masses[0];
  bool far = false;
  for (int64_t j = threadIdx.x; j < p.references; j += threads) {
    const float x = masses[j * mass.stride[2]];
    far = far || x > most * first || first > most * x;
  }
  return !__syncthreads_or(far);
}

// Whether so much of the head does: other kernels then leave that to them.
template <class T>
__device__ __forceinline__ bool is_on_chip(const BackwardWorkspace& parts, const T* workspace,
                                           int64_t head, float least) {
  return parts.on_chip >= 0 && workspace[parts.on_chip + head] >= T(least);
}

// d epsilon, d bandwidth and d reference mass of a head, by one warp, from the sums that the passes
// over the tokens of each side have left. With E = ds S / (epsilon bandwidth^2) the derivative by
// the bandwidth is sum_ij E_ij |k_i - y_j|^2 / bandwidth = -(sum_i k_i.dk_i + sum_j y_j.dy_j) /
// bandwidth. dmass_j = sum_t gbar^t_j / mass_j over the steps of both sides: only the logarithms of
// masses are used, and a factor common to all masses changes nothing.
template <class Storage>
__device__ void finish_head(const BackwardParams& p, const BackwardWorkspace& parts,
                            const Accumulate<Storage>* workspace, int64_t b, int64_t h,
                            Share of_keys, Share of_queries) {
  using T = Accumulate<Storage>;
  const int64_t references = p.references, head = b * p.heads + h;
  const int lane = thread_index() % 32;
  T by_scale = 0, by_distance = 0;
  for (int side = 0; side <= int(p.cross); ++side) {
    const int64_t before = side == 0 ? of_keys.before : of_queries.before;
    const int64_t count = side == 0 ? of_keys.count : of_queries.count;
    const T* scalars = workspace + (side == 0 ? parts.scalars[0] : parts.scalars[1]);
    const T* products =
        workspace + (side == 0 ? parts.reference_products[0] : parts.reference_products[1]);
    for (int64_t split = lane; split < count; split += 32) {
      by_scale += scalars[(before + split) * 2];
      by_distance += scalars[(before + split) * 2 + 1];
    }
    for (int64_t j = lane; j < references; j += 32) by_distance += products[head * references + j];
  }
  by_scale = lanes_sum<32>(by_scale);
  by_distance = lanes_sum<32>(by_distance);
  if (lane == 0) {
    const T epsilon = static_cast<const T*>(p.epsilon.data)[h * p.epsilon.stride[0]];
    static_cast<T*>(p.grad_epsilon.data)[head] = quotient(-by_scale * T(kLn2), epsilon);
    if (p.grad_bandwidth.data != nullptr) {
      const T bandwidth = static_cast<const T*>(p.bandwidth.data)[h * p.bandwidth.stride[0]];
      static_cast<T*>(p.grad_bandwidth.data)[head] =
          p.kernel == Kernel::kGaussian ? quotient(-by_distance, bandwidth) : T(0);
    }
  }
  if (p.grad_reference_mass.data == nullptr) return;
  const Tensor& mass = p.reference_mass;
  for (int64_t j = lane; j < references; j += 32) {
    T sum = 0;
    for (int side = 0; side <= int(p.cross); ++side) {
      const T* adjoints =
          workspace + (side == 0 ? parts.column_adjoints[0] : parts.column_adjoints[1]);
      for (int64_t t = 1; t <= p.iterations; ++t) {
        sum += adjoints[(head * (p.iterations + 1) + t) * references + j];
      }
    }
    static_cast<T*>(p.grad_reference_mass.data)[head * references + j] =
        quotient(sum, static_cast<const T*>(
                          mass.data)[b * mass.stride[0] + h * mass.stride[1] + j * mass.stride[2]]);
  }
}

}  // namespace setformer::cuda
