// Kernels of model/bidirectional.h, for the instruction set whose Words<Bf16> the including file has defined.
//
// Keys and values of a head are arranged in tiles of 16 outputs, [tile][words][16] where a word is two bfloat16 numbers that
// are summed over: of one position for keys, of two positions for values. A tile feeds dot products of pairs line by line,
// and 16 lines of it are a tile of AMX. 16 queries are taken at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/huge_pages.h"
#include "isa/table.h"
#include "layer/activations.h"
#include "layer/scratch.h"
#include "model/bf16_lanes.h"
#include "model/bidirectional.h"
#include "model/linear_impl.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#endif

namespace fastff {
namespace {

constexpr int64_t kHeadTile = 16;   // queries that are taken together, positions or columns of a tile
constexpr int64_t kHeadDepth = 32;  // numbers that are summed over are filled up to a multiple of this

// What one head needs; kept by a thread from call to call.
struct HeadRoom {
  Buffer<uint16_t> keys, values, queries, weights, staged;
  Buffer<float> scores, sums;

  static HeadRoom& local() {
    static thread_local HeadRoom room;
    return room;
  }
};

// Sixteen rows of a head from `first` on, filled up with zeros, also beyond the last token.
inline void copy_rows(const BidirectionalCall& call, const uint16_t* column, int64_t first, int64_t filled, uint16_t* to) {
  const int64_t n = std::min(kHeadTile, call.tokens - first);
  for (int64_t r = 0; r < n; ++r) {
    std::memcpy(to + r * filled, column + (first + r) * call.row_stride, call.head_dim * sizeof *to);
    std::memset(to + r * filled + call.head_dim, 0, (filled - call.head_dim) * sizeof *to);
  }
  std::memset(to + n * filled, 0, (kHeadTile - n) * filled * sizeof *to);
}

// keys: [tokens / 16][filled / 2][16][2]
inline void arrange_keys(const BidirectionalCall& call, const uint16_t* column, int64_t tiles, int64_t filled,
                         uint16_t* staged, uint16_t* to) {
  const int64_t words = filled / 2;
  for (int64_t t = 0; t < tiles; ++t) {
    if (t * kHeadTile >= call.tokens) {
      std::memset(to, 0, words * kHeadTile * 4);
      return;  // there is at most one tile without a token
    }
    copy_rows(call, column, t * kHeadTile, filled, staged);
    for (int64_t w = 0; w < words; ++w, to += 2 * kHeadTile)
      for (int64_t r = 0; r < kHeadTile; ++r) std::memcpy(to + 2 * r, staged + r * filled + 2 * w, 4);
  }
}

// Sixteen numbers of two positions, in turn.
inline void pair_positions(const uint16_t* __restrict one, const uint16_t* __restrict other, uint16_t* __restrict to) {
  for (int64_t c = 0; c < kHeadTile; ++c) {
    const uint32_t word = one[c] | static_cast<uint32_t>(other[c]) << 16;
    std::memcpy(to + 2 * c, &word, sizeof word);
  }
}

// values: [columns / 16][positions / 2][16][2]
inline void arrange_values(const BidirectionalCall& call, const uint16_t* column, int64_t tiles, int64_t positions,
                           uint16_t* to) {
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t n = std::min(kHeadTile, call.head_dim - t * kHeadTile);
    for (int64_t p = 0; p < positions; p += 2, to += 2 * kHeadTile) {
      const uint16_t* row = column + p * call.row_stride + t * kHeadTile;
      if (n == kHeadTile && p + 2 <= call.tokens) {
        pair_positions(row, row + call.row_stride, to);
        continue;
      }
      uint16_t pair[2][kHeadTile] = {};
      for (int64_t i = 0; i < 2; ++i)
        if (p + i < call.tokens) std::memcpy(pair[i], row + i * call.row_stride, n * sizeof *row);
      pair_positions(pair[0], pair[1], to);
    }
  }
}

#ifdef __AMX_BF16__
template <int N>
inline void by_amx(const uint16_t* x, int64_t x_stride, const uint16_t* tiles, int64_t words, float* out,
                   int64_t out_stride) {
  const int64_t next = words * 2 * kHeadTile;
  written_for_tiles();
  _tile_zero(0);
  if (N > 1) _tile_zero(1);
  if (N > 2) _tile_zero(2);
  if (N > 3) _tile_zero(3);
  for (int64_t w = 0; w < words; w += kHeadTile, tiles += kHeadTile * 2 * kHeadTile) {
    _tile_loadd(4, x + 2 * w, x_stride * 2);
    _tile_loadd(5, tiles, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (N > 1) {
      _tile_loadd(6, tiles + next, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (N > 2) {
      _tile_loadd(7, tiles + 2 * next, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if (N > 3) {
      _tile_loadd(5, tiles + 3 * next, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, out, out_stride * 4);
  if (N > 1) _tile_stored(1, out + kHeadTile, out_stride * 4);
  if (N > 2) _tile_stored(2, out + 2 * kHeadTile, out_stride * 4);
  if (N > 3) _tile_stored(3, out + 3 * kHeadTile, out_stride * 4);
}
#else
template <int M, int N>
inline void by_dots(const uint16_t* x, int64_t x_stride, const uint16_t* tiles, int64_t words, float* out,
                    int64_t out_stride) {
  using B = Words<Bf16>;
  typename B::Acc acc[M][N][B::parts];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
      for (int p = 0; p < B::parts; ++p) acc[m][n][p] = B::zero();
  for (int64_t w = 0; w < words; ++w) {
    typename B::Line line[N][B::parts];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
      for (int p = 0; p < B::parts; ++p)
        line[n][p] = B::load(reinterpret_cast<const char*>(tiles + (n * words + w) * 2 * kHeadTile), p);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto word = B::word(reinterpret_cast<const char*>(x + m * x_stride + 2 * w));
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
        for (int p = 0; p < B::parts; ++p) acc[m][n][p] = B::dot(acc[m][n][p], line[n][p], word);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
      for (int p = 0; p < B::parts; ++p) B::store(out + m * out_stride + n * kHeadTile, acc[m][n][p], p);
}
#endif

// out [16][count * 16] of sixteen rows of x [16][2 * words] with `count` tiles.
inline void times_tiles(const uint16_t* x, int64_t x_stride, const uint16_t* tiles, int64_t count, int64_t words,
                        float* out, int64_t out_stride) {
  const int64_t tile_numbers = words * 2 * kHeadTile;
#ifdef __AMX_BF16__
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) by_amx<4>(x, x_stride, tiles + t * tile_numbers, words, out + t * kHeadTile, out_stride);
  for (; t < count; ++t) by_amx<1>(x, x_stride, tiles + t * tile_numbers, words, out + t * kHeadTile, out_stride);
#else
  constexpr int kRows = Words<Bf16>::columns >= 4 ? 8 : 2;
  int64_t t = 0;
  for (; t + 2 <= count; t += 2)
    for (int64_t r = 0; r < kHeadTile; r += kRows)
      by_dots<kRows, 2>(x + r * x_stride, x_stride, tiles + t * tile_numbers, words, out + r * out_stride + t * kHeadTile,
                        out_stride);
  for (; t < count; ++t)
    for (int64_t r = 0; r < kHeadTile; r += kRows)
      by_dots<kRows, 1>(x + r * x_stride, x_stride, tiles + t * tile_numbers, words, out + r * out_stride + t * kHeadTile,
                        out_stride);
#endif
}

// 2^x of x at most zero, and zero but for 1e-38 from -126 down; relative error below 3e-7. NaN stays NaN.
FASTFF_INLINE float power_of_two(float x) {
  const float bounded = x < -126.0f ? -126.0f : x;
  const float shifted = bounded + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float r = bounded - (shifted - 12582912.0f);
  float p = 0.0013390863f;  // Chebyshev interpolation on [-1/2, 1/2]
  p = p * r + 0.009676032f;
  p = p * r + 0.05550357f;
  p = p * r + 0.24022107f;
  p = p * r + 0.6931472f;
  p = p * r + 1.0000001f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // the low bits of `shifted` hold the integer
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// Of n numbers, a multiple of 16.
inline float largest_of(const float* x, int64_t n) {
  using V = Vec<float>;
  auto most = V::load(x);
  for (int64_t i = V::width; i < n; i += V::width) most = V::max(most, V::load(x + i));
  float lanes[V::width];
  V::store(lanes, most);
  for (int half = V::width / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] = lanes[l + half] > lanes[l] ? lanes[l + half] : lanes[l];
  return lanes[0];
}

// exp((scores - largest) * scale) in the place of scores [begin, end), about 1e-38 in that of the others up to `filled`, a
// multiple of 16. scale: above zero.
inline void exponentials(float* scores, int64_t begin, int64_t end, int64_t filled, float scale) {
  for (int64_t i = 0; i < begin; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  for (int64_t i = end; i < filled; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  const float factor = scale * 1.44269504f, largest = largest_of(scores, filled);
  for (int64_t i = 0; i < filled; ++i) scores[i] = power_of_two((scores[i] - largest) * factor);
}

// Those exponentials as bfloat16; returns 1 / their sum.
inline float soften(float* scores, int64_t begin, int64_t end, int64_t filled, float scale, uint16_t* to) {
  using V = Vec<float>;
  exponentials(scores, begin, end, filled, scale);
  auto total = V::zero();
  for (int64_t i = 0; i < filled; i += V::width) total = V::add(total, V::load(scores + i));
  for (int64_t i = 0; i < filled; i += kHeadTile) to_bf16_lanes(scores + i, to + i);
  return 1 / V::sum(total);
}

inline void times_into(const float* __restrict x, float factor, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] * factor;
}

// Adds what belongs to the keys' distances from a query to its scores [begin, end), which are not scaled yet.
inline void add_bias(const BidirectionalCall& call, int64_t head, int64_t query, int64_t begin, int64_t end, float* scores) {
  const float* bias = call.bias + head * (2 * call.positions - 1) + call.positions - 1 + begin - query;
  const float inverse = 1 / call.scale;
  for (int64_t i = begin; i < end; ++i) scores[i] += *bias++ * inverse;
}

void attend_head(const BidirectionalCall& call, int64_t head) {
  const int64_t d = call.head_dim, width = call.heads * d, filled = round_up(d, kHeadDepth);
  const int64_t positions = round_up(call.tokens, kHeadDepth), columns = round_up(d, kHeadTile);
  const uint16_t* query = call.qkv + head * d;
  HeadRoom& room = HeadRoom::local();
  uint16_t* keys = room.keys.at_least(positions * filled);
  uint16_t* values = room.values.at_least(columns * positions);
  uint16_t* queries = room.queries.at_least(kHeadTile * filled);
  uint16_t* weights = room.weights.at_least(kHeadTile * positions);
  float* scores = room.scores.at_least(kHeadTile * positions);
  float* sums = room.sums.at_least(kHeadTile * columns);
  arrange_keys(call, query + width, positions / kHeadTile, filled, room.staged.at_least(kHeadTile * filled), keys);
  arrange_values(call, query + 2 * width, columns / kHeadTile, positions, values);
  for (int64_t first = 0; first < call.tokens; first += kHeadTile) {
    const int64_t n = std::min(kHeadTile, call.tokens - first);
    copy_rows(call, query, first, filled, queries);
    times_tiles(queries, filled, keys, positions / kHeadTile, filled / 2, scores, positions);
    float inverse[kHeadTile];
    for (int64_t r = 0; r < n; ++r) {
      const int64_t at = first + r, begin = call.window > 0 ? std::max<int64_t>(0, at - call.window) : 0;
      const int64_t end = call.window > 0 ? std::min(call.tokens, at + call.window + 1) : call.tokens;
      if (call.bias) add_bias(call, head, at, begin, end, scores + r * positions);
      inverse[r] = soften(scores + r * positions, begin, end, positions, call.scale, weights + r * positions);
    }
    std::memset(weights + n * positions, 0, (kHeadTile - n) * positions * sizeof *weights);
    times_tiles(weights, positions, values, columns / kHeadTile, positions / 2, sums, columns);
    for (int64_t r = 0; r < n; ++r) times_into(sums + r * columns, inverse[r], d, call.out + (first + r) * width + head * d);
  }
}

void attend_heads(const BidirectionalCall& call, int64_t begin, int64_t end) {
#ifdef __AMX_BF16__
  const Tiles tiles;
#endif
  for (int64_t head = begin; head < end; ++head) attend_head(call, head);
}

}  // namespace

const BidirectionalKernels FASTFF_TABLE(bidirectional) = {attend_heads};

}  // namespace fastff
