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

// What a product with the stored row may differ from the fp32 product.
struct StoreError {
  float bound;  // times ||x||: the weights' own error, and the rounding of both sums
  float reach;  // the larger of the norms of the fp32 row and of the stored numbers: times ||x||, what partial sums stay below
};
StoreError store_error(const Bf16* stored, float scale, const float* exact, int64_t n);
StoreError store_error(const int8_t* stored, float scale, const float* exact, int64_t n);

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
