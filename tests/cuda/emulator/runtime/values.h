// The meaning of PTX arithmetic on values. Compile with -ffp-contract=off.
#pragma once

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace emulator {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};
template <class T>
struct Pair {
  T low, high;
};

// A value's bits; integers stay what they are, so that assignment extends them by their own sign.
template <class T>
[[gnu::always_inline]] inline auto bits(T value) {
  if constexpr (std::is_integral_v<T>) {
    return value;
  } else if constexpr (sizeof(T) == 2) {
    return __builtin_bit_cast(uint16_t, value);
  } else if constexpr (sizeof(T) == 4) {
    return __builtin_bit_cast(uint32_t, value);
  } else {
    return __builtin_bit_cast(uint64_t, value);
  }
}

// A register's bits seen as a T; a register may be wider than T.
template <class T, class S>
[[gnu::always_inline]] inline T as(S register_value) {
  const auto word = bits(register_value);
  if constexpr (std::is_integral_v<T>) {
    return T(word);
  } else if constexpr (sizeof(T) == 2) {
    return __builtin_bit_cast(T, uint16_t(word));
  } else if constexpr (sizeof(T) == 4) {
    return __builtin_bit_cast(T, uint32_t(word));
  } else {
    return __builtin_bit_cast(T, uint64_t(word));
  }
}

enum class Rounding { nearest, zero, down, up };

constexpr int host_rounding(Rounding rounding) {
  switch (rounding) {
    case Rounding::zero:
      return FE_TOWARDZERO;
    case Rounding::down:
      return FE_DOWNWARD;
    case Rounding::up:
      return FE_UPWARD;
    default:
      return FE_TONEAREST;
  }
}

// Computes with the host's rounding mode changed. The volatile copies keep the compiler from
// moving the operation out of the two calls.
template <Rounding rounding, class Operation, class... T>
inline auto rounded(Operation operation, T... inputs) {
  if constexpr (rounding == Rounding::nearest) {
    return operation(inputs...);
  } else {
    return [&operation](auto... copies) {
      std::fesetround(host_rounding(rounding));
      volatile auto result = operation(copies...);
      std::fesetround(FE_TONEAREST);
      return decltype(operation(copies...))(result);
    }(static_cast<const volatile T&>(inputs)...);
  }
}

// What a GPU gives for NaN of its own making.
template <class T>
inline T canonical_nan() {
  if constexpr (sizeof(T) == 4) {
    return std::bit_cast<T>(0x7fffffffu);
  } else {
    return std::bit_cast<T>(uint64_t{0xfff8000000000000u});
  }
}

