#include "counts.h"

#include <algorithm>
#include <array>
#include <map>
#include <string>

namespace emulator {
namespace counts {
namespace {

using Lanes = std::array<uint64_t, 32>;

std::vector<std::vector<Lanes>> executions;                // [stretch, warp of the cluster]
std::map<std::string, std::map<size_t, uint64_t>> totals;  // by kernel and stretch
const Kernel* kernel = nullptr;
std::string text;

void close() {
  for (size_t stretch = 0; stretch < executions.size(); ++stretch) {
    uint64_t times = 0;
    for (const Lanes& lanes : executions[stretch]) {
      times += *std::max_element(lanes.begin(), lanes.end());
    }
    if (times) totals[kernel->name][stretch] += times;
  }
  executions.clear();
}

}  // namespace

void launch_starts(const Launch& launch) { kernel = launch.kernel; }
void launch_ends() { close(); }
void cluster_starts() { close(); }

// Lines of kernel, stretch and times, with tabs between.
extern "C" __attribute__((visibility("default"))) const char* emulator_counts() {
  text.clear();
  for (const auto& [name, by_stretch] : totals) {
    for (const auto& [stretch, times] : by_stretch) {
      text += name + "\t" + std::to_string(stretch) + "\t" + std::to_string(times) + "\n";
    }
  }
  return text.c_str();
}

extern "C" __attribute__((visibility("default"))) void emulator_clear_counts() { totals.clear(); }

}  // namespace counts

void count(const Thread& thread, uint32_t stretch) {
  auto& all = counts::executions;
  if (all.size() <= stretch) all.resize(stretch + 1);
  auto& warps = all[stretch];
  const uint32_t warp = warp_in_cluster(thread);
  if (warps.size() <= warp) warps.resize(warp + 1);
  ++warps[warp][thread.lane];
}

}  // namespace emulator
