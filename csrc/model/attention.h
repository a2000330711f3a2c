// Causal attention over a cache of keys and values in half precision.
//
// A layer's cache of one key-value head: keys in blocks of 16 positions, [block][head_dim][16], so that a query's scores at
// 16 positions are sums of whole vectors; then values, [position][head_dim filled up to 16].
#pragma once

#include <cstdint>

#include "base/dispatch.h"
#include "base/half.h"

namespace fastff {

constexpr int64_t kBlock = 16;  // positions of a block of keys

struct CacheShape {
  int64_t layers = 0, heads = 0, head_dim = 0, capacity = 0;  // heads of keys; capacity in positions

  int64_t blocks() const { return (capacity + kBlock - 1) / kBlock; }
  int64_t value_stride() const { return (head_dim + kBlock - 1) / kBlock * kBlock; }
  int64_t key_numbers() const { return blocks() * kBlock * head_dim; }
  int64_t head_numbers() const { return key_numbers() + blocks() * kBlock * value_stride(); }
  int64_t bytes() const { return layers * heads * head_numbers() * static_cast<int64_t>(sizeof(Half)); }
};

// One head's part of the cache.
struct HeadCache {
  Half* keys;
  Half* values;
  int64_t head_dim, value_stride;
};

constexpr int kMostQueries = 4;  // that share a pass over the cache

// Queries over one head's cache, each over its own number of positions from the first.
struct Queries {
  int count;                          // 1 to kMostQueries
  const float* query[kMostQueries];   // [head_dim]
  int64_t positions[kMostQueries];    // at least 1
  float* out[kMostQueries];           // [head_dim]
  float scale;                        // of scores
  float* scores[kMostQueries];        // room for whole blocks of positions
};

struct AttentionKernels {
  void (*store)(const HeadCache& cache, int64_t position, const float* key, const float* value);
  void (*attend)(const HeadCache& cache, const Queries& queries);
};

FASTFF_DECLARE_TABLES(AttentionKernels, attention);

// Rows of queries, keys and values side by side: [heads + 2 * key heads][head_dim]. The rows stand at positions first,
// first + 1 and so on; their keys and values enter the cache of `layer`, and out is [rows][heads * head_dim].
struct AttentionCall {
  CacheShape shape;
  Half* cache;
  int64_t layer, rows, first, heads, row_stride;
  const float* qkv;
  float* out;
  float scale;
};
void attend(const AttentionCall& call, int threads);

}  // namespace fastff
