// The kernels of every instruction set this processor has, against the definition in plain double
// loops and central differences of it.
#include <omp.h>

#include <string>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "problem.h"

namespace {

std::vector<Backend> backends() {
  const std::string supported = std::string(" ") + cpu::supported_instruction_sets() + " ";
  std::vector<Backend> result = {{"baseline", cpu::baseline::forward, cpu::baseline::backward}};
#if defined(SETFORMER_HAVE_AVX2)
  if (supported.find(" avx2 ") != std::string::npos) {
    result.push_back({"avx2", cpu::avx2::forward, cpu::avx2::backward});
  }
#endif
#if defined(SETFORMER_HAVE_AVX512)
  if (supported.find(" avx512 ") != std::string::npos) {
    result.push_back({"avx512", cpu::avx512::forward, cpu::avx512::backward});
  }
#endif
  return result;
}

using Matrix = std::vector<std::vector<double>>;

double log_sum_exp(const std::vector<double>& x) {
  double largest = -INFINITY, sum = 0;
  for (double value : x) largest = std::max(largest, value);
  if (largest == -INFINITY) return largest;
  for (double value : x) sum += std::exp(value - largest);
  return largest + std::log(sum);
}

// s_ij of batch item b, head h: every line of it is an equation of the definition.
Matrix scores(Problem<double>& p, Array<double>& tokens, Array<double>& positions, int64_t b,
              int64_t h) {
  const Case& c = p.c;
  Matrix s(tokens.sizes[2], std::vector<double>(c.M));
  for (size_t i = 0; i < s.size(); ++i) {
    for (int64_t j = 0; j < c.M; ++j) {
      double product = 0, distance = 0, offset = 0;
      for (int64_t d = 0; d < c.D; ++d) {
        const double k = tokens(b, h, i, d), y = p.reference(0, h, j, d);
        product += k * y;
        distance += (k - y) * (k - y);
      }
      for (int64_t d = 0; d < c.P; ++d) {
        const double difference = positions(0, 0, i, d) - p.reference_positions(0, 0, j, d);
        offset += difference * difference;
      }
      const double bandwidth = p.bandwidth(0, 0, 0, h);
      const double kappa =
          c.kernel == Kernel::kLinear ? product : std::exp(-distance / (2 * bandwidth * bandwidth));
      s[i][j] = kappa * std::exp(-offset / (0.8 * 0.8)) / p.epsilon(0, 0, 0, h);
    }
  }
  return s;
}

struct Potentials {
  std::vector<double> f, g;
};

Potentials sinkhorn(const Matrix& s, const std::vector<double>& log_a,
                    const std::vector<double>& log_b, int64_t steps) {
  Potentials p{log_a, std::vector<double>(log_b.size(), 0.0)};
  for (int64_t t = 0; t < steps; ++t) {
    for (size_t i = 0; i < log_a.size(); ++i) {
      std::vector<double> row = s[i];
      for (size_t j = 0; j < row.size(); ++j) row[j] += p.g[j];
      p.f[i] = log_a[i] - log_sum_exp(row);
    }
    for (size_t j = 0; j < log_b.size(); ++j) {
      std::vector<double> column(log_a.size());
      for (size_t i = 0; i < column.size(); ++i) column[i] = s[i][j] + p.f[i];
      p.g[j] = log_b[j] - log_sum_exp(column);
    }
  }
  return p;
}

std::vector<double> log_marginal(std::vector<double> masses) {
  double total = 0;
  for (double mass : masses) total += mass;
  for (double& mass : masses) mass = std::log(mass / total);
  return masses;
}

// The whole definition: the output [B, H, Nq, Dv] and the pooled one [B, H, M, Dv].
void define(Problem<double>& p, Array<double>& output, Array<double>& pooled) {
  const Case& c = p.c;
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t h = 0; h < c.H; ++h) {
      std::vector<double> a(c.N), uniform(p.queries), masses(c.M, 1.0);
      for (int64_t i = 0; i < c.N; ++i) {
        a[i] = !p.mask[b * c.N + i] ? 0 : c.masses ? p.token_mass(0, b, h, i) : 1;
      }
      for (int64_t i = 0; i < p.queries; ++i) uniform[i] = p.query_mask[b * p.queries + i];
      for (int64_t j = 0; c.masses && j < c.M; ++j) masses[j] = p.reference_mass(0, 0, h, j);
      const std::vector<double> log_b = log_marginal(masses);

      Matrix s = scores(p, p.key, p.token_positions, b, h);
      for (int64_t i = 0; i < c.N; ++i) {  // masked keys may hold NaN: cut them out
        if (!p.mask[b * c.N + i]) s[i].assign(c.M, 0.0);
      }
      Potentials potentials = sinkhorn(s, log_marginal(a), log_b, c.T);
      for (int64_t j = 0; j < c.M; ++j) {
        std::vector<double> column(c.N);
        for (int64_t i = 0; i < c.N; ++i) column[i] = s[i][j] + potentials.f[i];
        const double normalizer = log_sum_exp(column);
        for (int64_t d = 0; d < c.Dv; ++d) pooled(b, h, j, d) = 0;
        for (int64_t i = 0; i < c.N; ++i) {
          const double weight = std::exp(column[i] - normalizer);
          for (int64_t d = 0; d < c.Dv; ++d) pooled(b, h, j, d) += weight * p.value(b, h, i, d);
        }
      }
      if (c.Nq >= 0) {
        s = scores(p, p.query, p.query_positions, b, h);
        potentials = sinkhorn(s, log_marginal(uniform), log_b, c.T);
      }
      const bool* valid = c.Nq >= 0 ? &p.query_mask[b * p.queries] : &p.mask[b * c.N];
      for (int64_t i = 0; i < p.queries; ++i) {
        std::vector<double> row = s[i];
        for (int64_t j = 0; j < c.M; ++j) row[j] += potentials.g[j];
        const double normalizer = log_sum_exp(row);
        for (int64_t d = 0; d < c.Dv; ++d) {
          output(b, h, i, d) = 0;
          for (int64_t j = 0; valid[i] && j < c.M; ++j) {
            output(b, h, i, d) += std::exp(row[j] - normalizer) * pooled(b, h, j, d);
          }
        }
      }
    }
  }
}

