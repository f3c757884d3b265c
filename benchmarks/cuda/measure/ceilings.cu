// How fast the card does the one thing that is named: ceilings NAME prints a line of JSON.
//   nvcc -std=c++17 -O3 -arch=sm_90 ceilings.cu -o ceilings && ./ceilings ex2
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "cluster_step.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kChains = 8;     // independent ones of a thread: they hide each other's latency
constexpr int kUnrolled = 32;  // links of each chain in one round of the loop
constexpr int kRepeats = 5;

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
  }
}

// One link of a chain: the result depends on the argument, so that none is left out or moved.
struct Ex2 {
  using Value = float;
  static constexpr double kOperations = 1;  // of a thread
  static __device__ Value link(Value x) {
    asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
  }
};
struct Fma {
  using Value = float;
  static constexpr double kOperations = 1;
  static __device__ Value link(Value x) { return __fmaf_rn(x, x, 0.25f); }
};
struct Movm {
  using Value = uint32_t;
  static constexpr double kOperations = 1.0 / 32;  // a warp's threads do one together
  static __device__ Value link(Value x) {
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(x));
    return x;
  }
};

// As the kernels have it: of bfloat16, with sums in float32. Other numbers may draw more power.
struct Mma {
  struct Value {
    float sums[4];
    Value() = default;
    explicit __device__ Value(float x) : sums{x, x, x, x} {}
    explicit __device__ operator float() const { return sums[0] + sums[1] + sums[2] + sums[3]; }
  };
  static constexpr double kOperations = 2.0 * 16 * 8 * 16 / 32;  // of a thread
  static __device__ Value link(Value x) {
    const uint32_t small = 0x39803980;  // twice 2^-12
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, "
        "{%4,%4}, {%0,%1,%2,%3};"
        : "+f"(x.sums[0]), "+f"(x.sums[1]), "+f"(x.sums[2]), "+f"(x.sums[3])
        : "r"(small));
    return x;
  }
};

template <class Operation>
__global__ void __launch_bounds__(kThreads) chains(float* out, long long* cycles, int rounds) {
  using Value = typename Operation::Value;
  Value x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = Value(0.125f * float(threadIdx.x % 7 + i));
  const long long start = clock64();
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int link = 0; link < kUnrolled; ++link) {
#pragma unroll
      for (int i = 0; i < kChains; ++i) x[i] = Operation::link(x[i]);
    }
  }
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = clock64() - start;
  float sum = 0;
  for (int i = 0; i < kChains; ++i) sum += float(x[i]);
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// 16 bytes a thread and link, from shared memory.
__global__ void __launch_bounds__(kThreads) read_shared(float* out, long long* cycles, int rounds) {
  __shared__ uint4 memory[kThreads];
  memory[threadIdx.x] = {threadIdx.x, 1, 2, 3};
  __syncthreads();
  const uint32_t address = uint32_t(__cvta_generic_to_shared(&memory[threadIdx.x]));
  uint32_t sum = 0;
  const long long start = clock64();
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int link = 0; link < kUnrolled; ++link) {
      uint4 x;
      asm volatile("ld.volatile.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                   : "r"(address));
      sum ^= x.x ^ x.y ^ x.z ^ x.w;
    }
  }
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = clock64() - start;
  out[blockIdx.x * kThreads + threadIdx.x] = float(sum);
}

// 16 bytes a thread and link, of an array [pieces] that the L2 cache holds and no L1 cache keeps.
__global__ void __launch_bounds__(kThreads)
    read_cache(const uint4* array, int pieces, float* out, int rounds) {
  int piece = int((blockIdx.x * 977u * kThreads + threadIdx.x) % unsigned(pieces));
  uint32_t sum = 0;
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int link = 0; link < kChains; ++link) {
      uint4 x;
      asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                   : "l"(array + piece));
      sum ^= x.x ^ x.y ^ x.z ^ x.w;
      piece += kThreads;
      if (piece >= pieces) piece -= pieces;
    }
  }
  out[blockIdx.x * kThreads + threadIdx.x] = float(sum);
}

struct Card {
  cudaDeviceProp properties;
  float* out;
  long long* cycles;
};

Card open_card() {
  Card card;
  check(cudaGetDeviceProperties(&card.properties, 0), "cudaGetDeviceProperties");
  const size_t threads =
      size_t(card.properties.multiProcessorCount) * card.properties.maxThreadsPerMultiProcessor;
  check(cudaMalloc(&card.out, threads * sizeof(float)), "cudaMalloc");
  check(cudaMalloc(&card.cycles, sizeof(long long)), "cudaMalloc");
  return card;
}

// The shortest of several, after one to warm up.
template <class Launch>
double seconds(Launch launch) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  float least = 1e30f;
  for (int i = 0; i <= kRepeats; ++i) {
    check(cudaEventRecord(start), "cudaEventRecord");
    launch();
    check(cudaGetLastError(), "launch");
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "the kernel");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, end), "cudaEventElapsedTime");
    if (i > 0) least = std::min(least, ms);
  }
  return least * 1e-3;
}

// Blocks that fill every multiprocessor once.
template <class Kernel>
int full_grid(const Card& card, Kernel kernel) {
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0), "occupancy");
  return blocks * card.properties.multiProcessorCount;
}

