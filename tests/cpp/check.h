// CHECK for the C++ tests: counts, reports, and lets main return how it went.
#pragma once

#include <cmath>
#include <cstdio>

namespace check {

inline int passed = 0, failed = 0;

inline bool that(bool condition, const char* file, int line, const char* text) {
  ++(condition ? passed : failed);
  if (!condition) std::printf("%s:%d: failed: %s\n", file, line, text);
  return condition;
}

inline bool close(double actual, double expected, double tolerance, const char* file, int line,
                  const char* text) {
  const bool fits = std::abs(actual - expected) <= tolerance;
  ++(fits ? passed : failed);
  if (!fits) {
    std::printf("%s:%d: failed: %s: %.17g, expected %.17g within %.2g\n", file, line, text, actual,
                expected, tolerance);
  }
  return fits;
}

inline int report(const char* name) {
  std::printf("%s: %d passed, %d failed\n", name, passed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(condition) check::that((condition), __FILE__, __LINE__, #condition)
#define CHECK_CLOSE(actual, expected, tolerance) \
  check::close((actual), (expected), (tolerance), __FILE__, __LINE__, #actual)
