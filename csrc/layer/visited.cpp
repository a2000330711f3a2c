#include "layer/visited.h"

#include <algorithm>

namespace fastff {

Visited::Visited(const Tree& tree, const int64_t* leaf, int64_t rows) {
  const int64_t nodes = tree.nodes(), leaves = tree.leaves();
  std::vector<bool> heap(nodes + leaves);
  for (int64_t t = 0; t < tree.trees; ++t) {
    std::fill(heap.begin(), heap.end(), false);
    for (int64_t i = 0; i < rows; ++i) heap[nodes + leaf[i * tree.trees + t]] = true;
    for (int64_t n = nodes - 1; n >= 0; --n) heap[n] = heap[2 * n + 1] || heap[2 * n + 2];
    for (int64_t n = 0; n < nodes + leaves; ++n) {
      const bool is_leaf = n >= nodes;
      w_in.add(heap[n], is_leaf ? tree.leaf_in_rows() : 1);
      w_out.add(heap[n], is_leaf ? tree.leaf_width : tree.node_output ? 1 : 0);
      b_out.add(heap[n], is_leaf ? 1 : 0);
    }
  }
}

}  // namespace fastff
