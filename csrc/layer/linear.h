// The two loops that do all arithmetic on rows: dots (scores from rows) and combine (rows from factors).
// Included by one file per instruction set, after it has defined Vec<float> and Vec<double>:
//   Reg, width, zero, set, load, load_n, store, store_n, stream (a store that may pass by the cache), fma, sum, and
// fence(), which makes streams visible to other threads; load_n and store_n touch the first n < width elements.
// Vec<float> also loads bfloat16 and int8 weights (Bf16 and int8_t of kernels.h), widened to fp32; their load_n may read
// a whole register, since packed rows end in zeros.
//
// The order of every sum depends on the features and the instruction set alone, not on how rows are grouped: a row's
// route and output are the same bits alone and in any batch. Quantised routing relies on it to decide as fp32 does.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastff {
namespace {

// Partial sums of one product, which hide the latency of additions and round less. Routing nodes have tiles of one or
// three weight rows, leaves of one or four; it never depends on the number of rows.
constexpr int chains(int weights) { return weights <= 3 ? 4 : 1; }

// Rows of x in a tile: as many as leave registers free beside their partial sums, which three weight rows have most of.
template <class T>
constexpr int tile_rows(int64_t weights) {
  return Vec<T>::registers / (weights == 3 ? 16 : 8);
}

// out[m * out_stride + k] = <x[m], w[k]> over n elements, for M rows and N weight rows kept in registers.
template <class T, class W, int M, int N>
inline void dots_tile(const T* const* x, const W* const* w, int64_t n, T* out, int64_t out_stride) {
  using V = Vec<T>;
  constexpr int kUnroll = chains(N);
  typename V::Reg acc[M][N][kUnroll];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k)
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) acc[m][k][u] = V::zero();
  int64_t i = 0;
  for (; i + kUnroll * V::width <= n; i += kUnroll * V::width) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
      typename V::Reg row[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) row[m] = V::load(x[m] + i + u * V::width);
#pragma GCC unroll 8
      for (int k = 0; k < N; ++k) {
        const auto weight = V::load(w[k] + i + u * V::width);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m][k][u] = V::fma(row[m], weight, acc[m][k][u]);
      }
    }
  }
  for (; i < n; i += V::width) {
    const int64_t left = std::min<int64_t>(V::width, n - i);
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) {
      const auto weight = V::load_n(w[k] + i, left);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][k][0] = V::fma(V::load_n(x[m] + i, left), weight, acc[m][k][0]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) {
      auto total = acc[m][k][0];
#pragma GCC unroll 8
      for (int u = 1; u < kUnroll; ++u) total = V::add(total, acc[m][k][u]);
      out[m * out_stride + k] = V::sum(total);
    }
}

template <class T, class W>
inline T dot(const T* x, const W* w, int64_t n) {
  T out;
  dots_tile<T, W, 1, 1>(&x, &w, n, &out, 1);
  return out;
}

template <class T, class W, int M>
inline void dots_rows(const T* const* x, const W* const* w, int64_t weights, int64_t n, T* out, int64_t out_stride) {
  int64_t k = 0;
  for (; k + 4 <= weights; k += 4) dots_tile<T, W, M, 4>(x, w + k, n, out + k, out_stride);
  if constexpr (M <= tile_rows<T>(3))
    if (k + 3 == weights) return dots_tile<T, W, M, 3>(x, w + k, n, out + k, out_stride);
  for (; k < weights; ++k) dots_tile<T, W, M, 1>(x, w + k, n, out + k, out_stride);
}

// out[m * out_stride + k] = <x[m], w[k]> for any numbers of rows and weight rows.
template <class T, class W>
void dots(const T* const* x, int64_t rows, const W* const* w, int64_t weights, int64_t n, T* out, int64_t out_stride) {
  const int most = tile_rows<T>(weights);
  int64_t m = 0;
  if constexpr (tile_rows<T>(1) >= 4)
    for (; most >= 4 && m + 4 <= rows; m += 4) dots_rows<T, W, 4>(x + m, w, weights, n, out + m * out_stride, out_stride);
  for (; most >= 2 && m + 2 <= rows; m += 2) dots_rows<T, W, 2>(x + m, w, weights, n, out + m * out_stride, out_stride);
  for (; m < rows; ++m) dots_rows<T, W, 1>(x + m, w, weights, n, out + m * out_stride, out_stride);
}

// What becomes of the old contents of an output, and whether the new ones pass by the cache.
enum class Write { kStore, kAdd, kStream };

// Factors of a combination: of input k for output m is at data[m * per_output + k * per_input].
template <class T>
struct Factors {
  const T* data;
  int64_t per_output, per_input;
};

template <class T, class W, int M, int C, bool kPartial>
inline void combine_tile(T* const* out, const W* const* in, int64_t inputs, Factors<T> f, int64_t at, int64_t last,
                         Write write) {
  using V = Vec<T>;
  auto load = [&](const auto* p, int c) {
    return kPartial && c == C - 1 ? V::load_n(p + at + c * V::width, last) : V::load(p + at + c * V::width);
  };
  typename V::Reg acc[M][C];
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < C; ++c) acc[m][c] = V::zero();
  for (int64_t k = 0; k < inputs; ++k) {
    typename V::Reg row[C];
    for (int c = 0; c < C; ++c) row[c] = load(in[k], c);
    for (int m = 0; m < M; ++m) {
      const auto factor = V::set(f.data[m * f.per_output + k * f.per_input]);
      for (int c = 0; c < C; ++c) acc[m][c] = V::fma(factor, row[c], acc[m][c]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < C; ++c) {
      if (write == Write::kAdd) acc[m][c] = V::add(acc[m][c], load(out[m], c));  // last: long sums round as short ones
      if (kPartial && c == C - 1) V::store_n(out[m] + at + c * V::width, acc[m][c], last);
      else if (write == Write::kStream) V::stream(out[m] + at + c * V::width, acc[m][c]);
      else V::store(out[m] + at + c * V::width, acc[m][c]);
    }
}

template <class T, class W, int M>
inline void combine_rows(T* const* out, const W* const* in, int64_t inputs, Factors<T> f, int64_t begin, int64_t end,
                         Write write) {
  constexpr int kWidth = Vec<T>::width;
  constexpr int C = std::max(1, Vec<T>::registers / 2 / M);
  int64_t at = begin;
  for (; at + C * kWidth <= end; at += C * kWidth) combine_tile<T, W, M, C, false>(out, in, inputs, f, at, 0, write);
  for (; at + kWidth <= end; at += kWidth) combine_tile<T, W, M, 1, false>(out, in, inputs, f, at, 0, write);
  if (at < end) combine_tile<T, W, M, 1, true>(out, in, inputs, f, at, end - at, write);
}

// Columns [begin, end) of out[m] (+)= sum_k factor(m, k) * in[k]. A caller of kStream ends its work with fence().
template <class T, class W>
void combine(T* const* out, int64_t outputs, const W* const* in, int64_t inputs, Factors<T> f, int64_t begin,
             int64_t end, Write write) {
  auto from = [&](int64_t m) { return Factors<T>{f.data + m * f.per_output, f.per_output, f.per_input}; };
  int64_t m = 0;
  for (; m + 4 <= outputs; m += 4) combine_rows<T, W, 4>(out + m, in, inputs, from(m), begin, end, write);
  for (; m + 2 <= outputs; m += 2) combine_rows<T, W, 2>(out + m, in, inputs, from(m), begin, end, write);
  for (; m < outputs; ++m) combine_rows<T, W, 1>(out + m, in, inputs, from(m), begin, end, write);
}

}  // namespace
}  // namespace fastff
