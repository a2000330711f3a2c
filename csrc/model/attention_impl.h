// Kernels of model/attention.h, for the instruction set whose Vec<float> the including file has defined.
//
// The order of a query's sums depends on the model and the positions alone, not on the queries beside it: its bits are the
// same when a prompt is read at once and position by position.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "isa/table.h"
#include "layer/activations.h"
#include "layer/scratch.h"
#include "model/attention.h"

#ifdef __AMX_BF16__
#include "model/attention_tiles_impl.h"
#endif

namespace fastff {
namespace {

void store_position(const HeadCache& cache, int64_t position, const float* key, const float* value) {
  using V = Vec<float>;
  const int64_t dim = cache.head_dim;
  Half* keys = cache.keys + position / kBlock * kBlock * dim + position % kBlock;
  for (int64_t d = 0; d < dim; ++d) keys[d * kBlock] = to_half(key[d]);
  Half* values = cache.values + position * cache.value_stride;
  int64_t d = 0;
  for (; d + V::width <= dim; d += V::width) V::store(values + d, V::load(value + d));
  for (; d < dim; ++d) values[d] = to_half(value[d]);
}

constexpr int64_t kMostQueries = 4;  // that share a pass over the cache

// Queries over one head's cache, each over its own number of positions from the first.
struct Queries {
  const float* query[kMostQueries];  // [head_dim]
  int64_t positions[kMostQueries];   // at least 1
  float* out[kMostQueries];          // [head_dim]
  float scale;                       // of scores
  float* scores[kMostQueries];       // room for whole blocks of positions
};

// Scores of N queries at the 16 positions of a block.
template <int N>
inline void score_block(const Half* keys, int64_t dim, const float* const* query, float* const* scores) {
  using V = Vec<float>;
  constexpr int kParts = static_cast<int>(kBlock) / V::width, kChains = kParts == 1 ? 2 : 1;
  typename V::Reg acc[N][kChains][kParts];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c)
      for (int p = 0; p < kParts; ++p) acc[n][c][p] = V::zero();
  int64_t d = 0;
  for (; d + kChains <= dim; d += kChains)
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c)
      for (int p = 0; p < kParts; ++p) {
        const auto key = V::load(keys + (d + c) * kBlock + p * V::width);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[n][c][p] = V::fma(key, V::set(query[n][d + c]), acc[n][c][p]);
      }
  for (; d < dim; ++d)
    for (int p = 0; p < kParts; ++p) {
      const auto key = V::load(keys + d * kBlock + p * V::width);
      for (int n = 0; n < N; ++n) acc[n][0][p] = V::fma(key, V::set(query[n][d]), acc[n][0][p]);
    }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
    for (int p = 0; p < kParts; ++p) {
      auto total = acc[n][0][p];
      if constexpr (kChains == 2) total = V::add(total, acc[n][1][p]);
      V::store(scores[n] + p * V::width, total);
    }
}

// Scores become exponentials of their distance to the largest, zeros beyond `positions`; returns one over their sum.
inline float soften(float* scores, int64_t positions, int64_t blocks, float scale) {
  for (int64_t i = positions; i < blocks * kBlock; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  float most[kBlock], sums[kBlock] = {};
  for (int64_t l = 0; l < kBlock; ++l) most[l] = scores[l];
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t l = 0; l < kBlock; ++l) {
      const float s = scores[b * kBlock + l];
      most[l] = s > most[l] ? s : most[l];
    }
  const float largest = scale * *std::max_element(most, most + kBlock);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t l = 0; l < kBlock; ++l) {
      const float e = exp_(scores[b * kBlock + l] * scale - largest);
      scores[b * kBlock + l] = e;
      sums[l] += e;
    }
  float total = 0;
  for (float s : sums) total += s;
  return 1 / total;
}

