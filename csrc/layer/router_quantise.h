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

// What is seen of a row, by its place in a unit: element i in place i % 32.
struct RowParts {
  float squares[kUnit], largest[kUnit];

  // Loops of a known length over independent places: the compiler makes them a few vector instructions.
  void see(const float* x) {
    for (int64_t j = 0; j < kUnit; ++j) {
      squares[j] += x[j] * x[j];
      const float size = std::fabs(x[j]);
      largest[j] = size > largest[j] ? size : largest[j];
    }
  }
  // Puts one unit into 16 bits and adds what that misses to squares.
  void store(const float* x, float scale, float inverse, int16_t* to) {
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    for (int64_t j = 0; j < kUnit; ++j) {
      float q = (x[j] * inverse + kRounder) - kRounder;
      q = q > kLargestInt16 ? kLargestInt16 : q < -kLargestInt16 ? -kLargestInt16 : q;
      to[j] = static_cast<int16_t>(static_cast<int32_t>(q));
      const float rest = x[j] - q * scale;
      squares[j] += rest * rest;
    }
  }
  float sum() const {
    float total = 0;
    for (int64_t j = 0; j < kUnit; ++j) total += squares[j];
    return total;
  }
};

// Calls step(unit of x, i) for every unit of n elements, the last filled up with zeros.
template <class Step>
inline void for_units(const float* x, int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + kUnit <= n; i += kUnit) step(x + i, i);
  if (i == n) return;
  float rest[kUnit] = {};
  for (int64_t j = 0; j < n - i; ++j) rest[j] = x[i + j];
  step(rest, i);
}

// Stores n elements of x as to[0, padded): the largest integers whose parts cannot overflow.
inline Row16 store_row16(const float* x, int64_t n, int64_t padded, int16_t* to) {
  const Row16 useless = {0, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity()};
  RowParts seen = {};
  for_units(x, n, [&](const float* unit, int64_t) { seen.see(unit); });
  float widest = 0, largest = 0;
  for (int64_t j = 0; j < kUnit; j += 2) {
    widest = std::max(widest, seen.squares[j] + seen.squares[j + 1]);
    largest = std::max(largest, std::max(seen.largest[j], seen.largest[j + 1]));
  }
  const float squares = seen.sum();
  const double room = kPartNorm - std::sqrt(static_cast<double>(padded) / kUnit);
  if (!(squares > 1e-20f && squares < 1e30f) || room < kPartNorm / 2) {  // NaN, too, comes here
    std::fill(to, to + padded, static_cast<int16_t>(0));
    return useless;
  }
  const float scale = std::max(static_cast<float>(std::sqrt(widest) * 1.0001 / room), largest / kLargestInt16);
  RowParts rest = {};
  for_units(x, n, [&](const float* unit, int64_t i) { rest.store(unit, scale, 1 / scale, to + i); });
  const float norm = std::sqrt(squares);
  return {scale, norm * 1.001f, std::sqrt(rest.sum()) * 1.001f + norm * 1e-6f};
}

}  // namespace
}  // namespace fastff
