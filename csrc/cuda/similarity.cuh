// Scores s_ij log2(e) of tokens against the references of one head, a tile at a time on the fly: no
// N x M array exists anywhere.
#pragma once

#include "problem.cuh"

namespace setformer::cuda {

template <class Storage>
class Scores {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;

 public:
  __device__ explicit Scores(const Head<Storage>& head) : p_(head.p), head_(head) {}

  __device__ int chunks() const { return head_.layout.chunks; }
  __device__ int depths() const { return head_.layout.depths; }
  // Columns of the products with chunk `chunk`: its references in whole steps of 16.
  __device__ int columns(int chunk) const {
    const int left = int(p_.references) - chunk * S::kRows;
    return left >= S::kRows ? S::kRows : (left + 15) / 16 * 16;
  }

  // Before the first compute(tile, chunk) of a pass. Resident tiles are loaded by load_all instead.
  __device__ void begin(int64_t tile, int chunk) {
    if (head_.layout.resident) return;
    slot_ = 0;
    if (kStages == 2) {
      stage(tile, chunk, 0);
      commit_copies();
    }
  }

  // Loads what a resident head consists of.
  __device__ void load_all() {
    const int tiles = head_.layout.key_slots / head_.layout.depths;
    for (int tile = 0; tile < tiles; ++tile) {
      for (int d = 0; d < head_.layout.depths; ++d) {
        stage_rows(head_.tokens, int64_t(tile) * S::kRows, d * S::kDepth, keys(tile * depths() + d),
                   head_.layout.pitch);
      }
    }
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      for (int d = 0; d < head_.layout.depths; ++d) {
        stage_rows(head_.references, int64_t(chunk) * S::kRows, d * S::kDepth,
                   reference_tile(chunk * depths() + d), head_.layout.pitch);
      }
      load_positions(chunk, chunk);
    }
    commit_copies();
    wait_for_copies<0>();
    for (int tile = 0; tile < tiles; ++tile) {
      for (int d = 0; d < head_.layout.depths; ++d) {
        finish(head_.tokens, int64_t(tile) * S::kRows, d, keys(tile * depths() + d),
               key_norms(tile));
      }
    }
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      for (int d = 0; d < head_.layout.depths; ++d) {
        finish(head_.references, int64_t(chunk) * S::kRows, d, reference_tile(chunk * depths() + d),
               reference_norms(chunk));
      }
    }
    __syncthreads();
  }

  // scores = s log2(e) of the tile's tokens against references of the chunk. The next call will be
  // for (next_tile, next_chunk), next_tile < 0 where there is none: its data is fetched meanwhile.
  // Synchronises the block, also what it staged itself before the call. Unless the head is
  // resident: then call arrive().
  __device__ void compute(int64_t tile, int chunk, int64_t next_tile, int next_chunk,
                          Accumulators<Storage>& scores) {
    clear(scores);
    int key_set = int(tile), reference_set = chunk;
    if (head_.layout.resident) {
      for (int d = 0; d < depths(); ++d) {
        multiply_tiles(tile * depths() + d, chunk * depths() + d, d, chunk, scores);
      }
    } else {
      parity_ ^= 1;
      key_set = parity_;
      reference_set = one_reference_tile() ? 0 : parity_;
      for (int d = 0; d < depths(); ++d) {
        if (kStages == 1) {
          stage(tile, chunk, d);
          wait_for_copies<0>();
        } else {
          const int now = slot_;
          slot_ ^= 1;
          if (d + 1 < depths()) {
            stage(tile, chunk, d + 1);
          } else if (next_tile >= 0) {
            stage(next_tile, next_chunk, 0);
          }
          slot_ = now;
          commit_copies();
          wait_for_copies<1>();
        }
        finish(head_.tokens, tile * S::kRows, d, keys(slot_), key_norms(key_set));
        if (!one_reference_tile() || fresh_) {
          finish(head_.references, int64_t(chunk) * S::kRows, d,
                 reference_tile(one_reference_tile() ? 0 : slot_), reference_norms(reference_set));
          if (d == 0) load_positions(chunk, reference_set);
          fresh_ = false;
        }
        __syncthreads();
        multiply_tiles(slot_, one_reference_tile() ? 0 : slot_, d, chunk, scores);
        __syncthreads();
        held_ = slot_;
        if (kStages == 2) slot_ ^= 1;
      }
    }
    transform(tile, chunk, key_norms(key_set), reference_norms(reference_set), scores);
  }

  // Whether compute() left whole rows of the keys and references it used last.
  __device__ bool whole_rows() const { return depths() == 1 && !head_.layout.lean; }
  __device__ Plain<Storage> last_keys(int64_t tile) const {
    return {keys(head_.layout.resident ? int(tile) : held_), head_.layout.pitch};
  }
  __device__ Plain<Storage> last_references(int chunk) const {
    return {reference_tile(head_.layout.resident  ? chunk
                           : one_reference_tile() ? 0
                                                  : held_),
            head_.layout.pitch};
  }
  // Columns [d kDepth, ...) of the same rows, centred, into a tile of the caller's. Synchronises
  // afterwards; before, the caller must.
  __device__ void load_part(const Rows<Storage>& rows, int64_t first, int d, Storage* tile,
                            int pitch) const {
    stage_rows(rows, first, d * S::kDepth, tile, pitch);
    commit_copies();
    wait_for_copies<0>();
    if (!kIsHalf<Storage> && head_.gaussian) {
      finish_rows(rows, first, d * S::kDepth, tile, pitch, head_.center, static_cast<T*>(nullptr));
    }
    __syncthreads();
  }

  // Waits for the copies that the pass staged itself, and lets the whole block see them.
  __device__ void arrive() const {
    if (head_.layout.resident || kStages == 1) {
      wait_for_copies<0>();
    } else {
      wait_for_copies<1>();
    }
    __syncthreads();
  }

  // Calls visit(accumulator, log2 of the axis' factor of w_ij) for each accumulator and axis.
  template <class Visit>
  __device__ __forceinline__ void for_each_axis(int64_t tile, int chunk,
                                                Accumulators<Storage>& accumulators,
                                                Visit visit) const {
    if (!head_.has_positions) return;
    const Lane lane;
    const int set = head_.layout.resident ? chunk : one_reference_tile() ? 0 : parity_;
    const T* positions = head_.numbers() + head_.layout.positions() + set * 3 * S::kRows;
    const int64_t token = tile * S::kRows + 16 * lane.warp + lane.row;
#pragma unroll 1
    for (int axis = 0; axis < int(p_.position_depth); ++axis) {
      T own[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t i = token + 8 * half;
        own[half] = i < head_.tokens.count
                        ? head_.positions[i * head_.position_stride + axis * head_.axis_stride]
                        : T(0);
      }
#pragma unroll
      for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const T difference =
              own[e / 2] - positions[axis * S::kRows + 8 * n + lane.column + e % 2];
          visit(accumulators[n][e], difference * difference * head_.position_scale);
        }
      }
    }
  }

 private:
  __device__ bool one_reference_tile() const { return head_.layout.one_reference_tile(); }
  __device__ Storage* keys(int slot) const {
    return reinterpret_cast<Storage*>(shared_memory + kHeadBytes<Storage> +
                                      int64_t(slot) * head_.layout.tile_bytes);
  }
  __device__ Storage* reference_tile(int slot) const {
    return reinterpret_cast<Storage*>(shared_memory + head_.layout.references +
                                      int64_t(slot) * head_.layout.reference_bytes);
  }
  __device__ T* key_norms(int set) const {
    return head_.numbers() + head_.layout.key_norms() + set * S::kRows;
  }
  __device__ T* reference_norms(int set) const {
    return head_.numbers() + head_.layout.reference_norms() + set * S::kRows;
  }

  __device__ void stage(int64_t tile, int chunk, int d) {
    stage_rows(head_.tokens, tile * S::kRows, d * S::kDepth, keys(slot_), head_.layout.pitch);
    if (one_reference_tile()) {
      if (staged_references_) return;
      staged_references_ = true;
      stage_rows(head_.references, 0, 0, reference_tile(0), head_.layout.pitch);
    } else {
      stage_rows(head_.references, int64_t(chunk) * S::kRows, d * S::kDepth, reference_tile(slot_),
                 head_.layout.pitch);
    }
  }

  __device__ void finish(const Rows<Storage>& rows, int64_t first, int d, Storage* tile,
                         T* norms) const {
    if (!head_.gaussian) return;
    finish_rows(rows, first, d * S::kDepth, tile, head_.layout.pitch, head_.center, norms);
  }

  __device__ void multiply_tiles(int key_slot, int reference_slot, int d, int chunk,
                                 Accumulators<Storage>& scores) const {
    const Lane lane;
    multiply<false, false, Storage>(
        scores, Plain<Storage>{keys(key_slot), head_.layout.pitch}, 16 * lane.warp,
        Plain<Storage>{reference_tile(reference_slot), head_.layout.pitch},
        padded_depth<Storage>(int(p_.depth), d * S::kDepth), columns(chunk));
  }

  __device__ void load_positions(int chunk, int set) const {
    if (!head_.has_positions) return;
    const Tensor& from = p_.reference_positions;
    T* to = head_.numbers() + head_.layout.positions() + set * 3 * S::kRows;
    for (int j = int(threadIdx.x); j < S::kRows; j += S::kThreads) {
      const int64_t reference = int64_t(chunk) * S::kRows + j;
      for (int axis = 0; axis < int(p_.position_depth); ++axis) {
        to[axis * S::kRows + j] =
            reference < p_.references
                ? static_cast<const T*>(
                      from.data)[reference * from.stride[0] + axis * from.stride[1]]
                : T(0);
      }
    }
  }

  // From the products k.y to the scores.
  __device__ __forceinline__ void transform(int64_t tile, int chunk, const T* key_norms,
                                            const T* reference_norms,
                                            Accumulators<Storage>& scores) const {
    const Lane lane;
    if (!head_.gaussian) {
      for_each_score(scores, [&](int, int, T& score) { score *= head_.scale; });
      for_each_axis(tile, chunk, scores,
                    [](T& score, T exponent) { score *= power_of_two(exponent); });
      return;
    }
    const T c = T(kLog2E) / (T(2) * head_.bandwidth * head_.bandwidth);
    const T norms[2] = {key_norms[16 * lane.warp + lane.row],
                        key_norms[16 * lane.warp + lane.row + 8]};
    for_each_score(scores, [&](int half, int column, T& score) {
      // Rounding may leave a distance just below 0; a NaN stays one.
      const T distance = norms[half] + reference_norms[column] - T(2) * score;
      score = distance < T(0) ? T(0) : -c * distance;
    });
    for_each_axis(tile, chunk, scores, [](T& score, T exponent) { score += exponent; });
    for_each_score(scores, [&](int, int, T& score) { score = head_.scale * power_of_two(score); });
  }

  template <class Visit>
  __device__ static __forceinline__ void for_each_score(Accumulators<Storage>& scores,
                                                        Visit visit) {
    const Lane lane;
#pragma unroll
    for (int n = 0; n < S::kRows / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(e / 2, 8 * n + lane.column + e % 2, scores[n][e]);
    }
  }

  const ForwardParams& p_;
  const Head<Storage>& head_;
  bool staged_references_ = false, fresh_ = true;
  int slot_ = 0, parity_ = 0, held_ = 0;
};

template <class Storage>
__device__ __forceinline__ void load_resident() {
  Scores<Storage>(shared_head<Head<Storage>>()).load_all();
}

}  // namespace setformer::cuda
