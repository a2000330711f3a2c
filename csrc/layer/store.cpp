#include "layer/store.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fastff {
namespace {

// Each sum has at most n / 16 + 8 additions one after the other in any kernel (linear.h).
template <class W>
StoreError error_of(const W* stored, float scale, const float* exact, int64_t n) {
  double error = 0, norm = 0, stored_norm = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double number = to_float(stored[i]), difference = number * scale - exact[i];
    error += difference * difference;
    norm += static_cast<double>(exact[i]) * exact[i];
    stored_norm += number * number;
  }
  const double rounding = 2 * (n / 16.0 + 10) * std::ldexp(1.0, -24);
  const double bound = 1.0001 * (std::sqrt(error) + rounding * (std::sqrt(norm) + std::sqrt(error)));
  return {static_cast<float>(bound), static_cast<float>(1.0001 * std::sqrt(std::max(norm, stored_norm)))};
}

}  // namespace

float store(float* to, const float* from, int64_t n) {
  std::memcpy(to, from, n * sizeof(float));
  return 1;
}

float store(Bf16* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const bool nan = from[i] != from[i];
    to[i].bits = static_cast<uint16_t>(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest even
  }
  return 1;
}

float store(int8_t* to, const float* from, int64_t n) {
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::fabs(from[i]));
    finite &= std::isfinite(from[i]);
  }
  if (!finite) return NAN;  // the row then counts as NaN
  const float scale = largest / 127;
  if (!(scale > 0)) return 0;
  for (int64_t i = 0; i < n; ++i)
    to[i] = static_cast<int8_t>(std::nearbyint(std::max(-127.0f, std::min(127.0f, from[i] / scale))));
  return scale;
}

StoreError store_error(const Bf16* stored, float scale, const float* exact, int64_t n) {
  return error_of(stored, scale, exact, n);
}
StoreError store_error(const int8_t* stored, float scale, const float* exact, int64_t n) {
  return error_of(stored, scale, exact, n);
}

}  // namespace fastff
