// Products of tiles, 16 rows by up to kRows columns per warp.
//
// Accumulators have the layout of mma.m16n8 whichever way they are computed: of the 16 x 8 block n
// a thread holds rows r and r + 8, columns 8 n + c and 8 n + c + 1 with r = lane / 4 and c = 2
// (lane % 4), as accumulator[n][0..1] and accumulator[n][2..3].
//
// Half types multiply on the tensor cores (sm_80 on; float32 accumulators). Values that kernels
// computed in float32 are split into two halves, high + low, which keeps 16 (bfloat16) or 22 bits
// (float16): products with a tensor of the user are then as exact as that tensor. All other types
// use fused multiply-adds in the accumulate type: float32 keeps float32 accuracy.
#pragma once

#include "tile.cuh"

namespace setformer::cuda {

#if __CUDA_ARCH__ >= 800
template <class Storage>
inline constexpr bool kTensorCores = kIsHalf<Storage>;
#else
template <class Storage>
inline constexpr bool kTensorCores = false;
#endif

template <class Storage>
using Accumulators = Accumulate<Storage>[Shape<Storage>::kRows / 8][4];

struct Lane {
  int warp, row, column;
  __device__ __forceinline__ Lane() {
    const int t = thread_index();
    warp = t / 32;
    row = t % 32 / 4;
    column = t % 4 * 2;
  }
};

template <class T, int blocks>
__device__ __forceinline__ void clear(T (&accumulators)[blocks][4]) {
#pragma unroll
  for (int n = 0; n < blocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) accumulators[n][e] = T(0);
  }
}

template <class T, int blocks>
__device__ __forceinline__ void copy(T (&to)[blocks][4], const T (&from)[blocks][4]) {
#pragma unroll
  for (int n = 0; n < blocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[n][e] = from[n][e];
  }
}

// Calls visit(half, column, accumulator) for each of the thread's accumulators.
template <class Storage, class Visit>
__device__ __forceinline__ void for_each(Accumulators<Storage>& accumulators, Visit visit) {
  const Lane lane;
#pragma unroll
  for (int n = 0; n < Shape<Storage>::kRows / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) visit(e / 2, 8 * n + lane.column + e % 2, accumulators[n][e]);
  }
}

// Elements of a tensor of the user.
template <class Storage>
struct Plain {
  static constexpr int kParts = 1;
  const Storage* data;
  int pitch;
  __device__ const Storage* part(int) const { return data; }
};

// Values of the accumulate type: as high and low halves for the tensor cores, else as they are.
// They are stored times a power of two, because float16 has few exponents.
template <class Storage>
struct Formed {
  using T = Accumulate<Storage>;
  using Element = std::conditional_t<kTensorCores<Storage>, Storage, T>;
  static constexpr int kParts = kTensorCores<Storage> ? 2 : 1;
  Element* data;
  int pitch;

  __device__ const Element* part(int i) const { return data + i * Shape<Storage>::kRows * pitch; }

  __device__ __forceinline__ void store(int row, int column, T x) const {
    Element* to = data + row * pitch + column;
    if constexpr (kTensorCores<Storage>) {
      to[0] = narrow<Storage>(x);
      to[Shape<Storage>::kRows * pitch] = narrow<Storage>(x - widen(to[0]));
    } else {
      to[0] = x;
    }
  }
  __device__ __forceinline__ void store_pair(int row, int column, T x, T y) const {
    Element* to = data + row * pitch + column;
    if constexpr (kTensorCores<Storage>) {
      const Storage high_x = narrow<Storage>(x), high_y = narrow<Storage>(y);
      write_pair(to, high_x, high_y);
      write_pair(to + Shape<Storage>::kRows * pitch, narrow<Storage>(x - widen(high_x)),
                 narrow<Storage>(y - widen(high_y)));
    } else {
      write_pair(to, x, y);
    }
  }

 private:
  __device__ static __forceinline__ void write_pair(Element* to, Element x, Element y) {
    struct alignas(2 * sizeof(Element)) Pair {
      Element x, y;
    };
    *reinterpret_cast<Pair*>(to) = Pair{x, y};
  }
};

