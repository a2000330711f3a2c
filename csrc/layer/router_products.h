// Products of rows of x with rows of routing weights.
//
// In fp32 and fp64 the order of a sum is that of dot() (linear.h) whatever is grouped. Products in 16 bits are sums of
// integers in sixteen parts, element i in part (i / 2) % 16, that no row can make overflow (router_quantise.h). So a row's
// route and gates are the same bits alone and in any batch.
#pragma once

#include <cstdint>

#include "layer/linear.h"
#include "layer/scratch.h"

namespace fastff {
namespace {

// Brings `bytes` at p into the second-level cache.
inline void fetch_soon(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(static_cast<const char*>(p) + at, 0, 2);
}

template <class W>
struct Products {
  // out[m * 4 + j] = <x[m], w[j]> for J = 1 or 3 rows of weights.
  template <int J>
  static void few(const W* const* x, int64_t rows, const W* const* w, int64_t n, W* out) {
    dots(x, rows, w, J, n, out, 4);
  }

  // out[k] = <x[k], w[k]> for four pairs, whose loads hide each other's latency.
  static void each(const W* const* x, const W* const* w, int64_t n, W* out) {
    using V = Vec<W>;
    constexpr int kUnroll = chains(1);
    typename V::Reg acc[4][kUnroll];
#pragma GCC unroll 8
    for (int k = 0; k < 4; ++k)
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) acc[k][u] = V::zero();
    int64_t i = 0;
    for (; i + kUnroll * V::width <= n; i += kUnroll * V::width)
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u)
#pragma GCC unroll 8
        for (int k = 0; k < 4; ++k)
          acc[k][u] = V::fma(V::load(x[k] + i + u * V::width), V::load(w[k] + i + u * V::width), acc[k][u]);
    for (; i < n; i += V::width) {
      const int64_t left = std::min<int64_t>(V::width, n - i);
#pragma GCC unroll 8
      for (int k = 0; k < 4; ++k) acc[k][0] = V::fma(V::load_n(x[k] + i, left), V::load_n(w[k] + i, left), acc[k][0]);
    }
#pragma GCC unroll 8
    for (int k = 0; k < 4; ++k) {
      auto total = acc[k][0];
#pragma GCC unroll 8
      for (int u = 1; u < kUnroll; ++u) total = V::add(total, acc[k][u]);
      out[k] = V::sum(total);
    }
  }
};

// Rows end in zeros up to a multiple of 32 elements, and n is that multiple.
template <>
struct Products<int16_t> {
  using V = Vec<int16_t>;

  // A function of its own: the sums must find enough registers whatever the callers keep in theirs.
  template <int M, int J>
  __attribute__((noinline)) static void tile(const int16_t* const* x, const int16_t* const* w, int64_t n, float* out) {
    typename V::Sums acc[M][J];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) acc[m][j] = V::zero();
    for (int64_t i = 0; i < n; i += V::width) {
      typename V::Reg row[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) row[m] = V::load(x[m] + i);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        const auto weight = V::load(w[j] + i);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m][j] = V::dot(row[m], weight, acc[m][j]);
      }
    }
    if constexpr (J == 1 && M == 4) {
      float sums[4];
      V::sums(acc[0][0], acc[1][0], acc[2][0], acc[3][0], sums);
#pragma GCC unroll 8
      for (int m = 0; m < 4; ++m) out[4 * m] = sums[m];
    } else {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) V::sums(acc[m][0], acc[m][J > 1 ? 1 : 0], acc[m][J > 2 ? 2 : 0], V::zero(), out + 4 * m);
    }
  }

  template <int J>
  static void few(const int16_t* const* x, int64_t rows, const int16_t* const* w, int64_t n, float* out) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) tile<4, J>(x + m, w, n, out + 4 * m);
    for (; m + 2 <= rows; m += 2) tile<2, J>(x + m, w, n, out + 4 * m);
    for (; m < rows; ++m) tile<1, J>(x + m, w, n, out + 4 * m);
  }

  static void each(const int16_t* const* x, const int16_t* const* w, int64_t n, float* out) {
    typename V::Sums acc[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (int64_t i = 0; i < n; i += V::width)
#pragma GCC unroll 8
      for (int k = 0; k < 4; ++k) acc[k] = V::dot(V::load(x[k] + i), V::load(w[k] + i), acc[k]);
    V::sums(acc[0], acc[1], acc[2], acc[3], out);
  }
};

// out[m * out_stride + j] = <x[m], w + j * stride> for any numbers of both.
template <class T, class W>
void products(const W* const* x, int64_t rows, const W* w, int64_t weights, int64_t stride, int64_t n, T* out,
              int64_t out_stride) {
  constexpr int64_t kRows = 4;
  for (int64_t m = 0; m < rows; m += kRows) {
    const int64_t count = std::min(kRows, rows - m);
    T tile[kRows * 4];
    const auto keep = [&](int64_t j, int64_t columns) {
      for (int64_t k = 0; k < count; ++k)
        for (int64_t c = 0; c < columns; ++c) out[(m + k) * out_stride + j + c] = tile[4 * k + c];
    };
    int64_t j = 0;
    for (; j + 3 <= weights; j += 3) {
      const W* const row[3] = {w + j * stride, w + (j + 1) * stride, w + (j + 2) * stride};
      Products<W>::template few<3>(x + m, count, row, n, tile);
      keep(j, 3);
    }
    for (; j < weights; ++j) {
      const W* const row[1] = {w + j * stride};
      Products<W>::template few<1>(x + m, count, row, n, tile);
      keep(j, 1);
    }
  }
}

}  // namespace
}  // namespace fastff
