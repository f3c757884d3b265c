// SeT attention: the problem descriptor and the entry points of every backend.
//
// Plain C++17, no framework: tensors are pointers with strides in elements (not bytes), memory is
// the caller's. Shapes use the paper's letters: B batch, H heads, N tokens, M references, D depth
// of keys, Dv depth of values, P position coordinates, T Sinkhorn iterations.
#pragma once

#include <cstdint>

namespace setformer {

enum class ScalarType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

enum class Kernel : int32_t {
  kGaussian,  // exp(-|k - y|^2 / (2 bandwidth^2))
  kLinear,    // <k, y>
};

// Vectors up to this length are not scaled to unit length: their direction would be that of
// rounding errors.
inline constexpr double kShortest = 1e-12;

enum class Status : int32_t {
  kOk,
  kOutOfMemory,
  kNegativeTokenMass,         // token_mass must be >= 0
  kNonPositiveReferenceMass,  // reference_mass must be > 0
  kNonPositiveBandwidth,      // bandwidth must be > 0 and finite
  kNonPositiveEpsilon,        // epsilon must be > 0 and finite
  kPeerFailed,                // another rank of the group has an error of its own
  kMergeFailed,               // RankGroup::merge gave up
};

// A strided tensor of up to four dimensions. Absent optional tensors have data == nullptr.
struct Tensor {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};  // in elements; an expanded dimension has stride 0
};

// How the numbers of several ranks become one: their sum, or log2 of the sum of 2^x.
enum class Merge : int32_t { kSum, kLogSum };

// Numbers of one rank that are merged over all ranks: [rows, columns] of the accumulate type.
struct Shared {
  void* data;
  int64_t rows, columns, row_stride;
  Merge how;
};

// The ranks that together hold every sequence, each some of its tokens. For each head a Sinkhorn
// step merges M sums, and collect M Dv more. All ranks call `merge` equally often, with the same
// shapes; it replaces the numbers of each rank by the merged ones.
struct RankGroup {
  void* context = nullptr;
  // All `numbers` of a call have the same `how`. On CUDA the merge is put on the call's stream.
  // Returns false if the call must be given up.
  bool (*merge)(void* context, const Shared* numbers, int64_t count) = nullptr;
};

// "Storage" below is the type of query, key, value and reference; "accumulate" is float64 for
// float64 storage and float32 for every other.
struct ForwardParams {
  // Sizes.
  int64_t batch = 0;           // B
  int64_t heads = 0;           // H
  int64_t queries = 0;         // Nq, used where `cross`
  int64_t tokens = 0;          // N (of packed sequences: see offsets)
  int64_t references = 0;      // M >= 1
  int64_t depth = 0;           // D >= 1
  int64_t value_depth = 0;     // Dv >= 1
  int64_t position_depth = 0;  // P, 0 where there are no positions

  // Options.
  ScalarType type = ScalarType::kFloat32;
  Kernel kernel = Kernel::kGaussian;
  bool normalize = false;  // queries, keys and references count as scaled to unit length
  double position_bandwidth = 1.0;
  int64_t iterations = 1;  // T
  bool cross = false;      // queries are not the keys: they get a Sinkhorn solve of their own
  bool distribute = true;  // false: pooled outputs only
  // On CUDA blocks that share a head take 2^tiles_shift tiles of its tokens each: cuda/knobs.h.
  int32_t tiles_shift = 2;
  // Given if tokens and queries are those of one rank of a group. Gradients of what all ranks have
  // in common (references, bandwidth, epsilon) are then this rank's shares; only
  // grad_reference_mass is the whole gradient.
  const RankGroup* group = nullptr;

  // For packed sequences of different lengths, [batch + 1] in the memory of the device: the first
  // token of each sequence, then the number of all tokens. Arrays with a row for each token then
  // have B = 1 below; rows and query_rows hold one sequence after another. On the CPU `tokens` and
  // `queries` count all tokens; on CUDA, which cannot read the offsets before it launches, no
  // sequence has more, and `packed_tokens` and `packed_queries` count all.
  const int64_t* offsets = nullptr;
  const int64_t* query_offsets = nullptr;  // where `cross`
  int64_t packed_tokens = 0;
  int64_t packed_queries = 0;

  // Inputs.
  Tensor query;                // storage    [B, H, Nq, D], where `cross`
  Tensor key;                  // storage    [B, H, N, D]
  Tensor value;                // storage    [B, H, N, Dv]
  Tensor reference;            // storage    [B, H, M, D]; stride 0 over B if learned
  Tensor mask;                 // bool       [B, N], optional, true = valid
  Tensor query_mask;           // bool       [B, Nq], optional
  Tensor token_mass;           // accumulate [B, H, N], optional
  Tensor reference_mass;       // accumulate [B, H, M], optional
  Tensor bandwidth;            // accumulate [H], optional: 1
  Tensor epsilon;              // accumulate [H]
  Tensor token_positions;      // accumulate [N, P], optional
  Tensor query_positions;      // accumulate [Nq, P], optional
  Tensor reference_positions;  // accumulate [M, P], optional

  // Outputs. The normalisers are what backward needs of the solve: f^t = log a - rows[t-1] and
  // g^t = log b - columns[t-1], kept as the sums themselves where a head is solved by scaling and
  // as their base-2 logarithms where it is solved in the log domain (see cpu/transport.h).
  Tensor output;         // storage    [B, H, Nq or N, Dv], where `distribute`
  Tensor pooled;         // accumulate [B, H, M, Dv] contiguous
  Tensor rows;           // accumulate [B, H, T + 1, N] contiguous
  Tensor columns;        // accumulate [B, H, max(T, 1) + 1, M] contiguous; the last row is 1 / the
                         // column sums of C, which rounding makes differ from 1 (0 without any
                         // mass; always 1 on the CPU)
  Tensor query_rows;     // accumulate [B, H, T + 1, Nq] contiguous, where `cross`
  Tensor query_columns;  // accumulate [B, H, max(T, 1), M] contiguous, where `cross`
};

// Backward reads what forward wrote; gradients with a null pointer are not computed.
struct BackwardParams : ForwardParams {
  Tensor grad_output;  // storage    [B, H, Nq or N, Dv], optional
  Tensor grad_pooled;  // accumulate [B, H, M, Dv], optional

  Tensor grad_query;           // storage    [B, H, Nq, D], where `cross`
  Tensor grad_key;             // storage    [B, H, N, D]
  Tensor grad_value;           // storage    [B, H, N, Dv]
  Tensor grad_reference;       // accumulate [B, H, M, D] contiguous, per sample also if learned
  Tensor grad_token_mass;      // accumulate [B, H, N] contiguous, optional
  Tensor grad_reference_mass;  // accumulate [B, H, M] contiguous, optional
  Tensor grad_bandwidth;       // accumulate [B, H] contiguous, optional
  Tensor grad_epsilon;         // accumulate [B, H] contiguous
};

namespace cpu {

Status set_attention_forward(const ForwardParams& params);
Status set_attention_backward(const BackwardParams& params);

// The instruction set the calls above run on: "baseline", "avx2" or "avx512". Chosen once, the
// best that was compiled and that the processor has; SETFORMER_CPU_ISA overrides it.
const char* instruction_set();
// All that could be chosen on this processor, separated by spaces, best last.
const char* supported_instruction_sets();

}  // namespace cpu
}  // namespace setformer
