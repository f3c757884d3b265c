// How one head lies on a block: which warp holds which tokens, and what is in shared memory.
//
// A warp owns up to kStrips strips of 16 tokens, and keeps their entries against all references in
// registers. These are accumulators of mma.m16n8k16: lane 4 g + c holds tokens g and g + 8 of a
// strip, and references 8 n + 2 c and 8 n + 2 c + 1 of each block n. Numbers that belong to
// references are stored in one of two ways: as fragments, like the accumulators, or spread over the
// warp, where each lane holds those of references 64 h + 2 lane and 64 h + 2 lane + 1.
#pragma once

#include "../problem.cuh"
#include "parts.cuh"

namespace setformer::cuda::on_chip {

template <class StorageType, int blocks, int strips, int warps>
struct Shape {
  using Storage = StorageType;
  static constexpr bool kClustered = false;  // whether the blocks of a cluster share a head
  static constexpr bool kShare = false;   // whether a block takes a share of a head of any length
  static constexpr int kBlocks = blocks;  // of 8 references
  static constexpr int kStrips = strips;  // of 16 tokens, a warp's
  static constexpr int kWarps = warps;
  static constexpr int kThreads = 32 * warps;
  static constexpr int kReferences = 8 * blocks;
  static constexpr int kLanePairs = (blocks + 7) / 8;  // pairs of references in a lane's Spread
  static constexpr int kWarpTokens = 16 * strips;
  static constexpr int kTokens = warps * kWarpTokens;  // a block's
  static constexpr int kPairs = (blocks + 1) / 2;      // of blocks: a product's depth of 16
  // Blocks that a multiprocessor should hold: it has 65536 registers, a thread at most 255.
  static constexpr int kBlocksAtOnce = warps == 1 && kParts<Storage> == 1 ? 12 : 8 / warps;
};

// Of each block of a cluster.
template <class StorageType, int blocks, int strips>
struct ClusterShape : Shape<StorageType, blocks, strips, 8> {
  static constexpr bool kClustered = true;
};

// Of a block that takes a share of a head, one part of it after the other. Of many references it
// keeps fewer strips, so that no registers spill.
template <class StorageType, int blocks, int strips>
struct ShareShape : Shape<StorageType, blocks, (blocks > 8 ? 2 : strips), 8> {
  static constexpr bool kShare = true;
  static constexpr int kLeastStrips = blocks > 8 ? 32 : 8 * strips;  // of a share
};

// Bands of 16 columns that a warp's room holds of its rows. In parts these take three times the
// room.
template <class Storage>
inline constexpr int kMostBands = kParts<Storage> > 1 ? 2 : 4;
inline constexpr int kBands = 2;      // bands that products take at once
inline constexpr int kGroup = 2;      // blocks of references that collect takes at once
inline constexpr int kMostRanks = 8;  // of a cluster that any device of 9.0 can hold as a whole

template <class S>
using Entries = float[S::kStrips][S::kBlocks][4];
template <class S>
using OfTokens = float[S::kStrips][2];  // of tokens g and g + 8 of each strip
template <class S>
using OfReferences = float[S::kBlocks][2];  // in fragments
template <class S>
using Spread = float2[S::kLanePairs];

// Room for a Head at the start of shared memory.
inline constexpr int kHeadBytes = 320;

// The head that a block works on. It is in shared memory, because as variables it would take
// registers that the entries need.
template <class Storage>
struct Head : HeadTensors<Storage> {
  Similarity<float> similarity;
  Global<float> pooled;
  int first_strip, last_strip;  // of the block's share: [first, last)

  // What a vector adds to the exponent; `square` is its square norm.
  __device__ __forceinline__ float exponent(float square) const {
    return similarity.gaussian ? -similarity.distance_scale * square : 0.0f;
  }

