// The problem in the form that kernels use: sides, heads, how tokens are split over blocks, and
// what a block keeps in shared memory.
#pragma once

#include "launch.h"
#include "product.cuh"

namespace setformer::cuda {

// Where the tokens of a sample are.
struct Span {
  int64_t start;   // in arrays with a row for each token: the index along the first dimension
  int64_t before;  // tokens of all samples before this one
  int64_t count;
  bool valid;  // false if offsets are not what they should be; the others are within bounds then
};

// The tokens of one side: the keys, or the queries of cross attention, and their solve.
struct Side {
  Tensor tokens;     // storage    [B, H, count, D]
  Tensor mask;       // bool       [B, count], optional
  Tensor mass;       // accumulate [B, H, count], optional
  Tensor positions;  // accumulate [count, P], optional
  int64_t count;     // of packed sequences: the most that one has
  void* rows;        // accumulate [B, H, T + 1, count]: rows^t = log2 sum_j 2^(s_ij + g^t_j)
  void* columns;     // accumulate [B, H, column_rows, M]: columns^t = log2 sum_i 2^(s_ij + f^t_i)
  int64_t column_rows;      // max(T, 1), and for keys one more: Head::collection_scale
  const int64_t* offsets;   // [B + 1] of packed sequences, else null
  int64_t samples, packed;  // B, and the tokens of all packed sequences

  // Packed arrays have a single sample; their stride[0] is that of a token (see `prepared`).
  __device__ Span span(int64_t b) const {
    if (offsets == nullptr) return {b, b * count, count, true};
    __builtin_assume(__isGlobal(offsets));
    const int64_t begin = offsets[b], end = offsets[b + 1];
    const int64_t first = between(begin, 0, packed);
    const int64_t most = packed - first < count ? packed - first : count;
    const int64_t found = between(end - first, 0, most);
    // Where offsets descend, the sequence between them has no rows to be NaN: its neighbours are.
    const bool before = b > 0 ? offsets[b - 1] <= begin : begin == 0;
    const bool after = b + 1 < samples ? end <= offsets[b + 2] : end == packed;
    const bool valid = first == begin && first + found == end && before && after;
    return {first, first, found, valid};
  }

