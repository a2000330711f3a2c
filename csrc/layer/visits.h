// Which rows visit which leaf. An item is one slot of one row: item row * k + slot.
#pragma once

#include <cstdint>

namespace fastff {

// Items sorted by leaf, equal leaves in the order of the items: a row's items come in ascending order of their leaves.
struct Visits {
  int64_t rows, k;
  const int32_t* item;  // [rows * k], of each sorted position; likewise below
  const int32_t* leaf;

  int64_t items() const { return rows * k; }
  int64_t row(int64_t position) const { return item[position] / k; }

  // The end of the group of one leaf that begins here.
  int64_t group_end(int64_t position, int64_t end) const {
    int64_t stop = position + 1;
    while (stop < end && leaf[stop] == leaf[position]) ++stop;
    return stop;
  }
};

}  // namespace fastff
