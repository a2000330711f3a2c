// Products of lines of 4-bit weights and of groups with scales of their own, beside words_plain.h.
//
// A line of 4-bit weights is two of 8-bit ones: the lower halves of its bytes are one, the upper halves the other. The sums
// of a group of inputs are whole numbers; times a scale of half precision to each of 16 outputs they add to floats.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "isa/words_plain.h"

namespace fastff {
namespace {

struct Groups {
  using B = Words<int8_t>;
  struct Floats {
    float lane[16];
  };

  static Floats zero() { return {}; }
  static B::Line lower(B::Line line) {
    for (uint32_t& word : line.word) word &= 0x0f0f0f0fu;
    return line;
  }
  static B::Line upper(B::Line line) {
    for (uint32_t& word : line.word) word = word >> 4 & 0x0f0f0f0fu;
    return line;
  }
  static B::Acc all(int32_t value) {
    B::Acc acc;
    for (int32_t& lane : acc.lane) lane = value;
    return acc;
  }
  // f + sums * scales
  static Floats scaled(Floats f, const B::Acc& sums, const Half* scales, int) {
    for (int i = 0; i < 16; ++i) f.lane[i] += static_cast<float>(sums.lane[i]) * to_float(scales[i]);
    return f;
  }
  // f + x * scales
  static Floats added(Floats f, float x, const Half* scales, int) {
    for (int i = 0; i < 16; ++i) f.lane[i] += x * to_float(scales[i]);
    return f;
  }
  static void store(float* to, const Floats& f, int) { std::memcpy(to, f.lane, sizeof f.lane); }
};

}  // namespace
}  // namespace fastff