 private:
  __device__ static int64_t between(int64_t x, int64_t least, int64_t most) {
    return x < least ? least : x > most ? most : x;
  }
};

__host__ __device__ inline int64_t steps_kept(const ForwardParams& p) {
  return p.iterations > 0 ? p.iterations : 1;
}

__host__ __device__ inline Side keys_of(const ForwardParams& p) {
  return {p.key,     p.mask,      p.token_mass,   p.token_positions,
          p.tokens,  p.rows.data, p.columns.data, steps_kept(p) + 1,
          p.offsets, p.batch,     p.packed_tokens};
}
__host__ __device__ inline Side queries_of(const ForwardParams& p) {
  return {p.query,           p.query_mask,         Tensor{},      p.query_positions, p.queries,
          p.query_rows.data, p.query_columns.data, steps_kept(p), p.query_offsets,   p.batch,
          p.packed_queries};
}
// Of all samples.
inline int64_t all_tokens(const Side& side) {
  return side.offsets != nullptr ? side.packed : side.samples * side.count;
}
// The side that distributes: its tokens receive the output.
__host__ __device__ inline Side receivers_of(const ForwardParams& p) {
  return p.cross ? queries_of(p) : keys_of(p);
}

__host__ __device__ constexpr int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Which tokens a block takes. This depends only on their number (or a knob), so that results do not
// depend on the batch or the device. With four tiles a block, the work done once per block
// (references, merging) is less than the work per token; at most 256 partial sums are merged. The
// number of tiles of a block is a power of two, because a 64-bit division is a function call, which
// would spill registers.
template <class Storage>
struct Splits {
  int64_t tiles, tiles_each, count;
  __host__ __device__ Splits(const ForwardParams& p, int64_t tokens, bool whole = false) {
    tiles = divide_up(tokens, Shape<Storage>::kRows);
    tiles_each = tiles;
    count = 1;
    if (whole) return;
    int shift = p.tiles_shift;
    while (tiles > (int64_t(256) << shift)) ++shift;
    tiles_each = int64_t(1) << shift;
    count = (tiles + tiles_each - 1) >> shift;
    if (count == 0) count = 1;
  }
};

// The blocks that share a head, and those of all heads before it; of packed sequences at least so
// many, for their lengths are on the device.
struct Share {
  int64_t before, count;
};
template <class Storage>
__host__ __device__ inline int64_t packed_shares(const ForwardParams& p, int64_t samples,
                                                 int64_t tokens) {
  return p.heads * (samples + (tokens / Shape<Storage>::kRows >> p.tiles_shift));
}
template <class Storage>
__device__ inline Share share_of(const ForwardParams& p, const Side& side, const Span& span,
                                 int64_t b, int64_t h) {
  const int64_t count = Splits<Storage>(p, span.count).count;
  const int64_t before =
      side.offsets == nullptr ? b * p.heads * count : packed_shares<Storage>(p, b, span.before);
  return {before + h * count, count};
}
// Of all heads.
template <class Storage>
inline int64_t all_shares(const ForwardParams& p, const Side& side) {
  if (side.offsets != nullptr) return packed_shares<Storage>(p, p.batch, side.packed);
  return p.batch * p.heads * Splits<Storage>(p, side.count).count;
}
// At least as many as share any head. (A longer sequence may be shared by fewer.)
template <class Storage>
__host__ __device__ inline int64_t most_shares(const ForwardParams& p, const Side& side) {
  const Splits<Storage> splits(p, side.count);
  if (side.offsets == nullptr || splits.tiles <= int64_t(256) << p.tiles_shift) return splits.count;
  return 256;
}

// Up to this log2(e) / epsilon, scores are used as factors 2^s (transport.cuh): epsilon >= 1/32.
inline constexpr double kMostFactorScale = 32 * kLog2E * (1 + 1e-6);
// Not in float64, against which the other types are checked.
template <class Storage>
inline constexpr bool kFactors = sizeof(Storage) < 8;

// Room for a Head at the start of shared memory.
template <class Storage>
inline constexpr int kHeadBytes =
    2304 + (kIsHalf<Storage> ? 0 : kMostDepth * int(sizeof(Accumulate<Storage>)));

// The shared memory that a streaming pass may take: what sm_86, 89 and 120 give a block. Code for
// sm_80 runs on these too, so the limit must not depend on the device.
inline constexpr int kMostStreaming = 99 * 1024;

// What a pass keeps in shared memory, in addition to the tiles from which scores are formed.
enum Needs : int {
  kScoresOnly = 0,
  kNeedsRows = 1,     // a tile of values, or of the gradients of outputs
  kNeedsPlan = 2,     // a tile of a plan
  kNeedsOperand = 4,  // a tile of A or dA
  kNeedsSteps = 8,    // numbers of several steps for a tile of references
  kHeadAlone = 16,    // forms no scores: has room for the Head only
  kPools = kNeedsRows | kNeedsPlan,
  kDistributes = kPools | kNeedsOperand,
  kDifferentiates = kDistributes | kNeedsSteps,
};

// A block's shared memory, in bytes from its start: the Head, then tiles of keys and references. If
// `resident`, these are all tiles of a head; else `stages` tiles of each, but only one of
// references if they are a single tile. Devices with one stage have 64 KiB a block: streaming
// passes are `lean` there, that is once scores are formed, rows overwrite the keys and operands the
// references.
template <class Storage>
struct Layout {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;

  bool resident, lean;
  int chunks, depths;  // numbers of tiles: of the references, and of one row
  int pitch, tile_bytes, reference_bytes;
  int key_slots;
  int steps_at_once;
  int references, rows, plan, operand, numbers, total;

