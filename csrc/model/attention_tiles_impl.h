// Attention over a cache by tiles of AMX: the part of model/attention_impl.h that is theirs.
//
// A number is two of bfloat16: its upper bits and what is left of it. For keys and values in half precision that is exact,
// for queries and weights it leaves out less than 2^-16 of them. A product is the sum of three: the upper parts, and one's
// upper with the other's lower part. A query's bits depend neither on the queries beside it nor on how many come at once.
// A key or value beyond half precision makes the queries that see it NaN, as it has no parts.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "isa/tiles.h"
#include "layer/scratch.h"
#include "model/attention.h"
#include "model/bidirectional_impl.h"

namespace fastff {
namespace {

constexpr int64_t kSpan = 128;                // positions whose keys or values are arranged at once
constexpr int64_t kMostRoomScores = 1 << 16;  // of the queries that are taken together
constexpr int64_t kFetchedAhead = 4096;       // numbers of a cache
constexpr int64_t kTileNumbers = 16 * 2 * 16;  // of a tile: sixteen lines of sixteen pairs

// What the queries of one head need; kept by a thread from call to call. Arrays of two planes have the upper parts first.
struct QueryRoom {
  Buffer<uint16_t> queries;  // [groups][2][16][filled]
  Buffer<uint16_t> weights;  // [groups][2][16][width]
  Buffer<uint16_t> tiles;    // of a span: [16 positions or 32][..][2][kTileNumbers]
  Buffer<float> scores;      // [groups][16][width]
  Buffer<float> sums;        // [groups][16][value_stride]
  Buffer<float> inverse;     // [groups][16]: 1 / the sum of a query's weights

  static QueryRoom& local() {
    static thread_local QueryRoom room;
    return room;
  }
};

// Two rows of sixteen numbers that are half precision's as a line of pairs of each plane.
inline void split_pair(__m512 x, __m512 y, uint16_t* upper, uint16_t* lower) {
  const auto bits = [](__m512 v) { return _mm512_castps_si512(v); };
  const auto upper_of = [&](__m512 v) { return _mm512_and_si512(bits(v), _mm512_set1_epi32(static_cast<int>(0xffff0000u))); };
  const auto pairs = [&](__m512 v, __m512 w) { return _mm512_or_si512(_mm512_srli_epi32(bits(v), 16), upper_of(w)); };
  const auto left_of = [&](__m512 v) { return _mm512_sub_ps(v, _mm512_castsi512_ps(upper_of(v))); };
  _mm512_storeu_si512(upper, pairs(x, y));
  _mm512_storeu_si512(lower, pairs(left_of(x), left_of(y)));
}

// Thirty-two rows of sixteen numbers, `stride` apart, of which the first `there` are read and the others are zeros, as a
// tile of each plane. As much as that is fetched from memory further on, where the next ones are.
inline void split_tile(const Half* from, int64_t stride, int64_t there, const Half* next, uint16_t* to) {
  const char* ahead = reinterpret_cast<const char*>(next);
  int64_t line = 0;
  for (; 2 * line + 2 <= std::min(there, kHeadDepth); ++line, from += 2 * stride) {
    __builtin_prefetch(ahead + line * 64, 0, 2);
    split_pair(Vec<float>::load(from), Vec<float>::load(from + stride), to + line * 32, to + kTileNumbers + line * 32);
  }
  for (; line < kHeadTile; ++line, from += 2 * stride)
    split_pair(2 * line < there ? Vec<float>::load(from) : _mm512_setzero_ps(), _mm512_setzero_ps(), to + line * 32,
               to + kTileNumbers + line * 32);
}

// Sixteen numbers in fp32 as numbers of each plane, rounded.
inline void split_numbers(__m512 x, uint16_t* upper, uint16_t* lower) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  const __m512 of_upper = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(upper), rounded);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lower),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_sub_ps(x, of_upper))));
}

