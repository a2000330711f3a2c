// Checks of a caller's tree, weights and rows. Each throws std::invalid_argument naming the value seen and the one expected.
#pragma once

#include "base/checks.h"
#include "layer/kernels.h"

namespace fastff {

Tree checked(const fastff_tree* tree);

// So that no later product of sizes overflows.
void need_rows(const Tree& tree, int64_t rows);
void need_leaves(const Tree& tree, const int64_t* leaf, int64_t rows);

// Present, aligned, and a bias of the leaves only where leaves have one.
template <class T>
void need_weights(const Tree& tree, const Weights<T>& w) {
  need(w.w_in && w.w_out, "w_in and w_out must not be NULL");
  need(!w.b_out || !tree.node_output, "b_out must be NULL with node_output = 1");
  need_aligned(
      {array("w_in", w.w_in, 0), array("b_in", w.b_in, 0), array("w_out", w.w_out, 0), array("b_out", w.b_out, 0)});
}

template <class T>
Array w_in_array(const Tree& tree, const char* name, const T* data) {
  return array(name, data, tree.trees * tree.in_rows() * tree.in_features);
}
template <class T>
Array b_in_array(const Tree& tree, const char* name, const T* data) {
  return array(name, data, tree.trees * tree.in_rows());
}
template <class T>
Array w_out_array(const Tree& tree, const char* name, const T* data) {
  return array(name, data, tree.trees * tree.out_rows() * tree.out_features);
}
template <class T>
Array b_out_array(const Tree& tree, const char* name, const T* data) {
  return array(name, data, tree.trees * tree.leaves() * tree.out_features);
}

// The outputs of a forward overlap neither each other nor `inputs`: x and, where the caller still owns them, the weights.
template <class T>
void need_outputs(const Tree& tree, int64_t rows, const Forward<T>& out, Arrays inputs) {
  const Array y = array("y", out.y, rows * tree.out_features), leaf = array("leaf", out.leaf, rows * tree.trees),
              margin = array("margin", out.margin, rows),
              scores = array("scores", out.scores, rows * tree.trees * tree.path_scores());
  need_aligned({y, leaf, margin, scores});
  need_disjoint({y, leaf, margin, scores}, inputs);
}

template <class T>
void need_forward(const Tree& tree, const T* x, int64_t rows, const Forward<T>& out) {
  need_rows(tree, rows);
  if (rows == 0) return;
  need(x && out.y, "x and y must not be NULL");
  need_aligned({array("x", x, 0)});
  need_outputs(tree, rows, out, {array("x", x, rows * tree.in_features)});
}

}  // namespace fastff
