#include "cluster.h"

#include <cstring>
#include <map>

#include "checks.h"

namespace emulator {
namespace {

constexpr uint32_t kRankShift = 24;

// What is known of the threads that have arrived, for those that wait (race.h).
using Knowledge = std::vector<uint32_t>;

// Threads arrive; when the phase is over, what they knew is there for those that wait.
struct Phases {
  uint32_t arrived = 0;
  uint64_t phase = 0;
  Knowledge arriving, passed;

  void next() {
    arrived = 0;
    ++phase;
    passed = std::move(arriving);
    arriving.clear();
  }
};

struct ClusterBarrier : Phases {
  std::map<const Thread*, uint64_t> phase_of;  // of those that have arrived and not waited yet
};
ClusterBarrier cluster_barrier;

struct Store {
  uint8_t* to;
  std::vector<uint8_t> data;
  uint32_t issuer;
  const Site* site;
  Knowledge known;
};

// A phase is over when all have arrived and no byte that was expected is still to come.
struct MemoryBarrier : Phases {
  uint32_t count = 0;
  int64_t bytes = 0;
  uint32_t initialiser = 0;
  Knowledge initial;
  std::vector<Store> stores;
};
std::map<uint8_t*, MemoryBarrier> memory_barriers;

void pass_cluster_barrier() {
  const uint32_t arrived = cluster_barrier.arrived;
  if (arrived > 0 && arrived >= threads_left()) cluster_barrier.next();
}

MemoryBarrier& at(Thread& thread, const Site& site, uint8_t* barrier) {
  const auto found = memory_barriers.find(barrier);
  if (found == memory_barriers.end()) {
    fail(thread, site, kLaunchFailure, "there is no mbarrier: nobody has initialised it");
  }
  if (!checks::knows(thread, found->second.initialiser, found->second.initial)) {
    fail(thread, site, kLaunchFailure,
         "race: nothing orders this use of an mbarrier after its initialisation");
  }
  return found->second;
}

// The stores that report to a barrier arrive.
void deliver(const Thread& thread, MemoryBarrier& barrier) {
  for (const Store& store : barrier.stores) {
    std::memcpy(store.to, store.data.data(), store.data.size());
    checks::store_arrived(thread, *store.site, store.issuer, store.known, store.to,
                          uint32_t(store.data.size()), barrier.arriving);
    barrier.bytes -= int64_t(store.data.size());
  }
  barrier.stores.clear();
}

void pass_if_complete(MemoryBarrier& barrier) {
  if (barrier.arrived >= barrier.count && barrier.bytes == 0) barrier.next();
}

uint8_t* in_block(Thread& thread, const Site& site, Access access, uint32_t rank, uint32_t offset,
                  uint32_t bytes) {
  if (rank >= thread.launch.ranks) {
    fail(thread, site, kIllegalAddress, "access beyond the blocks of the cluster");
  }
  if (threads_left(rank) == 0) {
    fail(thread, site, kIllegalAddress,
         "access to the shared memory of a block that has left, rank " + std::to_string(rank));
  }
  check_shared(thread, site, access, rank, offset, bytes);
  return first_of_cluster(thread) + size_t{rank} * kSharedWindow + offset;
}

}  // namespace

uint32_t map_shared(Thread& thread, const Site& site, uint32_t address, uint32_t rank) {
  if (rank >= thread.launch.ranks) {
    fail(
        thread, site, kIllegalAddress,
        "rank " + std::to_string(rank) + " of a cluster of " + std::to_string(thread.launch.ranks));
  }
  return (rank + 1) << kRankShift | (address & ((1u << kRankShift) - 1));
}

uint64_t map_generic(Thread& thread, const Site& site, uint64_t address, uint32_t rank) {
  if (!in_shared(thread, address)) {
    fail(thread, site, kIllegalAddress, "mapa of an address that is not in shared memory");
  }
  const uint32_t offset = uint32_t(address - uint64_t(thread.shared));
  return uint64_t(
      cluster_address<1>(thread, site, Access::issue, map_shared(thread, site, offset, rank)));
}

template <int bytes>
uint8_t* cluster_address(Thread& thread, const Site& site, Access access, uint32_t address) {
  const uint32_t offset = address & ((1u << kRankShift) - 1), high = address >> kRankShift;
  return in_block(thread, site, access, high == 0 ? thread.rank : high - 1, offset, bytes);
}
uint8_t* of_another_block(Thread& thread, const Site& site, Access access, uint64_t address,
                          uint32_t bytes) {
  const SharedPlace place = shared_place(thread, reinterpret_cast<const uint8_t*>(address));
  return in_block(thread, site, access, place.rank, place.offset, bytes);
}
template uint8_t* cluster_address<1>(Thread&, const Site&, Access, uint32_t);
template uint8_t* cluster_address<2>(Thread&, const Site&, Access, uint32_t);
template uint8_t* cluster_address<4>(Thread&, const Site&, Access, uint32_t);
template uint8_t* cluster_address<8>(Thread&, const Site&, Access, uint32_t);
template uint8_t* cluster_address<16>(Thread&, const Site&, Access, uint32_t);

void arrive_at_cluster(Thread& thread, const Site& site, bool releases) {
  ClusterBarrier& barrier = cluster_barrier;
  if (!barrier.phase_of.emplace(&thread, barrier.phase).second) {
    fail(thread, site, kLaunchFailure, "arrives at the cluster's barrier a second time");
  }
  if (releases) checks::released(thread, barrier.arriving);
  has_progressed();
  ++barrier.arrived;
  pass_cluster_barrier();
}

void wait_for_cluster(Thread& thread, const Site& site) {
  ClusterBarrier& barrier = cluster_barrier;
  const auto arrival = barrier.phase_of.find(&thread);
  if (arrival == barrier.phase_of.end()) {
    fail(thread, site, kLaunchFailure, "waits at the cluster's barrier and has not arrived");
  }
  while (barrier.phase == arrival->second) poll(thread, site);
  has_progressed();
  barrier.phase_of.erase(arrival);
  checks::acquired(thread, barrier.passed);
}

void init_mbarrier(Thread& thread, const Site& site, uint8_t* barrier, uint32_t count) {
  if (count == 0) fail(thread, site, kLaunchFailure, "an mbarrier of no arrivals");
  MemoryBarrier& own = memory_barriers[barrier] = {};
  own.count = count;
  own.initialiser = checks::number_of(thread);
  checks::released(thread, own.initial);
}

void invalidate_mbarrier(Thread& thread, const Site& site, uint8_t* barrier) {
  at(thread, site, barrier);
  memory_barriers.erase(barrier);
}

void expect_bytes(Thread& thread, const Site& site, uint8_t* barrier, uint32_t bytes) {
  at(thread, site, barrier).bytes += bytes;
}

void arrive_at_mbarrier(Thread& thread, const Site& site, uint8_t* barrier, uint32_t count,
                        bool releases) {
  MemoryBarrier& own = at(thread, site, barrier);
  has_progressed();
  if (own.arrived + count > own.count) {
    fail(thread, site, kLaunchFailure, "more arrive at an mbarrier than it counts");
  }
  if (releases) checks::released(thread, own.arriving);
  own.arrived += count;
  pass_if_complete(own);
}

bool has_completed(Thread& thread, const Site& site, uint8_t* barrier, uint32_t parity) {
  MemoryBarrier& own = at(thread, site, barrier);
  if (!own.stores.empty()) {
    deliver(thread, own);
    pass_if_complete(own);
  }
  // The phase of a parity is over when the one at hand has the other.
  if ((own.phase & 1) == (parity & 1)) {
    poll(thread, site);
    return false;
  }
  has_progressed();
  checks::acquired(thread, own.passed);
  return true;
}

void store_async(Thread& thread, const Site& site, uint8_t* to, const void* data, uint32_t bytes,
                 uint8_t* barrier) {
  if (shared_place(thread, to).rank != shared_place(thread, barrier).rank) {
    fail(thread, site, kLaunchFailure, "st.async reports to an mbarrier of another block");
  }
  Store store{to, {}, checks::number_of(thread), &site, {}};
  const auto* from = static_cast<const uint8_t*>(data);
  store.data.assign(from, from + bytes);
  checks::released(thread, store.known);
  has_progressed();
  at(thread, site, barrier).stores.push_back(std::move(store));
}

namespace cluster {

void starts() {
  cluster_barrier = {};
  memory_barriers.clear();
}

void thread_leaves(Thread& thread) {
  ClusterBarrier& barrier = cluster_barrier;
  const auto arrival = barrier.phase_of.find(&thread);
  if (arrival != barrier.phase_of.end()) {
    if (arrival->second == barrier.phase) --barrier.arrived;
    barrier.phase_of.erase(arrival);
  }
  pass_cluster_barrier();
  if (threads_left(thread.rank) > 0) return;
  // What was never waited for may come at any time up to now, and later to nobody's memory.
  for (auto& [place, memory_barrier] : memory_barriers) {
    if (shared_place(thread, place).rank != thread.rank || memory_barrier.stores.empty()) continue;
    const Site& site = *memory_barrier.stores.front().site;
    deliver(thread, memory_barrier);
    report(thread, site, kLaunchFailure, "a block left before it waited for this store to it");
  }
}

}  // namespace cluster
}  // namespace emulator
