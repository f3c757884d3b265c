// Blocks of a cluster (sm_90): their barrier, addresses in the shared memory of another, mbarriers
// and the stores that arrive there.
//
// An address of .shared::cluster is that of .shared::cta with the rank + 1 above its lowest 24
// bits; 0 there is the thread's own block.
#pragma once

#include "machine.h"

namespace emulator {

uint32_t map_shared(Thread& thread, const Site& site, uint32_t address, uint32_t rank);
uint64_t map_generic(Thread& thread, const Site& site, uint64_t address, uint32_t rank);
template <int bytes>
uint8_t* cluster_address(Thread& thread, const Site& site, Access access, uint32_t address);

void arrive_at_cluster(Thread& thread, const Site& site, bool releases);
void wait_for_cluster(Thread& thread, const Site& site);

void init_mbarrier(Thread& thread, const Site& site, uint8_t* barrier, uint32_t count);
void invalidate_mbarrier(Thread& thread, const Site& site, uint8_t* barrier);
void expect_bytes(Thread& thread, const Site& site, uint8_t* barrier, uint32_t bytes);
void arrive_at_mbarrier(Thread& thread, const Site& site, uint8_t* barrier, uint32_t count,
                        bool releases);
// Whether the phase of that parity is over. Stores arrive when the barrier they report to is asked,
// the latest moment there is.
bool has_completed(Thread& thread, const Site& site, uint8_t* barrier, uint32_t parity);
void store_async(Thread& thread, const Site& site, uint8_t* to, const void* data, uint32_t bytes,
                 uint8_t* barrier);

namespace cluster {
void starts();
void thread_leaves(Thread& thread);
}  // namespace cluster

}  // namespace emulator
