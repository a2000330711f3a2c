// Rounding of rows to whole numbers, for the products of model/linear.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "model/linear.h"

namespace fastff {
namespace {

// What a row's numbers are multiplied by before they are rounded: one factor a channel, or none.
struct Unsmoothed {
  float operator()(int64_t, float x) const { return x; }
};
struct Smoothed {
  const float* factors;
  float operator()(int64_t i, float x) const { return x * factors[i]; }
};

// The largest |x| of a row as bits: NaN and infinity are above every number, and a maximum of them vectorises.
template <class Smooth>
inline uint32_t largest_bits(const float* x, int64_t n, Smooth smooth) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float v = smooth(i, x[i]);
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits &= 0x7fffffffu;
    most = most > bits ? most : bits;
  }
  return most;
}

// x * scale, rounded to nearest even; |x * scale| below 2^22.
inline int32_t rounded(float x, float scale) {
  const float shifted = x * scale + 12582912.0f;  // 1.5 * 2^23
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4b400000;
}

// The largest whole number of a row: sums of its products with weights of 8 bits must fit 32 bits.
inline float number_range(int64_t features, int planes) {
  return planes == 1 ? 127.0f : static_cast<float>(std::min<int64_t>(32000, 2147483647 / (127 * features) - 1));
}

// Of every 32 of a row's numbers the sum: products with ones, 64 at a time.
inline void sum_groups(int64_t row, QuantisedRows& to) {
  using B = Words<int8_t>;
  constexpr int kWords = kGroup / 4;
  constexpr uint32_t kOnes = 0x01010101;
  const auto ones = B::word(reinterpret_cast<const char*>(&kOnes));
  const char* bytes = reinterpret_cast<const char*>(to.bytes + row * to.planes * to.stride);
  int32_t* sums = to.group_sums.data() + row * to.groups();
  for (int64_t g = 0; g < to.groups(); g += 2, bytes += 64) {
    alignas(64) int32_t lanes[2 * kWords];
    for (int p = 0; p < B::parts; ++p) {
      auto acc = B::dot(B::zero(), ones, B::load(bytes, p));
      if (to.planes == 2) acc = B::join(acc, B::dot(B::zero(), ones, B::load(bytes + to.stride, p)));
      B::store(lanes, acc, p);
    }
    for (int64_t half = 0; half < 2; ++half) {
      int32_t sum = 0;
      for (int i = 0; i < kWords; ++i) sum += lanes[half * kWords + i];
      sums[g + half] = sum;
    }
  }
}

template <class Smooth>
inline void quantise_row(const float* x, int64_t row, Smooth smooth, QuantisedRows& to) {
  const int64_t n = to.features;
  int8_t* upper = to.bytes + row * to.planes * to.stride;
  std::memset(upper + n, 0, to.stride - n);
  if (to.planes == 2) std::memset(upper + to.stride + n, 0, to.stride - n);
  const uint32_t bits = largest_bits(x, n, smooth);
  float largest;
  std::memcpy(&largest, &bits, sizeof bits);
  const float range = number_range(n, to.planes);
  if (bits >= 0x7f800000u || largest < range * std::numeric_limits<float>::min()) {
    std::memset(upper, 0, to.planes * to.stride);
    to.scale[row] = bits >= 0x7f800000u ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    to.offset[row] = 0;
    return;
  }
  const float inverse = range / largest;
  uint32_t sum = 0;
  if (to.planes == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t v = rounded(smooth(i, x[i]), inverse);
      sum += static_cast<uint32_t>(v);
      upper[i] = static_cast<int8_t>(v);
    }
  } else {
    int8_t* lower = upper + to.stride;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t v = rounded(smooth(i, x[i]), inverse);
      sum += static_cast<uint32_t>(v);
      upper[i] = static_cast<int8_t>((v + 128) >> 8);
      lower[i] = static_cast<int8_t>(v);
    }
  }
  to.scale[row] = largest / range;
  to.offset[row] = static_cast<int32_t>(sum * 128);
}

void quantise_linear(const float* x, int64_t x_stride, const float* factors, int64_t begin, int64_t end,
                     QuantisedRows& to) {
  for (int64_t r = begin; r < end; ++r) {
    if (factors) quantise_row(x + r * x_stride, r, Smoothed{factors}, to);
    else quantise_row(x + r * x_stride, r, Unsmoothed{}, to);
    if (to.grouped) sum_groups(r, to);
  }
}

}  // namespace
}  // namespace fastff