// The warp's 16 rows of accumulators times `scale` into rows [16 warp, 16 warp + 16) of a tile.
template <class Storage>
__device__ __forceinline__ void store_accumulators(const Accumulators<Storage>& accumulators,
                                                   const Formed<Storage>& tile,
                                                   Accumulate<Storage> scale) {
  const Lane lane;
#pragma unroll
  for (int n = 0; n < Shape<Storage>::kRows / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tile.store_pair(16 * lane.warp + lane.row + 8 * half, 8 * n + lane.column,
                      accumulators[n][2 * half] * scale, accumulators[n][2 * half + 1] * scale);
    }
  }
}

// The power of two that brings values up to `largest` into the range of float16, whose exponents do
// not reach far enough for gradients; 1 for all other types.
template <class Storage>
__device__ __forceinline__ Accumulate<Storage> fitting_scale(Accumulate<Storage> largest) {
  if constexpr (kTensorCores<Storage> && std::is_same_v<Storage, __half>) {
    // Bounded, so that sums of other tiles stay finite in the unit of this one. The power is made
    // from the bits of a float, because a device's exponential may be inexact even at integers.
    const int exponent = largest > 0 && largest < infinity<float>() ? ilogbf(largest) : 0;
    return __int_as_float((127 + 13 - max(min(exponent, 100), -60)) << 23);
  } else {
    return Accumulate<Storage>(1);
  }
}

template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], uint32_t address) {
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
}

template <bool transposed, class Storage>
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const Storage* from) {
  load_matrices<transposed>(registers, uint32_t(__cvta_generic_to_shared(from)));
}

template <class Storage>
__device__ __forceinline__ void multiply_block(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  if constexpr (std::is_same_v<Storage, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// accumulators += A B on the tensor cores. A is [16, depth] from row `first` on, or where
// a_transposed [depth, 16] from column `first` on; B is [columns, depth], or where b_by_depth
// [depth, columns]. depth and columns are multiples of 16. ldmatrix loads 8 x 8 matrices; eight
// lanes give the row addresses of each.
template <bool a_transposed, bool b_by_depth, class Storage, int blocks, class A, class B>
__device__ __forceinline__ void multiply_on_tensor_cores(float (&accumulators)[blocks][4],
                                                         const A& a, int first, const B& b,
                                                         int depth, int columns) {
  const int lane = thread_index() % 32, matrix = lane / 8, line = lane % 8;
  // Matrices of A: rows 0-7 and 8-15 at depth 0-7, then both at depth 8-15.
  const int a_offset = a_transposed ? (matrix / 2 * 8 + line) * a.pitch + first + matrix % 2 * 8
                                    : (first + matrix % 2 * 8 + line) * a.pitch + matrix / 2 * 8;
  // Matrices of B: depth 0-7 and 8-15 of columns 0-7, then both of columns 8-15.
  const int b_offset = b_by_depth ? (matrix % 2 * 8 + line) * b.pitch + matrix / 2 * 8
                                  : (matrix / 2 * 8 + line) * b.pitch + matrix % 2 * 8;
#pragma unroll 1
  for (int k = 0; k < depth; k += 16) {
    uint32_t a_part[A::kParts][4];
#pragma unroll
    for (int part = 0; part < A::kParts; ++part) {
      load_matrices<a_transposed>(a_part[part],
                                  a.part(part) + a_offset + (a_transposed ? k * a.pitch : k));
    }
#pragma unroll
    for (int n = 0; n < blocks; n += 2) {
      if (8 * n >= columns) break;
      uint32_t b_part[B::kParts][4];
#pragma unroll
      for (int part = 0; part < B::kParts; ++part) {
        load_matrices<b_by_depth>(
            b_part[part],
            b.part(part) + b_offset + (b_by_depth ? k * b.pitch + 8 * n : 8 * n * b.pitch + k));
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        float (&d)[4] = accumulators[n + pair];
        multiply_block<Storage>(d, a_part[0], b_part[0][2 * pair], b_part[0][2 * pair + 1]);
        if constexpr (A::kParts == 2) {
          multiply_block<Storage>(d, a_part[1], b_part[0][2 * pair], b_part[0][2 * pair + 1]);
        }
        if constexpr (B::kParts == 2) {
          multiply_block<Storage>(d, a_part[0], b_part[1][2 * pair], b_part[1][2 * pair + 1]);
        }
      }
    }
  }
}

template <class Element>
struct alignas(2 * sizeof(Element)) Pair {
  Element x, y;
};

// The same by fused multiply-adds: in 16-byte pieces along the depth, if both operands allow it.
template <bool a_transposed, bool b_by_depth, class T, int blocks, class A, class B>
__device__ __forceinline__ void multiply_by_fma(T (&accumulators)[blocks][4], const A& a, int first,
                                                const B& b, int depth, int columns) {
  using ElementA = std::remove_cv_t<std::remove_reference_t<decltype(a.part(0)[0])>>;
  using ElementB = std::remove_cv_t<std::remove_reference_t<decltype(b.part(0)[0])>>;
  const Lane lane;
  if constexpr (!b_by_depth) {
    static_assert(!a_transposed && sizeof(ElementA) <= sizeof(ElementB));
    constexpr int kStep = Piece<ElementA>::kCount, kPieces = kStep / Piece<ElementB>::kCount;
#pragma unroll 1
    for (int k = 0; k < depth; k += kStep) {
      Piece<ElementA> rows[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows[half] = *reinterpret_cast<const Piece<ElementA>*>(
            a.part(0) + (first + lane.row + 8 * half) * a.pitch + k);
      }
#pragma unroll
      for (int n = 0; n < blocks; ++n) {
        if (8 * n >= columns) break;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) {
            const auto column = *reinterpret_cast<const Piece<ElementB>*>(
                b.part(0) + (8 * n + lane.column + c) * b.pitch + k +
                piece * Piece<ElementB>::kCount);
#pragma unroll
            for (int e = 0; e < Piece<ElementB>::kCount; ++e) {
              const T y = widen(column.elements[e]);
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const T x = widen(rows[half].elements[piece * Piece<ElementB>::kCount + e]);
                accumulators[n][2 * half + c] += x * y;
              }
            }
          }
        }
      }
    }
  } else {
    constexpr int kStep = Piece<ElementA>::kCount;
#pragma unroll 1
    for (int k0 = 0; k0 < depth; k0 += kStep) {
      T x[2][kStep];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + lane.row + 8 * half;
        if constexpr (a_transposed) {
#pragma unroll
          for (int e = 0; e < kStep; ++e) x[half][e] = widen(a.part(0)[(k0 + e) * a.pitch + row]);
        } else {
          const auto piece =
              *reinterpret_cast<const Piece<ElementA>*>(a.part(0) + row * a.pitch + k0);
#pragma unroll
          for (int e = 0; e < kStep; ++e) x[half][e] = widen(piece.elements[e]);
        }
      }
#pragma unroll
      for (int n = 0; n < blocks; ++n) {
        if (8 * n >= columns) break;
#pragma unroll
        for (int e = 0; e < kStep; ++e) {
          const auto pair = *reinterpret_cast<const Pair<ElementB>*>(
              b.part(0) + (k0 + e) * b.pitch + 8 * n + lane.column);
          const T y[2] = {widen(pair.x), widen(pair.y)};
#pragma unroll
          for (int i = 0; i < 4; ++i) accumulators[n][i] += x[i / 2][e] * y[i % 2];
        }
      }
    }
  }
}

