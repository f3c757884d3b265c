#include "warp.h"

#include <bit>
#include <cstring>

#include "checks.h"

namespace emulator {

// Every lane of the mask brings In; the last one to come calls work(threads of the warp), which
// writes what each lane takes away.
template <class Out, class In, class Work>
inline Out meet(Thread& thread, const Site& site, uint32_t mask, Meeting meeting, const In& in,
                const Work& work) {
  static_assert(sizeof(In) <= sizeof thread.brought && sizeof(Out) <= sizeof thread.taken);
  std::memcpy(thread.brought, &in, sizeof in);
  if (arrive_in_warp(thread, site, mask, meeting)) {
    work(thread.lanes);
    release_warp(thread, mask);
  }
  Out out;
  std::memcpy(&out, thread.taken, sizeof out);
  return out;
}
template <class T>
inline T brought(const Thread* lane) {
  T value;
  std::memcpy(&value, lane->brought, sizeof value);
  return value;
}
template <class T>
inline void give(Thread* lane, const T& value) {
  std::memcpy(lane->taken, &value, sizeof value);
}
template <class Work>
void for_lanes(uint32_t mask, const Work& work) {
  for (; mask; mask &= mask - 1) work(std::countr_zero(mask));
}

template <class Source>
inline Shuffled shuffle(Thread& thread, const Site& site, uint32_t value, uint32_t mask,
                        const Source& source) {
  struct Brought {
    uint32_t value;
    int source;
    bool in_range;
  };
  auto [lane, in_range] = source(int(thread.lane));
  const Brought in{value, in_range ? lane : int(thread.lane), in_range};
  return meet<Shuffled>(thread, site, mask, Meeting::any, in, [mask](Thread** lanes) {
    for_lanes(mask, [&](int i) {
      const auto wish = brought<Brought>(lanes[i]);
      // What a lane outside of the mask holds is undefined: NaN.
      const bool defined = mask >> wish.source & 1;
      const uint32_t got = defined ? brought<Brought>(lanes[wish.source]).value : ~0u;
      give(lanes[i], Shuffled{got, wish.in_range});
    });
  });
}
struct Wish {
  int lane;
  bool in_range;
};
struct Segment {
  int mask, clamp;
  explicit Segment(uint32_t limits) : mask(limits >> 8 & 31), clamp(limits & 31) {}
  int last(int lane) const { return (lane & mask) | (clamp & ~mask & 31); }
  int first(int lane) const { return lane & mask; }
};
Shuffled shuffle_up(Thread& thread, const Site& site, uint32_t value, uint32_t by, uint32_t limits,
                    uint32_t mask) {
  return shuffle(thread, site, value, mask, [=](int lane) {
    const int from = lane - int(by & 31);
    return Wish{from, from >= Segment(limits).last(lane)};
  });
}
Shuffled shuffle_down(Thread& thread, const Site& site, uint32_t value, uint32_t by,
                      uint32_t limits, uint32_t mask) {
  return shuffle(thread, site, value, mask, [=](int lane) {
    const int from = lane + int(by & 31);
    return Wish{from, from <= Segment(limits).last(lane)};
  });
}
Shuffled shuffle_bfly(Thread& thread, const Site& site, uint32_t value, uint32_t by,
                      uint32_t limits, uint32_t mask) {
  return shuffle(thread, site, value, mask, [=](int lane) {
    const int from = lane ^ int(by & 31);
    return Wish{from, from <= Segment(limits).last(lane)};
  });
}
Shuffled shuffle_idx(Thread& thread, const Site& site, uint32_t value, uint32_t index,
                     uint32_t limits, uint32_t mask) {
  return shuffle(thread, site, value, mask, [=](int lane) {
    const Segment segment(limits);
    const int from = segment.first(lane) | (int(index & 31) & ~segment.mask);
    return Wish{from, from <= segment.last(lane)};
  });
}

uint32_t vote_ballot(Thread& thread, const Site& site, bool yes, uint32_t mask) {
  return meet<uint32_t>(thread, site, mask, Meeting::any, yes, [mask](Thread** lanes) {
    uint32_t votes = 0;
    for_lanes(mask, [&](int i) { votes |= uint32_t(brought<bool>(lanes[i])) << i; });
    for_lanes(mask, [&](int i) { give(lanes[i], votes); });
  });
}
bool vote_all(Thread& thread, const Site& site, bool yes, uint32_t mask) {
  return vote_ballot(thread, site, yes, mask) == mask;
}
bool vote_any(Thread& thread, const Site& site, bool yes, uint32_t mask) {
  return vote_ballot(thread, site, yes, mask) != 0;
}
bool vote_uni(Thread& thread, const Site& site, bool yes, uint32_t mask) {
  const uint32_t votes = vote_ballot(thread, site, yes, mask);
  return votes == mask || votes == 0;
}
uint32_t match(Thread& thread, const Site& site, uint64_t value, uint32_t mask) {
  return meet<uint32_t>(thread, site, mask, Meeting::any, value, [mask](Thread** lanes) {
    for_lanes(mask, [&](int i) {
      uint32_t same = 0;
      for_lanes(mask, [&](int j) {
        same |= uint32_t(brought<uint64_t>(lanes[i]) == brought<uint64_t>(lanes[j])) << j;
      });
      give(lanes[i], same);
    });
  });
}

template <class T>
T reduced(Reduction reduction, T a, T b) {
  switch (reduction) {
    case Reduction::add_:
      return T(uint32_t(a) + uint32_t(b));
    case Reduction::min_:
      return std::min(a, b);
    case Reduction::max_:
      return std::max(a, b);
    case Reduction::and_:
      return a & b;
    case Reduction::or_:
      return a | b;
    default:
      return a ^ b;
  }
}
template <class T>
T reduce(Thread& thread, const Site& site, Reduction reduction, T value, uint32_t mask) {
  return meet<T>(thread, site, mask, Meeting::any, value, [=](Thread** lanes) {
    T result = brought<T>(lanes[std::countr_zero(mask)]);
    for_lanes(mask & (mask - 1),
              [&](int i) { result = reduced(reduction, result, brought<T>(lanes[i])); });
    for_lanes(mask, [&](int i) { give(lanes[i], result); });
  });
}
uint32_t reduce_warp(Thread& thread, const Site& site, Reduction reduction, uint32_t value,
                     uint32_t mask) {
  return reduce(thread, site, reduction, value, mask);
}
int32_t reduce_warp(Thread& thread, const Site& site, Reduction reduction, int32_t value,
                    uint32_t mask) {
  return reduce(thread, site, reduction, value, mask);
}

inline float to_float(Tf32 x) { return std::bit_cast<float>(x.bits & ~0x1fffu); }

template <class T>
inline float element(uint32_t word, int part) {
  return to_float(as<T>(word >> (8 * sizeof(T) % 32 * part)));
}
template <>
inline float element<Tf32>(uint32_t word, int) {
  return to_float(Tf32{word});
}

template <class T, int depth>
void multiply_matrices(Thread& thread, const Site& site, float (&d)[4],
                       const uint32_t (&a)[depth * sizeof(T) / 8],
                       const uint32_t (&b)[depth * sizeof(T) / 16], const float (&c)[4]) {
  constexpr int packed = 4 / sizeof(T);
  constexpr int a_registers = depth * sizeof(T) / 8, b_registers = depth * sizeof(T) / 16;
  struct Fragments {
    uint32_t a[a_registers], b[b_registers];
    float c[4];
  } in;
  std::copy(std::begin(a), std::end(a), in.a);
  std::copy(std::begin(b), std::end(b), in.b);
  std::copy(std::begin(c), std::end(c), in.c);
  struct Result {
    float d[4];
  };
  const auto out = meet<Result>(thread, site, ~0u, Meeting::aligned, in, [](Thread** lanes) {
    float left[16][depth], right[depth][8];
    double sum[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto fragments = brought<Fragments>(lanes[lane]);
      const int group = lane / 4, place = lane % 4;
      for (int part = 0; part < packed; ++part) {
        for (int i = 0; i < a_registers; ++i) {
          left[group + 8 * (i % 2)][packed * (place + 4 * (i / 2)) + part] =
              element<T>(fragments.a[i], part);
        }
        for (int i = 0; i < b_registers; ++i) {
          right[packed * (place + 4 * i) + part][group] = element<T>(fragments.b[i], part);
        }
      }
      for (int i = 0; i < 4; ++i) {
        sum[group + 8 * (i / 2)][2 * place + i % 2] = fragments.c[i];
      }
    }
    // Products are exact in double. How a tensor core rounds their sum is not documented; one
    // rounding at the end is the neutral choice.
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < depth; ++k) {
        for (int column = 0; column < 8; ++column) {
          sum[row][column] += double(left[row][k]) * double(right[k][column]);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, place = lane % 4;
      Result result;
      for (int i = 0; i < 4; ++i) {
        result.d[i] = float(sum[group + 8 * (i / 2)][2 * place + i % 2]);
      }
      give(lanes[lane], result);
    }
  });
  std::copy(std::begin(out.d), std::end(out.d), d);
}

template <int count, bool transposed>
void load_matrices(Thread& thread, const Site& site, uint32_t (&rows)[count], uint64_t address) {
  struct Registers {
    uint32_t of[count];
  };
  // All addresses are checked where the lane that names them runs; only 8 per matrix are read.
  const uint8_t* row = nullptr;
  if (thread.lane < 8 * count) {
    row = shared_address<16>(thread, site, Access::read, uint32_t(address));
  }
  const auto out = meet<Registers>(thread, site, ~0u, Meeting::aligned, row, [](Thread** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      Registers registers;
      for (int matrix = 0; matrix < count; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int from_row = transposed ? 2 * (lane % 4) + i : lane / 4;
          const int from_column = transposed ? lane / 4 : 2 * (lane % 4) + i;
          std::memcpy(&pair[i],
                      brought<const uint8_t*>(lanes[8 * matrix + from_row]) + 2 * from_column, 2);
        }
        registers.of[matrix] = pair[0] | uint32_t(pair[1]) << 16;
      }
      give(lanes[lane], registers);
    }
  });
  std::copy(std::begin(out.of), std::end(out.of), rows);
}

