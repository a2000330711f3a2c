#include "layer/store.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace fastff {
namespace {

// Each sum has at most n / 16 + 8 additions one after the other in any kernel (linear.h).
template <class W>
float error_of(std::initializer_list<StoredRow<W>> stored, const float* exact, int64_t n) {
  double error = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    double difference = -exact[i];
    for (const StoredRow<W>& row : stored) difference += static_cast<double>(to_float(row.numbers[i])) * row.scale;
    error += difference * difference;
    squares += static_cast<double>(exact[i]) * exact[i];
  }
  double norms = std::sqrt(squares);
  if (!(norms < kLargestNorm)) return INFINITY;
  for (const StoredRow<W>& row : stored) {
    double numbers = 0;
    for (int64_t i = 0; i < n; ++i) numbers += static_cast<double>(to_float(row.numbers[i])) * to_float(row.numbers[i]);
    norms += std::fabs(row.scale) * std::sqrt(numbers);
  }
  const double rounding = (n / 16.0 + 10) * std::ldexp(1.0, -24);
  return static_cast<float>(1.0001 * (std::sqrt(error) + rounding * norms));
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

StoredRow<int8_t> store_rest(int8_t* to, const StoredRow<int8_t>& stored, const float* exact, int64_t n) {
  std::vector<float> rest(n);
  for (int64_t i = 0; i < n; ++i)
    rest[i] = static_cast<float>(exact[i] - static_cast<double>(stored.numbers[i]) * stored.scale);
  return {to, store(to, rest.data(), n)};
}

float store_error(std::initializer_list<StoredRow<Bf16>> stored, const float* exact, int64_t n) {
  return error_of(stored, exact, n);
}
float store_error(std::initializer_list<StoredRow<int8_t>> stored, const float* exact, int64_t n) {
  return error_of(stored, exact, n);
}

}  // namespace fastff