template <class Real>
Results<Real> run(const Backend& backend, Problem<Real>& problem) {
  Results<Real> results(problem.c, problem.queries);
  CHECK(call(backend, problem, results) == Status::kOk);
  return results;
}

double loss(Problem<double>& p) {
  Array<double> output(p.c.B, p.c.H, p.queries, p.c.Dv), pooled(p.c.B, p.c.H, p.c.M, p.c.Dv);
  define(p, output, pooled);
  double sum = 0;
  for (size_t i = 0; i < output.data.size(); ++i) sum += output.data[i] * p.grad_output.data[i];
  return sum;
}

// Some entries of `gradient` against central differences of fourth order in `x`, with a step that
// is small beside the length epsilon over which the plan changes.
void check_gradient(Problem<double>& p, Array<double>& x, const std::vector<double>& gradient) {
  const double step = 1e-3 * std::min(p.c.epsilon, 0.1);
  const size_t stride = std::max<size_t>(1, x.data.size() / 7);
  for (size_t i = 0; i < x.data.size(); i += stride) {
    const double kept = x.data[i];
    if (std::isnan(kept)) {
      CHECK(gradient[i] == 0);
      continue;
    }
    const auto at = [&](double offset) {
      x.data[i] = kept + offset * step;
      return loss(p);
    };
    const double difference = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step);
    x.data[i] = kept;
    // Epsilons are down to a fifth of c.epsilon, so truncation is some (5e-3)^4 = 6e-10 times the
    // fifth derivative's constant. The loss, a sum of some hundred numbers near 1 from exponents
    // up to ten times 1 / epsilon, is rounded at 1e-13 / epsilon.
    const double rounding = 1e-13 / p.c.epsilon / step;
    CHECK_CLOSE(gradient[i], difference, 2e-8 * std::abs(gradient[i]) + rounding);
  }
}

std::vector<double> sum_over_batch(const Array<double>& per_sample, size_t size) {
  std::vector<double> sum(size, 0.0);
  for (size_t i = 0; i < per_sample.data.size(); ++i) sum[i % size] += per_sample.data[i];
  return sum;
}

void test_double(const Backend& backend, const Case& c) {
  Problem<double> p(c);
  Results<double> r = run(backend, p);
  Array<double> output(c.B, c.H, p.queries, c.Dv), pooled(c.B, c.H, c.M, c.Dv);
  define(p, output, pooled);
  for (size_t i = 0; i < output.data.size(); ++i) {
    CHECK_CLOSE(r.output.data[i], output.data[i], 1e-11);
  }
  for (size_t i = 0; i < pooled.data.size(); ++i) {
    CHECK_CLOSE(r.pooled.data[i], pooled.data[i], 1e-11);
  }
  check_gradient(p, p.key, r.grad_key.data);
  check_gradient(p, p.value, r.grad_value.data);
  if (c.Nq >= 0) check_gradient(p, p.query, r.grad_query.data);
  check_gradient(p, p.reference, sum_over_batch(r.grad_reference, p.reference.data.size()));
  check_gradient(p, p.bandwidth, sum_over_batch(r.grad_bandwidth, c.H));
  check_gradient(p, p.epsilon, sum_over_batch(r.grad_epsilon, c.H));
  if (c.masses) {
    check_gradient(p, p.token_mass, r.grad_token_mass.data);
    check_gradient(p, p.reference_mass, sum_over_batch(r.grad_reference_mass, c.H * c.M));
  }
}

