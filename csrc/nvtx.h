// Ranges that Nsight Systems and other NVTX tools show, in the domain "setformer_ext".
//
// Where no tool listens a range costs one test of a pointer: NVTX then gives no domain, and no text
// is formed. The headers come with the CUDA toolkit; a build that does not find them has no ranges.
#pragma once

#include <cinttypes>
#include <cstdio>

#include "set_attention.h"

#if __has_include(<nvtx3/nvToolsExt.h>)
#define SETFORMER_NVTX 1
#include <nvtx3/nvToolsExt.h>
#else
#define SETFORMER_NVTX 0
#endif

namespace setformer::nvtx {

#if SETFORMER_NVTX

inline nvtxDomainHandle_t domain() {
  static const nvtxDomainHandle_t handle = nvtxDomainCreateA("setformer_ext");
  return handle;
}

// From construction to destruction, named "set_attention_forward float32 B8 H3 N3136 M49 D32 Dv32
// T5", with Nq where queries are not the keys.
class Range {
 public:
  Range(const char* operation, const ForwardParams& p) {
    if (domain() == nullptr) return;
    static const char* const types[] = {"float32", "float64", "bfloat16", "float16"};
    char queries[32] = "";
    if (p.cross) std::snprintf(queries, sizeof queries, " Nq%" PRId64, p.queries);
    char text[256];
    std::snprintf(text, sizeof text,
                  "%s %s B%" PRId64 " H%" PRId64 " N%" PRId64 "%s M%" PRId64 " D%" PRId64
                  " Dv%" PRId64 " T%" PRId64,
                  operation, types[int(p.type)], p.batch, p.heads, p.tokens, queries, p.references,
                  p.depth, p.value_depth, p.iterations);
    nvtxEventAttributes_t event{};
    event.version = NVTX_VERSION;
    event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
    event.messageType = NVTX_MESSAGE_TYPE_ASCII;
    event.message.ascii = text;
    nvtxDomainRangePushEx(domain(), &event);
  }
  ~Range() {
    if (domain() != nullptr) nvtxDomainRangePop(domain());
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

#else

class Range {
 public:
  Range(const char*, const ForwardParams&) {}
};

#endif

}  // namespace setformer::nvtx
