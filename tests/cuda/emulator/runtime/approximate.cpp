// The approximate functions of a GPU. They err by a few units in the last place, which differ
// between devices. Exact, they are rounded from double; perturbed, they err by as much as the PTX
// manual allows, up or down by a hash of the function, its inputs and the seed: as on a GPU the
// same input gives the same result. What the manual's tables of special inputs fix is always so.
#include <bit>
#include <cmath>
#include <cstdint>

#include "machine.h"
#include "values.h"

namespace emulator {
namespace {

constexpr double kPi = 3.14159265358979323846;

enum class Function : uint64_t { rcp, sqrt, rsqrt, ex2, lg2, sin, cos, tanh, div, div_full };

// +1 or -1, by the mixing function of splitmix64.
double sign_of(Function function, float a, float b) {
  uint64_t x = options.seed * 16 + uint64_t(function);
  for (const float input : {a, b}) {
    x = (x ^ std::bit_cast<uint32_t>(input)) + 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    x ^= x >> 31;
  }
  return x & 1 ? 1 : -1;
}

double unit_in_the_last_place(double x) {
  return std::ldexp(1.0, std::max(std::ilogb(x), -126) - 23);
}

// The number that is furthest from the exact result within `bound` of it, on the side that the hash
// says. Results of 0, infinity and NaN have no error.
float result(Function function, double exact, double bound, float a, float b = 0) {
  const float nearest = float(exact);
  if (!options.perturbed || exact == 0 || !std::isfinite(nearest)) return nearest;
  const double wanted = exact + sign_of(function, a, b) * bound;
  float found = float(wanted);
  if (std::fabs(found - exact) > bound) found = std::nextafter(found, nearest);
  return std::isfinite(found) ? found : nearest;
}

}  // namespace

// "The maximum ulp error is 1 across the full range of inputs."
float rcp_approx(float x) {
  const double exact = 1 / double(x);
  return result(Function::rcp, exact, unit_in_the_last_place(exact), x);
}

// "The maximum relative error over the entire positive finite floating-point range is 2^-23."
float sqrt_approx(float x) {
  const double exact = std::sqrt(double(x));
  return result(Function::sqrt, exact, exact * 0x1p-23, x);
}

// "The maximum relative error over the entire positive finite floating-point range is 2^-22.9."
float rsqrt_approx(float x) {
  const double exact = 1 / std::sqrt(double(x));
  return result(Function::rsqrt, exact, exact * std::exp2(-22.9), x);
}

// "The maximum ulp error is 2 ulp from correctly rounded result"; of 0 it is 1.
float ex2_approx(float x) {
  if (x == 0) return 1;
  const double nearest = float(std::exp2(double(x)));
  return result(Function::ex2, nearest, 2 * unit_in_the_last_place(nearest), x);
}

// "The maximum absolute error is 2^-22 when the input operand is in the range (0.5, 2). For
// positive finite inputs outside of this interval, maximum relative error is 2^-22." So that of 1
// need not be 0.
float lg2_approx(float x) {
  const double exact = std::log2(double(x));
  const bool near_one = x > 0.5f && x < 2;
  if (options.perturbed && x == 1) return float(sign_of(Function::lg2, x, 0) * 0x1p-22);
  return result(Function::lg2, exact, near_one ? 0x1p-22 : std::fabs(exact) * 0x1p-22, x);
}

// "Maximum absolute error 2^-20.5 in [-2 pi, 2 pi] and 2^-14.7 in [-100 pi, 100 pi]"; beyond there
// is no bound.
float sin_approx(float x) {
  const double exact = std::sin(double(x));
  return result(Function::sin, exact, std::exp2(std::fabs(x) <= 2 * kPi ? -20.5 : -14.7), x);
}
float cos_approx(float x) {
  const double exact = std::cos(double(x));
  return result(Function::cos, exact, std::exp2(std::fabs(x) <= 2 * kPi ? -20.5 : -14.7), x);
}

// "The maximum relative error over the entire floating point range is 2^-11."
float tanh_approx(float x) {
  const double exact = std::tanh(double(x));
  return result(Function::tanh, exact, std::isinf(x) ? 0 : std::fabs(exact) * 0x1p-11, x);
}

// "For |b| in [2^-126, 2^126], the maximum ulp error is 2. For 2^126 < |b| < 2^128, if a is
// infinity, div.approx.f32 returns NaN, otherwise it returns a sign-preserving zero."
float div_approx(float a, float b) {
  if (std::fabs(b) > 0x1p126f && !std::isinf(b) && !std::isnan(a)) {
    return std::isinf(a) ? canonical_nan<float>() : 0.0f * a * std::copysign(1.0f, b);
  }
  const double exact = double(a) / double(b);
  return result(Function::div, exact, 2 * unit_in_the_last_place(exact), a, b);
}

// "The maximum ulp error is 2 across the full range of inputs."
float div_full(float a, float b) {
  const double exact = double(a) / double(b);
  return result(Function::div_full, exact, 2 * unit_in_the_last_place(exact), a, b);
}

}  // namespace emulator
