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

inline HeadCache head_cache(const AttentionCall& call, int64_t head) {
  const CacheShape& s = call.shape;
  Half* keys = call.cache + (call.layer * s.heads + head) * s.head_numbers();
  return {keys, keys + s.key_numbers(), s.head_dim, s.value_stride()};
}

// Queries of one key head are counted row by row: they share its keys.
struct HeadQueries {
  const AttentionCall& call;
  int64_t head;

  int64_t of_a_row() const { return call.heads / call.shape.heads; }
  int64_t count() const { return call.rows * of_a_row(); }
  int64_t positions(int64_t query) const { return call.first + query / of_a_row() + 1; }  // that it attends to
  const float* query(int64_t number) const {
    return call.qkv + number / of_a_row() * call.row_stride + place(number);
  }
  float* out(int64_t number) const {
    return call.out + number / of_a_row() * call.heads * call.shape.head_dim + place(number);
  }

 private:
  int64_t place(int64_t number) const { return (head * of_a_row() + number % of_a_row()) * call.shape.head_dim; }
};

struct AttentionKernels {
  void (*store)(const HeadCache& cache, int64_t position, const float* key, const float* value);
  // Queries [begin, end).
  void (*attend)(const HeadQueries& queries, int64_t begin, int64_t end);
  int64_t task_queries;  // that are better taken together
};

FASTFF_DECLARE_TILE_TABLES(AttentionKernels, attention);

void attend(const AttentionCall& call, int threads);

}  // namespace fastff
