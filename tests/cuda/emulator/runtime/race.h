// Finds accesses to the same byte that nothing orders: between threads of a cluster (of a block
// where there are none) barriers, mbarriers and __syncwarp do, which vector clocks follow; between
// clusters of a launch nothing does. Threads are numbered through the cluster.
#pragma once

#include "machine.h"

namespace emulator::race {

void launch_starts(const Launch& launch);
void launch_ends();
void cluster_starts(const Thread& first);
uint32_t number_of(const Thread& thread);
void released(const Thread& thread, std::vector<uint32_t>& knowledge);
void acquired(const Thread& thread, const std::vector<uint32_t>& knowledge);
bool knows(const Thread& thread, uint32_t other, const std::vector<uint32_t>& known);
void joined(const Thread& thread, std::vector<uint32_t>& participants);
void passed(const std::vector<uint32_t>& participants);

void shared_access(const Thread& thread, const Site& site, Access access, uint32_t rank,
                   uint32_t offset, uint32_t bytes);
void global_access(const Thread& thread, const Site& site, Access access, uint64_t address,
                   uint32_t bytes);
void copy_issued(const Thread& thread, const Copy& copy);
void copy_arrived(const Thread& thread, const Site& site, const Copy& copy);
void store_arrived(const Thread& thread, const Site& site, uint32_t issuer,
                   const std::vector<uint32_t>& known, const uint8_t* to, uint32_t bytes,
                   std::vector<uint32_t>& arriving);

}  // namespace emulator::race
