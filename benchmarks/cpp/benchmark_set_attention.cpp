// Times the kernels without Python: benchmark_set_attention [SHAPE | all] [ROUNDS] [forward]. For
// profilers, and for a look at one instruction set (SETFORMER_CPU_ISA) or number of threads
// (OMP_NUM_THREADS).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "set_attention.h"

namespace {

using namespace setformer;

struct Shape {
  const char* name;
  int64_t batch, heads, tokens, depth, references;
};

constexpr Shape kShapes[] = {{"v1", 8, 3, 3136, 32, 49},   {"v2", 8, 6, 784, 32, 49},
                             {"v3", 8, 12, 196, 32, 49},   {"v4", 8, 24, 49, 32, 49},
                             {"lang", 8, 12, 512, 64, 64}, {"long", 1, 8, 16384, 64, 128}};

// A contiguous [a, b, c, d] array that owns its memory.
struct Array {
  std::vector<float> data;
  Tensor tensor;

  Array(int64_t a, int64_t b, int64_t c, int64_t d) : data(a * b * c * d) {
    tensor = {data.data(), {b * c * d, c * d, d, 1}};
  }
  // Rows of unit norm.
  void randomize(std::mt19937& random, int64_t depth) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < data.size(); i += depth) {
      float square = 0;
      for (int64_t c = 0; c < depth; ++c) {
        data[i + c] = normal(random);
        square += data[i + c] * data[i + c];
      }
      for (int64_t c = 0; c < depth; ++c) data[i + c] /= std::sqrt(square);
    }
  }
};

double least_milliseconds(int rounds, const std::function<void()>& run) {
  run();
  double least = INFINITY;
  for (int i = 0; i < rounds; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    least = std::min(least, took.count());
  }
  return least;
}

void benchmark(const Shape& shape, int rounds, bool forward_alone) {
  const auto [name, B, H, N, D, M] = shape;
  const int64_t T = 5;
  std::mt19937 random(0);
  Array key(B, H, N, D), value(B, H, N, D), reference(1, H, M, D), bandwidth(1, 1, 1, H),
      epsilon(1, 1, 1, H);
  Array output(B, H, N, D), pooled(B, H, M, D), rows(B, H, T + 1, N), columns(B, H, T + 1, M);
  Array grad_output(B, H, N, D), grad_key(B, H, N, D), grad_value(B, H, N, D);
  Array grad_reference(B, H, M, D), grad_bandwidth(1, 1, B, H), grad_epsilon(1, 1, B, H);
  for (Array* array : {&key, &value, &reference, &grad_output}) array->randomize(random, D);
  std::fill(bandwidth.data.begin(), bandwidth.data.end(), 1.0f);
  std::fill(epsilon.data.begin(), epsilon.data.end(), 0.1f);

  BackwardParams p;
  p.batch = B, p.heads = H, p.tokens = N, p.references = M, p.depth = p.value_depth = D;
  p.iterations = T;
  p.key = key.tensor, p.value = value.tensor, p.reference = reference.tensor;
  p.reference.stride[0] = 0;
  p.bandwidth = {bandwidth.data.data(), {1}};
  p.epsilon = {epsilon.data.data(), {1}};
  p.output = output.tensor, p.pooled = pooled.tensor;
  p.rows = rows.tensor, p.columns = columns.tensor;
  p.grad_output = grad_output.tensor, p.grad_key = grad_key.tensor;
  p.grad_value = grad_value.tensor, p.grad_reference = grad_reference.tensor;
  p.grad_bandwidth = grad_bandwidth.tensor;
  p.grad_epsilon = grad_epsilon.tensor;

  const double pairs = double(B * H * N * M);
  const double forward = least_milliseconds(rounds, [&] { cpu::set_attention_forward(p); });
  std::printf("%-5s forward %8.3f ms (%5.1f GFLOP/s)", name, forward,
              pairs * (6 * D + 4 * T) / forward * 1e-6);
  if (!forward_alone) {
    const double backward = least_milliseconds(rounds, [&] { cpu::set_attention_backward(p); });
    std::printf("   backward %8.3f ms (%5.1f GFLOP/s)", backward,
                pairs * (14 * D + 8 * T) / backward * 1e-6);
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 10;
  const bool forward_alone = argc > 3 && std::string(argv[3]) == "forward";
  std::printf("%s\n", cpu::instruction_set());
  for (const Shape& shape : kShapes) {
    if (wanted.empty() || wanted == "all" || wanted == shape.name) {
      benchmark(shape, rounds, forward_alone);
    }
  }
}
