// Chooses the instruction set and the number of threads at run time.
#include <dirent.h>
#include <omp.h>
#include <pthread.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace setformer::cpu {
namespace {

struct Backend {
  const char* name;
  Status (*forward)(const ForwardParams&);
  Status (*backward)(const BackwardParams&);
};

// The instruction sets that were compiled and that this processor can run, best last.
std::vector<Backend> supported_backends() {
  std::vector<Backend> backends = {{"baseline", baseline::forward, baseline::backward}};
#if defined(SETFORMER_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    backends.push_back({"avx2", avx2::forward, avx2::backward});
  }
#endif
#if defined(SETFORMER_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    backends.push_back({"avx512", avx512::forward, avx512::backward});
#if defined(SETFORMER_HAVE_AVX512_BF16)
    if (__builtin_cpu_supports("avx512bf16")) {
      // AMD's processors compute its products twice as fast as those of float32, Intel's half as
      // fast: there they are not the best.
      const auto place = __builtin_cpu_is("amd") ? backends.end() : backends.end() - 1;
      backends.insert(place, {"avx512_bf16", avx512_bf16::forward, avx512_bf16::backward});
    }
#endif
  }
#endif
  return backends;
}

std::string names_of(const std::vector<Backend>& backends) {
  std::string names;
  for (const Backend& backend : backends) {
    names += (names.empty() ? "" : " ") + std::string(backend.name);
  }
  return names;
}

Backend choose() {
  const std::vector<Backend> backends = supported_backends();
  const char* wanted = std::getenv("SETFORMER_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return backends.back();
  for (const Backend& backend : backends) {
    if (wanted == std::string(backend.name)) return backend;
  }
  throw std::invalid_argument("SETFORMER_CPU_ISA must be one of: " + names_of(backends) +
                              " (what was compiled and this processor has), got '" + wanted + "'");
}

const Backend& chosen() {
  static const Backend backend = choose();
  return backend;
}

bool had_threads = false;  // several, in the process that called fork (in a child: its parent)
bool threads_are_lost = false;

void before_fork() {
  int threads = 0;
  if (DIR* tasks = opendir("/proc/self/task")) {
    while (const dirent* entry = readdir(tasks)) threads += entry->d_name[0] != '.';
    closedir(tasks);
  }
  had_threads = threads != 1;
}
void after_fork_in_child() { threads_are_lost = threads_are_lost || had_threads; }

const int registered = pthread_atfork(before_fork, nullptr, after_fork_in_child);

}  // namespace

int available_threads() { return registered == 0 && threads_are_lost ? 1 : omp_get_max_threads(); }

double least_parallel_work() {
  static const double work = [] {
    const char* given = std::getenv("SETFORMER_LEAST_PARALLEL_WORK");
    return given == nullptr || *given == '\0' ? 4e6 : std::atof(given);  // about 100 microseconds
  }();
  return work;
}

Status set_attention_forward(const ForwardParams& params) { return chosen().forward(params); }
Status set_attention_backward(const BackwardParams& params) { return chosen().backward(params); }

const char* instruction_set() { return chosen().name; }
const char* supported_instruction_sets() {
  static const std::string names = names_of(supported_backends());
  return names.c_str();
}

}  // namespace setformer::cpu
