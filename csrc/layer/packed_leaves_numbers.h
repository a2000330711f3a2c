// Rows of x and of factors as the products of packed leaves take them: fp32, bfloat16, or integers with one scale a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "layer/packed_leaves.h"
#include "layer/scratch.h"

namespace fastff {
namespace {

inline void fetch(const char* p) { __builtin_prefetch(p, 0, 2); }
inline void fetch_all(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) fetch(p + i);
}

// The nearest integer, ties to even, of a number of at most 2^22.
inline int32_t nearest(float v) {
  const float shifted = v + 12582912.0f;  // 1.5 * 2^23
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4b400000;
}

// What a row is divided by to become integers of at most `top`; NaN for a row that is not finite, 0 for one of zeros. The
// bits of magnitudes are ordered as the magnitudes are, NaN above infinity.
inline float row_scale(const float* v, int64_t n, float top) {
  int32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, v + i, sizeof bits);
    most = std::max(most, bits & 0x7fffffff);
  }
  float size;
  std::memcpy(&size, &most, sizeof size);
  return most >= 0x7f800000 ? NAN : size < 1e-30f ? 0.0f : size / top;
}

// Rounded to integers; returns their sum.
inline int32_t to_int8(const float* v, int64_t n, float scale, int8_t* to) {
  if (!(scale > 0)) {
    std::fill(to, to + n, int8_t{0});
    return 0;
  }
  const float inverse = 1 / scale;
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t q = nearest(v[i] * inverse);
    to[i] = static_cast<int8_t>(q);
    sum += q;
  }
  return sum;
}

// Rounded to 16 bits in two signed bytes, the upper ones first; returns the sum.
inline int32_t to_planes(const float* v, int64_t n, float scale, int8_t* to) {
  if (!(scale > 0)) {
    std::fill(to, to + 2 * n, int8_t{0});
    return 0;
  }
  const float inverse = 1 / scale;
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t q = nearest(v[i] * inverse), upper = (q + 128) >> 8;
    to[i] = static_cast<int8_t>(upper);
    to[n + i] = static_cast<int8_t>(q - upper * 256);
    sum += q;
  }
  return sum;
}

// An int8 sum without what unsigned weights added; both wrap around, their difference does not.
inline float corrected(int32_t total, int32_t correction, float scale) {
  return static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(total) - static_cast<uint32_t>(correction))) * scale;
}

template <class W>
void prepare(const LeafCall& call, int64_t begin, int64_t end) {
  const int64_t n = call.layout.leaves.in_features, padded_n = call.layout.x_words * 4 / static_cast<int64_t>(sizeof(W));
  for (int64_t row = begin; row < end; ++row) {
    const float* x = call.x + row * n;
    W* to = reinterpret_cast<W*>(call.xs) + row * padded_n;
    if constexpr (sizeof(W) == 4) {
      if (reinterpret_cast<const char*>(call.x) == call.xs) return;
      std::copy_n(x, n, to);
    } else if constexpr (sizeof(W) == 2) {
      for (int64_t i = 0; i < n; ++i) to[i].bits = to_bf16(x[i]);
    } else {
      call.x_scale[row] = row_scale(x, n, 127);
      call.x_correction[row] = 128 * to_int8(x, n, call.x_scale[row], to);
    }
    std::fill(to + n, to + padded_n, W());
  }
}

// int8: 16 bits in two signed bytes, and fewer where the sum of that many products could overflow.
template <class W>
void factors(const LeafCall& call, int64_t begin, int64_t end) {
  const int64_t n = call.visits.k * call.layout.neurons();
  for (int64_t row = begin; row < end; ++row) {
    const float* h = call.h + row * n;
    char* to = call.hs + row * call.hs_bytes;
    if constexpr (sizeof(W) == 2) {
      for (int64_t i = 0; i < n; ++i) reinterpret_cast<Bf16*>(to)[i].bits = to_bf16(h[i]);
    } else if constexpr (sizeof(W) == 1) {
      const float top = std::min(32512.0f, std::floor(2147483647.0f / 128 / static_cast<float>(std::max<int64_t>(n, 1))));
      call.h_scale[row] = row_scale(h, n, top);
      const uint32_t sum = static_cast<uint32_t>(to_planes(h, n, call.h_scale[row], reinterpret_cast<int8_t*>(to)));
      call.h_correction[row] = static_cast<int32_t>(128 * sum);
    }
  }
}

}  // namespace
}  // namespace fastff