// The attention of queries [begin, end) of a head.
class TileAttention {
 public:
  TileAttention(const HeadQueries& of, int64_t begin, int64_t end)
      : of_(of), cache_(head_cache(of.call, of.head)), begin_(begin), end_(end),
        groups_((end - begin + kHeadTile - 1) / kHeadTile), filled_(round_up(cache_.head_dim, kHeadDepth)),
        positions_(round_up(of.positions(end - 1), kHeadDepth)), width_(positions_ + kHeadDepth), room_(QueryRoom::local()) {}

  void run() {
    room_.queries.at_least(groups_ * 2 * kHeadTile * filled_);
    room_.weights.at_least(groups_ * 2 * kHeadTile * width_);
    room_.scores.at_least(groups_ * kHeadTile * width_);
    room_.sums.at_least(groups_ * kHeadTile * cache_.value_stride);
    room_.inverse.at_least(groups_ * kHeadTile);
    room_.tiles.at_least(2 * kSpan * std::max(filled_, cache_.value_stride));
    for (int64_t g = 0; g < groups_; ++g) split_queries(g);
    for (int64_t at = 0; at < positions_; at += kSpan) {
      const int64_t end = std::min(positions_, at + kSpan);
      arrange_keys(at, end);
      for (int64_t g = 0; g < groups_; ++g) score(g, at, std::min(end, group_width(g)));
    }
    for (int64_t g = 0; g < groups_; ++g) soften(g);
    for (int64_t at = 0; at < positions_; at += kSpan) {
      const int64_t end = std::min(positions_, at + kSpan);
      arrange_values(at, end);
      for (int64_t g = 0; g < groups_; ++g) sum_values(g, at, std::min(end, group_width(g)));
    }
    for (int64_t g = 0; g < groups_; ++g) finish(g);
  }

 private:
  int64_t group_count(int64_t g) const { return std::min(kHeadTile, end_ - begin_ - g * kHeadTile); }
  int64_t number(int64_t g, int64_t i) const { return begin_ + g * kHeadTile + i; }
  int64_t group_width(int64_t g) const { return round_up(of_.positions(number(g, group_count(g) - 1)), kHeadDepth); }
  uint16_t* queries(int64_t g) const { return room_.queries.data() + g * 2 * kHeadTile * filled_; }
  uint16_t* weights(int64_t g) const { return room_.weights.data() + g * 2 * kHeadTile * width_; }
  float* scores(int64_t g) const { return room_.scores.data() + g * kHeadTile * width_; }
  float* sums(int64_t g) const { return room_.sums.data() + g * kHeadTile * cache_.value_stride; }

