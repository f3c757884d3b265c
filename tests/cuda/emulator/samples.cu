// Small kernels of test_emulator.py: what threads do together, and what can go wrong.
#define API extern "C" __attribute__((visibility("default")))

#include <cuda_pipeline.h>
#include <cuda_runtime.h>

constexpr unsigned kAll = 0xffffffffu;

__global__ void warp_functions(int* out) {
  const int lane = threadIdx.x;
  int* row = out + 10 * lane;
  row[0] = __shfl_up_sync(kAll, lane, 3, 8);
  row[1] = __shfl_down_sync(kAll, lane, 3, 16);
  row[2] = __shfl_xor_sync(kAll, lane, 5);
  row[3] = __shfl_sync(kAll, lane, lane + 9, 16);
  row[4] = __ballot_sync(kAll, lane % 3 == 0);
  row[5] = __all_sync(kAll, lane < 32) + 2 * __all_sync(kAll, lane < 31) +
           4 * __any_sync(kAll, lane == 7);
  row[6] = __match_any_sync(kAll, lane % 4);
  row[7] = __reduce_add_sync(kAll, lane);
  row[8] = __reduce_max_sync(kAll, lane ^ 5);
  row[9] = lane < 8 ? __shfl_xor_sync(0xffu, lane, 1) : __shfl_xor_sync(0xffffff00u, lane, 2);
}
__global__ void block_functions(int* out) {
  const int i = threadIdx.x;
  const int count = __syncthreads_count(i % 3 == 0);
  const int all = __syncthreads_and(i < 96), any = __syncthreads_or(i == 95);
  if (i < 64) asm volatile("bar.sync 1, 64;");
  out[i] = count + 1000 * all + 10000 * any;
}
__global__ void atomics(int* out) {
  atomicAdd(out, int(threadIdx.x));
  atomicMax(out + 1, int(threadIdx.x));
  atomicCAS(out + 2, 0, int(threadIdx.x) + 1);
  atomicAdd(reinterpret_cast<float*>(out + 3), 0.5f);
}
__device__ __noinline__ double twice(double x) { return 2 * x; }
__global__ void double_functions(const double* in, double* out) {
  const double x = in[threadIdx.x];
  double* row = out + 8 * threadIdx.x;
  row[0] = exp2(x);
  row[1] = log2(fabs(x));
  row[2] = exp(x);
  row[3] = 1 / x;
  row[4] = sqrt(fabs(x));
  row[5] = sin(x);
  row[6] = twice(x);
  row[7] = pow(fabs(x), 0.3);
}
struct Big {
  long long numbers[150];
};
__global__ void big_parameter(Big big, long long* out) {
  out[threadIdx.x] = big.numbers[threadIdx.x];
}
__global__ void thread_order(int* out) { out[threadIdx.x] = atomicAdd(out + 64, 1); }

__global__ void copies(const int* in, int* out, int source_bytes) {
  __shared__ __align__(16) int tile[128];
  const int i = threadIdx.x;
  const unsigned to = unsigned(__cvta_generic_to_shared(tile + 4 * i));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(in + 4 * i),
               "r"(source_bytes));
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(in));
  asm volatile("cp.async.commit_group;");
  out[i] = tile[4 * i];  // nothing has arrived yet
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  for (int j = 0; j < 4; ++j) out[32 + 4 * i + j] = tile[4 * i + j];
  asm volatile("cp.async.wait_all;" ::: "memory");
  out[160 + i] = tile[4 * i];
}

