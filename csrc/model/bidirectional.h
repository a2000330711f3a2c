// Attention over whole sequences in both directions: products in bfloat16, sums and softmax in fp32.
#pragma once

#include <cstdint>

#include "base/dispatch.h"

namespace fastff {

// One sequence, in bfloat16. A row holds all queries, all keys, all values, [heads][head_dim] each.
struct BidirectionalCall {
  const uint16_t* qkv;
  int64_t row_stride, tokens, heads, head_dim;
  float scale;  // of scores, above zero
  int64_t window;     // positions before and after a query that it attends to; 0: all
  const float* bias;  // [heads][2 * positions - 1], added to scaled scores: of the key's position minus the query's, from
  int64_t positions;  // 1 - positions on; or null
  float* out;   // [tokens][heads * head_dim]
};

struct BidirectionalKernels {
  // Heads [begin, end).
  void (*attend)(const BidirectionalCall& call, int64_t begin, int64_t end);
};

FASTFF_DECLARE_TILE_TABLES(BidirectionalKernels, bidirectional);
inline const BidirectionalKernels& bidirectional_kernels() {
  return FASTFF_CHOSEN_TILE_TABLE(BidirectionalKernels, bidirectional);
}

}  // namespace fastff
