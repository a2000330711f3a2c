#include "layer/store.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace fastff {
namespace {

template <class W>
double weight(const StoredRow<W>& row, int64_t i) {
  return static_cast<double>(to_float(row.numbers[i])) * row.scale;
}

template <class Weight>
double norm(const Weight& weight, int64_t n) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += weight(i) * weight(i);
  return std::sqrt(squares);
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

template <class W>
StoredRow<int8_t> store_rest(int8_t* to, const StoredRow<W>& stored, const float* exact, int64_t n) {
  std::vector<float> rest(n);
  for (int64_t i = 0; i < n; ++i) rest[i] = static_cast<float>(exact[i] - weight(stored, i));
  return {to, store(to, rest.data(), n)};
}
template StoredRow<int8_t> store_rest(int8_t*, const StoredRow<Bf16>&, const float*, int64_t);
template StoredRow<int8_t> store_rest(int8_t*, const StoredRow<int8_t>&, const float*, int64_t);

// Each sum has at most n / 16 + 8 additions one after the other in any kernel (linear.h).
template <class... Ws>
float store_error(const float* exact, int64_t n, const StoredRow<Ws>&... stored) {
  const double of_exact = norm([&](int64_t i) { return static_cast<double>(exact[i]); }, n);
  if (!(of_exact < kLargestNorm)) return INFINITY;
  const double error = norm([&](int64_t i) { return (weight(stored, i) + ...) - exact[i]; }, n);
  const double norms = of_exact + (norm([&](int64_t i) { return weight(stored, i); }, n) + ...);
  return static_cast<float>(1.0001 * (error + (n / 16.0 + 10) * std::ldexp(1.0, -24) * norms));
}
template float store_error(const float*, int64_t, const StoredRow<Bf16>&);
template float store_error(const float*, int64_t, const StoredRow<int8_t>&);
template float store_error(const float*, int64_t, const StoredRow<Bf16>&, const StoredRow<int8_t>&);
template float store_error(const float*, int64_t, const StoredRow<int8_t>&, const StoredRow<int8_t>&);

}  // namespace fastff
