// Small kernels of test_emulator_clusters.py: blocks of a cluster, and what can go wrong among
// them.
#define API extern "C" __attribute__((visibility("default")))

#include <cuda_runtime.h>

#include <cstdint>

__device__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}
__device__ uint32_t special_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ uint32_t special_ranks() {
  uint32_t ranks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(ranks));
  return ranks;
}
__device__ uint32_t special_cluster() {
  uint32_t id;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(id));
  return id;
}
__device__ uint32_t remote(const void* pointer, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(pointer)), "r"(rank));
  return address;
}
__device__ float load_remote(uint32_t address) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
__device__ void store_remote(uint32_t address, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
__device__ void arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ void arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ void wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ void meet() {
  arrive();
  wait();
}
__device__ void init_barrier(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ void expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ void arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}
__device__ void await(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}
__device__ void store_async(uint32_t address, float x, float y, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::
          "r"(address),
      "f"(x), "f"(y), "r"(barrier)
      : "memory");
}

__shared__ float numbers[64];
__shared__ uint64_t barrier;

__global__ void __cluster_dims__(4, 1, 1) places(float* out) {
  float* row = out + 4 * blockIdx.x;
  row[0] = float(special_rank());
  row[1] = float(special_ranks());
  row[2] = float(special_cluster());
}

// Each block gets its neighbour's numbers.
template <bool releases, bool meets>
__device__ void read_neighbour(float* out) {
  const int i = threadIdx.x, other = special_rank() ^ 1;
  numbers[i] = float(100 * blockIdx.x + i);
  if (meets) {
    releases ? arrive() : arrive_relaxed();
    wait();
  }
  out[32 * blockIdx.x + i] = load_remote(remote(numbers + 31 - i, other));
  meet();
}
__global__ void __cluster_dims__(2, 1, 1) exchange(float* out) { read_neighbour<true, true>(out); }
__global__ void __cluster_dims__(2, 1, 1) not_released(float* out) {
  read_neighbour<false, true>(out);
}
__global__ void __cluster_dims__(2, 1, 1) no_meeting(float* out) {
  read_neighbour<true, false>(out);
}
// What a generic pointer says, and atomics.
__global__ void __cluster_dims__(2, 1, 1) generic(float* out) {
  const int i = threadIdx.x, other = special_rank() ^ 1;
  numbers[i] = float(i);
  meet();
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(numbers + i), "r"(other));
  *reinterpret_cast<float*>(address) += 1000.0f * special_rank();
  meet();
  out[32 * blockIdx.x + i] = numbers[i];
}
__global__ void __cluster_dims__(2, 1, 1) sums(float* out) {
  if (threadIdx.x == 0) numbers[40] = 0;
  meet();
  asm volatile("red.shared::cluster.add.f32 [%0], %1;" ::"r"(remote(numbers + 40, 1)),
               "f"(float(threadIdx.x + 1)));
  meet();
  out[32 * blockIdx.x + threadIdx.x] = numbers[40];
}

// Two rounds of stores to every block, each round in its own half.
template <bool waits>
__device__ void send(float* out) {
  const uint32_t i = threadIdx.x, rank = special_rank(), ranks = special_ranks();
  if (i == 0) init_barrier(&barrier, 1);
  meet();
  float sum = 0;
  for (uint32_t round = 0; round < (waits ? 2 : 1); ++round) {
    float* const half = numbers + 2 * ranks * round;
    if (i == 0) expect(&barrier, 8 * ranks);
    if (i < ranks) {
      store_async(remote(half + 2 * rank, i), float(rank + 1), float(10 * (round + 1)),
                  remote(&barrier, i));
    }
    if (waits) await(&barrier, round & 1);
    for (uint32_t r = 0; r < ranks; ++r) sum += half[2 * r] * half[2 * r + 1];
    __syncthreads();  // nobody may ask for this phase when the next one is over
  }
  out[32 * blockIdx.x + i] = sum;
  meet();
}
__global__ void __cluster_dims__(4, 1, 1) messages(float* out) { send<true>(out); }
__global__ void __cluster_dims__(4, 1, 1) not_awaited(float* out) { send<false>(out); }

