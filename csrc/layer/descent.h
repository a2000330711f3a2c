// Forward of one tree, the same source for every instruction set.
//
// Rows are kept as a list of indices. `descend` computes one node's score for all rows of a list, splits the list in two
// and goes on with each side, so that a node's weights are read once for all its rows and a subtree's rows stay in cache.
// A list that has become short is not worth splitting: its rows join a small group that walks down in lockstep, so that
// the loads of one row hide the latency of another. At the leaf the path is known and y is built once, rows of one leaf
// together (path_output.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "layer/kernels.h"
#include "layer/linear.h"
#include "layer/path_output.h"
#include "layer/plan.h"
#include "layer/quantised.h"
#include "layer/scratch.h"

namespace fastff {
namespace {

constexpr int64_t kStreamedBytes = 32 << 20;  // an output this large leaves the cache anyway before somebody reads it
constexpr int64_t kFirstLines = 4;  // of a child, fetched before it is known which child is needed

template <class T, class W>
class Descent {
  static constexpr bool kQuantised = !std::is_same_v<T, W>;

 public:
  Descent(const Block<T, W>& block, int64_t rows)
      : block_(block), tree_(block.tree), view_(block.view), write_(way_to_write(block.tree, rows)),
        output_(block_, write_), scratch_(block.scratch),
        row_elements_(kQuantised ? block.view.neuron_at + sizeof(Neuron) / sizeof(W) : block.tree.in_features) {}

  void run(int64_t rows) {
    int32_t* order = scratch_.order.at_least(rows);
    scratch_.side.at_least(rows);
    for (int64_t i = 0; i < rows; ++i) order[i] = static_cast<int32_t>(i);
    const int top = top_levels(tree_, rows);
    if (top > 0 && top < tree_.depth) sort_by_subtree(order, rows, top);
    else in_blocks(order, rows, top == 0 ? rows : kCachedRows, tree_.depth);  // so shallow a tree needs no sorting
    if (write_ == Write::kStream) fence();
  }

 private:
  // Past the cache where y is too large for it anyway, and no other tree adds to it.
  static Write way_to_write(const Tree& tree, int64_t rows) {
    const bool beyond_cache = rows * tree.out_features * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes;
    return tree.trees == 1 && beyond_cache ? Write::kStream : Write::kStore;
  }

  void sort_by_subtree(int32_t* order, int64_t rows, int top) {
    int32_t* mark = scratch_.mark.at_least(rows);
    in_blocks(order, rows, kCachedRows / 2, top);
    const int64_t subtrees = int64_t{1} << top;
    int64_t start[257] = {};
    for (int64_t i = 0; i < rows; ++i) ++start[mark[i] - (subtrees - 1) + 1];
    for (int64_t s = 0; s < subtrees; ++s) start[s + 1] += start[s];
    int64_t next[256];
    std::copy(start, start + subtrees, next);
    for (int64_t i = 0; i < rows; ++i) order[next[mark[i] - (subtrees - 1)]++] = static_cast<int32_t>(i);
    stop_ = tree_.depth;
    for (int64_t s = 0; s < subtrees; ++s) descend(top, subtrees - 1 + s, order + start[s], start[s + 1] - start[s]);
    flush();
  }

  // All rows from the root to level `stop`, so many at a time.
  void in_blocks(int32_t* order, int64_t rows, int64_t block, int stop) {
    stop_ = stop;
    for (int64_t at = 0; at < rows; at += block) {
      const int64_t n = std::min(block, rows - at);
      if constexpr (kQuantised)
        if (!block_.accumulate)
          for (int64_t i = at; i < at + n; ++i) block_.norm[i] = norm(block_.x_row(i), tree_.in_features);
      descend(0, 0, order + at, n);
    }
    flush();
  }

  void descend(int level, int64_t node, int32_t* rows, int64_t n) {
    if (n == 0) return;
    if (level == stop_) return arrive(node, rows, n);
    if (n < kSplitAtLeast) {
      for (int64_t i = 0; i < n; ++i) {
        if (walkers_ == kWalkers) flush();
        walk_[walkers_++] = {rows[i], level, node};
      }
      return;
    }
    if (n < kPairAtLeast || level + 1 == stop_) {
      score_node(level, node, rows, n);
      const int64_t left = split(level, rows, n);
      descend(level + 1, 2 * node + 1, rows, left);
      descend(level + 1, 2 * node + 2, rows + left, n - left);
      return;
    }
    score_family(level, node, rows, n);
    const int64_t left = split(level, rows, n);
    descend_split(level + 1, 2 * node + 1, rows, left);
    descend_split(level + 1, 2 * node + 2, rows + left, n - left);
  }

