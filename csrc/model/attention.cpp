#include "model/attention.h"

#include <algorithm>

#include "base/threads.h"

namespace fastff {
namespace {

constexpr int64_t kGrainScores = 2048;  // that are worth another thread

}  // namespace

void attend(const AttentionCall& call, int threads) {
  const AttentionKernels& kernels = FASTFF_CHOSEN_TILE_TABLE(AttentionKernels, attention);
  const int64_t dim = call.shape.head_dim, key_heads = call.shape.heads, task = kernels.task_queries;
  if (call.rows == 0) return;
  for (int64_t row = 0; row < call.rows; ++row)
    for (int64_t head = 0; head < key_heads; ++head) {
      const float* key = call.qkv + row * call.row_stride + (call.heads + head) * dim;
      kernels.store(head_cache(call, head), call.first + row, key, key + key_heads * dim);
    }
  const int64_t queries = HeadQueries{call, 0}.count(), tasks = (queries + task - 1) / task;
  const int64_t scores = (call.first + call.rows) * std::min(queries, task);  // of a task
  parallel(tasks * key_heads, std::max<int64_t>(1, kGrainScores / scores), threads, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin / tasks; head * tasks < end; ++head) {
      const int64_t first = std::max<int64_t>(0, begin - head * tasks), last = std::min(tasks, end - head * tasks);
      kernels.attend({call, head}, first * task, std::min(queries, last * task));
    }
  });
}

}  // namespace fastff
