// The end of a forward: rows that reached one leaf get its scores, and y from the scores of their paths.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "layer/activations.h"
#include "layer/kernels.h"
#include "layer/linear.h"
#include "layer/path.h"
#include "layer/quantised.h"
#include "layer/scratch.h"

namespace fastff {
namespace {

constexpr int kTile = 4;  // rows of one leaf finished together

// One tree over one block of rows: where they are read and written.
template <class T, class W>
struct Block {
  const Tree& tree;
  const View<T, W>& view;
  const T* x;            // [rows][in_features]
  T* y;                  // [rows][out_features]
  T* scores;             // of each row, score_stride apart
  int64_t score_stride;
  int64_t* leaf;         // of each row, tree.trees apart; or null
  T* norm;               // quantised: of each row, filled by the first tree
  bool accumulate;       // y already holds the part of other trees
  Scratch<T>& scratch;

  const T* x_row(int64_t row) const { return x + row * tree.in_features; }
  T* score_row(int32_t row) const { return scores + row * score_stride; }
};

template <class T, class W>
class PathOutput {
  static constexpr bool kQuantised = !std::is_same_v<T, W>;

 public:
  PathOutput(const Block<T, W>& block, Write write)
      : block_(block), tree_(block.tree), view_(block.view), write_(write), scratch_(block.scratch) {}

  // n rows that reached this leaf.
  void leaf(int64_t leaf, const int32_t* rows, int64_t n) {
    const int64_t neurons = tree_.leaf_in_rows();
    const W** weights = scratch_.template weights_of<W>().at_least(neurons);
    for (int64_t j = 0; j < neurons; ++j) weights[j] = view_.leaf_in_row(leaf, j);
    const W** outputs = scratch_.template outputs_of<W>().at_least(tree_.path_outputs() + 1);
    const int64_t count = output_rows(tree_, view_, leaf, outputs);
    if constexpr (kQuantised) output_scales(tree_, view_, leaf, scratch_.scale.at_least(count));
    const T* output_bias = view_.b_out ? view_.b_out + leaf * tree_.out_features : nullptr;
    for (int64_t i = 0; i < n; i += kTile) {
      const int64_t m = std::min<int64_t>(kTile, n - i);
      score_leaf(leaf, weights, neurons, rows + i, m);
      finish(rows + i, m, outputs, count, output_bias);
    }
    if (block_.leaf)
      for (int64_t i = 0; i < n; ++i) block_.leaf[rows[i] * tree_.trees] = leaf;
  }

 private:
  void score_leaf(int64_t leaf, const W* const* weights, int64_t neurons, const int32_t* rows, int64_t m) {
    const T* xs[kTile];
    for (int64_t k = 0; k < m; ++k) xs[k] = block_.x_row(rows[k]);
    T* raw = scratch_.raw.at_least(padded(kTile * tree_.path_scores()));
    dots(xs, m, weights, neurons, tree_.in_features, raw, neurons);
    const T* bias = view_.b_in ? view_.b_in + tree_.nodes() + leaf * neurons : nullptr;
    for (int64_t k = 0; k < m; ++k) {
      T* score = block_.score_row(rows[k]) + tree_.depth;
      for (int64_t j = 0; j < neurons; ++j) {
        T product = raw[k * neurons + j];
        if constexpr (kQuantised)
          product = scaled_product(product, view_.neuron(weights[j]), xs[k], weights[j], tree_.in_features);
        score[j] = product + (bias ? bias[j] : T(0));
      }
    }
  }

  // y of m rows that reached one leaf, from their path's scores.
  void finish(const int32_t* rows, int64_t m, const W* const* outputs, int64_t count, const T* output_bias) {
    const int64_t scores = tree_.path_scores(), factors = tree_.path_outputs() + 1;
    T* raw = scratch_.raw.at_least(padded(kTile * scores));
    T* value = scratch_.value.at_least(padded(kTile * scores));
    T* coef = scratch_.coef.at_least(kTile * factors);
    T* ys[kTile];
    for (int64_t k = 0; k < m; ++k) {
      std::copy_n(block_.score_row(rows[k]), scores, raw + k * scores);
      ys[k] = block_.y + rows[k] * tree_.out_features;
    }
    std::fill(raw + m * scores, raw + padded(m * scores), T(0));
    activate(tree_.activation, raw, value, m * scores);
    T* gate = nullptr;
    if (tree_.gated()) gates_of(tree_, raw, gate = scratch_.gate.at_least(padded(m * scores)), m * scores);
    for (int64_t k = 0; k < m; ++k)
      weigh(raw + k * scores, value + k * scores, gate ? gate + k * scores : nullptr, coef + k * factors);
    if constexpr (kQuantised) {
      if (output_bias)
        combine(ys, m, &output_bias, 1, {coef + factors - 1, factors, 1}, 0, tree_.out_features,
                block_.accumulate ? Write::kAdd : Write::kStore);
      const T* scale = scratch_.scale.data();
      for (int64_t k = 0; k < m; ++k)
        for (int64_t j = 0; j < count; ++j) coef[k * factors + j] *= scale[j];
    }
    const bool add = block_.accumulate || (kQuantised && output_bias);
    combine(ys, m, outputs, count, {coef, factors, 1}, 0, tree_.out_features, add ? Write::kAdd : write_);
  }

  // Factors of the output rows of one row: activations times the gates above them; last the leaf's gate, its bias's.
  void weigh(const T* score, const T* value, const T* gate, T* coef) const {
    T passed = 1;
    int64_t n = 0;
    for (int level = 0; level < tree_.depth; ++level) {
      if (tree_.node_output) coef[n++] = passed * value[level];
      if (gate) passed = narrowed(tree_, passed, gate[level]);
    }
    const T* leaf = value + tree_.depth;
    const T* pair = score + tree_.depth + tree_.leaf_width;
    for (int64_t j = 0; j < tree_.leaf_width; ++j) coef[n++] = passed * leaf[j] * (tree_.swiglu() ? pair[j] : T(1));
    coef[n] = passed;
  }

  const Block<T, W>& block_;
  const Tree& tree_;
  const View<T, W>& view_;
  Write write_;
  Scratch<T>& scratch_;
};

}  // namespace
}  // namespace fastff