  // To be called by one thread. Returns where the sample's tokens are.
  __device__ Span select(const ForwardParams& p, int64_t head, bool of_queries) {
    const Side side = of_queries ? queries_of(p) : keys_of(p);
    const Span span = this->select_tensors(p, side, head);
    similarity.select_similarity(p, side, span, this->h);
    pooled = static_cast<float*>(p.pooled.data) + head * p.references * p.value_depth;
    return span;
  }
};

// The layout of shared memory, as far as the shape does not fix it. Computed on the host:
// instructions read a kernel's arguments directly, while values that a kernel computes take
// registers or are computed again.
struct Sizes {
  int bands, value_bands;  // of keys and values
  int part, depth_part;    // elements from part to part of a row of rooms and of references
  int pitch, depth_pitch;  // elements from row to row of these, so that rows start in different
                           // banks
  int room;                // rows of a warp's room: its strips, by twos except in parts
  int ranks;               // blocks that share the head: those of a cluster, or 1
  int references, rows;    // where these begin, in bytes
  int total;               // bytes
};
struct Params : ForwardParams {
  Sizes sizes;
};

// A block's shared memory, in bytes from its start. A block of one warp has no columns and no sums.
//
//   the Head
//   terms       [kReferences]                    float: what references add to exponents
//   positions   [3, kReferences]                 float
//   largest     [8]                              float: masses of each warp
//   valid       [kWarps, 4]                      uint32_t: a bit for each of the warp's tokens
//   masses      [kTokens]                        float, a warp's own
//   spread      [2, kWarps, 64 kLanePairs]       float, a warp's own
//   columns     [2, kWarps, 64 kLanePairs]       float2: sums of each warp, and their exponents
//   sums        [2, kWarps, kGroup, kBands, 32]  float4: tiles of A^T of each warp
//   received    [2, kMostRanks, 64 kLanePairs]   float2: the same of each block of a cluster
//   tiles       [2, kMostRanks, kGroup, kBands, 32]  float4: the same
//   barriers    [2]                              uint64_t: of what blocks send
//   center      [kMostDepth]                     float: the mean of the references, if float32
//   operand     [kParts, bands, kPairs, 2, 32]   uint2: A in the order of fragments
//   references  [kReferences, depth pitch]       storage, as parts
//   rows        [kWarps, room, pitch]            storage, a warp's own: keys and values as parts,
//                                                outputs
template <class S>
struct Memory {
  static constexpr int kAcross = S::kWarps > 1;  // whether warps exchange sums
  static constexpr int kTerms = kHeadBytes;
  static_assert(sizeof(Head<typename S::Storage>) <= kHeadBytes);
  static constexpr int kPositions = kTerms + S::kReferences * 4;
  static constexpr int kLargest = kPositions + 3 * S::kReferences * 4;
  static constexpr int kValid = kLargest + 8 * 4;
  static constexpr int kMasses = kValid + S::kWarps * 4 * 4;
  static constexpr int kSpread = kMasses + S::kTokens * 4;
  static constexpr int kColumns = kSpread + 2 * S::kWarps * 64 * S::kLanePairs * 4;
  static constexpr int kSums = kColumns + kAcross * 2 * S::kWarps * 64 * S::kLanePairs * 8;
  static constexpr int kReceived = kSums + kAcross * 2 * S::kWarps * kGroup * kBands * 32 * 16;
  static constexpr int kTiles = kReceived + S::kClustered * 2 * kMostRanks * 64 * S::kLanePairs * 8;
  static constexpr int kBarriers =
      kTiles + S::kClustered * 2 * kMostRanks * kGroup * kBands * 32 * 16;
  static constexpr int kCenter = kBarriers + S::kClustered * 16;
  static constexpr int kOfParts = kParts<typename S::Storage>;
  static constexpr int kOperand = kCenter + (kOfParts > 1) * kMostDepth * 4;

  static Sizes sizes(const ForwardParams& p, int ranks = 1) {
    const int64_t tokens = p.cross && p.queries > p.tokens ? p.queries : p.tokens;
    const int warps = S::kWarps * ranks, strips = int((tokens + 16 * warps - 1) / (16 * warps));
    return sizes_of(p, strips, ranks);
  }
  // For warps with so many strips.
  static Sizes sizes_of(const ForwardParams& p, int strips, int ranks = 1) {
    Sizes sizes;
    sizes.ranks = ranks;
    sizes.bands = bands_of(p.depth);
    sizes.value_bands = bands_of(p.value_depth);
    const int most = sizes.bands > sizes.value_bands ? sizes.bands : sizes.value_bands;
    constexpr int kMost = kMostBands<typename S::Storage>;
    sizes.part = 16 * (most < kMost ? most : kMost);
    sizes.depth_part = 16 * sizes.bands;
    sizes.pitch = kOfParts * sizes.part + 8;
    sizes.depth_pitch = kOfParts * sizes.depth_part + 8;
    sizes.room = 16 * (kOfParts > 1 ? strips : strips + strips % 2);
    sizes.references = kOperand + kOfParts * sizes.value_bands * S::kPairs * 32 * 16;
    sizes.rows = sizes.references + S::kReferences * sizes.depth_pitch * 2;
    sizes.total = sizes.rows + S::kWarps * sizes.room * sizes.pitch * 2;
    return sizes;
  }
  // The number of bands of so many columns, rounded up to a multiple of kBands.
  static int bands_of(int64_t columns) {
    return (int(columns) + 16 * kBands - 1) / (16 * kBands) * kBands;
  }
};

inline constexpr int kElement = 2;  // bytes of a part

// An address in the form that ldmatrix and cp.async need.
__device__ __forceinline__ uint32_t shared_address(int offset) {
  return uint32_t(__cvta_generic_to_shared(shared_memory)) + offset;
}
template <class T>
__device__ __forceinline__ T* shared_at(int offset) {
  return reinterpret_cast<T*>(shared_memory + offset);
}
template <class S>
__device__ __forceinline__ Head<typename S::Storage>& shared_head() {
  return *shared_at<Head<typename S::Storage>>(0);
}

struct Place {
  int thread, lane, warp, g, c;
};
__device__ __forceinline__ Place place() {
  Place at;
  at.thread = int(threadIdx.x);
  at.lane = at.thread % 32;
  at.warp = __shfl_sync(kFullWarp, at.thread / 32, 0);  // the compiler then knows it is uniform
  at.g = at.lane / 4;
  at.c = at.lane % 4;
  return at;
}

// The block's rank in the cluster that shares the head, and the number of its blocks.
template <class S>
__device__ __forceinline__ int rank() {
  int rank = 0;
  if constexpr (S::kClustered) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
template <class S>
__device__ __forceinline__ int ranks() {
  int ranks = 1;
  if constexpr (S::kClustered) asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(ranks));
  return ranks;
}

// Of all warps that share the head, the one that stores what all of them know.
template <class S>
__device__ __forceinline__ bool is_first_warp(const Place& at) {
  return at.warp == 0 && rank<S>() == 0;
}

// The strips of one side.
template <class S>
__device__ __forceinline__ int all_strips() {
  return (int(shared_head<S>().tokens.count) + 15) / 16;
}

// The tokens of one side that belong to a warp.
template <class S>
struct Tokens {
  // Of bits for 32 tokens each. Compilers load three as four.
  static constexpr int kWords = S::kStrips > 4 ? 4 : (S::kStrips + 1) / 2;
  int first, strips;
  const uint32_t* valid;  // in the warp's own shared memory

