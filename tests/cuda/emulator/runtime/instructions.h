// All that a translated kernel includes.
#pragma once

#include "cluster.h"
#include "machine.h"
#include "values.h"
#include "warp.h"

namespace emulator {

template <class T>
inline T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
inline void store(uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

// Threads run one at a time, so that nothing comes between the load and the store.
template <class T, class Change>
inline T change(uint8_t* place, const Change& change) {
  const T old = load<T>(place);
  store<T>(place, change(old));
  return old;
}
template <class T>
inline T sum(T a, T b) {
  if constexpr (std::is_integral_v<T>) return T(uint64_t(a) + uint64_t(b));
  if constexpr (std::is_floating_point_v<T>) return a + b;
  if constexpr (IsPair<T>::value) return half_add(a, b);
}
#define EMULATOR_ATOMIC(name, expression)                          \
  template <class T>                                               \
  inline T atomic_##name(uint8_t* place, T value) {                \
    return change<T>(place, [=](T old) { return T(expression); }); \
  }
EMULATOR_ATOMIC(add, sum(old, value))
EMULATOR_ATOMIC(min, std::min(old, value))
EMULATOR_ATOMIC(max, std::max(old, value))
EMULATOR_ATOMIC(and, old& value)
EMULATOR_ATOMIC(or, old | value)
EMULATOR_ATOMIC(xor, old ^ value)
EMULATOR_ATOMIC(exch, ((void)old, value))
EMULATOR_ATOMIC(inc, old >= value ? 0 : old + 1)
EMULATOR_ATOMIC(dec, old == 0 || old > value ? value : old - 1)
#undef EMULATOR_ATOMIC
template <class T>
inline T atomic_cas(uint8_t* place, T expected, T value) {
  return change<T>(place, [=](T old) { return old == expected ? value : old; });
}

}  // namespace emulator
