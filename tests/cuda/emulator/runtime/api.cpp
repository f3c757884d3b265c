// For tests: options, errors, and launches without a host object.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "machine.h"

#define EMULATOR_API extern "C" __attribute__((visibility("default")))

EMULATOR_API long emulator_error_count() { return emulator::error_count; }
EMULATOR_API const char* emulator_last_message() { return emulator::last_message.c_str(); }
EMULATOR_API void emulator_clear_errors() {
  emulator::error_count = 0;
  emulator::last_message.clear();
}

// order: forward, reverse or random; mode: plain, address, race, trace or count; arithmetic: exact
// or perturbed. False for another word.
EMULATOR_API bool emulator_configure(const char* order, uint64_t seed, const char* mode,
                                     const char* arithmetic) {
  using emulator::Options;
  Options options;
  options.seed = seed;
  const std::string order_word = order, mode_word = mode, arithmetic_word = arithmetic;
  if (order_word == "reverse") {
    options.order = Options::Order::reverse;
  } else if (order_word == "random") {
    options.order = Options::Order::random;
  } else if (order_word != "forward") {
    return false;
  }
  options.address = mode_word == "address";
  options.race = mode_word == "race";
  options.trace = mode_word == "trace";
  const bool watching = options.address || options.race || options.trace;
  options.count = mode_word == "count";
  if (!watching && !options.count && mode_word != "plain") return false;
  options.perturbed = arithmetic_word == "perturbed";
  if (!options.perturbed && arithmetic_word != "exact") return false;
  emulator::options = options;
  emulator::watching = watching;
  emulator::counting = options.count;
  return true;
}

// Runs a kernel; arguments are its parameters' addresses. The cudaError_t, or -1 for an unknown
// kernel.
EMULATOR_API int emulator_run(const char* name, const uint32_t* grid, const uint32_t* block,
                              uint32_t shared_bytes, void** arguments) {
  const emulator::Kernel* kernel = emulator::find_kernel(name);
  if (!kernel) return -1;
  return emulator::run(*kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                       shared_bytes, arguments);
}

namespace {

// EMULATOR_ORDER, _SEED, _MODE and _ARITHMETIC set the options of a process.
const bool configured = [] {
  const auto variable = [](const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return value && *value ? value : otherwise;
  };
  const char* order = variable("EMULATOR_ORDER", "forward");
  const char* mode = variable("EMULATOR_MODE", "plain");
  const char* arithmetic = variable("EMULATOR_ARITHMETIC", "exact");
  const uint64_t seed = std::strtoull(variable("EMULATOR_SEED", "1"), nullptr, 10);
  if (emulator_configure(order, seed, mode, arithmetic)) return true;
  std::fprintf(stderr,
               "emulator: expected EMULATOR_ORDER forward, reverse or random, EMULATOR_MODE plain, "
               "address, race, trace or count and EMULATOR_ARITHMETIC exact or perturbed, got "
               "\"%s\", "
               "\"%s\" and \"%s\"\n",
               order, mode, arithmetic);
  std::abort();
}();

}  // namespace
