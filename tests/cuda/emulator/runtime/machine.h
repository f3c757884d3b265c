// CUDA threads on one host thread, those of a cluster at a time, which mostly is one block: each is
// a fiber that runs until it waits for others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

namespace emulator {

// Where an instruction comes from.
struct Site {
  const char* file;
  int line;
  const char* instruction;
};

struct Size3 {
  uint32_t x, y, z;
};

struct Thread;

struct ParameterPlace {
  uint32_t offset, bytes;
};
struct SharedArray {
  uint32_t offset, bytes;
};

// What a translated kernel says of itself.
struct Kernel {
  const char* name;
  void (*run)(Thread&);
  const ParameterPlace* parameters;
  int parameter_count;
  uint32_t parameter_bytes;
  const SharedArray* shared_arrays;
  int shared_array_count;
  uint32_t dynamic_shared_offset;
  bool uses_dynamic_shared;
  int most_threads;  // of a block, by __launch_bounds__; 0 where it gives none
  uint32_t ranks;    // blocks of a cluster, side by side along x; 0 where the launch says it
  int target;        // the compute capability that the PTX was compiled for: 80 for 8.0
};

struct RegisterKernel {
  explicit RegisterKernel(const Kernel& kernel);
};
const Kernel* find_kernel(const char* name);

struct Launch {
  const Kernel* kernel;
  Size3 grid, block;
  uint32_t ranks;  // blocks of a cluster
  uint32_t dynamic_shared_bytes;
  uint8_t* parameters;
};

struct Copy {
  uint8_t* to;
  const uint8_t* from;
  uint32_t bytes, source_bytes;
  const Site* site;
};

struct Thread {
  const Launch& launch;
  Size3 tid, ctaid;
  uint32_t rank;               // of the block in its cluster
  uint32_t index, warp, lane;  // index counts the threads of the block
  uint8_t* shared;             // of the block
  uint32_t shared_bytes;
  Thread** lanes;  // the 32 threads of the warp, null where the block ends before

  // What a lane brings to a meeting of its warp, and what it takes away.
  alignas(16) uint8_t brought[64];
  alignas(16) uint8_t taken[64];

