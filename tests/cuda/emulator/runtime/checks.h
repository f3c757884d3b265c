// What the checking modes are told of: accesses, and what orders them.
#pragma once

#include "machine.h"

namespace emulator::checks {

void launch_starts(const Launch& launch, uint8_t* shared);
void launch_ends();
void cluster_starts(const Thread& first);
void barrier_joined(const Thread& thread, uint32_t barrier);
void barrier_passed(uint32_t rank, uint32_t barrier);  // by all that joined since it last passed
void warp_joined(const Thread& thread);
void warp_passed(const Thread& thread, uint32_t mask);
void copy_issued(const Thread& thread, const Copy& copy);
void copy_arrived(const Thread& thread, const Site& site, const Copy& copy);

// What a thread knows to have happened is added to `knowledge`, and with `acquired` taken from it.
void released(const Thread& thread, std::vector<uint32_t>& knowledge);
void acquired(const Thread& thread, const std::vector<uint32_t>& knowledge);
// Whether the thread knows what `other` did when it released `known`.
bool knows(const Thread& thread, uint32_t other, const std::vector<uint32_t>& known);
// Of a thread among those of the cluster.
uint32_t number_of(const Thread& thread);
// What `issuer` has stored, of which it knew `known`, has come, for those that `arriving` reaches.
void store_arrived(const Thread& thread, const Site& site, uint32_t issuer,
                   const std::vector<uint32_t>& known, const uint8_t* to, uint32_t bytes,
                   std::vector<uint32_t>& arriving);

}  // namespace emulator::checks