  Layout() = default;
  __host__ __device__ Layout(const ForwardParams& p, int needs, bool resident, int64_t tokens,
                             int stages)
      : resident(resident), lean(!resident && stages == 1) {
    constexpr int kRowsBytes = S::kRows * (S::kDepth + S::kPerVector) * int(sizeof(Storage));
    constexpr int kPlanBytes = S::kRows * S::kWidePitch * int(sizeof(T));
    constexpr int kOperandBytes = S::kRows * S::kDeepPitch * int(sizeof(T));
    chunks = int(divide_up(p.references, S::kRows));
    depths = int(divide_up(p.depth, S::kDepth));
    const int width = depths > 1 ? S::kDepth : int(divide_up(p.depth, 16) * 16);
    pitch = width + S::kPerVector;
    tile_bytes = S::kRows * pitch * int(sizeof(Storage));
    reference_bytes = tile_bytes;
    if (lean && (needs & kNeedsOperand)) reference_bytes = kOperandBytes;
    if (lean && (needs & kNeedsRows)) tile_bytes = kRowsBytes;
    key_slots = resident ? int(divide_up(tokens, S::kRows)) * depths : stages;
    const int reference_slots = resident               ? chunks * depths
                                : lean                 ? 1
                                : chunks * depths == 1 ? 1
                                                       : stages;
    references = kHeadBytes<Storage> + key_slots * tile_bytes;
    int end = references + reference_slots * reference_bytes;
    const auto take = [&](int bytes) {
      end += bytes;
      return end - bytes;
    };
    plan = needs & kNeedsPlan ? take(kPlanBytes) : 0;
    rows = lean ? kHeadBytes<Storage> : needs & kNeedsRows ? take(kRowsBytes) : 0;
    operand = lean ? references : needs & kNeedsOperand ? take(kOperandBytes) : 0;
    numbers = end;
    total = numbers + steps() * int(sizeof(T));
    steps_at_once = 0;
    if (!(needs & kNeedsSteps)) return;
    constexpr int kStepBytes = 3 * S::kRows * int(sizeof(T));
    steps_at_once = stages == 1 ? 2 : resident || total + 8 * kStepBytes <= kMostStreaming ? 8 : 4;
    total += steps_at_once * kStepBytes;
  }

  // The references are a single tile, which stays in shared memory.
  __host__ __device__ bool one_reference_tile() const {
    return !lean && !resident && chunks * depths == 1;
  }

  // Where numbers begin: norms of keys and of references (of two tiles each, or of all if
  // resident), positions of two tiles of references (or all), sums of the warps, four values for
  // each reference, and for each of steps_at_once steps three values for each reference of a tile.
  // No result depends on steps_at_once.
  __host__ __device__ int key_norms() const { return 0; }
  __host__ __device__ int reference_norms() const {
    return key_norms() + (resident ? key_slots / depths : 2) * S::kRows;
  }
  __host__ __device__ int positions() const {
    return reference_norms() + (resident ? chunks : 2) * S::kRows;
  }
  __host__ __device__ int sums() const {
    return positions() + (resident ? chunks : 2) * 3 * S::kRows;
  }
  __host__ __device__ int terms() const { return sums() + 2 * S::kWarps * S::kRows; }
  __host__ __device__ int steps() const { return terms() + 4 * chunks * S::kRows; }
};

extern __shared__ __align__(128) unsigned char shared_memory[];

// The tensors of one head and side.
template <class Storage>
struct HeadTensors {
  using T = Accumulate<Storage>;

  int64_t index, b, h;    // b H + h
  Rows<Storage> tokens;   // [count, D]
  Rows<Storage> values;   // [N, Dv], on the keys' side
  Rows<Storage> outputs;  // [count, Dv], on the receivers' side
  Global<const T> mass;   // [count], optional
  int64_t mass_stride;
  Global<const T> positions;  // [count, P], optional
  int64_t position_stride, axis_stride;
  Global<T> rows;     // [T + 1, count]
  Global<T> columns;  // [max(T, 1), M]
  // [M] 1 / sum_i C_ij, of keys: corrects C for the rounding of exponents.
  Global<T> collection_scale;

