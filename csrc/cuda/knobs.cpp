#include "knobs.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace setformer::cuda {
namespace {

constexpr int kMostTilesShift = 10;

// The variable's value; empty if it is not set.
std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

[[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& value) {
  throw std::invalid_argument(std::string(name) + " must be " + expected + ", or unset, got '" +
                              value + "'");
}

bool read_switch(const char* name, bool otherwise) {
  const std::string value = variable(name);
  if (value.empty()) return otherwise;
  if (value != "on" && value != "off") refuse(name, "on or off", value);
  return value == "on";
}

// The logarithm of a power of two from 1 to 2^most.
int read_power_of_two(const char* name, int most, int otherwise) {
  const std::string value = variable(name);
  if (value.empty()) return otherwise;
  for (int shift = 0; shift <= most; ++shift) {
    if (value == std::to_string(1 << shift)) return shift;
  }
  refuse(name, "a power of two from 1 to " + std::to_string(1 << most), value);
}

}  // namespace

const Knobs& knobs() {
  static const Knobs chosen{read_switch("SETFORMER_CUDA_RESIDENT", true),
                            read_power_of_two("SETFORMER_CUDA_TILES", kMostTilesShift, 2)};
  return chosen;
}

}  // namespace setformer::cuda
