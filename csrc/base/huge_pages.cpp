#include "base/huge_pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <limits>
#include <new>

namespace fastff {
namespace {

// A last huge page is filled up only where that adds at most an eighth; else the rest lies on small pages.
int64_t whole_pages(int64_t bytes) {
  const int64_t small = round_up(bytes, sysconf(_SC_PAGESIZE)), huge = round_up(bytes, kHugePage);
  return huge - bytes <= bytes / 8 ? huge : small;
}

}  // namespace

void advise_huge_pages(void* data, int64_t bytes) {
  const auto begin = reinterpret_cast<intptr_t>(data);
  if (begin <= 0 || bytes <= 0 || bytes > std::numeric_limits<intptr_t>::max() - begin - kHugePage) return;
  const int64_t first = round_up(begin, kHugePage), end = (begin + bytes) / kHugePage * kHugePage;
#ifdef MADV_HUGEPAGE
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  static_cast<void>(first), static_cast<void>(end);
#endif
}

HugeBuffer::HugeBuffer(int64_t bytes) : bytes_(whole_pages(bytes)) {
  if (bytes_ == 0) return;
  const bool large = bytes_ >= kHugePage;
  mapped_bytes_ = bytes_ + (large ? kHugePage : 0);  // room to start at a huge page; untouched, it takes no memory
  mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped_ == MAP_FAILED) throw std::bad_alloc();
  const auto at = reinterpret_cast<intptr_t>(mapped_);
  data_ = reinterpret_cast<char*>(large ? round_up(at, kHugePage) : at);
  advise_huge_pages(data_, bytes_);
}

HugeBuffer::~HugeBuffer() {
  if (mapped_) munmap(mapped_, mapped_bytes_);
}

}  // namespace fastff