__global__ void no_barrier(float* o) {
  __shared__ float s[64];
  s[threadIdx.x] = o[threadIdx.x];
  o[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void barrier(float* o) {
  __shared__ float s[64];
  s[threadIdx.x] = o[threadIdx.x];
  __syncthreads();
  o[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void no_syncwarp(float* o) {
  __shared__ float s[64];
  s[threadIdx.x] = o[threadIdx.x];
  o[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void syncwarp(float* o) {
  __shared__ float s[64];
  s[threadIdx.x] = o[threadIdx.x];
  __syncwarp();
  o[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void write_after_read(float* o) {
  __shared__ float s[64];
  s[threadIdx.x] = o[threadIdx.x];
  __syncthreads();
  o[threadIdx.x] = s[63 - threadIdx.x];
  s[threadIdx.x] = 1;
  __syncthreads();
}
__global__ void race_of_blocks(float* o) {
  if (threadIdx.x == 0) o[0] = o[blockIdx.x + 1];
}
__global__ void read_of_another_block(float* o) {
  if (threadIdx.x == 0) o[blockIdx.x + 1] = o[blockIdx.x];
}
__global__ void blocks_apart(float* o) { o[blockIdx.x * 64 + threadIdx.x] = 1; }
__global__ void blocks_atomic(float* o) { atomicAdd(o, 1.0f); }
__global__ void no_wait(float* o) {
  __shared__ __align__(16) float s[256];
  __pipeline_memcpy_async(&s[threadIdx.x * 4], o + threadIdx.x * 4, 16);
  __pipeline_commit();
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
__global__ void uninitialised(float* o) {
  __shared__ float s[65];
  s[threadIdx.x] = 1;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x + 1];
}
__global__ void beyond_global(float* o) { o[threadIdx.x + 1] = 1; }
__global__ void beyond_shared(float* o) {
  extern __shared__ float s[];
  s[threadIdx.x + 1] = o[threadIdx.x];
}
__global__ void beyond_array(float* o, int by) {
  __shared__ float s[64], t[64];
  s[threadIdx.x + by] = t[threadIdx.x] = o[threadIdx.x];
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x] + t[threadIdx.x];
}
__global__ void misaligned(float* o) {
  *reinterpret_cast<float4*>(o + threadIdx.x) = make_float4(1, 2, 3, 4);
}
__global__ void divergent_barrier(float* o) {
  if (threadIdx.x < 16) {
    __syncthreads();
    o[0] = 1;
  } else {
    o[1] = 2;
    __syncthreads();
  }
  o[2] = 1;
}
__global__ void divergent_shuffle(float* o) {
  float v = 1;
  if (threadIdx.x < 20) v += __shfl_xor_sync(kAll, v, 1);
  o[threadIdx.x] = v;
}
__global__ void missing_warp(float* o) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;");
  o[threadIdx.x] = 1;
}
__global__ void null_pointer(float* o) { *reinterpret_cast<float*>(8 * (o == nullptr)) = 1; }
__global__ void trapped(float* o) {
  asm("trap;");
  o[0] = 1;
}
__global__ void __launch_bounds__(64) bounded(float* o) { o[0] = 1; }
__global__ void dynamic(float* o) {
  extern __shared__ float s[];
  s[threadIdx.x] = 1;
  o[0] = s[threadIdx.x];
}
__global__ void column_access(float* o) {
  __shared__ float s[32 * 32];
  for (int i = 0; i < 32; ++i) s[32 * i + threadIdx.x] = 1;
  __syncwarp();
  o[threadIdx.x] = s[32 * threadIdx.x];
  o[8 * threadIdx.x] = 1;
}

#define LAUNCH(name, blocks, threads, shared) \
  API int launch_##name(float* o) {           \
    name<<<blocks, threads, shared>>>(o);     \
    return cudaGetLastError();                \
  }
LAUNCH(no_barrier, 1, 64, 0)
LAUNCH(barrier, 1, 64, 0)
LAUNCH(no_syncwarp, 1, 64, 0)
LAUNCH(syncwarp, 1, 64, 0)
LAUNCH(write_after_read, 1, 64, 0)
LAUNCH(race_of_blocks, 3, 32, 0)
LAUNCH(read_of_another_block, 3, 32, 0)
LAUNCH(blocks_apart, 4, 64, 0)
LAUNCH(blocks_atomic, 4, 64, 0)
LAUNCH(no_wait, 1, 64, 0)
LAUNCH(uninitialised, 1, 64, 0)
LAUNCH(beyond_global, 1, 64, 0)
LAUNCH(beyond_shared, 1, 64, 256)
LAUNCH(misaligned, 1, 32, 0)
LAUNCH(divergent_barrier, 1, 32, 0)
LAUNCH(divergent_shuffle, 1, 32, 0)
LAUNCH(missing_warp, 1, 64, 0)
LAUNCH(trapped, 1, 32, 0)
LAUNCH(column_access, 1, 32, 0)
API int launch_null_pointer(float*) {
  null_pointer<<<1, 32>>>(nullptr);
  return cudaGetLastError();
}
API int launch_beyond_array(float* o, int by) {
  beyond_array<<<1, 64>>>(o, by);
  return cudaGetLastError();
}
API int launch_warp_functions(int* o) {
  warp_functions<<<1, 32>>>(o);
  return cudaGetLastError();
}
API int launch_block_functions(int* o) {
  block_functions<<<1, 96>>>(o);
  return cudaGetLastError();
}
API int launch_atomics(int* o) {
  atomics<<<2, 64>>>(o);
  return cudaGetLastError();
}
API int launch_thread_order(int* o) {
  thread_order<<<1, 64>>>(o);
  return cudaGetLastError();
}
API int launch_double_functions(const double* i, double* o, int n) {
  double_functions<<<1, n>>>(i, o);
  return cudaGetLastError();
}
API int launch_big_parameter(const Big* big, long long* o) {
  big_parameter<<<1, 150>>>(*big, o);
  return cudaGetLastError();
}
API int launch_copies(const int* i, int* o, int bytes) {
  copies<<<1, 32>>>(i, o, bytes);
  return cudaGetLastError();
}
API int launch_sized(float* o, int grid_y, int threads, int shared, int most_shared) {
  if (most_shared) {
    const int status =
        cudaFuncSetAttribute(dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
    if (status) return cudaGetLastError();
  }
  dynamic<<<dim3(1, grid_y), threads, shared>>>(o);
  return cudaGetLastError();
}
API int launch_bounded(float* o, int threads) {
  bounded<<<1, threads>>>(o);
  return cudaGetLastError();
}
API int last_error() { return cudaPeekAtLastError(); }
API int launch_on(float* o, int device, void* stream) {
  cudaSetDevice(device);
  barrier<<<1, 64, 0, cudaStream_t(stream)>>>(o);
  const int status = cudaGetLastError();
  cudaSetDevice(0);
  return status;
}
API void* stream_of(int device) {
  cudaStream_t stream;
  cudaSetDevice(device);
  cudaStreamCreate(&stream);
  cudaSetDevice(0);
  return stream;
}