// Rank 1 tells rank 0 that its number is there.
__global__ void __cluster_dims__(2, 1, 1) signal(float* out) {
  const int i = threadIdx.x;
  if (i == 0) init_barrier(&barrier, 32);
  meet();
  if (special_rank() == 1) {
    store_remote(remote(numbers + i, 0), float(7 * i));
    arrive_remote(remote(&barrier, 0));
  } else {
    await(&barrier, 0);
    out[i] = numbers[31 - i];
  }
  meet();
}

// Rank 1 answers rank 0, of which each polls while the other goes on.
__global__ void __cluster_dims__(2, 1, 1) answer(float* out) {
  const uint32_t i = threadIdx.x, rank = special_rank();
  if (i == 0) init_barrier(&barrier, 1);
  meet();
  if (rank == 1) {
    __syncthreads();
    if (i == 0) arrive_remote(remote(&barrier, 0));
    await(&barrier, 0);
  } else {
    await(&barrier, 0);
    if (i == 0) arrive_remote(remote(&barrier, 1));
  }
  out[32 * blockIdx.x + i] = float(rank + 1);
  meet();
}
// The target was read after the store was issued, and nothing was waited for.
__global__ void __cluster_dims__(2, 1, 1) read_too_early(float* out) {
  const uint32_t i = threadIdx.x, rank = special_rank();
  numbers[2 * i] = numbers[2 * i + 1] = 0;
  if (i == 0) init_barrier(&barrier, 1);
  meet();
  if (i == 0) {
    expect(&barrier, 8);
    store_async(remote(numbers, rank), 1.0f, 2.0f, remote(&barrier, rank));
    out[blockIdx.x] = numbers[0];
    await(&barrier, 0);
  }
  meet();
}

__global__ void __cluster_dims__(2, 1, 1) left_alone(float* out) {
  numbers[threadIdx.x] = 1;
  meet();
  if (special_rank() == 1) return;
  for (int turn = 0; turn < 4; ++turn) {
    __syncthreads();  // the other block goes on
    out[threadIdx.x] = load_remote(remote(numbers + threadIdx.x, 1));
  }
}
__global__ void __cluster_dims__(2, 1, 1) never_comes(float*) {
  if (special_rank() == 0) meet();
  while (special_rank() == 1) {
    if (threadIdx.x == 0) init_barrier(&barrier, 1);
    __syncthreads();
    await(&barrier, 0);
  }
}
__global__ void __cluster_dims__(2, 1, 1) did_not_arrive(float*) { wait(); }
__global__ void __cluster_dims__(2, 1, 1) arrives_twice(float*) {
  arrive();
  arrive();
}
__global__ void __cluster_dims__(2, 1, 1) rank_beyond(float* out) {
  out[0] = load_remote(remote(numbers, 2));
}
__global__ void __cluster_dims__(2, 1, 1) no_barrier_there(float*) { await(&barrier, 0); }
__global__ void __cluster_dims__(2, 1, 1) used_too_early(float*) {
  if (threadIdx.x == 0) init_barrier(&barrier, 1);
  arrive();
  if (threadIdx.x == 0 && special_rank() == 1) arrive_remote(remote(&barrier, 0));
  wait();
}
__global__ void __cluster_dims__(2, 1, 1) too_many(float*) {
  if (threadIdx.x == 0) init_barrier(&barrier, 1);
  meet();
  if (threadIdx.x > 0) return;
  expect(&barrier, 8);
  expect(&barrier, 8);
}
__global__ void __cluster_dims__(2, 1, 1) another_blocks_barrier(float*) {
  if (threadIdx.x == 0) init_barrier(&barrier, 1);
  meet();
  store_async(remote(numbers, 0), 1.0f, 2.0f, remote(&barrier, 1));
}

#define LAUNCH(name)                               \
  API int launch_##name(float* data, int blocks) { \
    name<<<blocks, 32>>>(data);                    \
    return int(cudaGetLastError());                \
  }
LAUNCH(places)
LAUNCH(exchange)
LAUNCH(not_released)
LAUNCH(no_meeting)
LAUNCH(generic)
LAUNCH(sums)
LAUNCH(messages)
LAUNCH(not_awaited)
LAUNCH(signal)
LAUNCH(answer)
LAUNCH(read_too_early)
LAUNCH(left_alone)
LAUNCH(never_comes)
LAUNCH(did_not_arrive)
LAUNCH(arrives_twice)
LAUNCH(rank_beyond)
LAUNCH(no_barrier_there)
LAUNCH(used_too_early)
LAUNCH(too_many)
LAUNCH(another_blocks_barrier)
