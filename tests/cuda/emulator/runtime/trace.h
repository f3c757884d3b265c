// Counts, for each instruction, what a warp's access costs: passes over the 32 banks of shared
// memory, or 32-byte sectors of global memory.
#pragma once

#include "machine.h"

namespace emulator::trace {

void launch_starts(const Launch& launch);
void launch_ends();
void cluster_starts();
void access(const Thread& thread, const Site& site, Access access, bool shared, uint64_t address,
            uint32_t bytes);

}  // namespace emulator::trace
