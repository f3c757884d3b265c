// Counts how often warps execute each stretch of a kernel: as often as their busiest lanes.
#pragma once

#include "machine.h"

namespace emulator::counts {

void launch_starts(const Launch& launch);
void launch_ends();
void cluster_starts();

}  // namespace emulator::counts
