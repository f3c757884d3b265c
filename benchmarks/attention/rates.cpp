// What this processor can do, for limits.py: rates of the best loops that the kernels' own vectors
// allow. Compiled when the benchmark starts, for the processor that it runs on.
#include <omp.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/simd.h"

namespace {

using namespace setformer::cpu::SETFORMER_ISA;
using Lanes = Vector<float>;

// Best rate of `work`, operations per second of all threads, over slices of a few milliseconds:
// what else a shared machine does only ever slows a slice down.
template <class Work>
double best_rate(int threads, double seconds, Work work) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  while (Clock::now() < end) {
    const auto start = Clock::now();
    double operations = 0;
#pragma omp parallel num_threads(threads) reduction(+ : operations)
    operations += work(omp_get_thread_num());
    const std::chrono::duration<double> taken = Clock::now() - start;
    if (operations / taken.count() > best) best = operations / taken.count();
  }
  return best;
}

volatile float sink;

// Independent chains of multiply-adds, more than latency times units.
double multiply_adds(int) {
  constexpr int chains = 12, steps = 200000;
  Lanes sum[chains];
  for (int i = 0; i < chains; ++i) sum[i] = splat(float(i));
  const Lanes factor = splat(0.999f), term = splat(0.001f);
  for (int step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) sum[i] = sum[i] * factor + term;
  }
  Lanes total{};
  for (int i = 0; i < chains; ++i) total += sum[i];
  sink = total[0];
  return 2.0 * chains * kLanes<float> * steps;
}

// The same with products of pairs of bfloat16, where the processor has them.
double bfloat16_multiply_adds(int) {
#if defined(__AVX512BF16__)
  constexpr int chains = 20, steps = 200000;
  __m512 sum[chains];
  for (int i = 0; i < chains; ++i) sum[i] = _mm512_set1_ps(float(i));
  const auto pairs = __m512bh(_mm512_set1_epi32(0x3b003b02));
  for (int step = 0; step < steps; ++step) {
#pragma GCC unroll 20
    for (int i = 0; i < chains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], pairs, pairs);
  }
  __m512 total = sum[0];
  for (int i = 1; i < chains; ++i) total += sum[i];
  sink = total[0];
  return 2.0 * 2 * chains * kLanes<float> * steps;
#else
  return 0;
#endif
}

// 2^x of an array that stays in the first-level cache.
double exponentials(int) {
  constexpr int count = 2048, repeats = 1000;
  static_assert(count % (kPack * kLanes<float>) == 0);
  alignas(64) float x[count], y[count];
  for (int i = 0; i < count; ++i) x[i] = -20.0f * float(i) / count;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (int i = 0; i < count; i += kPack * kLanes<float>) {
      Lanes part[kPack];
      for (int p = 0; p < kPack; ++p) part[p] = load(x + i + p * kLanes<float>);
      exp2_bounded<float>(part);
      for (int p = 0; p < kPack; ++p) store<float>(y + i + p * kLanes<float>, part[p]);
    }
    asm volatile("" : : "r"(y) : "memory");
  }
  sink = y[count / 2];
  return double(count) * repeats;
}

}  // namespace

extern "C" double multiply_add_rate(int threads, double seconds) {
  return best_rate(threads, seconds, multiply_adds);
}

extern "C" double bfloat16_multiply_add_rate(int threads, double seconds) {
  return best_rate(threads, seconds, bfloat16_multiply_adds);
}

extern "C" double exponential_rate(int threads, double seconds) {
  return best_rate(threads, seconds, exponentials);
}

// Bytes read and written per second by copies that no cache holds.
extern "C" double copy_rate(int threads, double seconds) {
  constexpr int64_t bytes = 64 << 20;
  std::vector<std::vector<char>> from(threads), to(threads);
#pragma omp parallel num_threads(threads)
  {
    from[omp_get_thread_num()].assign(bytes, 1);
    to[omp_get_thread_num()].assign(bytes, 0);
  }
  return best_rate(threads, seconds, [&](int thread) {
    std::memcpy(to[thread].data(), from[thread].data(), bytes);
    return 2.0 * bytes;
  });
}
