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
#include "fiber.h"

namespace emulator {

Options options;
bool watching = false;
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

enum class State { ready, at_barrier, in_warp, finished };

struct Fiber : Thread {
  void* stack = nullptr;
  State state = State::ready;
  const Site* waits_at = nullptr;
  uint32_t barrier = 0;
  bool yes = false;
  Counted counted{};

  Fiber(const Launch& launch)
      : Thread{launch, {}, {}, 0, 0, 0, nullptr, 0, nullptr, {}, {}, {}, {}} {}
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

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint32_t> order;
  Barrier barriers[kBarriers];
  Stacks stacks;
  void* scheduler = nullptr;  // the stack of run()
  Fiber* current = nullptr;
  uint32_t alive = 0;
  int error = 0;
  bool failed = false;  // the launch ends
  std::mt19937_64 random;
  uint8_t* shared = nullptr;
};
Machine machine;

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

uint32_t expected_at(const Barrier& barrier) {
  return barrier.expected ? barrier.expected : machine.alive;
}

void release_barrier_if_complete(uint32_t number) {
  Barrier& barrier = machine.barriers[number];
  const uint32_t expected = expected_at(barrier);
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  const Counted counted{barrier.yes, expected};
  for (Fiber& fiber : machine.fibers) {
    if (fiber.state == State::at_barrier && fiber.barrier == number) {
      fiber.state = State::ready;
      fiber.counted = counted;
    }
  }
  checks::barrier_passed(number);
  barrier.arrived = barrier.yes = barrier.expected = 0;
  std::fill(barrier.site_of_warp.begin(), barrier.site_of_warp.end(), nullptr);
}

void join_barrier(Thread& thread, const Site& site, bool aligned, uint32_t number, uint32_t threads,
                  bool yes) {
  if (number >= kBarriers) fail(thread, site, kLaunchFailure, "there are barriers 0 to 15");
  if (threads % 32) fail(thread, site, kLaunchFailure, "a barrier counts whole warps");
  Barrier& barrier = machine.barriers[number];
  if (barrier.arrived && barrier.expected != threads) {
    fail(thread, site, kLaunchFailure, "barrier joined with different thread counts");
  }
  barrier.site_of_warp.resize(machine.warps.size());
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
  Warp& warp = machine.warps[fiber.warp];
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
  --machine.alive;
  leave_warp(fiber);
  for (uint32_t i = 0; i < kBarriers; ++i) {
    if (machine.barriers[i].expected == 0) release_barrier_if_complete(i);
  }
  switch_to_scheduler(fiber);
  std::abort();
}

void fiber_main() {
  Fiber& fiber = *machine.current;
  fiber.launch.kernel->run(fiber);
  finish(fiber);
}

void place_thread(Fiber& fiber, uint32_t index, Size3 block_index) {
  const Size3 size = fiber.launch.block;
  fiber.tid = {index % size.x, index / size.x % size.y, index / (size.x * size.y)};
  fiber.ctaid = block_index;
  fiber.index = index;
  fiber.warp = index / 32;
  fiber.lane = index % 32;
  fiber.shared = machine.shared;
  fiber.shared_bytes =
      fiber.launch.kernel->dynamic_shared_offset + fiber.launch.dynamic_shared_bytes;
  fiber.lanes = machine.warps[fiber.warp].lanes;
  fiber.lanes[fiber.lane] = &fiber;
  fiber.copies.clear();
  fiber.copy_groups.clear();
  fiber.state = State::ready;
  fiber.waits_at = nullptr;
  fiber.stack = machine.stacks.prepare(index, fiber_main);
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

void run_block(Size3 block_index) {
  Machine& m = machine;
  const uint32_t threads = uint32_t(m.fibers.size());
  for (Warp& warp : m.warps) {
    std::fill(std::begin(warp.lanes), std::end(warp.lanes), nullptr);
    warp.exited = 0;
    warp.gatherings.clear();
  }
  if (threads % 32) m.warps.back().exited = ~0u << (threads % 32);
  for (uint32_t i = 0; i < threads; ++i) place_thread(m.fibers[i], i, block_index);
  for (Barrier& barrier : m.barriers) barrier = {};
  m.alive = threads;
  // Memory that nobody has written reads as NaN.
  std::memset(m.shared, 0xff, std::min<size_t>(m.fibers[0].shared_bytes, kSharedWindow));
  checks::block_starts(m.fibers[0]);
  while (m.alive) {
    bool any = false;
    if (options.order == Options::Order::random) {
      std::shuffle(m.order.begin(), m.order.end(), m.random);
    }
    for (const uint32_t i : m.order) {
      Fiber& fiber = m.fibers[i];
      if (fiber.state != State::ready) continue;
      any = true;
      m.current = &fiber;
      emulator_switch_stack(&m.scheduler, fiber.stack);
      if (m.failed) return;
    }
    if (!any && m.alive) {
      report_deadlock();
      m.failed = true;
      return;
    }
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
        void** arguments) {
  std::vector<std::max_align_t> buffer(kernel.parameter_bytes / sizeof(std::max_align_t) + 1);
  auto* parameters = reinterpret_cast<uint8_t*>(buffer.data());
  for (int i = 0; i < kernel.parameter_count; ++i) {
    const auto [offset, bytes] = kernel.parameters[i];
    std::memcpy(parameters + offset, arguments[i], bytes);
  }
  const Launch launch{&kernel, grid, block, dynamic_shared_bytes, parameters};
  Machine& m = machine;
  m.error = 0;
  m.failed = false;
  m.random.seed(options.seed);
  if (!m.shared) m.shared = static_cast<uint8_t*>(std::aligned_alloc(4096, kSharedWindow));
  const uint32_t threads = launch.block.x * launch.block.y * launch.block.z;
  m.stacks.reserve(threads);
  m.fibers.clear();
  m.fibers.reserve(threads);
  for (uint32_t i = 0; i < threads; ++i) m.fibers.emplace_back(launch);
  m.warps.resize((threads + 31) / 32);
  order_threads(threads);
  checks::launch_starts(launch, m.shared);

  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  std::vector<uint64_t> block_order;
  if (options.order == Options::Order::random) {
    block_order.resize(blocks);
    std::iota(block_order.begin(), block_order.end(), 0);
    std::shuffle(block_order.begin(), block_order.end(), m.random);
  }
  for (uint64_t i = 0; i < blocks && !m.failed; ++i) {
    uint64_t block = i;
    if (options.order == Options::Order::reverse) block = blocks - 1 - i;
    if (options.order == Options::Order::random) block = block_order[i];
    const uint64_t row = block / launch.grid.x;
    run_block({uint32_t(block % launch.grid.x), uint32_t(row % launch.grid.y),
               uint32_t(row / launch.grid.y)});
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

void yield(Thread& thread) { switch_to_scheduler(fiber_of(thread)); }

void exit_thread(Thread& thread) {
  finish(fiber_of(thread));
  std::abort();
}

uint64_t clock_ticks() {
  return uint64_t(std::chrono::steady_clock::now().time_since_epoch().count());
}

bool arrive_in_warp(Thread& thread, const Site& site, uint32_t mask, Meeting meeting) {
  Warp& warp = machine.warps[thread.warp];
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
  Warp& warp = machine.warps[thread.warp];
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
  release_barrier_if_complete(number);
  if (fiber.state != State::ready) switch_to_scheduler(fiber);
  return fiber.counted;
}

void arrive_at_barrier(Thread& thread, const Site& site, uint32_t number, uint32_t threads) {
  join_barrier(thread, site, true, number, threads, false);
  release_barrier_if_complete(number);
}

}  // namespace emulator
