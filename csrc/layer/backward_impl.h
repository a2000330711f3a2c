// Backward of one tree, the same source for every instruction set.
//
// Rows sorted by leaf make every node's rows one contiguous range, so weight gradients are sums over ranges: no atomics,
// and a result that does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layer/activations.h"
#include "layer/kernels.h"
#include "layer/linear.h"
#include "layer/path.h"
#include "layer/path_output.h"
#include "layer/scratch.h"

namespace fastff {
namespace {

// Slopes of one row: dscore from grad, the product <grad_y, output row> of each output row of its path.
template <class T>
struct RowGradient {
  const Tree& tree;
  const T* score = nullptr;
  const T* value = nullptr;
  const T* slope = nullptr;
  const T* gate = nullptr;  // tanh(|score| / tau), or null
  const T* grad = nullptr;
  T* dscore = nullptr;
  T* coef = nullptr;  // path_outputs factors, then the leaf's gate

  void run(bool output_bias) const {
    T passed[25];  // factor of each level
    passed[0] = 1;
    for (int level = 0; level < tree.depth; ++level)
      passed[level + 1] = gate ? narrowed(tree, passed[level], gate[level]) : T(1);
    const int64_t first = tree.node_output ? tree.depth : 0;
    for (int level = 0; level < tree.depth; ++level) {
      dscore[level] = tree.node_output ? passed[level] * slope[level] * grad[level] : T(0);
      if (tree.node_output) coef[level] = passed[level] * value[level];
    }
    T below = leaf(passed[tree.depth], first);
    coef[first + tree.leaf_width] = passed[tree.depth];
    if (!gate) return;
    if (output_bias) below += grad[first + tree.leaf_width];
    for (int level = tree.depth - 1; level >= 0; --level) {
      const T t = gate[level];
      const T sign = score[level] > T(0) ? T(1) : score[level] < T(0) ? T(-1) : T(0);
      T dgate = passed[level] * below;
      if (tree.gate == FASTFF_BOUNDARY) {
        below *= t;
      } else if (t < passed[level]) {  // the least so far: what hangs below is this gate's, none of it those above
        dgate = below;
        below = 0;
      } else {
        dgate = 0;
      }
      dscore[level] += dgate * (T(1) - t * t) * sign * inverse_tau<T>(tree);
      if (tree.node_output) below += value[level] * grad[level];
    }
  }

  // Fills the leaf's part; returns what the leaf adds to <grad_y, y> before its gate.
  T leaf(T passed, int64_t first) const {
    T total = 0;
    for (int64_t j = 0; j < tree.leaf_width; ++j) {
      const int64_t at = tree.depth + j;
      const T pair = tree.swiglu() ? score[at + tree.leaf_width] : T(1);
      const T g = grad[first + j];
      dscore[at] = passed * slope[at] * pair * g;
      if (tree.swiglu()) dscore[at + tree.leaf_width] = passed * value[at] * g;
      coef[first + j] = passed * value[at] * pair;
      total += value[at] * pair * g;
    }
    return total;
  }
};

template <class T>
class RowsBackward {
 public:
  RowsBackward(const Tree& tree, const View<T>& view, const Backward<T>& b)
      : tree_(tree), view_(view), b_(b), scratch_(Scratch<T>::local()) {}

  // Sorted positions [begin, end) reached one leaf.
  void leaf_group(int64_t leaf, int64_t begin, int64_t end) {
    const T** outputs = scratch_.outputs.at_least(tree_.path_outputs() + 1);
    const int64_t count = output_rows(tree_, view_, leaf, outputs);
    const T** inputs = scratch_.weights.at_least(tree_.path_scores());
    for (int level = 0; level < tree_.depth; ++level)
      inputs[level] = view_.in_row(ancestor(tree_, leaf, level));
    for (int64_t j = 0; j < tree_.leaf_in_rows(); ++j) inputs[tree_.depth + j] = view_.leaf_in_row(leaf, j);
    for (int64_t at = begin; at < end; at += kTile)
      tile(b_.order + at, std::min<int64_t>(kTile, end - at), outputs, count, inputs);
  }

