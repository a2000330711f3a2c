// fp32 rows in 16 bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace fastff {
namespace {  // of each file: an instruction set's copy must not be linked into another's

constexpr int64_t kUnit = 32;               // elements in 16 bits that a row is padded to
constexpr double kPartNorm = 46000;         // of each of a row's sixteen parts: a product of two is below 2^31
constexpr float kLargestInt16 = 32767;

// Rounding of two sums in fp32 in any order of the kernels, and of sixteen parts, as a multiple of ||x|| * ||w||.
inline float sum_rounding(int64_t n) { return static_cast<float>(2 * (n / 16.0 + 20) * std::ldexp(1.0, -24)); }

// A number in 16 bits: its row's scale times the stored integer.
struct Row16 {
  float scale, norm, error;  // norm: ||x||; error: ||x - stored x||; infinite where 16 bits do not serve
};

// Stores n elements of x as to[0, padded): the largest integers whose parts cannot overflow.
inline Row16 store_row16(const float* x, int64_t n, int64_t padded, int16_t* to) {
  const Row16 useless = {0, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity()};
  float part[kUnit] = {}, largest = 0;
  const auto see = [&](const float* from, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      part[j] += from[j] * from[j];
      const float size = std::fabs(from[j]);
      largest = size > largest ? size : largest;
    }
  };
  int64_t i = 0;
  for (; i + kUnit <= n; i += kUnit) see(x + i, kUnit);
  see(x + i, n - i);
  float squares = 0, widest = 0;
  for (int64_t j = 0; j < kUnit; j += 2) {
    squares += part[j] + part[j + 1];
    widest = std::max(widest, part[j] + part[j + 1]);
  }
  std::fill(to + n, to + padded, static_cast<int16_t>(0));
  const double room = kPartNorm - std::sqrt(static_cast<double>(padded) / kUnit);
  if (!(squares > 1e-20f && squares < 1e30f) || room < kPartNorm / 2) {  // NaN, too, comes here
    std::fill(to, to + n, static_cast<int16_t>(0));
    return useless;
  }
  const float scale = std::max(static_cast<float>(std::sqrt(widest) * 1.0001 / room), largest / kLargestInt16);
  const float inverse = 1 / scale;
  float missed[kUnit] = {};
  const auto store = [&](const float* from, int16_t* into, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      float q = from[j] * inverse + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
      q -= 12582912.0f;
      q = q > kLargestInt16 ? kLargestInt16 : q < -kLargestInt16 ? -kLargestInt16 : q;
      into[j] = static_cast<int16_t>(static_cast<int32_t>(q));
      const float difference = from[j] - q * scale;
      missed[j] += difference * difference;
    }
  };
  for (i = 0; i + kUnit <= n; i += kUnit) store(x + i, to + i, kUnit);
  store(x + i, to + i, n - i);
  float error = 0;
  for (int64_t j = 0; j < kUnit; ++j) error += missed[j];
  return {scale, std::sqrt(squares) * 1.001f, std::sqrt(error) * 1.001f + std::sqrt(squares) * 1e-6f};
}

}  // namespace
}  // namespace fastff
