#include "layer/arguments.h"

#include <algorithm>
#include <cmath>

namespace fastff {

Tree checked(const fastff_tree* t) {
  need(t != nullptr, "tree must not be NULL");
  need_in("in_features", t->in_features, 1, kMaxSize);
  need_in("out_features", t->out_features, 1, kMaxSize);
  need_in("trees", t->trees, 1, kMaxSize);
  need_in("leaf_width", t->leaf_width, 1, kMaxSize);
  need_in("depth", t->depth, 0, 24);
  need_in("activation", t->activation, FASTFF_GELU, FASTFF_ABS);
  need_in("gate", t->gate, FASTFF_UNGATED, FASTFF_BOUNDARY_MIN);
  need(t->activation != FASTFF_SWIGLU || !t->node_output, "swiglu needs node_output = 0");
  need(t->gate == FASTFF_UNGATED || (t->tau > 0 && std::isfinite(t->tau)), "tau must be positive and finite");
  const double rows = std::ldexp(2.0 * t->leaf_width + 1, t->depth);
  const double widest = static_cast<double>(std::max(t->in_features, t->out_features));
  need(rows * widest * static_cast<double>(t->trees) * sizeof(double) < kAddressable,
       "weights need more memory than can be addressed");
  Tree tree{};
  tree.in_features = t->in_features;
  tree.out_features = t->out_features;
  tree.trees = t->trees;
  tree.leaf_width = t->leaf_width;
  tree.depth = t->depth;
  tree.node_output = t->node_output != 0;
  tree.activation = t->activation;
  tree.gate = t->gate;
  tree.tau = t->tau;
  return tree;
}

void need_rows(const Tree& tree, int64_t rows) {
  need_in("rows", rows, 0, kMaxRows);
  const double widest = std::max({static_cast<double>(tree.in_features), static_cast<double>(tree.out_features),
                                  static_cast<double>(tree.trees) * static_cast<double>(tree.path_scores() + 1)});
  need(static_cast<double>(rows) * widest * sizeof(double) < kAddressable,
       "rows need more memory than can be addressed");
}

void need_leaves(const Tree& tree, const int64_t* leaf, int64_t rows) {
  for (int64_t i = 0; i < rows * tree.trees; ++i) need_in("leaf", leaf[i], 0, tree.leaves() - 1);
}

}  // namespace fastff
