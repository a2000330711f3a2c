// bfloat16, the upper half of an fp32 number, and stored weights as numbers.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastff {

struct Bf16 {
  uint16_t bits;
};

namespace {  // of each file: an instruction set's copy must not be linked into another's

inline float to_float(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline float to_float(int8_t value) { return value; }

// To nearest, ties to even.
inline uint16_t to_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return static_cast<uint16_t>(v != v ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

}  // namespace fastff
