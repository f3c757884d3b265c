// Instructions for which the 32 threads of a warp meet, and asynchronous copies. They are compiled
// once, in warp.cpp: translated kernels are long enough without them.
#pragma once

#include "machine.h"
#include "values.h"

namespace emulator {

// `limits` packs the segment mask (bits 8 to 12) and the clamp (bits 0 to 4).
struct Shuffled {
  uint32_t value;
  bool in_range;
};
Shuffled shuffle_up(Thread& thread, const Site& site, uint32_t value, uint32_t by, uint32_t limits,
                    uint32_t mask);
Shuffled shuffle_down(Thread& thread, const Site& site, uint32_t value, uint32_t by,
                      uint32_t limits, uint32_t mask);
Shuffled shuffle_bfly(Thread& thread, const Site& site, uint32_t value, uint32_t by,
                      uint32_t limits, uint32_t mask);
Shuffled shuffle_idx(Thread& thread, const Site& site, uint32_t value, uint32_t index,
                     uint32_t limits, uint32_t mask);

uint32_t vote_ballot(Thread& thread, const Site& site, bool yes, uint32_t mask);
bool vote_all(Thread& thread, const Site& site, bool yes, uint32_t mask);
bool vote_any(Thread& thread, const Site& site, bool yes, uint32_t mask);
bool vote_uni(Thread& thread, const Site& site, bool yes, uint32_t mask);

// The lanes that bring the same value.
uint32_t match(Thread& thread, const Site& site, uint64_t value, uint32_t mask);

enum class Reduction { add_, min_, max_, and_, or_, xor_ };
uint32_t reduce_warp(Thread& thread, const Site& site, Reduction reduction, uint32_t value,
                     uint32_t mask);
int32_t reduce_warp(Thread& thread, const Site& site, Reduction reduction, int32_t value,
                    uint32_t mask);

// D = A B + C with the fragments of the PTX manual, "Matrix Fragments for mma.m16n8k..". Lane l has
// group l / 4 and place l % 4. A register of A or B holds `packed` neighbours along k:
//   A: row group + 8 (register odd), k = packed (place + 4 (register / 2)) + part
//   B: column group,                 k = packed (place + 4 register) + part
//   C: row group + 8 (register / 2), column 2 place + register % 2
struct Tf32 {
  uint32_t bits;
};
template <class T, int depth>
void multiply_matrices(Thread& thread, const Site& site, float (&d)[4],
                       const uint32_t (&a)[depth * sizeof(T) / 8],
                       const uint32_t (&b)[depth * sizeof(T) / 16], const float (&c)[4]);

// Lane 8 i + r brings the address of row r of matrix i, 8 elements of 16 bits. Lane l takes from
// each matrix the elements (l / 4, 2 (l % 4)) and the one after, of the transposed one with .trans.
template <int count, bool transposed>
void load_matrices(Thread& thread, const Site& site, uint32_t (&rows)[count], uint64_t address);

uint32_t transpose_matrix(Thread& thread, const Site& site, uint32_t value);

// Asynchronous copies arrive when they are waited for, the latest moment there is; until then the
// destination holds NaN.
template <int bytes>
void copy_async(Thread& thread, const Site& site, uint32_t to, uint64_t from,
                uint32_t source_bytes);
void issue_copy(Thread& thread, const Copy& copy);
void commit_copies(Thread& thread);
void wait_for_copies(Thread& thread, const Site& site, uint32_t pending_groups);

}  // namespace emulator