void print_rate(const Card& card, double amount, double time, const char* unit) {
  long long cycles = 0;
  check(cudaMemcpy(&cycles, card.cycles, sizeof(cycles), cudaMemcpyDeviceToHost), "cudaMemcpy");
  const double per_clock = amount / card.properties.multiProcessorCount / double(cycles);
  std::printf("{\"rate\": %.6e, \"unit\": \"%s\", \"per_clock\": %.4f, \"MHz\": %.0f}\n",
              amount / time, unit, per_clock, double(cycles) / time * 1e-6);
}

template <class Operation>
void measure_chains(const Card& card, int rounds, const char* unit) {
  const int grid = full_grid(card, chains<Operation>);
  const double time =
      seconds([&] { chains<Operation><<<grid, kThreads>>>(card.out, card.cycles, rounds); });
  const double links = double(grid) * kThreads * rounds * kUnrolled * kChains;
  print_rate(card, links * Operation::kOperations, time, unit);
}

void measure_shared(const Card& card) {
  const int grid = full_grid(card, read_shared), rounds = 2000;
  const double time =
      seconds([&] { read_shared<<<grid, kThreads>>>(card.out, card.cycles, rounds); });
  print_rate(card, double(grid) * kThreads * rounds * kUnrolled * sizeof(uint4), time, "B/s");
}

void measure_cache(const Card& card) {
  const size_t bytes = std::min<size_t>(card.properties.l2CacheSize / 4, 16 << 20);
  uint4* array;
  check(cudaMalloc(&array, bytes), "cudaMalloc");
  check(cudaMemset(array, 1, bytes), "cudaMemset");
  const int grid = full_grid(card, read_cache), rounds = 500;
  const int pieces = int(bytes / sizeof(uint4));
  const double time =
      seconds([&] { read_cache<<<grid, kThreads>>>(array, pieces, card.out, rounds); });
  const double read = double(grid) * kThreads * rounds * kChains * sizeof(uint4);
  std::printf("{\"rate\": %.6e, \"unit\": \"B/s\"}\n", read / time);
}

// ranks blocks on a multiprocessor each, and as many clusters of them as the card holds at once.
template <int ranks, Exchange exchange>
void measure_steps(const Card& card) {
  constexpr int kSteps = 20000;
  if (ranks > 1 && card.properties.major < 9) {
    std::printf("{\"note\": \"not on this card: clusters begin with compute capability 9.0\"}\n");
    return;
  }
  const auto kernel = cluster_steps<ranks, exchange>;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  const size_t alone =  // no second block fits beside one that takes so much
      card.properties.sharedMemPerBlockOptin - attributes.sharedSizeBytes - 1024;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(alone)),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = ranks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(card.properties.multiProcessorCount / ranks * ranks));
  config.blockDim = dim3(kStepThreads);
  config.dynamicSmemBytes = alone;
  if (ranks > 1) {
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "clusters at once");
    config.gridDim = dim3(unsigned(clusters * ranks));
  }
  const double time = seconds([&] {
    check(cudaLaunchKernelEx(&config, kernel, card.out, card.cycles, kSteps), "cudaLaunchKernelEx");
  });
  long long cycles = 0;
  check(cudaMemcpy(&cycles, card.cycles, sizeof(cycles), cudaMemcpyDeviceToHost), "cudaMemcpy");
  std::vector<float> out(size_t(config.gridDim.x) * kStepThreads);
  check(cudaMemcpy(out.data(), card.out, out.size() * sizeof(float), cudaMemcpyDeviceToHost),
        "cudaMemcpy");
  size_t wrong = 0;
  for (size_t i = 0; i < out.size(); ++i) wrong += out[i] != expected_sum<ranks>(int(i), kSteps);
  if (wrong > 0) {
    std::fprintf(stderr, "%zu of %zu sums are wrong after %d steps\n", wrong, out.size(), kSteps);
    std::exit(1);
  }
  std::printf("{\"ns_a_step\": %.1f, \"cycles_a_step\": %.1f, \"blocks\": %u}\n",
              time / kSteps * 1e9, double(cycles) / kSteps, config.gridDim.x);
}

const std::map<std::string, void (*)(const Card&)> kMeasures = {
    {"ex2", [](const Card& card) { measure_chains<Ex2>(card, 200, "exponentials/s"); }},
    {"fma", [](const Card& card) { measure_chains<Fma>(card, 800, "FMA/s"); }},
    {"movm", [](const Card& card) { measure_chains<Movm>(card, 200, "matrices/s"); }},
    {"mma", [](const Card& card) { measure_chains<Mma>(card, 100, "flop/s"); }},
    {"shared", measure_shared},
    {"cache", measure_cache},
    {"step of one block", measure_steps<1, Exchange::block>},
    {"step of 2 by barrier", measure_steps<2, Exchange::barrier>},
    {"step of 4 by barrier", measure_steps<4, Exchange::barrier>},
    {"step of 8 by barrier", measure_steps<8, Exchange::barrier>},
    {"step of 2 by st.async", measure_steps<2, Exchange::async>},
    {"step of 4 by st.async", measure_steps<4, Exchange::async>},
    {"step of 8 by st.async", measure_steps<8, Exchange::async>},
};

}  // namespace

int main(int count, char** words) {
  const std::string name = count == 2 ? words[1] : "";
  const auto measure = kMeasures.find(name);
  if (measure == kMeasures.end()) {
    std::fprintf(stderr, "ceilings: NAME is none that is measured here, got '%s'\n", name.c_str());
    return 2;
  }
  measure->second(open_card());
}
