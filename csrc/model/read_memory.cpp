// A measured bound of every engine that reads its weights once: how fast one core reads memory and does nothing else.
#include <cstring>

#include "base/checks.h"
#include "base/errors.h"
#include "model/fastff_model.h"

namespace fastff {
namespace {

constexpr int64_t kStep = 256, kAhead = 4096;  // bytes: read at once, and from there to what is fetched

// Sums of `streams` parts of memory that are read side by side, `bytes` each.
uint64_t read_streams(const char* data, int64_t bytes, int64_t streams) {
  uint64_t sums[kStep / sizeof(uint64_t)] = {};
  for (int64_t at = 0; at < bytes; at += kStep)
    for (int64_t s = 0; s < streams; ++s) {
      const char* from = data + s * bytes + at;
      uint64_t words[kStep / sizeof(uint64_t)];
      for (int64_t l = 0; l < kStep; l += 64) __builtin_prefetch(from + kAhead + l, 0, 2);
      std::memcpy(words, from, kStep);
      for (int64_t i = 0; i < kStep / static_cast<int64_t>(sizeof(uint64_t)); ++i) sums[i] += words[i];
    }
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace
}  // namespace fastff

using namespace fastff;

int32_t fastff_read_memory(const void* data, int64_t bytes, int64_t streams, uint64_t* sum) {
  return guarded([&] {
    need(data != nullptr && sum != nullptr, "data or sum is NULL");
    need_in("streams", streams, 1, 16);
    need_in("bytes", bytes, 0, kMaxSize);
    need(bytes % (streams * kStep) == 0, "bytes is no multiple of 256 bytes a stream");
    *sum = read_streams(static_cast<const char*>(data), bytes / streams, streams);
  });
}