uint32_t transpose_matrix(Thread& thread, const Site& site, uint32_t value) {
  return meet<uint32_t>(thread, site, ~0u, Meeting::aligned, value, [](Thread** lanes) {
    uint32_t elements[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto pair = brought<uint32_t>(lanes[lane]);
      elements[lane / 4][2 * (lane % 4)] = pair & 0xffff;
      elements[lane / 4][2 * (lane % 4) + 1] = pair >> 16;
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = 2 * (lane % 4), column = lane / 4;
      give(lanes[lane], elements[row][column] | elements[row + 1][column] << 16);
    }
  });
}

void issue_copy(Thread& thread, const Copy& copy) {
  std::memset(copy.to, 0xff, copy.bytes);
  checks::copy_issued(thread, copy);
  thread.copies.push_back(copy);
}

void commit_copies(Thread& thread) {
  thread.copy_groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

void wait_for_copies(Thread& thread, const Site& site, uint32_t pending_groups) {
  while (thread.copy_groups.size() > pending_groups) {
    for (const Copy& copy : thread.copy_groups.front()) {
      std::memcpy(copy.to, copy.from, copy.source_bytes);
      std::memset(copy.to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
      checks::copy_arrived(thread, site, copy);
    }
    thread.copy_groups.pop_front();
  }
}

template <int bytes>
void copy_async(Thread& thread, const Site& site, uint32_t to, uint64_t from,
                uint32_t source_bytes) {
  if (source_bytes > bytes) fail(thread, site, kLaunchFailure, "cp.async of more than its size");
  if (from % bytes) fail(thread, site, kMisalignedAddress, "misaligned source of cp.async");
  uint8_t* place = shared_address<bytes>(thread, site, Access::write, to);
  if (source_bytes) {
    // With fewer bytes than its size an instruction reads no more than these.
    if (source_bytes == bytes) {
      global_address<bytes>(thread, site, Access::read, from);
    } else {
      for (uint32_t i = 0; i < source_bytes; ++i) {
        global_address<1>(thread, site, Access::read, from + i);
      }
    }
  }
  issue_copy(thread, {place, reinterpret_cast<const uint8_t*>(from), bytes, source_bytes, &site});
}

#define EMULATOR_MATRICES(type, depth)                                                  \
  template void multiply_matrices<type, depth>(                                         \
      Thread&, const Site&, float (&)[4], const uint32_t (&)[depth * sizeof(type) / 8], \
      const uint32_t (&)[depth * sizeof(type) / 16], const float (&)[4]);
EMULATOR_MATRICES(Bfloat16, 16)
EMULATOR_MATRICES(Bfloat16, 8)
EMULATOR_MATRICES(Half, 16)
EMULATOR_MATRICES(Half, 8)
EMULATOR_MATRICES(Tf32, 8)
EMULATOR_MATRICES(Tf32, 4)

#define EMULATOR_LOAD(count)                                                                      \
  template void load_matrices<count, false>(Thread&, const Site&, uint32_t (&)[count], uint64_t); \
  template void load_matrices<count, true>(Thread&, const Site&, uint32_t (&)[count], uint64_t);
EMULATOR_LOAD(1)
EMULATOR_LOAD(2)
EMULATOR_LOAD(4)

template void copy_async<4>(Thread&, const Site&, uint32_t, uint64_t, uint32_t);
template void copy_async<8>(Thread&, const Site&, uint32_t, uint64_t, uint32_t);
template void copy_async<16>(Thread&, const Site&, uint32_t, uint64_t, uint32_t);

}  // namespace emulator
