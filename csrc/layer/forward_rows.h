// One call's forward: where the weights lie, and its rows split over threads.
#pragma once

#include "base/threads.h"
#include "layer/arguments.h"
#include "layer/kernels.h"
#include "layer/plan.h"

namespace fastff {

// Tree t of weights that lie as fastff.h says.
template <class T>
View<T> plain_view(const Tree& tree, int64_t t, const Weights<T>& w) {
  View<T> v{};
  v.node_in = w.w_in + t * tree.in_rows() * tree.in_features;
  v.node_out = w.w_out + t * tree.out_rows() * tree.out_features;
  v.node_in_stride = v.leaf_in_row_stride = tree.in_features;
  v.node_out_stride = v.leaf_out_row_stride = tree.out_features;
  v.leaf_in = v.node_in + tree.nodes() * tree.in_features;
  v.leaf_out = v.node_out + (tree.node_output ? tree.nodes() * tree.out_features : 0);
  v.leaf_in_stride = tree.leaf_in_rows() * tree.in_features;
  v.leaf_out_stride = tree.leaf_width * tree.out_features;
  v.b_in = w.b_in ? w.b_in + t * tree.in_rows() : nullptr;
  v.b_out = w.b_out ? w.b_out + t * tree.leaves() * tree.out_features : nullptr;
  return v;
}

// All trees over all rows. kernel: of the chosen instruction set, for these views.
template <class T, class W, class Kernel>
void forward_rows(const Kernel& kernel, const Tree& tree, const View<T, W>* views, const T* x, int64_t rows,
                  const Forward<T>& out, int threads) {
  need_forward(tree, x, rows, out);
  parallel(rows, rows_a_piece(tree), threads,
           [&](int64_t begin, int64_t end) { kernel(tree, views, x, begin, end, out); });
}

}  // namespace fastff