inline float ftz(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

template <class T>
inline T saturate(T x) {
  return x > T(0) ? std::min(x, T(1)) : T(0);  // NaN becomes 0
}

// Floating point

template <Rounding r, class T>
inline T add(T a, T b) {
  return rounded<r>([](T x, T y) { return x + y; }, a, b);
}
template <Rounding r, class T>
inline T sub(T a, T b) {
  return rounded<r>([](T x, T y) { return x - y; }, a, b);
}
template <Rounding r, class T>
inline T mul(T a, T b) {
  return rounded<r>([](T x, T y) { return x * y; }, a, b);
}
template <Rounding r, class T>
inline T div(T a, T b) {
  return rounded<r>([](T x, T y) { return x / y; }, a, b);
}
template <Rounding r, class T>
inline T fma(T a, T b, T c) {
  return rounded<r>([](T x, T y, T z) { return std::fma(x, y, z); }, a, b, c);
}
template <Rounding r, class T>
inline T mad(T a, T b, T c) {
  return fma<r>(a, b, c);
}
template <Rounding r, class T>
inline T rcp(T a) {
  return rounded<r>([](T x) { return T(1) / x; }, a);
}
template <Rounding r, class T>
inline T sqrt(T a) {
  return rounded<r>([](T x) { return std::sqrt(x); }, a);
}

// The approximate functions of a GPU, see approximate.cpp.
float rcp_approx(float x);
float sqrt_approx(float x);
float rsqrt_approx(float x);
float ex2_approx(float x);
float lg2_approx(float x);
float sin_approx(float x);
float cos_approx(float x);
float tanh_approx(float x);
float div_approx(float a, float b);
float div_full(float a, float b);

// rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 see and give the upper word only.
inline double upper_word(double x) {
  const uint64_t word = std::bit_cast<uint64_t>(x) & 0xffffffff00000000u;
  const double upper = std::bit_cast<double>(word);
  return std::fabs(upper) < 0x1p-1022 ? std::copysign(0.0, x) : upper;
}
inline double rcp_approx_ftz(double x) { return upper_word(1 / upper_word(x)); }
inline double rsqrt_approx_ftz(double x) { return upper_word(1 / std::sqrt(upper_word(x))); }

// -0 is less than +0; a NaN loses against a number, or wins with .NaN.
template <bool keep_nan, class T>
inline T float_min(T a, T b) {
  if (std::isnan(a) || std::isnan(b)) {
    if (keep_nan || (std::isnan(a) && std::isnan(b))) return canonical_nan<T>();
    return std::isnan(a) ? b : a;
  }
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <bool keep_nan, class T>
inline T float_max(T a, T b) {
  if (std::isnan(a) || std::isnan(b)) {
    if (keep_nan || (std::isnan(a) && std::isnan(b))) return canonical_nan<T>();
    return std::isnan(a) ? b : a;
  }
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
template <class T>
inline T float_abs(T x) {
  return std::fabs(x);
}
template <class T>
inline T float_neg(T x) {
  return -x;
}

template <class T>
inline bool is_finite(T x) {
  return std::isfinite(x);
}
template <class T>
inline bool is_infinite(T x) {
  return std::isinf(x);
}
template <class T>
inline bool is_number(T x) {
  return !std::isnan(x);
}
template <class T>
inline bool is_notanumber(T x) {
  return std::isnan(x);
}
template <class T>
inline bool is_normal(T x) {
  return std::isnormal(x);
}
template <class T>
inline bool is_subnormal(T x) {
  return std::fpclassify(x) == FP_SUBNORMAL;
}

// Half precision

inline double to_double(Bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline double to_double(Half x) {
  const int exponent = x.bits >> 10 & 31;
  const int fraction = x.bits & 1023;
  double magnitude = std::ldexp(fraction + (exponent ? 1024 : 0), std::max(exponent, 1) - 25);
  if (exponent == 31) magnitude = fraction ? std::nan("") : HUGE_VAL;
  return x.bits >> 15 ? -magnitude : magnitude;
}
inline double to_double(float x) { return x; }
inline double to_double(double x) { return x; }

inline float to_float(Bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(Half x) {
  // Moving exponent and fraction into place gives the value times 2^-112, exactly.
  const float magnitude = std::bit_cast<float>((x.bits & 0x7fffu) << 13) * 0x1p112f;
  const bool special = (x.bits & 0x7c00) == 0x7c00;
  const uint32_t word =
      special ? 0x7f800000u | (x.bits & 0x3ffu) << 13 : std::bit_cast<uint32_t>(magnitude);
  return std::bit_cast<float>(word | (x.bits & 0x8000u) << 16);
}

template <class T>
struct HalfFormat;
template <>
struct HalfFormat<Half> {
  static constexpr int fraction_bits = 10, smallest_exponent = -14, largest_exponent = 15;
  static constexpr uint16_t nan = 0x7fff, infinity = 0x7c00;
};
template <>
struct HalfFormat<Bfloat16> {
  static constexpr int fraction_bits = 7, smallest_exponent = -126, largest_exponent = 127;
  static constexpr uint16_t nan = 0x7fff, infinity = 0x7f80;
};

// Rounds to the units of the format at the value's exponent, all exact in double but the rounding.
template <class T, Rounding rounding>
inline T to_half(double x) {
  using Format = HalfFormat<T>;
  if (std::isnan(x)) return T{Format::nan};
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(x);
  if (std::isinf(x)) return T{uint16_t(sign | Format::infinity)};
  int exponent = Format::smallest_exponent;
  if (magnitude > 0) exponent = std::max(exponent, std::ilogb(magnitude));
  const double units = std::ldexp(magnitude, Format::fraction_bits - exponent);
  double whole = std::floor(units);
  const double rest = units - whole;
  bool up = false;
  switch (rounding) {
    case Rounding::nearest:
      up = rest > 0.5 || (rest == 0.5 && std::fmod(whole, 2) == 1);
      break;
    case Rounding::zero:
      break;
    case Rounding::down:
      up = rest > 0 && sign;
      break;
    case Rounding::up:
      up = rest > 0 && !sign;
      break;
  }
  whole += up;
  // A carry out of the fraction runs into the exponent field, as it should; a value beyond the
  // largest becomes infinity where it is rounded away from zero.
  const int field = exponent - Format::smallest_exponent;
  const int64_t word = (int64_t{field} << Format::fraction_bits) + int64_t(whole);
  if (word >= Format::infinity || exponent > Format::largest_exponent) {
    const bool away = rounding == Rounding::nearest || up || (rounding == Rounding::up && !sign) ||
                      (rounding == Rounding::down && sign);
    return T{uint16_t(sign | (away ? Format::infinity : Format::infinity - 1))};
  }
  return T{uint16_t(sign | word)};
}

template <class T>
inline T relu(T x) {
  const bool nan = (x.bits & 0x7fff) > HalfFormat<T>::infinity;
  return x.bits >> 15 && !nan ? T{0} : x;
}

// Nearest, ties away from zero, to 10 bits of fraction.
inline uint32_t to_tf32(float x) {
  const uint32_t word = std::bit_cast<uint32_t>(x);
  if ((word & 0x7f800000u) == 0x7f800000u) return word & 0x7fffffu ? 0x7fffffffu : word;
  return (word + 0x1000u) & ~0x1fffu;
}

// a + b and fma with the last bit odd where they are inexact: rounding once more to fewer bits then
// gives what one rounding would have given.
inline double odd_sum(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double virtual_b = sum - a;
  const double error = (a - (sum - virtual_b)) + (b - virtual_b);
  if (error == 0 || std::bit_cast<uint64_t>(sum) & 1) return sum;
  return std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
}

template <class T>
struct IsPair : std::false_type {};
template <class T>
struct IsPair<Pair<T>> : std::true_type {};

template <class T, class Operation, class... Rest>
inline T each_half(Operation operation, T first, Rest... rest) {
  if constexpr (IsPair<T>::value) {
    return T{each_half(operation, first.low, rest.low...),
             each_half(operation, first.high, rest.high...)};
  } else {
    return to_half<T, Rounding::nearest>(operation(to_double(first), to_double(rest)...));
  }
}
template <class T>
inline T half_add(T a, T b) {
  return each_half(odd_sum, a, b);
}
template <class T>
inline T half_sub(T a, T b) {
  return each_half([](double x, double y) { return odd_sum(x, -y); }, a, b);
}
template <class T>
inline T half_mul(T a, T b) {
  return each_half([](double x, double y) { return x * y; }, a, b);
}
template <class T>
inline T half_fma(T a, T b, T c) {
  return each_half([](double x, double y, double z) { return odd_sum(x * y, z); }, a, b, c);
}
template <bool keep_nan, class T>
inline T half_min(T a, T b) {
  return each_half(float_min<keep_nan, double>, a, b);
}
template <bool keep_nan, class T>
inline T half_max(T a, T b) {
  return each_half(float_max<keep_nan, double>, a, b);
}
template <class T>
inline T half_ex2(T a) {
  return each_half([](double x) { return std::exp2(x); }, a);
}
template <class T>
inline T half_tanh(T a) {
  return each_half([](double x) { return std::tanh(x); }, a);
}
template <class T>
inline T half_abs(T a) {
  constexpr uint32_t mask = sizeof(T) == 2 ? 0x7fff : 0x7fff7fff;
  return as<T>(bits(a) & mask);
}
template <class T>
inline T half_neg(T a) {
  constexpr uint32_t mask = sizeof(T) == 2 ? 0x8000 : 0x80008000;
  return as<T>(bits(a) ^ mask);
}

// Conversions

template <class To, class From>
inline To widen(From x) {
  if constexpr (std::is_same_v<To, double>) return to_double(x);
  if constexpr (std::is_same_v<From, float>) return x;
  if constexpr (sizeof(From) == 2) return to_float(x);
}
template <class To, Rounding rounding, class From>
inline To narrow(From x) {
  if constexpr (std::is_same_v<To, float>) {
    return rounded<rounding>([](double value) { return float(value); }, double(x));
  } else {
    return to_half<To, rounding>(x);
  }
}
template <Rounding rounding, class T>
inline T round_to_integer(T x) {
  if constexpr (rounding == Rounding::zero) return std::trunc(x);
  if constexpr (rounding == Rounding::down) return std::floor(x);
  if constexpr (rounding == Rounding::up) return std::ceil(x);
  return std::nearbyint(x);
}
// Clamps to the integer's range; NaN becomes 0.
template <class To, Rounding rounding, class From>
inline To to_integer(From x) {
  const double whole = round_to_integer<rounding>(to_double(x));
  if (std::isnan(whole)) return 0;
  if (whole <= double(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (whole >= double(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return To(whole);
}
template <class To, Rounding rounding, class From>
inline To integer_to_float(From x) {
  if constexpr (sizeof(To) == 2) {
    // Exact in double up to 53 bits; beyond, both half formats round at far higher bits.
    return to_half<To, rounding>(double(x));
  } else {
    return rounded<rounding>([](From value) { return To(value); }, x);
  }
}
template <class To, class From>
inline To cast_integer(From x) {
  return To(x);
}
template <class To, class From>
inline To clamp_integer(From x) {
  using Wide = __int128;
  const Wide low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
  return To(std::clamp(Wide(x), low, high));
}

// Integers

template <class T>
using Double = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;

template <class T>
inline T mul_lo(T a, T b) {
  return T(uint64_t(a) * uint64_t(b));
}
template <class T>
inline T mul_hi(T a, T b) {
  return T((Double<T>(a) * Double<T>(b)) >> (8 * sizeof(T)));
}
template <class T>
inline Double<T> mul_wide(T a, T b) {
  return Double<T>(a) * Double<T>(b);
}
template <class T>
inline T add_with_carry(T a, T b, bool carry_in, bool& carry_out) {
  const auto sum = static_cast<unsigned __int128>(a) + b + carry_in;
  carry_out = (sum >> (8 * sizeof(T))) != 0;
  return T(sum);
}
template <class T>
inline T sub_with_carry(T a, T b, bool borrow_in, bool& borrow_out) {
  const auto difference = static_cast<unsigned __int128>(a) - b - borrow_in;
  borrow_out = (difference >> 127) != 0;
  return T(difference);
}
// PTX leaves division by zero open: all ones, as devices give.
template <class T>
inline T integer_div(T a, T b) {
  if (b == 0) return T(~T(0));
  if (std::is_signed_v<T> && b == T(-1)) return T(0 - uint64_t(a));
  return T(a / b);
}
template <class T>
inline T integer_rem(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return T(a % b);
}
template <class T>
inline T integer_neg(T a) {
  return T(0 - uint64_t(a));
}
template <class T>
inline T integer_abs(T a) {
  return a < 0 ? integer_neg(a) : a;
}

// Bits

template <class T>
inline T shl(T a, uint32_t by) {
  return by >= 8 * sizeof(T) ? T(0) : T(uint64_t(a) << by);
}
template <class T>
inline T shr(T a, uint32_t by) {
  return T(a >> std::min<uint32_t>(by, 8 * sizeof(T) - 1)) >>
         (by >= 8 * sizeof(T) ? 1 : 0);  // a whole width and more leaves the sign, or nothing
}
inline uint32_t wrap_shift(uint32_t by) { return by & 31; }
inline uint32_t clamp_shift(uint32_t by) { return std::min(by, 32u); }
inline uint32_t funnel_shift_l(uint32_t low, uint32_t high, uint32_t by) {
  return uint32_t((uint64_t(high) << 32 | low) >> (32 - by));
}
inline uint32_t funnel_shift_r(uint32_t low, uint32_t high, uint32_t by) {
  return uint32_t((uint64_t(high) << 32 | low) >> by);
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (uint32_t i = 0; i < 8; ++i) {  // bit i of the table: the result where a, b, c are i's bits
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}
// Each nibble of the selection picks one of 8 bytes; its highest bit asks for the byte's sign.
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selection) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selection >> (4 * i) & 15;
    uint32_t byte = uint32_t(bytes >> (8 * (nibble & 7))) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
template <class T>
inline T bfe(T a, uint32_t position, uint32_t length) {
  const int width = 8 * sizeof(T), start = position & 255, count = length & 255;
  if (count == 0) return 0;
  const int sign_bit = std::min(start + count - 1, width - 1);
  const bool sign = std::is_signed_v<T> && (uint64_t(a) >> sign_bit & 1);
  uint64_t result = 0;
  for (int i = 0; i < width; ++i) {
    const bool bit = i < count && start + i < width ? uint64_t(a) >> (start + i) & 1 : sign;
    result |= uint64_t(bit) << i;
  }
  return T(result);
}
template <class T>
inline T bfi(T field, T into, uint32_t position, uint32_t length) {
  const uint32_t width = 8 * sizeof(T), start = position & 255, count = length & 255;
  if (start >= width || count == 0) return into;
  const T mask = T((count >= width ? ~T(0) : T((T(1) << count) - 1)) << start);
  return T((into & ~mask) | (T(field << start) & mask));
}
template <class T>
inline uint32_t popc(T a) {
  return std::popcount(a);
}
template <class T>
inline uint32_t clz(T a) {
  return std::countl_zero(a);
}
template <class T>
inline T brev(T a) {
  T result = 0;
  for (size_t i = 0; i < 8 * sizeof(T); ++i) result |= T(a >> i & 1) << (8 * sizeof(T) - 1 - i);
  return result;
}
// The highest bit that differs from the sign.
template <bool as_shift, class T>
inline uint32_t bfind(T a) {
  using Unsigned = std::make_unsigned_t<T>;
  const auto magnitude = Unsigned(a < 0 ? ~a : a);
  if (magnitude == 0) return ~0u;
  const uint32_t shift = std::countl_zero(magnitude);
  return as_shift ? shift : uint32_t(8 * sizeof(T) - 1 - shift);
}

// Comparisons: a NaN fails the ordered ones and passes the unordered ones.

template <class T>
inline bool unordered(T a, T b) {
  return std::isnan(to_double(a)) || std::isnan(to_double(b));
}
#define EMULATOR_COMPARISON(name, operation)                        \
  template <class T>                                                \
  inline bool float_##name(T a, T b) {                              \
    return !unordered(a, b) && to_double(a) operation to_double(b); \
  }                                                                 \
  template <class T>                                                \
  inline bool float_##name##u(T a, T b) {                           \
    return unordered(a, b) || to_double(a) operation to_double(b);  \
  }
EMULATOR_COMPARISON(eq, ==)
EMULATOR_COMPARISON(ne, !=)
EMULATOR_COMPARISON(lt, <)
EMULATOR_COMPARISON(le, <=)
EMULATOR_COMPARISON(gt, >)
EMULATOR_COMPARISON(ge, >=)
#undef EMULATOR_COMPARISON
template <class T>
inline bool float_num(T a, T b) {
  return !unordered(a, b);
}
template <class T>
inline bool float_nan(T a, T b) {
  return unordered(a, b);
}

}  // namespace emulator
