// What the checking modes are told of: accesses, and what orders them.
#pragma once

#include "machine.h"

namespace emulator::checks {

void launch_starts(const Launch& launch, uint8_t* shared);
void launch_ends();
void block_starts(const Thread& first);
void barrier_joined(const Thread& thread, uint32_t barrier);
void barrier_passed(uint32_t barrier);  // by all that joined since it last passed
void warp_joined(const Thread& thread);
void warp_passed(const Thread& thread, uint32_t mask);
void copy_issued(const Thread& thread, const Copy& copy);
void copy_arrived(const Thread& thread, const Site& site, const Copy& copy);

}  // namespace emulator::checks
