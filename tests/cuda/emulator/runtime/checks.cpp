#include "checks.h"

#include <cstdio>

#include "counts.h"
#include "race.h"
#include "trace.h"

// AddressSanitizer's runtime, where it is loaded: the first of these bytes that belongs to no
// allocation, or null.
extern "C" __attribute__((weak)) void* __asan_region_is_poisoned(void* start, size_t bytes);

namespace emulator {

namespace {

std::string hexadecimal(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(value));
  return text;
}

std::string of_bytes(const char* what, uint32_t bytes) {
  return std::string(what) + " of " + std::to_string(bytes) + " bytes at ";
}

// Whether one array, or the dynamic part, holds all of the access.
bool in_one_array(const Thread& thread, uint32_t offset, uint32_t bytes) {
  const Kernel& kernel = *thread.launch.kernel;
  if (offset >= kernel.dynamic_shared_offset) return true;
  for (int i = 0; i < kernel.shared_array_count; ++i) {
    const auto [start, size] = kernel.shared_arrays[i];
    if (offset >= start && offset + bytes <= start + size) return true;
  }
  return false;
}

std::vector<uint32_t> barrier_participants[kMostRanks][16];
std::vector<std::vector<uint32_t>> warp_participants;  // [rank, warp]

std::vector<uint32_t>& participants_of_warp(const Thread& thread) {
  return warp_participants[warp_in_cluster(thread)];
}

}  // namespace

void check_shared(Thread& thread, const Site& site, Access access, uint32_t rank, uint32_t offset,
                  uint32_t bytes) {
  if (offset % bytes) {
    fail(thread, site, kMisalignedAddress,
         of_bytes("misaligned access", bytes) + "shared memory byte " + std::to_string(offset));
  }
  if (uint64_t(offset) + bytes > thread.shared_bytes ||
      (watching && !in_one_array(thread, offset, bytes))) {
    fail(thread, site, kIllegalAddress,
         of_bytes("access beyond an array", bytes) + "shared memory byte " +
             std::to_string(offset) + " of " + std::to_string(thread.shared_bytes));
  }
  if (access == Access::issue) return;
  if (options.race) race::shared_access(thread, site, access, rank, offset, bytes);
  if (options.trace) trace::access(thread, site, access, true, offset, bytes);
}

void check_global(Thread& thread, const Site& site, Access access, uint64_t address,
                  uint32_t bytes) {
  if (address % bytes) {
    fail(thread, site, kMisalignedAddress,
         of_bytes("misaligned access", bytes) + hexadecimal(address));
  }
  if (address < 65536) {
    fail(thread, site, kIllegalAddress, of_bytes("access", bytes) + hexadecimal(address));
  }
  if (options.address) {
    if (!__asan_region_is_poisoned) {
      fail(thread, site, kIllegalAddress,
           "mode address needs AddressSanitizer's runtime: LD_PRELOAD=$(gcc "
           "-print-file-name=libasan.so)");
    }
    if (__asan_region_is_poisoned(reinterpret_cast<void*>(address), bytes)) {
      fail(thread, site, kIllegalAddress,
           of_bytes("access beyond an allocation", bytes) + hexadecimal(address));
    }
  }
  if (options.race) race::global_access(thread, site, access, address, bytes);
  if (options.trace) trace::access(thread, site, access, false, address, bytes);
}

namespace checks {

void launch_starts(const Launch& launch, uint8_t*) {
  if (options.race) race::launch_starts(launch);
  if (options.trace) trace::launch_starts(launch);
  if (options.count) counts::launch_starts(launch);
}
void launch_ends() {
  if (options.race) race::launch_ends();
  if (options.trace) trace::launch_ends();
  if (options.count) counts::launch_ends();
}
void cluster_starts(const Thread& first) {
  if (options.race) race::cluster_starts(first);
  if (options.trace) trace::cluster_starts();
  if (options.count) counts::cluster_starts();
  for (auto& of_block : barrier_participants) {
    for (auto& participants : of_block) participants.clear();
  }
  warp_participants.assign(32 * first.launch.ranks, {});
}
void barrier_joined(const Thread& thread, uint32_t barrier) {
  if (options.race) race::joined(thread, barrier_participants[thread.rank][barrier]);
}
void barrier_passed(uint32_t rank, uint32_t barrier) {
  if (options.race) race::passed(barrier_participants[rank][barrier]);
  barrier_participants[rank][barrier].clear();
}
void warp_joined(const Thread& thread) {
  if (options.race) race::joined(thread, participants_of_warp(thread));
}
// Lanes of other masks may wait in the same warp: they stay.
void warp_passed(const Thread& thread, uint32_t mask) {
  if (!options.race) return;
  std::vector<uint32_t> passing, waiting;
  const uint32_t first = race::number_of(thread) - thread.lane;  // of the warp
  for (const uint32_t number : participants_of_warp(thread)) {
    (mask >> (number - first) & 1 ? passing : waiting).push_back(number);
  }
  race::passed(passing);
  participants_of_warp(thread) = waiting;
}
void copy_issued(const Thread& thread, const Copy& copy) {
  if (options.race) race::copy_issued(thread, copy);
}
void copy_arrived(const Thread& thread, const Site& site, const Copy& copy) {
  if (options.race) race::copy_arrived(thread, site, copy);
}
void released(const Thread& thread, std::vector<uint32_t>& knowledge) {
  if (options.race) race::released(thread, knowledge);
}
void acquired(const Thread& thread, const std::vector<uint32_t>& knowledge) {
  if (options.race) race::acquired(thread, knowledge);
}
bool knows(const Thread& thread, uint32_t other, const std::vector<uint32_t>& known) {
  return !options.race || race::knows(thread, other, known);
}
uint32_t number_of(const Thread& thread) { return options.race ? race::number_of(thread) : 0; }
void store_arrived(const Thread& thread, const Site& site, uint32_t issuer,
                   const std::vector<uint32_t>& known, const uint8_t* to, uint32_t bytes,
                   std::vector<uint32_t>& arriving) {
  if (options.race) race::store_arrived(thread, site, issuer, known, to, bytes, arriving);
}

}  // namespace checks
}  // namespace emulator