// out[n][column ..] of N queries: values summed by their weights, C vectors of columns.
template <int N, int C>
inline void sum_values(const HeadCache& cache, const Queries& q, int64_t positions, const float* inverse, int64_t column) {
  using V = Vec<float>;
  typename V::Reg acc[N][C];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[n][c] = V::zero();
  const Half* values = cache.values + column;
  const int64_t shared = *std::min_element(q.positions, q.positions + N);
  for (int64_t t = 0; t < shared; ++t, values += cache.value_stride) {
    typename V::Reg value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[c] = V::load(values + c * V::width);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const auto weight = V::set(q.scores[n][t]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[n][c] = V::fma(weight, value[c], acc[n][c]);
    }
  }
  for (int64_t t = shared; t < positions; ++t, values += cache.value_stride)
    for (int n = 0; n < N; ++n) {
      if (t >= q.positions[n]) continue;  // a weight of 0 would make an infinite value NaN
      const auto weight = V::set(q.scores[n][t]);
      for (int c = 0; c < C; ++c) acc[n][c] = V::fma(weight, V::load(values + c * V::width), acc[n][c]);
    }
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < C; ++c) {
      const int64_t at = column + c * V::width;
      const auto scaled = V::fma(acc[n][c], V::set(inverse[n]), V::zero());
      if (at + V::width <= cache.head_dim) V::store(q.out[n] + at, scaled);
      else if (at < cache.head_dim) V::store_n(q.out[n] + at, scaled, cache.head_dim - at);
    }
}

template <int N>
void attend_queries(const HeadCache& cache, const Queries& q) {
  using V = Vec<float>;
  const int64_t positions = *std::max_element(q.positions, q.positions + N);
  const int64_t blocks = (positions + kBlock - 1) / kBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    float* scores[N];
    for (int n = 0; n < N; ++n) scores[n] = q.scores[n] + b * kBlock;
    score_block<N>(cache.keys + b * kBlock * cache.head_dim, cache.head_dim, q.query, scores);
  }
  float inverse[N];
  for (int n = 0; n < N; ++n) inverse[n] = soften(q.scores[n], q.positions[n], blocks, q.scale);
  constexpr int64_t kColumns = 4 * V::width;
  int64_t column = 0;
  for (; column + kColumns <= cache.value_stride; column += kColumns)
    sum_values<N, 4>(cache, q, positions, inverse, column);
  for (; column < cache.value_stride; column += V::width) sum_values<N, 1>(cache, q, positions, inverse, column);
}

void attend_some(const HeadCache& cache, int64_t count, const Queries& q) {
  switch (count) {
    case 1: return attend_queries<1>(cache, q);
    case 2: return attend_queries<2>(cache, q);
    case 3: return attend_queries<3>(cache, q);
    default: return attend_queries<4>(cache, q);
  }
}

void attend_in_fp32(const HeadQueries& of, int64_t begin, int64_t end) {
  static thread_local Buffer<float> room;
  const int64_t stride = of.call.shape.blocks() * kBlock;
  float* scores = room.at_least(kMostQueries * stride);
  for (; begin < end; begin += kMostQueries) {
    const int64_t count = std::min(kMostQueries, end - begin);
    Queries queries{};
    queries.scale = of.call.scale;
    for (int64_t i = 0; i < count; ++i) {
      queries.query[i] = of.query(begin + i);
      queries.positions[i] = of.positions(begin + i);
      queries.out[i] = of.out(begin + i);
      queries.scores[i] = scores + i * stride;
    }
    attend_some(head_cache(of.call, of.head), count, queries);
  }
}

void attend_head(const HeadQueries& of, int64_t begin, int64_t end) {
#ifdef __AMX_BF16__
  // Keys and values are arranged for tiles at every token, which one query a key head is not worth. (The choice is by the
  // model alone: other sums have other bits.)
  if (of.of_a_row() > 1) return attend_by_tiles(of, begin, end);
#endif
  attend_in_fp32(of, begin, end);
}

}  // namespace

#ifdef __AMX_BF16__
constexpr int64_t kTaskQueries = kHeadTile;
#else
constexpr int64_t kTaskQueries = kMostQueries;
#endif

const AttentionKernels FASTFF_TABLE(attention) = {store_position, attend_head, kTaskQueries};

}  // namespace fastff