// float32 against float64 of the same numbers.
void test_float(const Backend& backend, const Case& c) {
  Problem<float> low(c);
  Problem<double> high(c);
  const auto widen = [](const Array<float>& from, Array<double>& to) {
    to.data.assign(from.data.begin(), from.data.end());
  };
  widen(low.query, high.query), widen(low.key, high.key), widen(low.value, high.value);
  widen(low.reference, high.reference);
  widen(low.bandwidth, high.bandwidth), widen(low.epsilon, high.epsilon);
  widen(low.token_mass, high.token_mass), widen(low.reference_mass, high.reference_mass);
  widen(low.token_positions, high.token_positions);
  widen(low.query_positions, high.query_positions);
  widen(low.reference_positions, high.reference_positions);
  widen(low.grad_output, high.grad_output);
  const Results<float> actual = run(backend, low);
  const Results<double> expected = run(backend, high);
  // Scores of size 1 / epsilon carry an error of eps / epsilon, which T steps may each repeat.
  const double tolerance = 1.2e-7 / c.epsilon * double(c.T + 2) * 8;
  const auto compare = [&](const Array<float>& x, const Array<double>& y) {
    double largest = 1e-3, error = 0;
    for (size_t i = 0; i < x.data.size(); ++i) {
      largest = std::max(largest, std::abs(y.data[i]));
      error = std::max(error, std::abs(double(x.data[i]) - y.data[i]));
    }
    CHECK_CLOSE(error / largest, 0.0, tolerance);
  };
  compare(actual.output, expected.output);
  compare(actual.pooled, expected.pooled);
  compare(actual.grad_value, expected.grad_value);
  // Below this entropy plans are nearly permutations: the gradient of the scores all but cancels.
  if (c.epsilon < 0.02) {
    for (float x : actual.grad_key.data) CHECK(std::isfinite(x));
    for (float x : actual.grad_reference.data) CHECK(std::isfinite(x));
  } else {
    compare(actual.grad_key, expected.grad_key);
    compare(actual.grad_reference, expected.grad_reference);
  }
}

void test_threads(const Backend& backend, const Case& c) {
  Problem<float> p(c);
  omp_set_num_threads(1);
  const Results<float> one = run(backend, p);
  for (int threads : {2, 3, 4}) {
    omp_set_num_threads(threads);
    CHECK(run(backend, p) == one);
  }
  omp_set_num_threads(2);
}

void test_bad_values(const Backend& backend) {
  const auto status = [&](auto spoil) {
    Case c{1, 2, 5, 3, 2, 4, 2};
    c.masses = true;
    Problem<double> problem(c);
    spoil(problem);
    Results<double> r(problem.c, problem.queries);
    ForwardParams p;
    problem.fill(p);
    p.output = r.output.tensor(), p.pooled = r.pooled.tensor();
    p.rows = r.rows.tensor(), p.columns = r.columns.tensor();
    return backend.forward(p);
  };
  CHECK(status([](auto&) {}) == Status::kOk);
  CHECK(status([](auto& p) { p.token_mass.data[3] = -1; }) == Status::kNegativeTokenMass);
  CHECK(status([](auto& p) { p.reference_mass.data[3] = 0; }) == Status::kNonPositiveReferenceMass);
  CHECK(status([](auto& p) { p.bandwidth.data[1] = -1; }) == Status::kNonPositiveBandwidth);
  CHECK(status([](auto& p) { p.epsilon.data[1] = 0; }) == Status::kNonPositiveEpsilon);
  CHECK(status([](auto& p) { p.epsilon.data[0] = NAN; }) == Status::kNonPositiveEpsilon);
}

}  // namespace

int main() {
  const Kernel linear = Kernel::kLinear, gaussian = Kernel::kGaussian;
  const std::vector<Case> cases = {
      {1, 1, 1, 1, 1, 1, 0},
      {1, 1, 1, 1, 1, 1, 3},
      {2, 1, 7, 3, 5, 4, 0},
      {2, 2, 50, 5, 3, 7, 1},
      {2, 2, 49, 17, 33, 9, 5},
      {1, 1, 97, 16, 16, 16, 2, linear, 0.5},
      {1, 1, 13, 4, 3, 5, 3, gaussian, 0.001},
      {1, 2, 20, 4, 3, 5, 2, linear, 0.02},
      {1, 2, 20, 4, 3, 5, 4, gaussian, 0.1, 11, 2, true, true},
      {2, 1, 20, 4, 3, 5, 0, gaussian, 0.1, 11, 1, true, true},
      {2, 1, 20, 4, 3, 5, 3, gaussian, 0.003, 11, 3, true, true},
      {1, 1, 60, 4, 3, 5, 2, linear, 1.0, 7, 2, true, true},
      {1, 2, 60, 4, 3, 17, 3, linear, 0.01, -1, 1, true, true},
      {2, 2, 53, 6, 20, 33, 5, gaussian, 0.2, -1, 2, true, true},
  };
  for (const Backend& backend : backends()) {
    std::printf("%s\n", backend.name);
    for (const Case& c : cases) {
      test_double(backend, c);
      test_float(backend, c);
    }
    // One head of several spans, and several heads; scores cached and recomputed.
    test_threads(backend, {1, 1, 1700, 5, 6, 7, 3, gaussian, 0.1, 1300, 0, true, false});
    test_threads(backend, {2, 5, 131, 9, 17, 12, 2, linear, 0.01, -1, 2, true, true});
    test_threads(backend, {1, 1, 9000, 3, 2, 300, 2});
    test_bad_values(backend);
  }
  return check::report("test_set_attention");
}