  __device__ __forceinline__ explicit Tokens(const Place& at)
      : Tokens(at, 0, all_strips<S>(), rank<S>() * S::kWarps + at.warp, ranks<S>() * S::kWarps) {}
  // Of the strips from `from` on, `all` of them, which `warps` warps share: their numbers of strips
  // differ by one at most.
  __device__ __forceinline__ Tokens(const Place& at, int from, int all, int warp, int warps) {
    const auto& rows = shared_head<S>().tokens;
    const int begin = all * warp / warps;
    first = 16 * (from + begin);
    strips = all * (warp + 1) / warps - begin;
    uint32_t* words = shared_at<uint32_t>(Memory<S>::kValid) + 4 * at.warp;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const int i = 32 * word + at.lane;
      const uint32_t bits = __ballot_sync(kFullWarp, i < 16 * strips && rows.valid(first + i));
      if (at.lane == 0) words[word] = bits;
    }
    __syncwarp();
    valid = words;
  }
  // Token g or g + 8 of a strip.
  __device__ __forceinline__ bool is_valid(int strip, int half, int g) const {
    return valid[strip / 2] >> (16 * (strip % 2) + 8 * half) & 1u << g;
  }
};

// The address that a lane gives to ldmatrix in the room. The four matrices are rows 0 to 7 and 8 to
// 15 of a strip at columns 0 to 7, then both at columns 8 to 15; with `transposed` first both
// column ranges of rows 0 to 7, then those of rows 8 to 15.
template <class S>
__device__ __forceinline__ uint32_t strip_matrices(const Params& p, const Place& at,
                                                   bool transposed) {
  const int matrix = at.lane / 8, line = at.lane % 8;
  const int down = transposed ? matrix / 2 : matrix % 2,
            right = transposed ? matrix % 2 : matrix / 2;
  return shared_address(p.sizes.rows) +
         kElement * ((at.warp * p.sizes.room + 8 * down + line) * p.sizes.pitch + 8 * right);
}

// Calls visit(entry, strip, half, block, parity of the reference) for each entry of the lane.
template <class S, class Visit>
__device__ __forceinline__ void for_each_entry(Entries<S>& entries, Visit visit) {
#pragma unroll
  for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(entries[s][n][e], s, e / 2, n, e % 2);
    }
  }
}

// Calls visit(strip, half) for each token of the lane.
template <class S, class Visit>
__device__ __forceinline__ void for_each_token(Visit visit) {
#pragma unroll
  for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) visit(s, half);
  }
}

// Calls visit(reference, number) for the lane's numbers of a Spread.
template <class Visit, class Pairs>
__device__ __forceinline__ void for_each_own(const Place& at, Pairs& pairs, Visit visit) {
#pragma unroll
  for (int h = 0; h < int(sizeof(pairs) / sizeof(pairs[0])); ++h) {
    visit(64 * h + 2 * at.lane, pairs[h].x);
    visit(64 * h + 2 * at.lane + 1, pairs[h].y);
  }
}

// Copies a Spread into one of the warp's own rooms (`which`), as pairs in the order of references.
template <class S>
__device__ __forceinline__ const float2* in_room(const Place& at, const Spread<S>& own,
                                                 int which = 0) {
  float2* room =
      shared_at<float2>(Memory<S>::kSpread) + (which * S::kWarps + at.warp) * 32 * S::kLanePairs;
  __syncwarp();
#pragma unroll
  for (int h = 0; h < S::kLanePairs; ++h) room[32 * h + at.lane] = own[h];
  __syncwarp();
  return room;
}

template <class S>
__device__ __forceinline__ void to_fragments(const Place& at, const Spread<S>& own,
                                             OfReferences<S>& fragments) {
  const float2* room = in_room<S>(at, own);
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
    const float2 pair = room[4 * n + at.c];
    fragments[n][0] = pair.x;
    fragments[n][1] = pair.y;
  }
}

// A barrier for all warps of a block.
template <class S>
__device__ __forceinline__ void meet() {
  if constexpr (S::kWarps == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

}  // namespace setformer::cuda::on_chip
