#include "checks.h"

#include <cstdio>

namespace emulator {

namespace {

std::string hexadecimal(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

void check_shared(Thread& thread, const Site& site, Access access, uint32_t offset,
                  uint32_t bytes) {
  (void)access;
  if (offset % bytes) {
    fail(thread, site, kMisalignedAddress,
         "misaligned access of " + std::to_string(bytes) + " bytes at shared memory byte " +
             std::to_string(offset));
  }
  if (uint64_t(offset) + bytes > thread.shared_bytes) {
    fail(thread, site, kIllegalAddress,
         "access of " + std::to_string(bytes) + " bytes at shared memory byte " +
             std::to_string(offset) + " of " + std::to_string(thread.shared_bytes));
  }
}

void check_global(Thread& thread, const Site& site, Access access, uint64_t address,
                  uint32_t bytes) {
  (void)access;
  if (address % bytes) {
    fail(thread, site, kMisalignedAddress,
         "misaligned access of " + std::to_string(bytes) + " bytes at " + hexadecimal(address));
  }
  if (address < 65536) {
    fail(thread, site, kIllegalAddress, "access at " + hexadecimal(address));
  }
}

namespace checks {

void launch_starts(const Launch&, uint8_t*) {}
void launch_ends() {}
void block_starts(const Thread&) {}
void barrier_joined(const Thread&, uint32_t) {}
void barrier_passed(uint32_t) {}
void warp_joined(const Thread&) {}
void warp_passed(const Thread&, uint32_t) {}
void copy_issued(const Thread&, const Copy&) {}
void copy_arrived(const Thread&, const Site&, const Copy&) {}

}  // namespace checks
}  // namespace emulator