 private:
  void tile(const int32_t* rows, int64_t m, const T* const* outputs, int64_t count, const T* const* inputs) {
    const int64_t scores = tree_.path_scores(), width = tree_.path_outputs() + 1;
    T* raw = scratch_.raw.at_least(padded(kTile * scores));
    T* value = scratch_.value.at_least(padded(kTile * scores));
    T* slope = scratch_.slope.at_least(padded(kTile * scores));
    T* grad = scratch_.grad.at_least(kTile * width);
    T* packed = scratch_.coef.at_least(kTile * scores);
    const T* grads[kTile];
    T* grad_xs[kTile];
    for (int64_t k = 0; k < m; ++k) {
      std::copy_n(b_.scores + rows[k] * tree_.trees * scores, scores, raw + k * scores);
      grads[k] = b_.grad_y + rows[k] * tree_.out_features;
      grad_xs[k] = b_.grad_x ? b_.grad_x + rows[k] * tree_.in_features : nullptr;
    }
    std::fill(raw + m * scores, raw + padded(m * scores), T(0));
    activate_with_slope(tree_.activation, raw, value, slope, m * scores);
    dots(grads, m, outputs, count, tree_.out_features, grad, width);
    T* gate = nullptr;
    if (tree_.gated()) {
      gate = scratch_.gate.at_least(padded(m * scores));
      gates_of(tree_, raw, gate, m * scores);
    }
    for (int64_t k = 0; k < m; ++k) {
      const int64_t at = k * scores;
      T* dscore = b_.dscore + rows[k] * scores;
      RowGradient<T> row{tree_};
      row.score = raw + at;
      row.value = value + at;
      row.slope = slope + at;
      row.gate = gate ? gate + at : nullptr;
      row.grad = grad + k * width;
      row.dscore = dscore;
      row.coef = b_.coef + rows[k] * width;
      row.run(view_.b_out != nullptr);
      std::copy_n(dscore, scores, packed + at);
    }
    if (b_.grad_x)
      combine(grad_xs, m, inputs, scores, {packed, scores, 1}, 0, tree_.in_features,
              b_.accumulate_x ? Write::kAdd : Write::kStore);
  }

  const Tree& tree_;
  const View<T>& view_;
  const Backward<T>& b_;
  Scratch<T>& scratch_;
};

template <class T>
void backward_rows(const Tree& tree, const View<T>& view, const Backward<T>& b, int64_t begin, int64_t end) {
  RowsBackward<T> rows(tree, view, b);
  for (int64_t at = begin; at < end;) {
    const int64_t leaf = b.leaf[b.order[at] * tree.trees];
    int64_t stop = at + 1;
    while (stop < end && b.leaf[b.order[stop] * tree.trees] == leaf) ++stop;
    rows.leaf_group(leaf, at, stop);
    at = stop;
  }
}

// Sums over the rows of each node: columns [begin, end) of a target's rows += factor * source row.
template <class T>
class WeightSums {
 public:
  WeightSums(const Tree& tree, const Backward<T>& b, const T* source, int64_t columns, const T* factors,
             int64_t factor_stride, int64_t begin, int64_t end)
      : tree_(tree), b_(b), source_(source), columns_(columns), factors_(factors), factor_stride_(factor_stride),
        begin_(begin), end_(end) {}

  // Four levels at a time: one pass over a row serves up to four nodes of its path.
  void nodes(const GradientRows<T>& target, int64_t rows) {
    for (int top = 0; top < tree_.depth; top += kTile) {
      const int levels = std::min(kTile, tree_.depth - top);
      const int shift = tree_.depth - (top + levels - 1);  // leaf + leaves >> shift names the lowest of these nodes
      for_groups(rows, shift, [&](int64_t lowest, int64_t from, int64_t to) {
        T* outs[kTile];
        for (int k = 0; k < levels; ++k) outs[k] = target.at((lowest >> (levels - 1 - k)) - 1);
        sum(outs, levels, from, to, top);
      });
    }
  }