  // To be called by one thread. Returns where the sample's tokens are.
  __device__ Span select_tensors(const ForwardParams& p, const Side& side, int64_t head) {
    index = head;
    if (head <= 0xffffffff && p.heads <= 0xffffffff) {  // a division of 64 bits takes long
      b = uint32_t(head) / uint32_t(p.heads);
      h = uint32_t(head) % uint32_t(p.heads);
    } else {
      b = head / p.heads;
      h = head % p.heads;
    }
    const Span span = side.span(b);
    tokens.select(side.tokens, span.start, h, span.count, p.depth);
    tokens.hide(side.mask, b);
    values.select(p.value, span.start, h, span.count, p.value_depth);
    values.hide(p.mask, b);
    outputs.select(p.output, span.start, h, span.count, p.value_depth);
    mass = side.mass.data == nullptr
               ? nullptr
               : static_cast<const T*>(side.mass.data) + span.start * side.mass.stride[0] +
                     h * side.mass.stride[1];
    mass_stride = side.mass.stride[2];
    positions = static_cast<const T*>(side.positions.data);
    position_stride = side.positions.stride[0];
    axis_stride = side.positions.stride[1];
    if (side.offsets != nullptr && side.positions.data != nullptr) {
      positions = static_cast<const T*>(side.positions.data) + span.before * position_stride;
    }
    rows =
        static_cast<T*>(side.rows) + (p.iterations + 1) * (p.heads * span.before + h * span.count);
    columns = static_cast<T*>(side.columns) + head * side.column_rows * p.references;
    collection_scale = columns + steps_kept(p) * p.references;
    return span;
  }
};

// The parameters that turn products k.y into scores.
template <class T>
struct Similarity {
  T epsilon, bandwidth;
  T scale;           // log2(e) / epsilon
  T distance_scale;  // log2 of the gaussian is -distance_scale |k - y|^2
  T position_scale;  // log2 of w_ij is position_scale |p_i - r_j|^2
  bool gaussian, has_positions;
  bool factored;  // scores are known to lie in [0, kMostFactorScale]

  // To be called by one thread.
  __device__ void select_similarity(const ForwardParams& p, const Side& side, const Span& span,
                                    int64_t h) {
    gaussian = p.kernel == Kernel::kGaussian;
    epsilon = static_cast<const T*>(p.epsilon.data)[h * p.epsilon.stride[0]];
    bandwidth = p.bandwidth.data == nullptr
                    ? T(1)
                    : static_cast<const T*>(p.bandwidth.data)[h * p.bandwidth.stride[0]];
    // Invalid values cannot be refused without waiting for the device: they make all results NaN.
    const T most = infinity<T>();
    const bool possible =
        epsilon > T(0) && epsilon < most && bandwidth > T(0) && bandwidth < most && span.valid;
    if (!possible) epsilon = T(NAN);
    scale = T(kLog2E) / epsilon;
    distance_scale = T(kLog2E) / (T(2) * bandwidth * bandwidth);
    factored = kFactors<T> && gaussian && scale <= T(kMostFactorScale);
    has_positions = side.positions.data != nullptr && p.reference_positions.data != nullptr;
    const T position_bandwidth = T(p.position_bandwidth);
    position_scale = T(-kLog2E) / (position_bandwidth * position_bandwidth);
  }
};

// The head and side that a block works on. It lies at the start of shared memory, because as
// variables it would take registers that the accumulators need.
template <class Storage>
struct Head : HeadTensors<Storage>, Similarity<Accumulate<Storage>> {
  using T = Accumulate<Storage>;
  static constexpr int kBytes = kHeadBytes<Storage>;

