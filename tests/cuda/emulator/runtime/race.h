// Finds accesses to the same byte that nothing orders: between threads of a block by barriers and
// __syncwarp, which vector clocks follow; between blocks of a launch nothing does.
#pragma once

#include "machine.h"

namespace emulator::race {

void launch_starts(const Launch& launch);
void launch_ends();
void block_starts(const Thread& first);
void joined(const Thread& thread, std::vector<uint32_t>& participants);
void passed(const std::vector<uint32_t>& participants);

void shared_access(const Thread& thread, const Site& site, Access access, uint32_t offset,
                   uint32_t bytes);
void global_access(const Thread& thread, const Site& site, Access access, uint64_t address,
                   uint32_t bytes);
void copy_issued(const Thread& thread, const Copy& copy);
void copy_arrived(const Thread& thread, const Site& site, const Copy& copy);

}  // namespace emulator::race