  // As descend, with the node's scores known.
  void descend_split(int level, int64_t node, int32_t* rows, int64_t n) {
    const int64_t left = split(level, rows, n);
    descend(level + 1, 2 * node + 1, rows, left);
    descend(level + 1, 2 * node + 2, rows + left, n - left);
  }

  void score_node(int level, int64_t node, const int32_t* rows, int64_t n) {
    const W* weight = view_.in_row(node);
    for (int64_t i = 0; i < n; i += kTile) {
      const T* xs[kTile];
      T out[kTile];
      const int64_t m = std::min<int64_t>(kTile, n - i);
      for (int64_t k = 0; k < m; ++k) xs[k] = block_.x_row(rows[i + k]);
      dots(xs, m, &weight, 1, tree_.in_features, out, 1);
      for (int64_t k = 0; k < m; ++k) block_.score_row(rows[i + k])[level] = settled(rows[i + k], node, weight, out[k]);
    }
  }

  // A node and both its children at once: reading x from the second-level cache costs more than the arithmetic, and so
  // the product that turns out not to be needed is cheaper than another pass over x.
  void score_family(int level, int64_t node, const int32_t* rows, int64_t n) {
    const int64_t nodes[3] = {node, 2 * node + 1, 2 * node + 2};
    const W* weights[3];
    for (int k = 0; k < 3; ++k) weights[k] = view_.in_row(nodes[k]);
    constexpr int kRows = tile_rows<T>(3);
    for (int64_t i = 0; i < n; i += kRows) {
      const T* xs[kRows];
      T out[kRows][3];
      const int64_t m = std::min<int64_t>(kRows, n - i);
      for (int64_t k = 0; k < m; ++k) xs[k] = block_.x_row(rows[i + k]);
      if (tree_.trees == 1)  // else x came into the cache with the first tree
        for (int64_t k = i + kTile; k < std::min(i + kTile + m, n); ++k) prefetch(block_.x_row(rows[k]), tree_.in_features);
      dots(xs, m, weights, 3, tree_.in_features, out[0], 3);
      for (int64_t k = 0; k < m; ++k) {
        T* score = block_.score_row(rows[i + k]) + level;
        score[0] = settled(rows[i + k], node, weights[0], out[k][0]);
        const int child = 1 + (score[0] > T(0));
        score[1] = settled(rows[i + k], nodes[child], weights[child], out[k][child]);
      }
    }
  }

  // Rows that go left at this level first, each side in its old order; returns how many do.
  int64_t split(int level, int32_t* rows, int64_t n) {
    int32_t* side = scratch_.side.data();
    int64_t left = 0, right = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t row = rows[i];
      const bool goes_right = block_.score_row(row)[level] > T(0);
      rows[left] = row;
      side[right] = row;
      left += !goes_right;
      right += goes_right;
    }
    std::copy(side, side + right, rows + left);
    return left;
  }

  // Take the waiting rows down to stop_, one level of each after the other.
  void flush() {
    int waiting = walkers_;
    walkers_ = 0;
    for (int moving = waiting; moving;) {
      moving = 0;
      for (int k = 0; k < waiting; ++k) {
        Walker& w = walk_[k];
        if (w.level == stop_) continue;
        step(w);
        moving += w.level < stop_;
      }
    }
    std::sort(walk_, walk_ + waiting, [](const Walker& a, const Walker& b) { return a.node < b.node; });
    for (int k = 0; k < waiting;) {
      int32_t same[kWalkers];
      int n = 0;
      const int64_t node = walk_[k].node;
      while (k < waiting && walk_[k].node == node) same[n++] = walk_[k++].row;
      arrive(node, same, n);
    }
  }

  struct Walker {
    int32_t row;
    int level;
    int64_t node;
  };