  // `count` rows to a leaf, the first leaf's at row `first` of the target; their factors start at `factor`.
  void leaves(const GradientRows<T>& target, int64_t rows, int64_t first, int64_t count, int64_t factor) {
    for_groups(rows, 0, [&](int64_t lowest, int64_t from, int64_t to) {
      const int64_t base = first + (lowest - tree_.leaves()) * count;
      for (int64_t j = 0; j < count; j += kTile) {
        T* outs[kTile];
        const int64_t n = std::min<int64_t>(kTile, count - j);
        for (int64_t k = 0; k < n; ++k) outs[k] = target.at(base + j + k);
        sum(outs, n, from, to, factor + j);
      }
    });
  }

 private:
  template <class F>
  void for_groups(int64_t rows, int shift, F&& visit) {
    for (int64_t at = 0; at < rows;) {
      const int64_t node = heap(at) >> shift;
      int64_t stop = at + 1;
      while (stop < rows && heap(stop) >> shift == node) ++stop;
      visit(node, at, stop);
      at = stop;
    }
  }
  int64_t heap(int64_t position) const { return b_.leaf[b_.order[position] * tree_.trees] + tree_.leaves(); }

  void sum(T* const* outs, int64_t n, int64_t from, int64_t to, int64_t factor) {
    constexpr int64_t kRun = 16;  // short partial sums: rounding errors grow with the run, not with the rows
    const T* ins[kRun];
    T packed[kRun * kTile];
    for (int64_t at = from; at < to; at += kRun) {
      const int64_t m = std::min(kRun, to - at);
      for (int64_t i = 0; i < m; ++i) {
        const int64_t row = b_.order[at + i];
        ins[i] = source_ + row * columns_;
        for (int64_t k = 0; k < n; ++k) packed[i * kTile + k] = factors_[row * factor_stride_ + factor + k];
      }
      combine(outs, n, ins, m, {packed, 1, kTile}, begin_, end_, Write::kAdd);
    }
  }

  const Tree& tree_;
  const Backward<T>& b_;
  const T* source_;
  int64_t columns_;
  const T* factors_;
  int64_t factor_stride_, begin_, end_;
};

template <class T>
void backward_w_in(const Tree& tree, const Backward<T>& b, int64_t rows, int64_t begin, int64_t end) {
  const int64_t scores = tree.path_scores();
  if (b.grad_w_in) {
    WeightSums<T> sums(tree, b, b.x, tree.in_features, b.dscore, scores, begin, end);
    sums.nodes(b.grad_w_in, rows);
    sums.leaves(b.grad_w_in, rows, tree.nodes(), tree.leaf_in_rows(), tree.depth);
  }
  if (b.grad_b_in && begin == 0) {
    for (int64_t at = 0; at < rows; ++at) {
      const int64_t row = b.order[at], leaf = b.leaf[row * tree.trees];
      const T* dscore = b.dscore + row * scores;
      for (int level = 0; level < tree.depth; ++level)
        b.grad_b_in[ancestor(tree, leaf, level)] += dscore[level];
      T* own = b.grad_b_in + tree.nodes() + leaf * tree.leaf_in_rows();
      for (int64_t j = 0; j < tree.leaf_in_rows(); ++j) own[j] += dscore[tree.depth + j];
    }
  }
}

template <class T>
void backward_w_out(const Tree& tree, const Backward<T>& b, int64_t rows, int64_t begin, int64_t end) {
  const int64_t first = tree.node_output ? tree.depth : 0;
  WeightSums<T> sums(tree, b, b.grad_y, tree.out_features, b.coef, tree.path_outputs() + 1, begin, end);
  if (b.grad_w_out) {
    if (tree.node_output) sums.nodes(b.grad_w_out, rows);
    sums.leaves(b.grad_w_out, rows, tree.node_output ? tree.nodes() : 0, tree.leaf_width, first);
  }
  if (b.grad_b_out) sums.leaves(b.grad_b_out, rows, 0, 1, first + tree.leaf_width);
}

}  // namespace
}  // namespace fastff