  ForwardParams p;

  Layout<Storage> layout;
  int64_t first_tile, last_tile;  // [first, last)
  int64_t split, splits;
  int64_t shares_before;  // of other heads in partial

  Rows<Storage> references;  // [M, D]
  Global<T> pooled;          // [M, Dv]
  Global<T> partial;         // sums of blocks that share a head, to be merged: [shares, ...]
  int64_t widest;            // columns of a resident head's room in partial; 0 for others
  T center[kIsHalf<Storage> ? 1 : kMostDepth];  // see finish_rows

  // To be called by one thread. `part` may be beyond the splits of a short packed sequence. Returns
  // where the sample's tokens are.
  __device__ Span select(const ForwardParams& params, const Side& side, int needs, bool resident,
                         int64_t head, int64_t part, T* sums) {
    partial = sums;
    p = params;
    const Span span = this->select_tensors(p, side, head);
    const Splits<Storage> parts(params, span.count, resident);
    split = part;
    splits = parts.count;
    shares_before = resident ? head : share_of<Storage>(p, side, span, this->b, this->h).before;
    first_tile = part * parts.tiles_each;
    last_tile = first_tile + parts.tiles_each;
    if (last_tile > parts.tiles) last_tile = parts.tiles;

    references.select(p.reference, this->b, this->h, p.references, p.depth);
    pooled = static_cast<T*>(p.pooled.data) + head * p.references * p.value_depth;

    widest = !resident ? 0 : (p.depth > p.value_depth ? p.depth : p.value_depth) + 1;
    this->gaussian = p.kernel == Kernel::kGaussian;
    if (needs & kHeadAlone) return span;
    layout = Layout<Storage>(p, needs, resident, span.count, kStages);
    this->select_similarity(p, side, span, this->h);
    return span;
  }

  // To be called after select, by all threads: computes the mean of the references, about which the
  // tokens lie.
  __device__ void find_center() {
    if constexpr (!kIsHalf<Storage>) {
      __syncthreads();
      const T weight = quotient(T(1), T(references.count));
      for (int d = thread_index(); d < references.depth; d += Shape<Storage>::kThreads) {
        T sum = 0;
        for (int64_t j = 0; j < references.count; ++j) {
          sum += references.data[j * references.row_stride + d * references.column_stride];
        }
        center[d] = sum * weight;
      }
    }
    __syncthreads();
  }

  __device__ T* numbers() const { return reinterpret_cast<T*>(shared_memory + layout.numbers); }

  // The head's part of partial, [splits, M, columns]. Parts of resident heads never overlap,
  // whatever `columns` is: their blocks may be in different passes.
  __device__ T* partials(int64_t columns) const {
    return partial + shares_before * references.count * (widest > 0 ? widest : columns);
  }

  // rows^t_i, t in -1..T; 0 for t = -1
  __device__ __forceinline__ T row(int64_t t, int64_t i) const {
    return t < 0 || i >= this->tokens.count ? T(0) : this->rows[t * this->tokens.count + i];
  }
  // columns^t_j, t in 1..T (0 where T = 0)
  __device__ __forceinline__ T& column(int64_t t, int64_t j) const {
    return this->columns[(t > 0 ? t - 1 : 0) * references.count + j];
  }
  // log2 a_i up to a constant; -inf for a token that is hidden or beyond the end.
  __device__ __forceinline__ T log_mass(int64_t i) const {
    if (!this->tokens.valid(i)) return -infinity<T>();
    return this->mass.absent() ? T(0) : log_two(this->mass[i * this->mass_stride]);
  }
};

// The head that the block works on.
template <class SelectedHead>
__device__ __forceinline__ SelectedHead& shared_head() {
  static_assert(sizeof(SelectedHead) <= SelectedHead::kBytes);
  return *reinterpret_cast<SelectedHead*>(shared_memory);
}

}  // namespace setformer::cuda
