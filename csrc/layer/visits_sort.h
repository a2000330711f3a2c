// The visits of one call, sorted by leaf.
#pragma once

#include <vector>

#include "layer/visits.h"

namespace fastff {

// Memory is kept from call to call.
class SortedVisits {
 public:
  // leaf [rows][k], each 0 to leaves - 1.
  Visits sort(const int64_t* leaf, int64_t rows, int64_t k, int64_t leaves);

 private:
  void count(const int64_t* leaf, int64_t items, int64_t leaves);
  void compare(const int64_t* leaf, int64_t items);

  std::vector<int32_t> item_, leaf_, start_;
  std::vector<uint64_t> keys_;
};

}  // namespace fastff
