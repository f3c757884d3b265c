// Tiles in shared memory: how rows of a strided tensor get there and back.
//
// A tile has Shape::kRows rows of up to Shape::kDepth elements, 16 bytes of padding after each:
// with row lengths that are multiples of 32 bytes, eight consecutive rows then start in eight
// different groups of four banks, so that reading a column of eight 16-byte pieces (ldmatrix, or
// vectors of the FMA products) has no bank conflict.
#pragma once

#include "../set_attention.h"
#include "numbers.cuh"

namespace setformer::cuda {

template <class Storage>
struct Shape {
  using T = Accumulate<Storage>;
  static constexpr bool kDouble = sizeof(Storage) == 8;
  static constexpr int kRows = kDouble ? 32 : 64;  // tokens, and references, of a tile
  static constexpr int kDepth = kIsHalf<Storage> ? 64 : 32;
  static constexpr int kWarps = kRows / 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPerVector = 16 / int(sizeof(Storage));
  static constexpr int kLanesPerRow = kDepth / kPerVector;  // 8, or 16 for float64
  static constexpr int kRowsAtOnce = kThreads / kLanesPerRow;
  // Depth tiles of values that a block accumulates at once: together as wide as kRows.
  static constexpr int kGroup = kRows / kDepth;
  // Plans, at most 1, are stored times this: float16 can then hold entries down to 2^-38.
  static constexpr T kPlanScale = std::is_same_v<Storage, __half> ? T(16384) : T(1);
  // Pitches of tiles of the accumulate type, or of high and low halves in the same room. They give
  // no bank conflicts when fragments are stored as pairs, nor when rows 2 apart are read as
  // vectors.
  static constexpr int kWidePitch = kRows + 8;
  static constexpr int kDeepPitch = kDepth + (kIsHalf<Storage> ? 8 : kPerVector);
};

// A pointer to device memory that is kept in shared memory. For the compiler such a pointer could
// point anywhere, and accesses would be generic: this tells it that the pointer is to global
// memory.
template <class T>
class Global {
 public:
  __device__ Global& operator=(T* pointer) {
    pointer_ = pointer;
    return *this;
  }
  __device__ __forceinline__ operator T*() const {
    __builtin_assume(__isGlobal(pointer_));
    return pointer_;
  }
  __device__ bool absent() const { return pointer_ == nullptr; }

 private:
  T* pointer_;
};

struct alignas(16) Vector16 {
  uint32_t words[4];
};

// cp.async, from sm_80 on: 16 bytes from global to shared memory; the last 16 - bytes become 0.
__device__ __forceinline__ void copy_async(uint32_t address, const void* global, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(bytes)
               : "memory");
#endif
}
// Devices before sm_80 copy through registers.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
#if __CUDA_ARCH__ >= 800
  copy_async(uint32_t(__cvta_generic_to_shared(shared)), global, bytes);
#else
  if (bytes == 16) {
    *static_cast<Vector16*>(shared) = *static_cast<const Vector16*>(global);
    return;
  }
#pragma unroll 1
  for (int word = 0; word < 8; ++word) {  // storage types are of 2 bytes or more
    static_cast<uint16_t*>(shared)[word] =
        2 * word < bytes ? static_cast<const uint16_t*>(global)[word] : uint16_t(0);
  }
#endif
}
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `pending` of this thread's newest groups are still under way.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}
// With copies in the background there are two buffers: one is filled while the other is read.
#if __CUDA_ARCH__ >= 800
inline constexpr int kStages = 2;
#else
inline constexpr int kStages = 1;
#endif

// The rows [count, depth] of one head of a tensor, of which `mask` (optional) may hide some.
template <class Storage>
struct Rows {
  Global<Storage> data;
  int64_t row_stride, column_stride;
  int64_t count;
  int depth;
  Global<const bool> mask;
  int64_t mask_stride;
  bool vectors;  // every row starts at a multiple of 16 bytes and is contiguous

  __device__ void select(const Tensor& tensor, int64_t b, int64_t h, int64_t rows,
                         int64_t columns) {
    Storage* const start =
        static_cast<Storage*>(tensor.data) + b * tensor.stride[0] + h * tensor.stride[1];
    data = start;
    row_stride = tensor.stride[2];
    column_stride = tensor.stride[3];
    count = rows;
    depth = int(columns);
    mask = nullptr;
    vectors = column_stride == 1 && (reinterpret_cast<uintptr_t>(start) % 16) == 0 &&
              row_stride % Shape<Storage>::kPerVector == 0;
  }
  __device__ void hide(const Tensor& hidden, int64_t b) {
    if (hidden.data == nullptr) return;
    mask = static_cast<const bool*>(hidden.data) + b * hidden.stride[0];
    mask_stride = hidden.stride[1];
  }
  __device__ __forceinline__ bool valid(int64_t i) const {
    return i < count && (mask.absent() || mask[i * mask_stride]);
  }
};

