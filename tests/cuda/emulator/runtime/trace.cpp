#include "trace.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <tuple>
#include <unordered_map>

namespace emulator::trace {
namespace {

struct Totals {
  uint64_t requests = 0;  // of warps
  uint64_t bytes = 0;
  uint64_t cost = 0;   // passes over the banks, or sectors
  uint64_t least = 0;  // what these bytes need at best
};

struct Address {
  uint64_t at;
  uint32_t bytes, lane;
};

// The n-th time that each lane of a warp executes an instruction is one request of the warp.
struct Request {
  const Site* site;
  bool shared, write;
  uint32_t warp, number;
  auto operator<=>(const Request&) const = default;
};

std::map<Request, std::vector<Address>> open;
std::map<std::tuple<const Site*, uint32_t>, uint32_t> counts;  // by site and thread
// Sites live as long as their library; kernels that are instances of one template keep apart.
std::map<std::tuple<const char*, const Site*, bool, bool>, Totals> totals;
const char* kernel = "";
std::string text;

// Lanes go in phases of 128 bytes; in each, a bank gives one 4-byte word a pass.
void count_shared(const std::vector<Address>& addresses, Totals& total) {
  const uint32_t bytes = addresses.front().bytes;
  const uint32_t lanes_per_phase = bytes <= 4 ? 32 : 128 / bytes;
  std::map<uint32_t, std::array<std::set<uint64_t>, 32>> phases;
  for (const Address& address : addresses) {
    auto& banks = phases[address.lane / lanes_per_phase];
    for (uint64_t word = address.at / 4; word <= (address.at + bytes - 1) / 4; ++word) {
      banks[word % 32].insert(word);
    }
  }
  for (const auto& [phase, banks] : phases) {
    size_t passes = 0;
    for (const auto& words : banks) passes = std::max(passes, words.size());
    total.cost += passes;
  }
  total.least += phases.size();
}

void count_global(const std::vector<Address>& addresses, Totals& total) {
  std::set<uint64_t> sectors, bytes;
  for (const Address& address : addresses) {
    for (uint32_t i = 0; i < address.bytes; ++i) {
      bytes.insert(address.at + i);
      sectors.insert((address.at + i) / 32);
    }
  }
  total.cost += sectors.size();
  total.least += (bytes.size() + 31) / 32;
}

void close() {
  for (const auto& [request, addresses] : open) {
    Totals& total = totals[{kernel, request.site, request.shared, request.write}];
    ++total.requests;
    for (const Address& address : addresses) total.bytes += address.bytes;
    if (request.shared) {
      count_shared(addresses, total);
    } else {
      count_global(addresses, total);
    }
  }
  open.clear();
  counts.clear();
}

}  // namespace

void launch_starts(const Launch& launch) { kernel = launch.kernel->name; }
void launch_ends() { close(); }
void cluster_starts() { close(); }

void access(const Thread& thread, const Site& site, Access access, bool shared, uint64_t address,
            uint32_t bytes) {
  // One instruction may touch shared and global memory: cp.async.
  const uint32_t warp = warp_in_cluster(thread);
  const uint32_t number = counts[{&site, (warp * 32 + thread.lane) * 2 + shared}]++;
  open[{&site, shared, access != Access::read, warp, number}].push_back(
      {address, bytes, thread.lane});
}

// Lines of kernel, file, line, instruction, space, direction, requests, bytes, cost and least, with
// tabs between.
extern "C" __attribute__((visibility("default"))) const char* emulator_trace() {
  text.clear();
  for (const auto& [key, total] : totals) {
    const auto& [name, site, shared, write] = key;
    text += std::string(name) + "\t" + site->file + "\t" + std::to_string(site->line) + "\t" +
            site->instruction + "\t" + (shared ? "shared" : "global") + "\t" +
            (write ? "write" : "read") + "\t" + std::to_string(total.requests) + "\t" +
            std::to_string(total.bytes) + "\t" + std::to_string(total.cost) + "\t" +
            std::to_string(total.least) + "\n";
  }
  return text.c_str();
}

extern "C" __attribute__((visibility("default"))) void emulator_clear_trace() { totals.clear(); }

}  // namespace emulator::trace