  void split_queries(int64_t g) {
    uint16_t *upper = queries(g), *lower = upper + kHeadTile * filled_;
    for (int64_t i = 0; i < group_count(g); ++i, upper += filled_, lower += filled_) {
      const float* query = of_.query(number(g, i));
      for (int64_t d = 0; d < filled_; d += 16) {
        const int64_t left = std::clamp<int64_t>(cache_.head_dim - d, 0, 16);
        split_numbers(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1), query + d), upper + d, lower + d);
      }
    }
  }

  // Of positions [at, end): [16 positions][filled / 32][2] tiles.
  void arrange_keys(int64_t at, int64_t end) {
    uint16_t* to = room_.tiles.data();
    const int64_t dim = cache_.head_dim;
    for (int64_t block = at / kBlock; block < end / kBlock; ++block)
      for (int64_t d = 0; d < filled_; d += kHeadDepth, to += 2 * kTileNumbers)
        split_tile(cache_.keys + (block * dim + d) * kBlock, kBlock, block < of_.call.shape.blocks() ? dim - d : 0,
                   cache_.keys + (block * dim + d) * kBlock + kFetchedAhead, to);
  }

  // Of positions [at, end): [32 positions][columns / 16][2] tiles; zeros beyond the last position that a query sees.
  void arrange_values(int64_t at, int64_t end) {
    uint16_t* to = room_.tiles.data();
    const int64_t last = of_.positions(end_ - 1), stride = cache_.value_stride;
    for (int64_t t = at; t < end; t += kHeadDepth)
      for (int64_t c = 0; c < stride; c += kHeadTile, to += 2 * kTileNumbers)
        split_tile(cache_.values + t * stride + c, stride, last - t, cache_.values + t * stride + c * kHeadDepth + kFetchedAhead, to);
  }

  // Scores of a group at positions [at, end), thirty-two at a time.
  void score(int64_t g, int64_t at, int64_t end) {
    written_for_tiles();
    const uint16_t *upper = queries(g), *lower = upper + kHeadTile * filled_, *keys = room_.tiles.data();
    const int64_t next = filled_ / kHeadDepth * 2 * kTileNumbers;  // sixteen positions
    for (int64_t t = at; t < end; t += kHeadDepth, keys += 2 * next) {
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t d = 0; d < filled_; d += kHeadDepth) {
        _tile_loadd(4, upper + d, filled_ * 2);
        _tile_loadd(5, lower + d, filled_ * 2);
        const uint16_t* of = keys + d / kHeadDepth * 2 * kTileNumbers;
        add_products<0>(of);
        add_products<1>(of + next);
      }
      _tile_stored(0, scores(g) + t, width_ * 4);
      _tile_stored(1, scores(g) + t + kHeadTile, width_ * 4);
    }
  }

  // Adds to a tile of sums the products of tiles 4 and 5, upper and lower parts, with the two that follow in memory.
  template <int tile>
  static inline __attribute__((always_inline)) void add_products(const uint16_t* with) {
    _tile_loadd(6, with, 64);
    _tile_loadd(7, with + kTileNumbers, 64);
    if constexpr (tile == 0) { _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(0, 4, 7); _tile_dpbf16ps(0, 5, 6); }
    if constexpr (tile == 1) { _tile_dpbf16ps(1, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(1, 5, 6); }
    if constexpr (tile == 2) { _tile_dpbf16ps(2, 4, 6); _tile_dpbf16ps(2, 4, 7); _tile_dpbf16ps(2, 5, 6); }
    if constexpr (tile == 3) { _tile_dpbf16ps(3, 4, 6); _tile_dpbf16ps(3, 4, 7); _tile_dpbf16ps(3, 5, 6); }
  }

  // Scores become weights, each exp of the distance to its query's largest; zeros beyond a query's positions.
  void soften(int64_t g) {
    uint16_t *upper = weights(g), *lower = upper + kHeadTile * width_;
    const int64_t width = group_width(g);
    for (int64_t i = 0; i < group_count(g); ++i, upper += width_, lower += width_) {
      const int64_t positions = of_.positions(number(g, i)), whole = round_up(positions, kBlock);
      room_.inverse.data()[g * kHeadTile + i] = soften_query(scores(g) + i * width_, positions, upper, lower);
      std::fill(upper + whole, upper + width, uint16_t{0});
      std::fill(lower + whole, lower + width, uint16_t{0});
    }
  }

  float soften_query(float* scores, int64_t positions, uint16_t* upper, uint16_t* lower) const {
    const int64_t whole = round_up(positions, kBlock);
    exponentials(scores, 0, positions, whole, of_.call.scale);
    for (int64_t i = positions; i < whole; ++i) scores[i] = 0;
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < whole; i += kBlock) {
      const __m512 weight = _mm512_loadu_ps(scores + i);
      total = _mm512_add_ps(total, weight);
      split_numbers(weight, upper + i, lower + i);
    }
    return 1 / _mm512_reduce_add_ps(total);
  }

  // Adds the values at positions [at, end) to a group's sums, four times sixteen columns at a time.
  void sum_values(int64_t g, int64_t at, int64_t end) {
    for (int64_t c = 0; c < cache_.value_stride; c += 4 * kHeadTile)
      switch (std::min<int64_t>(4, (cache_.value_stride - c) / kHeadTile)) {
        case 1: sum_columns<1>(g, at, end, c); break;
        case 2: sum_columns<2>(g, at, end, c); break;
        case 3: sum_columns<3>(g, at, end, c); break;
        default: sum_columns<4>(g, at, end, c);
      }
  }

  template <int N>
  void sum_columns(int64_t g, int64_t at, int64_t end, int64_t column) {
    if (at >= end) return;
    written_for_tiles();
    const uint16_t *upper = weights(g), *lower = upper + kHeadTile * width_;
    const uint16_t* values = room_.tiles.data() + column / kHeadTile * 2 * kTileNumbers;
    float* to = sums(g) + column;
    const int64_t stride = cache_.value_stride * 4, next = cache_.value_stride / kHeadTile * 2 * kTileNumbers;
    const bool begins = at == 0;
    if (begins) _tile_zero(0); else _tile_loadd(0, to, stride);
    if (N > 1) { if (begins) _tile_zero(1); else _tile_loadd(1, to + kHeadTile, stride); }
    if (N > 2) { if (begins) _tile_zero(2); else _tile_loadd(2, to + 2 * kHeadTile, stride); }
    if (N > 3) { if (begins) _tile_zero(3); else _tile_loadd(3, to + 3 * kHeadTile, stride); }
    for (int64_t t = at; t < end; t += kHeadDepth, values += next) {
      _tile_loadd(4, upper + t, width_ * 2);
      _tile_loadd(5, lower + t, width_ * 2);
      add_products<0>(values);
      if (N > 1) add_products<1>(values + 2 * kTileNumbers);
      if (N > 2) add_products<2>(values + 4 * kTileNumbers);
      if (N > 3) add_products<3>(values + 6 * kTileNumbers);
    }
    _tile_stored(0, to, stride);
    if (N > 1) _tile_stored(1, to + kHeadTile, stride);
    if (N > 2) _tile_stored(2, to + 2 * kHeadTile, stride);
    if (N > 3) _tile_stored(3, to + 3 * kHeadTile, stride);
  }

  void finish(int64_t g) {
    for (int64_t i = 0; i < group_count(g); ++i)
      times_into(sums(g) + i * cache_.value_stride, room_.inverse.data()[g * kHeadTile + i], cache_.head_dim,
                 of_.out(number(g, i)));
  }

  const HeadQueries& of_;
  const HeadCache cache_;
  const int64_t begin_, end_, groups_, filled_;
  const int64_t positions_;  // that a query sees, in whole tiles
  const int64_t width_;      // of a row of scores: no multiple of 2 KB, which would lie in few sets of the cache
  QueryRoom& room_;
};