template <bool a_transposed, bool b_by_depth, class Storage, int blocks, class A, class B>
__device__ __forceinline__ void multiply(Accumulate<Storage> (&accumulators)[blocks][4], const A& a,
                                         int first, const B& b, int depth, int columns) {
  if constexpr (kTensorCores<Storage>) {
    multiply_on_tensor_cores<a_transposed, b_by_depth, Storage>(accumulators, a, first, b, depth,
                                                                columns);
  } else {
    multiply_by_fma<a_transposed, b_by_depth>(accumulators, a, first, b, depth, columns);
  }
}

// The same for operands that are stored times powers of two: the product is multiplied by `unit`.
// Only float16 needs this; for all other types unit = 1.
template <bool a_transposed, bool b_by_depth, class Storage, int blocks, class A, class B>
__device__ __forceinline__ void multiply_scaled(Accumulate<Storage> (&accumulators)[blocks][4],
                                                const A& a, int first, const B& b, int depth,
                                                int columns, Accumulate<Storage> unit) {
  if constexpr (kTensorCores<Storage> && std::is_same_v<Storage, __half>) {
    // scaling there and back is exact, and needs no second set of accumulators
    const auto scale = [&](float factor) {
#pragma unroll
      for (int n = 0; n < blocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) accumulators[n][e] *= factor;
      }
    };
    scale(1.0f / unit);
    multiply<a_transposed, b_by_depth, Storage>(accumulators, a, first, b, depth, columns);
    scale(unit);
  } else {
    multiply<a_transposed, b_by_depth, Storage>(accumulators, a, first, b, depth, columns);
  }
}

}  // namespace setformer::cuda
