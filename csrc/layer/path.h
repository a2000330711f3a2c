// What forward and backward say alike of one path: its nodes, its output rows and its gates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "layer/activations.h"
#include "layer/kernels.h"

namespace fastff {
namespace {

// The routing node at `level` on the way to `leaf`.
inline int64_t ancestor(const Tree& tree, int64_t leaf, int level) {
  return ((leaf + tree.leaves()) >> (tree.depth - level)) - 1;
}

// Weight rows that a path through `leaf` adds to y: nodes from the root (if they are neurons), the leaf's, its bias
// where it has the type of the weights.
template <class T, class W>
int64_t output_rows(const Tree& tree, const View<T, W>& view, int64_t leaf, const W** rows) {
  int64_t n = 0;
  if (tree.node_output)
    for (int level = 0; level < tree.depth; ++level) rows[n++] = view.out_row(ancestor(tree, leaf, level));
  for (int64_t j = 0; j < tree.leaf_width; ++j) rows[n++] = view.leaf_out_row(leaf, j);
  if constexpr (std::is_same_v<T, W>)
    if (view.b_out) rows[n++] = view.b_out + leaf * tree.out_features;
  return n;
}

// The factor below a node, of the factor above it and the node's own. Of equal ones the least is that above: the
// gradient of BOUNDARY_MIN is then that node's alone.
template <class T>
T narrowed(const Tree& tree, T above, T gate) {
  if (tree.gate == FASTFF_BOUNDARY) return above * gate;
  return gate < above || gate != gate ? gate : above;  // NaN, once in, stays
}

// 1 / tau, finite: a score of zero has the gate zero however small tau is.
template <class T>
T inverse_tau(const Tree& tree) {
  return static_cast<T>(1 / std::max(tree.tau, static_cast<double>(std::numeric_limits<T>::min())));
}

// The gate of each score: tanh(|score| / tau), with room for whole vectors at both ends.
template <class T>
void gates_of(const Tree& tree, const T* score, T* gate, int64_t n) {
  const T inverse = inverse_tau<T>(tree);
  for (int64_t i = 0; i < padded(n); ++i) gate[i] = tanh_(std::fabs(score[i]) * inverse);
}

}  // namespace
}  // namespace fastff
