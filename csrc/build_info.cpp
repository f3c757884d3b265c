#include "build_info.h"

#include "build_facts.h"
#include "cuda/device.h"
#include "nvtx.h"

namespace setformer {

std::map<std::string, std::string> build_info() {
  return {
      {"version", SETFORMER_VERSION},
      {"compiler", SETFORMER_COMPILER},
      {"build_type", SETFORMER_BUILD_TYPE},
      {"instruction_sets", SETFORMER_INSTRUCTION_SETS},
      {"openmp", std::to_string(_OPENMP)},
      {"cuda", SETFORMER_CUDA_DECISION},
      {"cuda_architectures", SETFORMER_CUDA_ARCHITECTURES},
      {"cuda_runtime", cuda::runtime_version()},
      {"nvtx", SETFORMER_NVTX ? "yes" : "no"},
  };
}

}  // namespace setformer