// Elements of a row that products read: whole steps of 16, what lies beyond the depth is 0.
template <class Storage>
__device__ __forceinline__ int padded_depth(int depth, int first_column) {
  const int left = depth - first_column;
  return left >= Shape<Storage>::kDepth ? Shape<Storage>::kDepth : (left + 15) / 16 * 16;
}

// Calls visit(row, column) for the 16-byte pieces of a tile that belong to this thread. These are
// always the same, so a thread may process what it copied itself before the block synchronises.
template <class Storage, class Visit>
__device__ __forceinline__ void for_each_own_piece(Visit visit) {
  using S = Shape<Storage>;
  const int column = thread_index() % S::kLanesPerRow * S::kPerVector;
#pragma unroll 1
  for (int row = thread_index() / S::kLanesPerRow; row < S::kRows; row += S::kRowsAtOnce) {
    visit(row, column);
  }
}

// Starts copying rows [first, first + kRows), columns from first_column on, into `tile`.
template <class Storage>
__device__ void stage_rows(const Rows<Storage>& rows, int64_t first, int first_column,
                           Storage* tile, int pitch) {
  using S = Shape<Storage>;
  const int width = padded_depth<Storage>(rows.depth, first_column);
  for_each_own_piece<Storage>([&](int row, int column) {
    if (column >= width) return;
    const int64_t i = first + row;
    const int left = rows.depth - first_column - column;
    const int elements = !rows.valid(i) || left <= 0 ? 0
                         : left < S::kPerVector      ? left
                                                     : S::kPerVector;
    Storage* to = tile + row * pitch + column;
    if (rows.vectors) {
      const Storage* from =
          elements == 0 ? rows.data : rows.data + i * rows.row_stride + first_column + column;
      copy_async(to, from, elements * int(sizeof(Storage)));
    } else {
      const Storage* from = rows.data + i * rows.row_stride + first_column * rows.column_stride;
#pragma unroll 1
      for (int e = 0; e < S::kPerVector; ++e) {
        to[e] = e < elements ? from[(column + e) * rows.column_stride] : narrow<Storage>(0);
      }
    }
  });
}

template <class Element>
struct alignas(16) Piece {
  static constexpr int kCount = 16 / int(sizeof(Element));
  Element elements[kCount];
};

// Processes the pieces that this thread has staged, after they arrived. Subtracts `center` [depth]
// (optional; float32 and float64 only), and stores in norms [kRows] (optional) the square norm of
// each row times `factor`; if a row takes several tiles, their shares are added up. |k|^2 + |y|^2 -
// 2 k.y cancels for data far from the origin. In half types this error, 2^-24 |k|^2, is below the
// error that rounding k itself causes in the distance, 2^-11 |k| |k - y| (float16), because |k - y|
// is at least 2^-11 |k|.
template <class Storage, class T>
__device__ void finish_rows(const Rows<Storage>& rows, int64_t first, int first_column,
                            Storage* tile, int pitch, const T* center, T* norms, T factor) {
  using S = Shape<Storage>;
  const int width = padded_depth<Storage>(rows.depth, first_column);
  for_each_own_piece<Storage>([&](int row, int column) {
    T square = 0;
    if (column < width) {
      auto& place = *reinterpret_cast<Piece<Storage>*>(tile + row * pitch + column);
      Piece<Storage> piece = place;
      if constexpr (!kIsHalf<Storage>) {
        const bool valid = center != nullptr && rows.valid(first + row);
#pragma unroll
        for (int e = 0; e < S::kPerVector; ++e) {
          const int at = first_column + column + e;
          if (valid && at < rows.depth) piece.elements[e] -= center[at];
        }
        place = piece;
      }
#pragma unroll
      for (int e = 0; e < S::kPerVector; ++e) {
        const T x = widen(piece.elements[e]);
        square += x * x;
      }
    }
    square = lanes_sum<S::kLanesPerRow>(square) * factor;
    if (column == 0 && norms != nullptr)
      norms[row] = first_column == 0 ? square : norms[row] + square;
  });
}

}  // namespace setformer::cuda