  void step(Walker& w) {
    const bool more = w.level + 1 < tree_.depth;
    if (more) {
      prefetch(view_.in_row(2 * w.node + 1), row_elements_, 0, kFirstLines);
      prefetch(view_.in_row(2 * w.node + 2), row_elements_, 0, kFirstLines);
    }
    const W* weight = view_.in_row(w.node);
    const T score = settled(w.row, w.node, weight, dot(block_.x_row(w.row), weight, tree_.in_features));
    block_.score_row(w.row)[w.level] = score;
    if (kQuantised && tree_.node_output) prefetch(view_.out_row(w.node), tree_.out_features);  // no gain with fp32 rows
    w.node = 2 * w.node + 1 + (score > T(0));
    ++w.level;
    if (more) prefetch(view_.in_row(w.node), row_elements_, kFirstLines);
    else prefetch(view_.leaf_in_row(w.node - tree_.nodes(), 0), row_elements_);
  }

  // A node's score from its product with a row. In doubt about its sign what rounding left of the weights is added, and
  // where that is not enough, the product is taken again in full precision.
  T settled(int32_t row, int64_t node, const W* weight, T product) const {
    const T bias = view_.b_in ? view_.b_in[node] : T(0);
    if constexpr (kQuantised) {
      const Neuron& neuron = view_.neuron(weight);
      const T score = product * neuron.scale_in + bias;
      if (sign_is_certain(score, block_.norm[row], neuron)) return score;
      // One score in six is in doubt in int8 (one in 25 in bf16), and with the rest one in six hundred.
      const Neuron& both = view_.neuron_with_rest(weight);
      const T finer = score + dot(block_.x_row(row), view_.rest(weight), tree_.in_features) * both.scale_in;
      if (sign_is_certain(finer, block_.norm[row], both)) return finer;
      product = dot(block_.x_row(row), view_.exact_in + node * tree_.in_features, tree_.in_features);
    }
    return product + bias;
  }

  void arrive(int64_t node, const int32_t* rows, int64_t n) {
    if (stop_ == tree_.depth) return output_.leaf(node - tree_.nodes(), rows, n);
    for (int64_t i = 0; i < n; ++i) scratch_.mark.data()[rows[i]] = static_cast<int32_t>(node);
  }

  const Block<T, W> block_;
  const Tree& tree_;
  const View<T, W>& view_;
  const Write write_;
  PathOutput<T, W> output_;
  Scratch<T>& scratch_;
  const int64_t row_elements_;  // of a weight row as stored
  int stop_ = 0;
  int walkers_ = 0;
  Walker walk_[kWalkers];
};

template <class T>
void lower_margin(const T* scores, int64_t stride, int64_t rows, int depth, T* margin) {
  for (int64_t i = 0; i < rows; ++i)
    for (int level = 0; level < depth; ++level) {
      const T size = std::fabs(scores[i * stride + level]);
      if (!(size >= margin[i])) margin[i] = margin[i] != margin[i] ? margin[i] : size;  // NaN, once in, stays
    }
}

template <class T, class W>
void forward(const Tree& tree, const View<T, W>* views, const T* x, int64_t begin, int64_t end, const Forward<T>& out) {
  const int64_t rows_at_once = block_rows(tree, sizeof(W), sizeof(T));
  Scratch<T>& scratch = Scratch<T>::local();
  const int64_t own = tree.path_scores(), stride = out.scores ? tree.trees * own : own;
  for (int64_t at = begin; at < end; at += rows_at_once) {
    const int64_t rows = std::min(rows_at_once, end - at);
    T* norms = std::is_same_v<T, W> ? nullptr : scratch.norm.at_least(rows);
    if (out.margin) std::fill_n(out.margin + at, rows, std::numeric_limits<T>::infinity());
    for (int64_t t = 0; t < tree.trees; ++t) {
      T* scores = out.scores ? out.scores + at * stride + t * own : scratch.scores.at_least(rows * own);
      int64_t* leaf = out.leaf ? out.leaf + at * tree.trees + t : nullptr;
      const Block<T, W> block = {tree, views[t], x + at * tree.in_features, out.y + at * tree.out_features, scores,
                                 stride, leaf, norms, t > 0, scratch};
      Descent<T, W>(block, rows).run(rows);
      if (out.margin) lower_margin(scores, stride, rows, tree.depth, out.margin + at);
    }
  }
}

}  // namespace
}  // namespace fastff
