// Sums over the blocks of a cluster that share a head (from sm_90 on).
//
// In an exchange each block sends its own sums to all blocks of the cluster, itself included, by
// st.async: the receiver's mbarrier counts the bytes that have come. Each block adds what it has
// received in the order of the ranks, so that all get the same bits.
//
// Two rooms and two barriers are used in turns; rooms never overlap, whatever they hold. No block
// sends to a room that another still reads: it sends after it has received the exchange before, and
// the others sent that one after all of their warps had met, and so had read all earlier ones.
#pragma once

#include "scores.cuh"

namespace setformer::cuda::on_chip {

struct Exchange {
  uint32_t count = 0;  // of exchanges so far
  __device__ __forceinline__ uint32_t room() const { return count & 1; }
  __device__ __forceinline__ uint32_t parity() const { return count >> 1 & 1; }  // of the barrier
};

// For sums over columns of entries, of numbers or of log-sum-exps.
__device__ __forceinline__ float combined(float x, float y) { return x + y; }
__device__ __forceinline__ LogSum<float> combined(LogSum<float> x, const LogSum<float>& y) {
  x.merge(y);
  return x;
}

template <class Sum>
struct alignas(2 * sizeof(Sum)) Two {
  Sum x, y;
};
// Sums of all references, spread over the warp.
template <class S, class Sum>
using Sums = Two<Sum>[S::kLanePairs];

// The address of the same place in the shared memory of another block.
__device__ __forceinline__ uint32_t address_in(int rank, uint32_t address) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

__device__ __forceinline__ void send(uint32_t to, uint32_t barrier, const Two<float>& x) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, "
      "[%3];" ::"r"(to),
      "f"(x.x), "f"(x.y), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void send(uint32_t to, uint32_t barrier, const float4& x) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, "
      "%3, %4}, [%5];" ::"r"(to),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void send(uint32_t to, uint32_t barrier, const Two<LogSum<float>>& x) {
  send(to, barrier, float4{x.x.largest, x.x.sum, x.y.largest, x.y.sum});
}

// To be called once, by all threads of the cluster, before anything is sent.
template <class S>
__device__ __forceinline__ void begin_exchanges(const Place& at) {
  if (at.thread == 0) {
#pragma unroll
    for (int room = 0; room < 2; ++room) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(
                       shared_address(Memory<S>::kBarriers + 8 * room))
                   : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Between two exchanges all warps of the block must meet. One thread says how many bytes will come.
template <class S>
__device__ __forceinline__ void expect(const Place& at, const Exchange& exchange, int bytes) {
  if (at.thread != 0) return;
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(Memory<S>::kBarriers + 8 * exchange.room())),
               "r"(bytes)
               : "memory");
}
template <class S>
__device__ __forceinline__ void receive(const Exchange& exchange) {
  const uint32_t barrier = shared_address(Memory<S>::kBarriers + 8 * exchange.room());
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(exchange.parity())
        : "memory");
  }
}

// Combines the numbers that all warps of a block know with those of all other blocks. Each warp
// sends them to one block.
template <class S, class Sum, class Combine>
__device__ __forceinline__ void over_ranks(const Place& at, Exchange& exchange, Sums<S, Sum>& sums,
                                           Combine combine) {
  static_assert(S::kWarps >= kMostRanks);
  constexpr int kRow = 32 * S::kLanePairs * int(sizeof(Two<Sum>));  // bytes of a block's numbers
  constexpr int kRoom = (Memory<S>::kTiles - Memory<S>::kReceived) / 2;
  static_assert(kMostRanks * kRow <= kRoom);
  const int room = Memory<S>::kReceived + int(exchange.room()) * kRoom;
  expect<S>(at, exchange, ranks<S>() * kRow);
  if (at.warp < ranks<S>()) {
    const uint32_t to = address_in(at.warp, shared_address(room + rank<S>() * kRow));
    const uint32_t barrier =
        address_in(at.warp, shared_address(Memory<S>::kBarriers + 8 * exchange.room()));
#pragma unroll
    for (int h = 0; h < S::kLanePairs; ++h) {
      send(to + (32 * h + at.lane) * int(sizeof(Two<Sum>)), barrier, sums[h]);
    }
  }
  receive<S>(exchange);
  ++exchange.count;
  const Two<Sum>* own = shared_at<Two<Sum>>(room) + at.lane;
#pragma unroll
  for (int h = 0; h < S::kLanePairs; ++h) sums[h] = own[32 * h];
#pragma unroll 1
  for (int other = 1; other < ranks<S>(); ++other) {
    own += 32 * S::kLanePairs;
#pragma unroll
    for (int h = 0; h < S::kLanePairs; ++h) {
      sums[h] = {combine(sums[h].x, own[32 * h].x), combine(sums[h].y, own[32 * h].y)};
    }
  }
}

// Adds the sums of all blocks that share the head.
template <class S, class Sum>
__device__ __forceinline__ void add_ranks(const Place& at, Exchange& exchange, Sums<S, Sum>& sums) {
  if constexpr (S::kClustered) {
    over_ranks<S, Sum>(at, exchange, sums,
                       [](const Sum& x, const Sum& y) { return combined(x, y); });
  }
}

// The largest of a number that is the same in all threads of a block.
template <class S>
__device__ __forceinline__ float most_of_ranks(const Place& at, Exchange& exchange, float x) {
  Sums<S, float> numbers;
#pragma unroll
  for (int h = 0; h < S::kLanePairs; ++h) numbers[h] = {x, x};
  over_ranks<S, float>(at, exchange, numbers, [](float a, float b) { return most(a, b); });
  return numbers[0].x;
}

}  // namespace setformer::cuda::on_chip