  std::vector<Copy> copies;                   // cp.async since the last commit_group
  std::deque<std::vector<Copy>> copy_groups;  // committed, the oldest first
};

constexpr uint32_t kSharedWindow = 256 << 10;  // of addresses; no device has more for a block
constexpr uint32_t kMostRanks = 16;            // of a cluster

// issue: by st.async, whose data arrive later.
enum class Access { read, write, atomic, issue };

// Errors. fail() ends the launch and does not return; report() lets it go on to find more. The
// number is the cudaError_t that the launch gives.
constexpr int kIllegalAddress = 700, kMisalignedAddress = 716, kLaunchFailure = 719;
constexpr int kInvalidClusterSize = 912;
[[noreturn]] void fail(Thread& thread, const Site& site, int error, const std::string& message);
void report(const Thread& thread, const Site& site, int error, const std::string& message);

// Runs all blocks of a launch; cudaSuccess or the first error. `arguments` are the addresses of the
// kernel's parameters, which are copied. A launch's own `ranks`, blocks of a cluster, must be those
// that the kernel was compiled for, if it was; 0 where it says nothing.
int run(const Kernel& kernel, Size3 grid, Size3 block, uint32_t dynamic_shared_bytes,
        void** arguments, uint32_t ranks = 0);

struct Options {
  enum class Order { forward, reverse, random } order = Order::forward;
  uint64_t seed = 1;
  bool address = false;  // look every access up in AddressSanitizer's shadow memory
  bool race = false;
  bool trace = false;
  bool count = false;
  bool perturbed = false;  // approximate functions err by as much as they may
};
extern Options options;
extern bool watching;  // whether every access goes through the checks below
extern bool counting;  // whether count() is called
extern long error_count;
extern std::string last_message;

// A stretch of the kernel without a jump begins.
void count(const Thread& thread, uint32_t stretch);
#define EMULATOR_COUNT(stretch) \
  if (counting) [[unlikely]]    \
    count(thread, stretch);

// Addresses

void check_shared(Thread& thread, const Site& site, Access access, uint32_t rank, uint32_t offset,
                  uint32_t bytes);
void check_global(Thread& thread, const Site& site, Access access, uint64_t address,
                  uint32_t bytes);

inline bool in_shared(const Thread& thread, uint64_t address) {
  return address - uint64_t(thread.shared) < kSharedWindow;
}

template <int bytes>
uint8_t* shared_address(Thread& thread, const Site& site, Access access, uint32_t offset) {
  if (offset % bytes || uint64_t(offset) + bytes > thread.shared_bytes || watching) [[unlikely]] {
    check_shared(thread, site, access, thread.rank, offset, bytes);
  }
  return thread.shared + offset;
}
template <int bytes>
uint8_t* global_address(Thread& thread, const Site& site, Access access, uint64_t address) {
  constexpr uint64_t lowest = 65536;  // nothing lies there: a null pointer and an offset
  if (address % bytes || address < lowest || watching) [[unlikely]] {
    check_global(thread, site, access, address, bytes);
  }
  return reinterpret_cast<uint8_t*>(address);
}
// The shared memory of rank 0; the others' follow, a window each.
inline uint8_t* first_of_cluster(const Thread& thread) {
  return thread.shared - size_t{thread.rank} * kSharedWindow;
}
// Of a place in it: whose it is, and where there.
struct SharedPlace {
  uint32_t rank, offset;
};
inline SharedPlace shared_place(const Thread& thread, const uint8_t* place) {
  const uint64_t from_first = uint64_t(place - first_of_cluster(thread));
  return {uint32_t(from_first / kSharedWindow), uint32_t(from_first % kSharedWindow)};
}
inline uint32_t warp_in_cluster(const Thread& thread) { return thread.rank * 32 + thread.warp; }

// What lies in the shared memory of another block of the cluster.
inline bool in_cluster(const Thread& thread, uint64_t address) {
  return address - uint64_t(first_of_cluster(thread)) <
         uint64_t{thread.launch.ranks} * kSharedWindow;
}
uint8_t* of_another_block(Thread& thread, const Site& site, Access access, uint64_t address,
                          uint32_t bytes);
template <int bytes>
uint8_t* generic_address(Thread& thread, const Site& site, Access access, uint64_t address) {
  if (in_shared(thread, address)) {
    return shared_address<bytes>(thread, site, access, address - uint64_t(thread.shared));
  }
  if (in_cluster(thread, address)) return of_another_block(thread, site, access, address, bytes);
  return global_address<bytes>(thread, site, access, address);
}
template <int bytes>
uint8_t* local_address(Thread& thread, const Site& site, Access, uint64_t address) {
  if (address % bytes) fail(thread, site, kMisalignedAddress, "misaligned local access");
  return reinterpret_cast<uint8_t*>(address);
}

// Compiled once, in machine.cpp: translated kernels that inline them take long to compile.
#define EMULATOR_ADDRESSES(bytes)                                                         \
  extern template uint8_t* shared_address<bytes>(Thread&, const Site&, Access, uint32_t); \
  extern template uint8_t* global_address<bytes>(Thread&, const Site&, Access, uint64_t); \
  extern template uint8_t* generic_address<bytes>(Thread&, const Site&, Access, uint64_t);
EMULATOR_ADDRESSES(1)
EMULATOR_ADDRESSES(2)
EMULATOR_ADDRESSES(4)
EMULATOR_ADDRESSES(8)
EMULATOR_ADDRESSES(16)
#undef EMULATOR_ADDRESSES

// Threads that wait

enum class Meeting { any, aligned, exited_may_miss };

// Waits until all lanes of the mask have come; true for the last one, which then calls
// release_warp() once it has written what each takes away.
bool arrive_in_warp(Thread& thread, const Site& site, uint32_t mask, Meeting meeting);
void release_warp(Thread& thread, uint32_t mask);

struct Counted {
  uint32_t yes, threads;
  bool all() const { return yes == threads; }
  bool any() const { return yes != 0; }
};
Counted count_in_block(Thread& thread, const Site& site, bool aligned, uint32_t barrier,
                       uint32_t threads, bool yes);
inline void sync_block(Thread& thread, const Site& site, bool aligned, uint32_t barrier,
                       uint32_t threads) {
  count_in_block(thread, site, aligned, barrier, threads, false);
}
void arrive_at_barrier(Thread& thread, const Site& site, uint32_t barrier, uint32_t threads);
void sync_warp(Thread& thread, const Site& site, uint32_t mask);

// Lets the others run. A launch in which all threads do nothing but poll for a round has come to a
// standstill; has_progressed() tells that a thread has done more.
void poll(Thread& thread, const Site& site);
void has_progressed();
// Threads of the cluster, or of the block of that rank, that are still there.
uint32_t threads_left();
uint32_t threads_left(uint32_t rank);

void yield(Thread& thread);
[[noreturn]] void exit_thread(Thread& thread);
[[noreturn]] inline void trap(Thread& thread, const Site& site) {
  fail(thread, site, kLaunchFailure, "trap");
}
[[noreturn]] inline void bad_branch(Thread& thread, const Site& site) {
  fail(thread, site, kLaunchFailure, "brx.idx beyond its targets");
}
uint64_t clock_ticks();

}  // namespace emulator
