// Sorting items by leaf.
#include "layer/visits.h"

#include <algorithm>
#include <numeric>

#include "base/checks.h"
#include "layer/visits_sort.h"

namespace fastff {

Visits SortedVisits::sort(const int64_t* leaf, int64_t rows, int64_t k, int64_t leaves) {
  const int64_t items = rows * k;
  need_in("leaves chosen by all rows", items, 0, kMaxRows);
  bool ascending = true;
  for (int64_t i = 1; i < items; ++i) ascending &= leaf[i - 1] <= leaf[i];
  item_.resize(items);
  leaf_.resize(items);
  if (ascending) {
    std::iota(item_.begin(), item_.end(), 0);
    std::copy(leaf, leaf + items, leaf_.begin());
  } else if (leaves > 8 * items) {
    compare(leaf, items);
  } else {
    count(leaf, items, leaves);
  }
  return {rows, k, item_.data(), leaf_.data()};
}

void SortedVisits::count(const int64_t* leaf, int64_t items, int64_t leaves) {
  start_.assign(leaves + 1, 0);
  for (int64_t i = 0; i < items; ++i) ++start_[leaf[i] + 1];
  std::partial_sum(start_.begin(), start_.end(), start_.begin());
  for (int64_t i = 0; i < items; ++i) {
    const int32_t at = start_[leaf[i]]++;
    item_[at] = static_cast<int32_t>(i);
    leaf_[at] = static_cast<int32_t>(leaf[i]);
  }
}

void SortedVisits::compare(const int64_t* leaf, int64_t items) {
  keys_.resize(items);
  for (int64_t i = 0; i < items; ++i) keys_[i] = static_cast<uint64_t>(leaf[i]) << 32 | static_cast<uint64_t>(i);
  std::sort(keys_.begin(), keys_.end());
  for (int64_t i = 0; i < items; ++i) {
    item_[i] = static_cast<int32_t>(keys_[i] & 0xffffffffu);
    leaf_[i] = static_cast<int32_t>(keys_[i] >> 32);
  }
}

}  // namespace fastff
