// One step of a solver that is spread over the blocks of a cluster: the sums over all warps of all
// blocks, for 64 columns, known to every thread. Nothing else is in the loop.
#pragma once

#include <cstdint>

enum class Exchange { block, barrier, async };

constexpr int kStepWarps = 8;
constexpr int kStepThreads = 32 * kStepWarps;

// Value of one thread after `steps`, were the exchange right: each step takes the mean over all and
// adds the block's rank. All of it is exact in float32.
template <int ranks>
float expected_sum(int thread, int steps) {
  const int column = 2 * (thread % 32), rank = thread / kStepThreads % ranks;
  return float(column) + 0.5f * float((ranks - 1) * steps) + float(rank);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint32_t address_in(uint32_t address, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

__device__ __forceinline__ void synchronize_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

__device__ __forceinline__ void expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ bool is_done(uint32_t barrier, int phase) {
  uint32_t done;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(barrier), "r"(phase)
      : "memory");
  return done != 0;
}

// out [gridDim.x, kStepThreads] gets each thread's first column, cycles those of block 0.
template <int ranks, Exchange exchange>
__global__ void __launch_bounds__(kStepThreads)
    cluster_steps(float* out, long long* cycles, int steps) {
#if __CUDA_ARCH__ >= 900
  constexpr bool kHasClusters = true;
#else
  constexpr bool kHasClusters = false;
#endif
  if constexpr (ranks == 1 || kHasClusters) {
    __shared__ float2 of_warps[2][kStepWarps][32];
    __shared__ float2 of_ranks[2][ranks][32];
    __shared__ uint64_t barriers[2];
    constexpr int kBytes = ranks * 32 * int(sizeof(float2));  // that a block gets in a step
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = blockIdx.x % ranks;
    if constexpr (exchange == Exchange::async) {
      if (threadIdx.x == 0) {
        for (uint64_t& barrier : barriers) {
          asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(&barrier))
                       : "memory");
          expect(shared_address(&barrier), kBytes);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      }
    }
    if constexpr (ranks > 1) synchronize_cluster();

    float2 x = {float(2 * lane + rank), float(2 * lane + 1 + rank)};
    const long long start = clock64();
    for (int step = 0; step < steps; ++step) {
      const int side = step & 1;  // two, so that nobody writes what another still reads
      of_warps[side][warp][lane] = x;
      __syncthreads();
      float2 sum = {0, 0};
      if (warp < ranks || ranks == 1) {
#pragma unroll
        for (int w = 0; w < kStepWarps; ++w) {
          sum.x += of_warps[side][w][lane].x;
          sum.y += of_warps[side][w][lane].y;
        }
      }
      if constexpr (exchange == Exchange::barrier) {
        if (warp < ranks) {
          const uint32_t to = address_in(shared_address(&of_ranks[side][rank][lane]), warp);
          asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(sum.x), "f"(sum.y)
                       : "memory");
        }
        synchronize_cluster();
      } else if constexpr (exchange == Exchange::async) {
        const uint32_t barrier = shared_address(&barriers[side]);
        if (warp < ranks) {
          const uint32_t to = address_in(shared_address(&of_ranks[side][rank][lane]), warp);
          asm volatile(
              "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 "
              "[%0], {%1, %2}, [%3];" ::"r"(to),
              "f"(sum.x), "f"(sum.y), "r"(address_in(barrier, warp))
              : "memory");
        }
        while (!is_done(barrier, step >> 1 & 1)) {
        }
        // for the step after next; the block's barrier of the next lies before its first message
        if (threadIdx.x == 0) expect(barrier, kBytes);
      }
      if constexpr (ranks > 1) {
        sum = {0, 0};
#pragma unroll
        for (int r = 0; r < ranks; ++r) {
          sum.x += of_ranks[side][r][lane].x;
          sum.y += of_ranks[side][r][lane].y;
        }
      }
      constexpr float kShare = 1.0f / (ranks * kStepWarps);
      x = {sum.x * kShare + float(rank), sum.y * kShare + float(rank)};
    }
    if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = clock64() - start;
    out[blockIdx.x * kStepThreads + threadIdx.x] = x.x;
    if constexpr (ranks > 1) synchronize_cluster();  // nobody leaves while others write to it
  }
}
