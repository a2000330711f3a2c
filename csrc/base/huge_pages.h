// Memory for weights: on huge pages where the system has them, and no more of it than the weights need.
#pragma once

#include <cstdint>

namespace fastff {

constexpr int64_t kHugePage = int64_t{1} << 21;
constexpr int64_t kLine = 64;  // bytes of a cache line

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Advise huge pages for those that lie wholly in [data, data + bytes).
void advise_huge_pages(void* data, int64_t bytes);

// Zeroed memory for at least `bytes`, aligned to a small page, from the size of a huge page on to a huge one. Throws
// std::bad_alloc.
class HugeBuffer {
 public:
  explicit HugeBuffer(int64_t bytes);
  ~HugeBuffer();
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }  // of memory, whole pages

 private:
  int64_t bytes_;
  int64_t mapped_bytes_ = 0;
  void* mapped_ = nullptr;
  char* data_ = nullptr;
};

}  // namespace fastff
