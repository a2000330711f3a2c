#include "model/attention.h"

#include <algorithm>
#include <vector>

#include "base/threads.h"

namespace fastff {
namespace {

constexpr int64_t kGrainPositions = 512;  // of a group of queries, that are worth another thread

HeadCache head_cache(const AttentionCall& call, int64_t head) {
  const CacheShape& s = call.shape;
  Half* keys = call.cache + (call.layer * s.heads + head) * s.head_numbers();
  return {keys, keys + s.key_numbers(), s.head_dim, s.value_stride()};
}

// Queries number [begin, end) of one key head, counted row by row: they share its keys.
void attend_group(const AttentionCall& call, int64_t head, int64_t begin, int64_t end, std::vector<float>& room) {
  const int64_t dim = call.shape.head_dim, shared = call.heads / call.shape.heads;
  const int64_t stride = call.shape.blocks() * kBlock;
  if (static_cast<int64_t>(room.size()) < kMostQueries * stride) room.resize(kMostQueries * stride);
  Queries queries{};
  queries.count = static_cast<int>(end - begin);
  queries.scale = call.scale;
  for (int i = 0; i < queries.count; ++i) {
    const int64_t row = (begin + i) / shared, of_all = head * shared + (begin + i) % shared;
    queries.query[i] = call.qkv + row * call.row_stride + of_all * dim;
    queries.out[i] = call.out + row * call.heads * dim + of_all * dim;
    queries.positions[i] = call.first + row + 1;
    queries.scores[i] = room.data() + i * stride;
  }
  FASTFF_CHOSEN_TABLE(AttentionKernels, attention).attend(head_cache(call, head), queries);
}

}  // namespace

void attend(const AttentionCall& call, int threads) {
  const auto store = FASTFF_CHOSEN_TABLE(AttentionKernels, attention).store;
  const int64_t dim = call.shape.head_dim, key_heads = call.shape.heads;
  for (int64_t row = 0; row < call.rows; ++row)
    for (int64_t head = 0; head < key_heads; ++head) {
      const float* key = call.qkv + row * call.row_stride + (call.heads + head) * dim;
      store(head_cache(call, head), call.first + row, key, key + key_heads * dim);
    }
  const int64_t queries = call.rows * (call.heads / key_heads), groups = (queries + kMostQueries - 1) / kMostQueries;
  const int64_t grain = std::max<int64_t>(1, kGrainPositions / (call.first + call.rows));
  parallel(groups * key_heads, grain, threads, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> room;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % groups * kMostQueries;
      attend_group(call, i / groups, first, std::min(queries, first + kMostQueries), room);
    }
  });
}

}  // namespace fastff
