// A problem with arrays of exactly the size they need, so that under AddressSanitizer a step
// outside any of them stops the test, and the results of all calls for it.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "set_attention.h"

using namespace setformer;

struct Backend {
  const char* name;
  Status (*forward)(const ForwardParams&);
  Status (*backward)(const BackwardParams&);
};

struct Case {
  int64_t B, H, N, D, Dv, M, T;
  Kernel kernel = Kernel::kGaussian;
  double epsilon = 0.1;
  int64_t Nq = -1;  // -1: self attention
  int64_t P = 0;
  bool masses = false, mask = false;
};

// [a, b, c, d], contiguous.
template <class T>
struct Array {
  int64_t sizes[4];
  std::vector<T> data;

  Array(int64_t a, int64_t b, int64_t c, int64_t d) : sizes{a, b, c, d}, data(a * b * c * d) {}
  T& operator()(int64_t i, int64_t j, int64_t k, int64_t l) {
    return data[((i * sizes[1] + j) * sizes[2] + k) * sizes[3] + l];
  }
  Tensor tensor() {
    return {data.data(), {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1}};
  }
};

// A problem with its arrays; Real is double or float.
template <class Real>
struct Problem {
  Case c;
  int64_t queries;
  Array<Real> query, key, value, reference, token_mass, reference_mass, bandwidth, epsilon;
  Array<Real> token_positions, query_positions, reference_positions, grad_output;
  std::unique_ptr<bool[]> mask, query_mask;

  explicit Problem(const Case& shape)
      : c(shape),
        queries(c.Nq < 0 ? c.N : c.Nq),
        query(c.B, c.H, queries, c.D),
        key(c.B, c.H, c.N, c.D),
        value(c.B, c.H, c.N, c.Dv),
        reference(1, c.H, c.M, c.D),
        token_mass(1, c.B, c.H, c.N),
        reference_mass(1, 1, c.H, c.M),
        bandwidth(1, 1, 1, c.H),
        epsilon(1, 1, 1, c.H),
        token_positions(1, 1, c.N, c.P),
        query_positions(1, 1, queries, c.P),
        reference_positions(1, 1, c.M, c.P),
        grad_output(c.B, c.H, queries, c.Dv),
        mask(new bool[c.B * c.N]),
        query_mask(new bool[c.B * queries]) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform(0.2, 1.0);
    for (auto* array : {&query, &key, &value, &reference, &grad_output}) {
      for (Real& x : array->data) x = Real(normal(random));
    }
    for (auto* array :
         {&token_mass, &reference_mass, &token_positions, &query_positions, &reference_positions}) {
      for (Real& x : array->data) x = Real(uniform(random));
    }
    for (Real& x : bandwidth.data) x = Real(1 + uniform(random));
    for (Real& x : epsilon.data) x = Real(c.epsilon * uniform(random));
    for (int64_t i = 0; i < c.B * c.N; ++i) mask[i] = !c.mask || i % 3 != 1;
    for (int64_t i = 0; i < c.B * queries; ++i) query_mask[i] = !c.mask || i % 4 != 2;
    if (c.mask) {  // what padding holds must not matter
      for (int64_t d = 0; d < c.D; ++d) key(0, 0, 1, d) = std::numeric_limits<Real>::quiet_NaN();
    }
  }

  void fill(ForwardParams& p) {
    p.batch = c.B, p.heads = c.H, p.tokens = c.N, p.queries = queries, p.references = c.M;
    p.depth = c.D, p.value_depth = c.Dv, p.position_depth = c.P, p.iterations = c.T;
    p.type = sizeof(Real) == 8 ? ScalarType::kFloat64 : ScalarType::kFloat32;
    p.kernel = c.kernel, p.position_bandwidth = 0.8;
    p.cross = c.Nq >= 0;
    p.key = key.tensor(), p.value = value.tensor(), p.query = query.tensor();
    p.reference = reference.tensor();
    p.reference.stride[0] = 0;
    if (c.mask) {
      p.mask = {mask.get(), {c.N, 1}};
      p.query_mask = {query_mask.get(), {queries, 1}};
    }
    if (c.masses) {
      p.token_mass = {token_mass.data.data(), {c.H * c.N, c.N, 1}};
      p.reference_mass = {reference_mass.data.data(), {0, c.M, 1}};
    }
    p.bandwidth = {bandwidth.data.data(), {1}};
    p.epsilon = {epsilon.data.data(), {1}};
    if (c.P > 0) {
      p.token_positions = {token_positions.data.data(), {c.P, 1}};
      p.query_positions = {query_positions.data.data(), {c.P, 1}};
      p.reference_positions = {reference_positions.data.data(), {c.P, 1}};
    }
  }
};

// What a call writes.
template <class Real>
struct Results {
  Array<Real> output, pooled, rows, columns, query_rows, query_columns;
  Array<Real> grad_query, grad_key, grad_value, grad_reference, grad_token_mass;
  Array<Real> grad_reference_mass, grad_bandwidth, grad_epsilon;

  Results(const Case& c, int64_t queries)
      : output(c.B, c.H, queries, c.Dv),
        pooled(c.B, c.H, c.M, c.Dv),
        rows(c.B, c.H, c.T + 1, c.N),
        columns(c.B, c.H, std::max<int64_t>(c.T, 1) + 1, c.M),
        query_rows(c.B, c.H, c.T + 1, queries),
        query_columns(c.B, c.H, std::max<int64_t>(c.T, 1), c.M),
        grad_query(c.B, c.H, queries, c.D),
        grad_key(c.B, c.H, c.N, c.D),
        grad_value(c.B, c.H, c.N, c.Dv),
        grad_reference(c.B, c.H, c.M, c.D),
        grad_token_mass(c.B, c.H, c.N, 1),
        grad_reference_mass(1, c.B, c.H, c.M),
        grad_bandwidth(1, 1, c.B, c.H),
        grad_epsilon(1, 1, c.B, c.H) {}

  bool operator==(const Results& other) const {
    return output.data == other.output.data && grad_query.data == other.grad_query.data &&
           grad_key.data == other.grad_key.data && grad_value.data == other.grad_value.data &&
           grad_reference.data == other.grad_reference.data &&
           grad_token_mass.data == other.grad_token_mass.data &&
           grad_reference_mass.data == other.grad_reference_mass.data &&
           grad_bandwidth.data == other.grad_bandwidth.data &&
           grad_epsilon.data == other.grad_epsilon.data && pooled.data == other.pooled.data;
  }
};

// Forward and backward.
template <class Real>
Status call(const Backend& backend, Problem<Real>& problem, Results<Real>& r) {
  BackwardParams p;
  problem.fill(p);
  p.output = r.output.tensor(), p.pooled = r.pooled.tensor();
  p.rows = r.rows.tensor(), p.columns = r.columns.tensor();
  p.query_rows = r.query_rows.tensor(), p.query_columns = r.query_columns.tensor();
  Status status = backend.forward(p);
  if (status != Status::kOk) return status;
  p.grad_output = problem.grad_output.tensor();
  p.grad_query = r.grad_query.tensor(), p.grad_key = r.grad_key.tensor();
  p.grad_value = r.grad_value.tensor(), p.grad_reference = r.grad_reference.tensor();
  p.grad_bandwidth = r.grad_bandwidth.tensor();
  p.grad_epsilon = r.grad_epsilon.tensor();
  if (problem.c.masses) {
    p.grad_token_mass = r.grad_token_mass.tensor();
    p.grad_reference_mass = r.grad_reference_mass.tensor();
  }
  return backend.backward(p);
}
