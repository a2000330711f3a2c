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

// values: [columns / 16][positions / 2][16][2]
inline void arrange_values(const BidirectionalCall& call, const uint16_t* column, int64_t tiles, int64_t positions,
                           uint16_t* to) {
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t p = 0; p < positions; p += 2, to += 2 * kHeadTile) {
      const int64_t n = std::min(kHeadTile, call.head_dim - t * kHeadTile);
      const uint16_t* row = column + p * call.row_stride + t * kHeadTile;
      uint16_t pair[2][kHeadTile] = {};
      for (int64_t i = 0; i < 2; ++i)
        if (p + i < call.tokens) std::memcpy(pair[i], row + i * call.row_stride, n * sizeof *row);
      for (int64_t c = 0; c < kHeadTile; ++c) {
        const uint32_t word = pair[0][c] | static_cast<uint32_t>(pair[1][c]) << 16;
        std::memcpy(to + 2 * c, &word, sizeof word);
      }
    }
}

#ifdef __AMX_BF16__
template <int N>
inline void by_amx(const uint16_t* x, int64_t x_stride, const uint16_t* tiles, int64_t words, float* out,
                   int64_t out_stride) {
  const int64_t next = words * 2 * kHeadTile;
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

// exp((scores - largest) * scale) of `tokens` scores, as bfloat16, zeros up to `filled`, a multiple of 16; returns 1 / their
// sum. scale: above zero.
inline float soften(float* scores, int64_t tokens, int64_t filled, float scale, uint16_t* to) {
  for (int64_t i = tokens; i < filled; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  float most[kHeadTile], sum[kHeadTile] = {};
  std::memcpy(most, scores, sizeof most);
  for (int64_t i = kHeadTile; i < filled; i += kHeadTile)
    for (int64_t l = 0; l < kHeadTile; ++l) most[l] = scores[i + l] > most[l] ? scores[i + l] : most[l];
  float largest = most[0];
  for (int64_t l = 1; l < kHeadTile; ++l) largest = most[l] > largest ? most[l] : largest;
  for (int64_t i = 0; i < filled; i += kHeadTile) {
    float weights[kHeadTile];
    for (int64_t l = 0; l < kHeadTile; ++l) {
      weights[l] = exp_((scores[i + l] - largest) * scale);
      sum[l] += weights[l];
    }
    to_bf16_lanes(weights, to + i);
  }
  float total = 0;
  for (int64_t l = 0; l < kHeadTile; ++l) total += sum[l];
  return 1 / total;
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
    for (int64_t r = 0; r < n; ++r)
      inverse[r] = soften(scores + r * positions, call.tokens, positions, call.scale, weights + r * positions);
    std::memset(weights + n * positions, 0, (kHeadTile - n) * positions * sizeof *weights);
    times_tiles(weights, positions, values, columns / kHeadTile, positions / 2, sums, columns);
    for (int64_t r = 0; r < n; ++r) {
      float* out = call.out + (first + r) * width + head * d;
      for (int64_t i = 0; i < d; ++i) out[i] = sums[r * columns + i] * inverse[r];
    }
  }
}

void attend_heads(const BidirectionalCall& call, int64_t begin, int64_t end) {
#ifdef __AMX_BF16__
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
#endif
  for (int64_t head = begin; head < end; ++head) attend_head(call, head);
#ifdef __AMX_BF16__
  _tile_release();
#endif
}

}  // namespace

const BidirectionalKernels FASTFF_TABLE(bidirectional) = {attend_heads};

}  // namespace fastff
