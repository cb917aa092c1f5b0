// The 16-bit floating types, in software: conversions happen once per input value, never in an inner loop.
#pragma once
#include <cstdint>
#include <cstring>

namespace counterlens {

struct Half {
  uint16_t bits;
};

struct BFloat {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat x) { return from_bits(uint32_t(x.bits) << 16); }

inline float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  // Shifted into place, the exponent is 112 too small; a multiplication corrects it, for subnormals too.
  if (magnitude < 0x7c00u << 13) return from_bits(sign | bits_of(from_bits(magnitude) * from_bits(239u << 23)));
  return from_bits(sign | 0x7f800000 | magnitude);  // inf and NaN
}

inline void narrow(double x, double &to) { to = x; }
inline void narrow(double x, float &to) { to = float(x); }

// Round to nearest, ties to even.
inline void narrow(float x, BFloat &to) {
  const uint32_t bits = bits_of(x);
  to.bits = x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void narrow(float x, Half &to) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000)
    half = 0x7e00;  // NaN
  else if (magnitude >= 143u << 23)
    half = 0x7c00;  // 2^16 and above: inf
  else if (magnitude < 113u << 23)  // subnormal: adding a half aligns the last bit, and the addition rounds
    half = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  else
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  to.bits = uint16_t(sign | half);
}

// By way of float, as torch does it.
template <typename Narrow>
inline void narrow(double x, Narrow &to) {
  narrow(float(x), to);
}

}  // namespace counterlens
