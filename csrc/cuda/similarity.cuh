// Scores s_ij log2(e) of tokens against the references of one head, a tile at a time on the fly: no
// N x M array exists anywhere.
#pragma once

#include "problem.cuh"

namespace setformer::cuda {

template <class Storage, bool resident>
class Scores {
  using S = Shape<Storage>;
  using T = Accumulate<Storage>;

 public:
  // Layout::lean, as the compiler knows it.
  static constexpr bool kLean = !resident && kStages == 1;

  __device__ explicit Scores(const Head<Storage>& head) : p_(head.p), head_(head) {}

  __device__ int chunks() const { return head_.layout.chunks; }
  __device__ int depths() const { return head_.layout.depths; }
  // Columns of the products with chunk `chunk`: its references in whole steps of 16.
  __device__ int columns(int chunk) const {
    const int left = int(p_.references) - chunk * S::kRows;
    return left >= S::kRows ? S::kRows : (left + 15) / 16 * 16;
  }

  // Loads all keys, references and positions of a resident head.
  __device__ void load_all() {
    static_assert(resident);
    const int tiles = head_.layout.key_slots / depths();
#pragma unroll 1
    for (int of_references = 0; of_references < 2; ++of_references) {
      for (int slot = 0; slot < (of_references ? chunks() : tiles) * depths(); ++slot) {
        stage_rows(rows(of_references), int64_t(slot / depths()) * S::kRows,
                   slot % depths() * S::kDepth, tile_at(of_references, slot), head_.layout.pitch);
      }
    }
    for (int chunk = 0; chunk < chunks(); ++chunk) load_positions(chunk, chunk);
    commit_copies();
    wait_for_copies<0>();
#pragma unroll 1
    for (int of_references = 0; of_references < 2; ++of_references) {
      for (int slot = 0; slot < (of_references ? chunks() : tiles) * depths(); ++slot) {
        const int set = slot / depths();
        finish(of_references, int64_t(set) * S::kRows, slot % depths(), slot, set);
      }
    }
    __syncthreads();
  }

  // scores = s log2(e) of the tile's tokens against references of the chunk. The next call must be
  // for (next_tile, next_chunk), whose data is fetched meanwhile; next_tile < 0 if there is no next
  // call. Synchronises the block unless the head is resident.
  __device__ void compute(int64_t tile, int chunk, int64_t next_tile, int next_chunk,
                          Accumulators<Storage>& scores) {
    clear(scores);
    int key_set = int(tile), reference_set = chunk;
    if constexpr (!resident) {
      parity_ ^= 1;
      key_set = parity_;
      reference_set = one_reference_tile() ? 0 : parity_;
    }
#pragma unroll 1
    for (int d = 0; d < depths(); ++d) {
      int key_slot = int(tile) * depths() + d, reference_slot = chunk * depths() + d;
      if constexpr (!resident) {
        fetch(tile, chunk, d, next_tile, next_chunk);
        key_slot = slot_;
        reference_slot = one_reference_tile() ? 0 : slot_;
#pragma unroll 1
        for (int of_references = 0; of_references < 2; ++of_references) {
          if (of_references && one_reference_tile() && finished_references_) break;
          finish(of_references, (of_references ? chunk : tile) * S::kRows, d,
                 of_references ? reference_slot : key_slot,
                 of_references ? reference_set : key_set);
          if (of_references && d == 0) load_positions(chunk, reference_set);
          if (of_references) finished_references_ = true;
        }
        __syncthreads();
      }
      multiply<false, false, Storage>(
          scores, Plain<Storage>{tile_at(false, key_slot), head_.layout.pitch}, 16 * Lane().warp,
          Plain<Storage>{tile_at(true, reference_slot), head_.layout.pitch},
          padded_depth<Storage>(int(p_.depth), d * S::kDepth), columns(chunk));
      if constexpr (!resident) {
        __syncthreads();
        held_ = slot_;
        if (kStages == 2) slot_ ^= 1;
      }
    }
    transform(tile, chunk, key_norms(key_set), reference_norms(reference_set), scores);
  }

  // Whether compute() left whole rows of the keys and references it used last.
  __device__ bool whole_rows() const { return depths() == 1 && !kLean; }
  __device__ Plain<Storage> last_keys(int64_t tile) const {
    return {tile_at(false, resident ? int(tile) : held_), head_.layout.pitch};
  }
  __device__ Plain<Storage> last_references(int chunk) const {
    return {tile_at(true, resident ? chunk : one_reference_tile() ? 0 : held_), head_.layout.pitch};
  }
  // Columns [d kDepth, ...) of the same rows, centred, into a tile of the caller. The caller must
  // synchronise before; this synchronises afterwards.
  __device__ void load_part(const Rows<Storage>& rows, int64_t first, int d, Storage* tile,
                            int pitch) const {
    stage_rows(rows, first, d * S::kDepth, tile, pitch);
    commit_copies();
    wait_for_copies<0>();
    if (!kIsHalf<Storage> && head_.gaussian) {
      finish_rows(rows, first, d * S::kDepth, tile, pitch, static_cast<const T*>(head_.center),
                  static_cast<T*>(nullptr), T(0));
    }
    __syncthreads();
  }

