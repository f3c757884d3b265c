// What this binary was built from and for: the facts of a bug report.
#pragma once

#include <map>
#include <string>

namespace setformer {

// Fixed at build time: version, compiler, build_type, instruction_sets, openmp, cuda,
// cuda_architectures, cuda_runtime, nvtx. Touches no device.
std::map<std::string, std::string> build_info();

}  // namespace setformer
