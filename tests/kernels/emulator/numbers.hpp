// Numbers as Metal has them: 16-bit types that round to nearest even, and short vectors.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

using uint = unsigned int;

namespace emulated {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// float -> a format of 16 bits with so many of mantissa and this exponent bias, and back.
template <int MANTISSA, int BIAS>
uint16_t narrowed(float value) {
  constexpr int exponent_bits = 15 - MANTISSA, top = (1 << exponent_bits) - 1;
  const uint32_t bits = bits_of(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  const int exponent = int(bits >> 23 & 0xffu);
  const uint32_t mantissa = bits & 0x7fffffu;
  if (exponent == 0xff) {
    return uint16_t(sign | top << MANTISSA | (mantissa ? 1 << (MANTISSA - 1) : 0));
  }
  int wanted = exponent - 127 + BIAS;
  uint64_t whole = exponent ? mantissa | 0x800000u : mantissa;
  int drop = 23 - MANTISSA;
  if (wanted <= 0) {  // subnormal
    drop += 1 - wanted;
    wanted = 0;
    if (exponent == 0) drop -= 1;
  } else {
    whole -= 0x800000u;  // its first bit is implied
  }
  if (drop > 40) return sign;
  const uint64_t half = uint64_t(1) << (drop - 1), rest = whole & (2 * half - 1);
  uint64_t kept = whole >> drop;
  kept += rest > half || (rest == half && (kept & 1));
  const uint64_t found = (uint64_t(wanted) << MANTISSA) + kept;
  return uint16_t(sign | (found >= uint64_t(top) << MANTISSA ? top << MANTISSA : found));
}

template <int MANTISSA, int BIAS>
float widened(uint16_t bits) {
  constexpr int top = (1 << (15 - MANTISSA)) - 1;
  const float sign = bits & 0x8000u ? -1.0f : 1.0f;
  const int exponent = bits >> MANTISSA & top, mantissa = bits & ((1 << MANTISSA) - 1);
  if (exponent == top) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(float(mantissa), 1 - BIAS - MANTISSA);
  return sign * std::ldexp(float(mantissa | 1 << MANTISSA), exponent - BIAS - MANTISSA);
}

template <int MANTISSA, int BIAS>
struct Narrow {
  uint16_t bits;
  Narrow() = default;
  explicit Narrow(float value) : bits(narrowed<MANTISSA, BIAS>(value)) {}
  operator float() const { return widened<MANTISSA, BIAS>(bits); }
};

}  // namespace emulated

using half = emulated::Narrow<10, 15>;
using bfloat16_t = emulated::Narrow<7, 127>;
using float16_t = half;

template <typename T, int N>
struct vec;

// An element by number; another than there are ends the program.
template <int N, typename T>
T& element(T* first, int i) {
  if (i < 0 || i >= N) __builtin_trap();
  return first[i];
}

template <typename T>
struct vec<T, 2> {
  T x, y;
  vec() = default;
  vec(T x, T y) : x(x), y(y) {}
  T& operator[](int i) { return element<2>(&x, i); }
  const T& operator[](int i) const { return element<2>(&x, i); }
};

template <typename T>
struct vec<T, 3> {
  T x, y, z;
};

template <typename T>
struct vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  T& operator[](int i) { return element<4>(&x, i); }
  const T& operator[](int i) const { return element<4>(&x, i); }
};

using float2 = vec<float, 2>;
using float4 = vec<float, 4>;
using uint3 = vec<uint, 3>;
using uint4 = vec<uint, 4>;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
using std::exp;
using std::fma;