  // Waits for the copies that the pass itself started, and makes them visible to the whole block.
  __device__ void arrive() const {
    if constexpr (resident || kStages == 1) {
      wait_for_copies<0>();
    } else {
      wait_for_copies<1>();
    }
    __syncthreads();
  }

  // Calls visit(accumulator, log2 of w_ij's factor for the axis) for each accumulator and axis.
  template <class Visit>
  __device__ __forceinline__ void for_each_axis(int64_t tile, int chunk,
                                                Accumulators<Storage>& accumulators,
                                                Visit visit) const {
    if (!head_.has_positions) return;
    const Lane lane;
    const int set = resident ? chunk : one_reference_tile() ? 0 : parity_;
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
  __device__ const Rows<Storage>& rows(bool of_references) const {
    return of_references ? head_.references : head_.tokens;
  }
  __device__ Storage* tile_at(bool of_references, int slot) const {
    const Layout<Storage>& layout = head_.layout;
    return reinterpret_cast<Storage*>(
        shared_memory + (of_references ? layout.references : kHeadBytes<Storage>)+slot *
                            (of_references ? layout.reference_bytes : layout.tile_bytes));
  }
  __device__ T* key_norms(int set) const {
    return head_.numbers() + head_.layout.key_norms() + set * S::kRows;
  }
  __device__ T* reference_norms(int set) const {
    return head_.numbers() + head_.layout.reference_norms() + set * S::kRows;
  }

  // Waits for depth tile d of (tile, chunk), and starts to copy the next one.
  __device__ void fetch(int64_t tile, int chunk, int d, int64_t next_tile, int next_chunk) {
    if constexpr (kStages == 1) {
      stage(tile, chunk, d, 0);
      wait_for_copies<0>();
    } else {
      const bool deeper = d + 1 < depths(), ends = !deeper && next_tile < 0;
#pragma unroll 1
      for (int ahead = fetched_ ? 1 : 0; ahead < 2; ++ahead) {
        const bool other = ahead && !deeper;
        if (!(ahead && ends)) {
          stage(other ? next_tile : tile, other ? next_chunk : chunk, other ? 0 : d + ahead,
                slot_ ^ ahead);
        }
        commit_copies();
      }
      fetched_ = !ends;
      wait_for_copies<1>();
    }
  }

  __device__ void stage(int64_t tile, int chunk, int d, int slot) {
#pragma unroll 1
    for (int of_references = 0; of_references < 2; ++of_references) {
      if (of_references && one_reference_tile()) {
        if (staged_references_) break;
        staged_references_ = true;
        slot = 0;
      }
      stage_rows(rows(of_references), (of_references ? chunk : tile) * S::kRows, d * S::kDepth,
                 tile_at(of_references, slot), head_.layout.pitch);
    }
  }

  __device__ void finish(bool of_references, int64_t first, int d, int slot, int set) const {
    if (!head_.gaussian) return;
    finish_rows(rows(of_references), first, d * S::kDepth, tile_at(of_references, slot),
                head_.layout.pitch, static_cast<const T*>(head_.center),
                of_references ? reference_norms(set) : key_norms(set), -head_.distance_scale);
  }

  __device__ void load_positions(int chunk, int set) const {
    if (!head_.has_positions) return;
    const Tensor& from = p_.reference_positions;
    T* to = head_.numbers() + head_.layout.positions() + set * 3 * S::kRows;
    for (int j = thread_index(); j < S::kRows; j += S::kThreads) {
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

  // Turns the products k.y into scores; norms are -|k|^2 and -|y|^2 times distance_scale.
  __device__ __forceinline__ void transform(int64_t tile, int chunk, const T* key_norms,
                                            const T* reference_norms,
                                            Accumulators<Storage>& scores) const {
    const Lane lane;
    if (!head_.gaussian) {
      for_each<Storage>(scores, [&](int, int, T& score) { score *= head_.scale; });
      for_each_axis(tile, chunk, scores,
                    [](T& score, T exponent) { score *= power_of_two(exponent); });
      return;
    }
    const T norms[2] = {key_norms[16 * lane.warp + lane.row],
                        key_norms[16 * lane.warp + lane.row + 8]};
    const T twice = T(2) * head_.distance_scale;
    for_each<Storage>(scores, [&](int half, int column, T& score) {
      // Rounding may leave a distance just below 0; a NaN stays one.
      const T exponent = twice * score + (norms[half] + reference_norms[column]);
      score = exponent > T(0) ? T(0) : exponent;
    });
    for_each_axis(tile, chunk, scores, [](T& score, T exponent) { score += exponent; });
    for_each<Storage>(scores,
                      [&](int, int, T& score) { score = head_.scale * power_of_two(score); });
  }

  const ForwardParams& p_;
  const Head<Storage>& head_;
  // If the references are one tile, they are staged and finished only once.
  bool staged_references_ = false, finished_references_ = false;
  bool fetched_ = false;  // the last call has started the copies that this one needs
  int slot_ = 0, parity_ = 0, held_ = 0;
};

template <class Storage>
__device__ __forceinline__ void load_resident() {
  Scores<Storage, true>(shared_head<Head<Storage>>()).load_all();
}

}  // namespace setformer::cuda
