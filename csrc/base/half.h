// IEEE half precision as stored; arithmetic is in fp32.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastff {

struct Half {
  uint16_t bits;
};

namespace {  // of each file: an instruction set's copy must not be linked into another's

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0;  // infinity and NaN
  const float scaled = float_of(magnitude << 13) * 0x1p112f;        // of the exponents' biases; right for subnormal numbers
  return float_of(sign | special | bits_of(scaled));
}

// Rounded to nearest even; beyond the largest: infinity.
inline Half to_half(float value) {
  uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (bits < 0x38800000u)  // subnormal: adding 1/2 rounds at its last place
    return {static_cast<uint16_t>(sign | (bits_of(float_of(bits) + 0.5f) - 0x3f000000u))};
  bits += 0xc8000fffu + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | bits >> 13)};
}

}  // namespace

}  // namespace fastff