// Whether the values of positions [begin, end) are numbers.
inline bool finite_values(const HeadCache& cache, int64_t begin, int64_t end) {
  __m512i most = _mm512_setzero_si512();
  const Half* last = cache.values + end * cache.value_stride;
  for (const Half* at = cache.values + begin * cache.value_stride; at < last; at += 16) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_cvtepu16_epi32(bits), _mm512_set1_epi32(0x7fff)));
  }
  return _mm512_reduce_max_epi32(most) < 0x7c00;
}

// Up to four tiles of sums, two of queries or weights, two of keys or values.
struct AttentionTileShapes : TileShapes {
  explicit AttentionTileShapes(int64_t queries) {
    for (int tile = 0; tile < 6; ++tile) rows[tile] = static_cast<uint8_t>(std::min(kHeadTile, queries));
  }
};

void attend_by_tiles(const HeadQueries& of, int64_t begin, int64_t end) {
  const int64_t positions = of.positions(end - 1);
  // A weight of 0 would make an infinite value NaN: then queries that do not see it go alone.
  const bool together = finite_values(head_cache(of.call, of.head), of.positions(begin), positions);
  const int64_t most = together ? std::max<int64_t>(1, kMostRoomScores / (positions * kHeadTile)) * kHeadTile : 1;
  const Tiles tiles{AttentionTileShapes(std::min(most, end - begin))};
  for (; begin < end; begin += most) TileAttention(of, begin, std::min(end, begin + most)).run();
}

}  // namespace
}  // namespace fastff
