// How a row of fp32 weights is stored as W (float, Bf16 or int8_t), and what that may change of a product with it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "base/bf16.h"
#include "base/huge_pages.h"

namespace fastff {

// Each returns the scale: stored times scale is the weight meant. An int8 row with a NaN or an infinity has the scale NaN.
float store(float* to, const float* from, int64_t n);
float store(Bf16* to, const float* from, int64_t n);
float store(int8_t* to, const float* from, int64_t n);

constexpr float kLargestNorm = 1e18f;  // of a row of weights and of x: partial sums of their product then stay finite

// Numbers that stand, times their scale, for a row of weights or for a part of each weight.
template <class W>
struct StoredRow {
  const W* numbers;
  float scale;
};

// What rounding to `stored` left of the n weights of `exact`, rounded as well: eight bits more of each.
template <class W>
StoredRow<int8_t> store_rest(int8_t* to, const StoredRow<W>& stored, const float* exact, int64_t n);

// What the sum of products of stored rows with x may differ from the fp32 product, as a multiple of ||x||: the weights' own
// error, and the rounding of all sums. Infinite if the norm of the weights is above kLargestNorm or not finite.
template <class... Ws>
float store_error(const float* exact, int64_t n, const StoredRow<Ws>&... stored);

template <class W>
constexpr bool kIsQuantised = !std::is_same_v<W, float>;

// Elements of a row as stored. fp32 rows end with a cache line, unless padding would cost more than an eighth; quantised
// rows always do, in zeros, because kernels load whole registers of them.
template <class W>
constexpr int64_t row_elements(int64_t features) {
  const int64_t line = kLine / sizeof(W);
  return kIsQuantised<W> || features >= 8 * line ? round_up(features, line) : features;
}

}  // namespace fastff
