#include "machine.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <string_view>

#include "checks.h"
#include "cluster.h"
#include "fiber.h"

namespace emulator {

Options options;
bool watching = false;
bool counting = false;
long error_count = 0;
std::string last_message;

#define EMULATOR_ADDRESSES(bytes)                                                  \
  template uint8_t* shared_address<bytes>(Thread&, const Site&, Access, uint32_t); \
  template uint8_t* global_address<bytes>(Thread&, const Site&, Access, uint64_t); \
  template uint8_t* generic_address<bytes>(Thread&, const Site&, Access, uint64_t);
EMULATOR_ADDRESSES(1)
EMULATOR_ADDRESSES(2)
EMULATOR_ADDRESSES(4)
EMULATOR_ADDRESSES(8)
EMULATOR_ADDRESSES(16)

namespace {

enum class State { ready, at_barrier, in_warp, polling, finished };

struct Fiber : Thread {
  void* stack = nullptr;
  State state = State::ready;
  const Site* waits_at = nullptr;
  uint32_t barrier = 0;
  bool yes = false;
  Counted counted{};

  Fiber(const Launch& launch)
      : Thread{launch, {}, {}, 0, 0, 0, 0, nullptr, 0, nullptr, {}, {}, {}, {}} {}
};

// Lanes that wait for each other; a warp may have several, of disjoint masks.
struct Gathering {
  uint32_t mask, arrived;
  const Site* site;
  Meeting meeting;
};
struct Warp {
  Thread* lanes[32];
  uint32_t exited;
  std::vector<Gathering> gatherings;
};
struct Barrier {
  uint32_t arrived = 0, expected = 0, yes = 0;  // expected 0: all threads that are still there
  std::vector<const Site*> site_of_warp;
};

constexpr int kBarriers = 16;

struct Block {
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  uint32_t alive = 0;
};

// The blocks of one cluster at a time.
struct Machine {
  std::vector<Fiber> fibers;  // of one block after another
  std::vector<Block> blocks;  // by rank
  std::vector<uint32_t> order;
  Stacks stacks;
  void* scheduler = nullptr;  // the stack of run()
  Fiber* current = nullptr;
  bool progressed = false;
  int error = 0;
  bool failed = false;  // the launch ends
  std::mt19937_64 random;
  uint8_t* shared = nullptr;  // of rank 0; the others' follow
};
Machine machine;

Block& block_of(const Thread& thread) { return machine.blocks[thread.rank]; }
Warp& warp_of(const Thread& thread) { return block_of(thread).warps[thread.warp]; }

Fiber& fiber_of(Thread& thread) { return static_cast<Fiber&>(thread); }

void switch_to_scheduler(Fiber& fiber) { emulator_switch_stack(&fiber.stack, machine.scheduler); }

void wait(Fiber& fiber, State state, const Site* site) {
  fiber.state = state;
  fiber.waits_at = site;
  switch_to_scheduler(fiber);
}

std::string where(const Thread& thread, const Site& site) {
  char text[256];
  std::snprintf(text, sizeof text, "block (%u, %u, %u), thread (%u, %u, %u)", thread.ctaid.x,
                thread.ctaid.y, thread.ctaid.z, thread.tid.x, thread.tid.y, thread.tid.z);
  return std::string(thread.launch.kernel->name) + ", " + text + ", " + site.file + ":" +
         std::to_string(site.line) + ": " + site.instruction;
}

// "shfl.sync.bfly.b32" of the whole instruction.
std::string_view opcode(const Site& site) {
  std::string_view text = site.instruction;
  if (text[0] == '@') text.remove_prefix(text.find(' ') + 1);
  return text.substr(0, text.find(' '));
}

void release_barrier_if_complete(uint32_t rank, uint32_t number) {
  Block& block = machine.blocks[rank];
  Barrier& barrier = block.barriers[number];
  const uint32_t expected = barrier.expected ? barrier.expected : block.alive;
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  const Counted counted{barrier.yes, expected};
  for (Fiber& fiber : machine.fibers) {
    if (fiber.rank == rank && fiber.state == State::at_barrier && fiber.barrier == number) {
      fiber.state = State::ready;
      fiber.counted = counted;
    }
  }
  checks::barrier_passed(rank, number);
  barrier.arrived = barrier.yes = barrier.expected = 0;
  std::fill(barrier.site_of_warp.begin(), barrier.site_of_warp.end(), nullptr);
}

void join_barrier(Thread& thread, const Site& site, bool aligned, uint32_t number, uint32_t threads,
                  bool yes) {
  if (number >= kBarriers) fail(thread, site, kLaunchFailure, "there are barriers 0 to 15");
  if (threads % 32) fail(thread, site, kLaunchFailure, "a barrier counts whole warps");
  Barrier& barrier = block_of(thread).barriers[number];
  if (barrier.arrived && barrier.expected != threads) {
    fail(thread, site, kLaunchFailure, "barrier joined with different thread counts");
  }
  barrier.site_of_warp.resize(block_of(thread).warps.size());
  const Site*& site_of_warp = barrier.site_of_warp[thread.warp];
  if (aligned && site_of_warp && site_of_warp != &site) {
    fail(thread, site, kLaunchFailure,
         "divergent barrier: other threads of the warp wait at line " +
             std::to_string(site_of_warp->line));
  }
  site_of_warp = &site;
  barrier.expected = threads;
  ++barrier.arrived;
  barrier.yes += yes;
  checks::barrier_joined(thread, number);
}

void leave_warp(Fiber& fiber) {
  Warp& warp = warp_of(fiber);
  warp.exited |= 1u << fiber.lane;
  for (Gathering& gathering : warp.gatherings) {
    if (!gathering.arrived || !(gathering.mask >> fiber.lane & 1)) continue;
    if (gathering.meeting != Meeting::exited_may_miss) {
      fail(fiber, *gathering.site, kLaunchFailure, "a lane left the kernel that others wait for");
    }
    if (((gathering.arrived | warp.exited) & gathering.mask) == gathering.mask) {
      release_warp(fiber, gathering.mask);
      checks::warp_passed(fiber, gathering.mask);
    }
  }
}

void finish(Fiber& fiber) {
  fiber.state = State::finished;
  Block& block = block_of(fiber);
  --block.alive;
  leave_warp(fiber);
  for (uint32_t i = 0; i < kBarriers; ++i) {
    if (block.barriers[i].expected == 0) release_barrier_if_complete(fiber.rank, i);
  }
  cluster::thread_leaves(fiber);
  switch_to_scheduler(fiber);
  std::abort();
}

void fiber_main() {
  Fiber& fiber = *machine.current;
  fiber.launch.kernel->run(fiber);
  finish(fiber);
}

void place_thread(Fiber& fiber, uint32_t rank, uint32_t index, Size3 block_index) {
  const Size3 size = fiber.launch.block;
  fiber.tid = {index % size.x, index / size.x % size.y, index / (size.x * size.y)};
  fiber.ctaid = block_index;
  fiber.rank = rank;
  fiber.index = index;
  fiber.warp = index / 32;
  fiber.lane = index % 32;
  fiber.shared = machine.shared + size_t{rank} * kSharedWindow;
  fiber.shared_bytes =
      fiber.launch.kernel->dynamic_shared_offset + fiber.launch.dynamic_shared_bytes;
  fiber.lanes = warp_of(fiber).lanes;
  fiber.lanes[fiber.lane] = &fiber;
  fiber.copies.clear();
  fiber.copy_groups.clear();
  fiber.state = State::ready;
  fiber.waits_at = nullptr;
  fiber.stack = machine.stacks.prepare(rank * size.x * size.y * size.z + index, fiber_main);
}

void report_deadlock() {
  int shown = 0;
  std::string who;
  Fiber* first = nullptr;
  for (Fiber& fiber : machine.fibers) {
    if (fiber.state == State::finished || fiber.state == State::ready) continue;
    if (!first) first = &fiber;
    if (shown++ < 8) {
      who += "\n    thread " + std::to_string(fiber.index) + " at " + fiber.waits_at->file + ":" +
             std::to_string(fiber.waits_at->line) + ": " + fiber.waits_at->instruction;
    }
  }
  report(*first, *first->waits_at, kLaunchFailure,
         "deadlock: " + std::to_string(shown) + " threads wait for others that never come:" + who);
}

void start_block(uint32_t rank, Size3 block_index) {
  Machine& m = machine;
  Block& block = m.blocks[rank];
  const uint32_t threads = uint32_t(m.fibers.size() / m.blocks.size());
  for (Warp& warp : block.warps) {
    std::fill(std::begin(warp.lanes), std::end(warp.lanes), nullptr);
    warp.exited = 0;
    warp.gatherings.clear();
  }
  if (threads % 32) block.warps.back().exited = ~0u << (threads % 32);
  Fiber* fibers = &m.fibers[size_t{rank} * threads];
  for (uint32_t i = 0; i < threads; ++i) place_thread(fibers[i], rank, i, block_index);
  for (Barrier& barrier : block.barriers) barrier = {};
  block.alive = threads;
  // Memory that nobody has written reads as NaN.
  std::memset(fibers->shared, 0xff, std::min<size_t>(fibers->shared_bytes, kSharedWindow));
}

// A round lets every thread run that can.
bool run_round() {
  Machine& m = machine;
  bool any = false;
  if (options.order == Options::Order::random) {
    std::shuffle(m.order.begin(), m.order.end(), m.random);
  }
  for (const uint32_t i : m.order) {
    Fiber& fiber = m.fibers[i];
    const bool polled = fiber.state == State::polling;
    if (fiber.state != State::ready && !polled) continue;
    m.progressed = false;
    m.current = &fiber;
    emulator_switch_stack(&m.scheduler, fiber.stack);
    any |= m.progressed || !polled || fiber.state != State::polling;
    if (m.failed) break;
  }
  return any;
}

// The blocks from the first one's index on.
void run_cluster(Size3 first) {
  Machine& m = machine;
  for (uint32_t rank = 0; rank < m.blocks.size(); ++rank) {
    start_block(rank, {first.x + rank, first.y, first.z});
  }
  cluster::starts();
  checks::cluster_starts(m.fibers[0]);
  while (threads_left() > 0 && !m.failed) {
    if (run_round() || m.failed) continue;
    report_deadlock();
    m.failed = true;
  }
}

void order_threads(uint32_t threads) {
  machine.order.resize(threads);
  std::iota(machine.order.begin(), machine.order.end(), 0);
  if (options.order == Options::Order::reverse) {
    std::reverse(machine.order.begin(), machine.order.end());
  }
}

std::map<std::string, const Kernel*>& kernels() {
  static std::map<std::string, const Kernel*> all;
  return all;
}

}  // namespace

RegisterKernel::RegisterKernel(const Kernel& kernel) { kernels()[kernel.name] = &kernel; }

const Kernel* find_kernel(const char* name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : found->second;
}

int run(const Kernel& kernel, Size3 grid, Size3 block, uint32_t dynamic_shared_bytes,
        void** arguments, uint32_t ranks) {
  if (ranks == 0) ranks = kernel.ranks == 0 ? 1 : kernel.ranks;
  if (kernel.ranks != 0 && ranks != kernel.ranks) return kInvalidClusterSize;
  std::vector<std::max_align_t> buffer(kernel.parameter_bytes / sizeof(std::max_align_t) + 1);
  auto* parameters = reinterpret_cast<uint8_t*>(buffer.data());
  for (int i = 0; i < kernel.parameter_count; ++i) {
    const auto [offset, bytes] = kernel.parameters[i];
    std::memcpy(parameters + offset, arguments[i], bytes);
  }
  const Launch launch{&kernel, grid, block, ranks, dynamic_shared_bytes, parameters};
  Machine& m = machine;
  m.error = 0;
  m.failed = false;
  m.random.seed(options.seed);
  if (!m.shared) {
    m.shared = static_cast<uint8_t*>(std::aligned_alloc(4096, kMostRanks * kSharedWindow));
  }
  if (ranks > kMostRanks || grid.x % ranks) return kInvalidClusterSize;
  const uint32_t threads = launch.block.x * launch.block.y * launch.block.z;
  m.stacks.reserve(ranks * threads);
  m.fibers.clear();
  m.fibers.reserve(ranks * threads);
  for (uint32_t i = 0; i < ranks * threads; ++i) m.fibers.emplace_back(launch);
  m.blocks.resize(ranks);
  for (Block& each : m.blocks) each.warps.resize((threads + 31) / 32);
  order_threads(ranks * threads);
  checks::launch_starts(launch, m.shared);

  const uint64_t clusters = uint64_t{grid.x} * grid.y * grid.z / ranks;
  std::vector<uint64_t> cluster_order;
  if (options.order == Options::Order::random) {
    cluster_order.resize(clusters);
    std::iota(cluster_order.begin(), cluster_order.end(), 0);
    std::shuffle(cluster_order.begin(), cluster_order.end(), m.random);
  }
  for (uint64_t i = 0; i < clusters && !m.failed; ++i) {
    uint64_t first = i;
    if (options.order == Options::Order::reverse) first = clusters - 1 - i;
    if (options.order == Options::Order::random) first = cluster_order[i];
    first *= ranks;
    const uint64_t row = first / grid.x;
    run_cluster({uint32_t(first % grid.x), uint32_t(row % grid.y), uint32_t(row / grid.y)});
  }
  checks::launch_ends();
  return m.error;
}

void report(const Thread& thread, const Site& site, int error, const std::string& message) {
  last_message = message + "\n  in " + where(thread, site);
  if (++error_count <= 20) std::fprintf(stderr, "emulator: %s\n", last_message.c_str());
  if (!machine.error) machine.error = error;
}

void fail(Thread& thread, const Site& site, int error, const std::string& message) {
  report(thread, site, error, message);
  machine.failed = true;
  switch_to_scheduler(fiber_of(thread));
  std::abort();
}

void poll(Thread& thread, const Site& site) {
  Fiber& fiber = fiber_of(thread);
  wait(fiber, State::polling, &site);
  fiber.state = State::ready;
}
void has_progressed() { machine.progressed = true; }

uint32_t threads_left(uint32_t rank) { return machine.blocks[rank].alive; }
uint32_t threads_left() {
  uint32_t left = 0;
  for (const Block& block : machine.blocks) left += block.alive;
  return left;
}

void yield(Thread& thread) { switch_to_scheduler(fiber_of(thread)); }

void exit_thread(Thread& thread) {
  finish(fiber_of(thread));
  std::abort();
}

uint64_t clock_ticks() {
  return uint64_t(std::chrono::steady_clock::now().time_since_epoch().count());
}

bool arrive_in_warp(Thread& thread, const Site& site, uint32_t mask, Meeting meeting) {
  Warp& warp = warp_of(thread);
  if (!(mask >> thread.lane & 1)) {
    fail(thread, site, kLaunchFailure, "the thread's own lane is not in its mask");
  }
  if (meeting != Meeting::exited_may_miss && (warp.exited & mask)) {
    fail(thread, site, kLaunchFailure, "the mask names lanes that have left the kernel");
  }
  Gathering* gathering = nullptr;
  for (Gathering& candidate : warp.gatherings) {
    if (candidate.arrived && candidate.mask != mask && (candidate.mask >> thread.lane & 1)) {
      fail(thread, site, kLaunchFailure,
           "divergent warp: other lanes wait for this one with another mask at line " +
               std::to_string(candidate.site->line));
    }
    if (candidate.mask == mask) gathering = &candidate;
  }
  if (!gathering) gathering = &warp.gatherings.emplace_back(Gathering{mask, 0, nullptr, meeting});
  if (gathering->arrived == 0) {
    gathering->site = &site;
    gathering->meeting = meeting;
  } else if (gathering->site != &site &&
             (meeting == Meeting::aligned || opcode(*gathering->site) != opcode(site))) {
    fail(thread, site, kLaunchFailure,
         "divergent warp: other lanes wait at line " + std::to_string(gathering->site->line) +
             ": " + gathering->site->instruction);
  }
  gathering->arrived |= 1u << thread.lane;
  if (((gathering->arrived | warp.exited) & mask) == mask) return true;
  wait(fiber_of(thread), State::in_warp, &site);
  return false;
}

void release_warp(Thread& thread, uint32_t mask) {
  Warp& warp = warp_of(thread);
  for (Gathering& gathering : warp.gatherings) {
    if (gathering.mask != mask) continue;
    for (uint32_t left = gathering.arrived; left; left &= left - 1) {
      Fiber& fiber = fiber_of(*warp.lanes[std::countr_zero(left)]);
      if (fiber.state == State::in_warp) fiber.state = State::ready;
    }
    gathering.arrived = 0;
  }
}

void sync_warp(Thread& thread, const Site& site, uint32_t mask) {
  checks::warp_joined(thread);
  if (arrive_in_warp(thread, site, mask, Meeting::exited_may_miss)) {
    release_warp(thread, mask);
    checks::warp_passed(thread, mask);
  }
}

Counted count_in_block(Thread& thread, const Site& site, bool aligned, uint32_t number,
                       uint32_t threads, bool yes) {
  Fiber& fiber = fiber_of(thread);
  join_barrier(thread, site, aligned, number, threads, yes);
  fiber.barrier = number;
  fiber.state = State::at_barrier;
  fiber.waits_at = &site;
  release_barrier_if_complete(thread.rank, number);
  if (fiber.state != State::ready) switch_to_scheduler(fiber);
  return fiber.counted;
}

void arrive_at_barrier(Thread& thread, const Site& site, uint32_t number, uint32_t threads) {
  join_barrier(thread, site, true, number, threads, false);
  release_barrier_if_complete(thread.rank, number);
}

}  // namespace emulator
