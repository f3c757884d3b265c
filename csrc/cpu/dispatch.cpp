// Chooses the instruction set and the number of threads at run time.
#include <omp.h>
#include <pthread.h>

#include <atomic>
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
  Status (*plan)(const PlanParams&);
};

// What was compiled and this processor can run, best last.
std::vector<Backend> supported_backends() {
  std::vector<Backend> backends = {
      {"baseline", baseline::forward, baseline::backward, baseline::plan}};
#if defined(SETFORMER_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    backends.push_back({"avx2", avx2::forward, avx2::backward, avx2::plan});
  }
#endif
#if defined(SETFORMER_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    backends.push_back({"avx512", avx512::forward, avx512::backward, avx512::plan});
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

std::atomic<bool> threads_were_used{false}, threads_are_lost{false};

void after_fork_in_child() { threads_are_lost = threads_were_used.load(); }

}  // namespace

int available_threads() {
  static const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);
  (void)registered;
  const int threads = threads_are_lost ? 1 : omp_get_max_threads();
  if (threads > 1) threads_were_used = true;
  return threads;
}

Status set_attention_forward(const ForwardParams& params) { return chosen().forward(params); }
Status set_attention_backward(const BackwardParams& params) { return chosen().backward(params); }
Status transport_plan(const PlanParams& params) { return chosen().plan(params); }

const char* instruction_set() { return chosen().name; }
const char* supported_instruction_sets() {
  static const std::string names = names_of(supported_backends());
  return names.c_str();
}

}  // namespace setformer::cpu
