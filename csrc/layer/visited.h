// Which rows of the weights a batch visits.
#pragma once

#include <cstdint>
#include <vector>

#include "layer/kernels.h"

namespace fastff {

// Rows of w_in, w_out and b_out, counted over all trees, that some row of x visits: in ascending order the visited ones
// have the slots 0, 1, 2 ...; the others have -1.
class Visited {
 public:
  Visited(const Tree& tree, const int64_t* leaf, int64_t rows);

  struct Slots {
    std::vector<int64_t> of;
    int64_t count = 0;

    void add(bool visited, int64_t rows) {
      for (int64_t i = 0; i < rows; ++i) of.push_back(visited ? count++ : -1);
    }
    // Numbers of the visited rows, `count` of them.
    void list(int64_t* rows) const {
      if (rows)
        for (size_t row = 0; row < of.size(); ++row)
          if (of[row] >= 0) *rows++ = static_cast<int64_t>(row);
    }
  };
  Slots w_in, w_out, b_out;
};

}  // namespace fastff
