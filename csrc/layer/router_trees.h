// Greedy descents of many trees.
//
// Many rows: tree by tree. Rows are kept as a list of indices, grouped by the node that they have reached; a pass takes
// every group down two levels, with the products of all its rows and three nodes, its own and its children's, so that
// weights are read once for all rows. Few rows: all trees of all rows go down level by level, four at a time; what a
// decision needs next is fetched whole as soon as it is known. Where there are matrix tiles, they compute the scores of
// all nodes of the first levels for sixteen rows at a time, which then go down side by side.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "layer/activations.h"
#include "layer/router_products.h"
#include "layer/router_rows.h"
#include "layer/router_tiles.h"

namespace fastff {
namespace {

constexpr int64_t kFewRows = 24;          // up to so many, descents go level by level
constexpr int64_t kTreeBlockRows = 1024;  // rows whose lists and scores are kept at a time
constexpr int64_t kTiledBlockRows = 256;  // likewise, with all that tiles want of them
constexpr int64_t kTiledBytes = 192 << 10;  // of the trees whose tiles are in work: half of the second-level cache's part

template <class T>
struct TreesScratch {
  Buffer<T> score, gate, product;
  Buffer<int32_t> order, next_order, start, next_start, side, reached;

  static TreesScratch& local() {
    static thread_local TreesScratch scratch;
    return scratch;
  }
};

// gate[i] = the gate of a path whose scores are score[level * stride + i]. Arrays have room for whole vectors.
template <class T>
void path_gates(const Router& router, const T* score, int64_t stride, int64_t n, T* gate) {
  const int64_t whole = padded(n);
  for (int64_t i = 0; i < whole; ++i) gate[i] = 1;
  if (router.gate == FASTFF_UNGATED) return;
  const T inverse = static_cast<T>(std::min(1 / router.tau, static_cast<double>(std::numeric_limits<T>::max())));
  for (int level = 0; level < router.depth; ++level) {
    const T* own = score + level * stride;
    if (router.gate == FASTFF_BOUNDARY)
      for (int64_t i = 0; i < whole; ++i) gate[i] *= tanh_(std::fabs(own[i]) * inverse);
    else
      for (int64_t i = 0; i < whole; ++i) {
        const T factor = tanh_(std::fabs(own[i]) * inverse);
        gate[i] = factor < gate[i] || factor != factor ? factor : gate[i];  // NaN, once in, stays
      }
  }
}

template <class T, class W>
class Trees {
 public:
  Trees(const Router& router, const RouterView<T, W>& view, const Chosen<T>& out)
      : router_(router), view_(view), out_(out), rows_(router, view), scratch_(TreesScratch<T>::local()) {}

  void run(const T* x, const RoutePiece& piece) {
    const int64_t block = has_tiles(piece.row_end - piece.row) ? kTiledBlockRows : kTreeBlockRows;
    for (int64_t at = piece.row; at < piece.row_end; at += block) {
      first_ = at;
      count_ = std::min(block, piece.row_end - at);
      rows_.take(x + at * router_.in_features, count_);
      if (has_tiles(count_)) {
        by_tiles(piece.tree, piece.tree_end);
      } else if (count_ <= kFewRows) {
        few_rows(piece.tree, piece.tree_end);
      } else {
        for (int64_t t = piece.tree; t < piece.tree_end; ++t) {
          fetch_later(t + 1 < piece.tree_end ? t + 1 : t);
          many_rows(t);
        }
      }
    }
  }

 private:
  // ---- many rows ----

  void many_rows(int64_t t) {
    stride_ = padded(count_);
    score_ = scratch_.score.at_least(router_.depth * stride_ + kPad);
    make_groups();
    for (int64_t i = 0; i < count_; ++i) groups_.order[i] = static_cast<int32_t>(i);
    groups_.start[0] = 0;
    groups_.start[1] = static_cast<int32_t>(count_);
    passes(t, 0);
  }

  void make_groups() {
    const int64_t leaves = router_.tree_leaves();
    scratch_.product.at_least(4 * stride_);
    groups_ = {scratch_.order.at_least(stride_), scratch_.start.at_least(leaves + 1)};
    next_ = {scratch_.next_order.at_least(stride_), scratch_.next_start.at_least(leaves + 1)};
    scratch_.side.at_least(4 * stride_);
  }

  // Takes the groups of a level down to the leaves, and puts out what they reached.
  void passes(int64_t t, int level) {
    while (level < router_.depth) {
      const int levels = (router_.depth - level) % 2 == 1 ? 1 : 2;
      if (levels == 1) pass<1>(t, level);
      else pass<2>(t, level);
      level += levels;
    }
    const T* gate = gates();
    for (int64_t leaf = 0; leaf < router_.tree_leaves(); ++leaf)
      for (int32_t p = groups_.start[leaf]; p < groups_.start[leaf + 1]; ++p)
        put(groups_.order[p], t, leaf, gate[groups_.order[p]]);
    if (out_.scores) put_scores(t);
  }

  const T* gates() {
    T* gate = scratch_.gate.at_least(stride_);
    for (int level = 0; level < router_.depth; ++level)  // the last vector's rest
      for (int64_t i = count_; i < stride_; ++i) score(level)[i] = 0;
    path_gates(router_, score_, stride_, count_, gate);
    return gate;
  }

  void put_scores(int64_t t) const {
    for (int64_t i = 0; i < count_; ++i)
      for (int level = 0; level < router_.depth; ++level) score_out(i, t)[level] = score(level)[i];
  }

  // A tree whose nodes come into the second-level cache while the one before it is in work, a few lines a tile of rows.
  void fetch_later(int64_t t) {
    const int64_t bytes = router_.nodes() * view_.stride * static_cast<int64_t>(sizeof(W));
    const int64_t tiles = (router_.depth + 1) / 2 * ((count_ + 3) / 4);
    later_ = reinterpret_cast<const char*>(view_.at(weight_row(t, 0, 0)));
    later_end_ = later_ + bytes;
    later_bytes_ = (bytes / kLineBytes / std::max<int64_t>(1, tiles) + 1) * kLineBytes;
  }
  void fetch_some() {
    if (later_ >= later_end_) return;
    fetch_soon(later_, later_bytes_);
    later_ += later_bytes_;
  }

  T* score(int level) const { return score_ + level * stride_; }
  T* score_out(int64_t i, int64_t t) const {
    return out_.scores + ((first_ + i) * router_.trees + t) * router_.depth;
  }
  void put(int64_t i, int64_t t, int64_t leaf, T gate) const {
    const int64_t at = (first_ + i) * router_.trees + t;
    out_.leaf[at] = t * router_.tree_leaves() + leaf;
    out_.gate[at] = gate;
  }

  // Takes the groups of all nodes of a level down by L levels.
  template <int L>
  void pass(int64_t t, int level) {
    constexpr int kSides = 1 << L;
    const int64_t groups = int64_t{1} << level;
    int32_t* side[kSides];
    for (int s = 0; s < kSides; ++s) side[s] = scratch_.side.data() + s * stride_;
    int32_t filled = 0;
    next_.start[0] = 0;
    for (int64_t g = 0; g < groups; ++g) {
      int32_t counts[kSides] = {};
      const int32_t *order = groups_.order + groups_.start[g], n = groups_.start[g + 1] - groups_.start[g];
      if (n > 0) {
        multiply<L>(t, level, g, order, n);
        split<L>(t, level, g, order, n, side, counts);
      }
      for (int s = 0; s < kSides; ++s) {
        std::copy(side[s], side[s] + counts[s], next_.order + filled);
        filled += counts[s];
        next_.start[g * kSides + s + 1] = filled;
      }
    }
    std::swap(groups_, next_);
  }

  int64_t weight_row(int64_t t, int level, int64_t g) const {
    return t * router_.nodes() + (int64_t{1} << level) - 1 + g;
  }

  template <int L>
  void multiply(int64_t t, int level, int64_t g, const int32_t* order, int64_t n) {
    constexpr int64_t kRows = 4;
    const int64_t own = weight_row(t, level, g), child = weight_row(t, level + 1, 2 * g);
    const W* w[3] = {view_.at(own)};
    if constexpr (L == 2) w[1] = view_.at(child), w[2] = view_.at(child + 1);
    T* product = scratch_.product.data();
    for (int64_t p = 0; p < n; p += kRows) {
      const int64_t m = std::min(kRows, n - p);
      const W* x[kRows];
      for (int64_t k = 0; k < m; ++k) x[k] = rows_.row(order[p + k]);
      fetch_some();
      Products<W>::template few<2 * L - 1>(x, m, w, rows_.n(), product + 4 * p);
    }
  }

  // Deals the rows of a group out to its sides and keeps the scores of the way.
  template <int L>
  void split(int64_t t, int level, int64_t g, const int32_t* order, int64_t n, int32_t* const* side, int32_t* counts) {
    const int64_t own = weight_row(t, level, g), child = weight_row(t, level + 1, 2 * g);
    const T* product = scratch_.product.data();
    T *first = score(level), *second = score(level + L - 1);
    for (int64_t p = 0; p < n; ++p) {
      const int32_t row = order[p];
      T value = rows_.decided(row, own, product[4 * p]);
      int at = value > T(0);
      first[row] = value;
      if constexpr (L == 2) {
        value = rows_.decided(row, child + at, product[4 * p + 1 + at]);
        at = 2 * at + (value > T(0));
        second[row] = value;
      }
      side[at][counts[at]++] = row;
    }
  }

  // ---- many rows, by tiles ----

#ifndef __AMX_INT8__
  static constexpr bool has_tiles(int64_t) { return false; }
  void by_tiles(int64_t, int64_t) {}
#else
  bool has_tiles(int64_t rows) const { return view_.tiles && router_.depth > 0 && rows >= kFewTiledRows; }

  // A few trees at a time, whose tiles stay in the cache for all rows while the next trees' are on their way to it.
  void by_tiles(int64_t tree, int64_t tree_end) {
    if constexpr (std::is_same_v<W, int16_t>) {
      const Tiles tiles;
      const TiledWeights of = tiled_weights(router_);
      TiledRows x;
      x.take(rows_, 0, 1, count_);
      const int64_t tree_bytes = of.panels() * x.steps() * 2 * kTileBytes, few = std::max<int64_t>(1, kTiledBytes / tree_bytes);
      stride_ = padded(count_);
      const int64_t tree_scores = router_.depth * stride_;
      scratch_.score.at_least(few * tree_scores + kPad);
      scratch_.product.at_least(std::max(4 * stride_, of.panels() * kTileRows * kTileRows));
      scratch_.reached.at_least(few * stride_);
      make_groups();
      for (int64_t t = tree, n; t < tree_end; t += n) {
        n = std::min(few, tree_end - t);
        const char *next = view_.panel(router_, t + n), *next_end = view_.panel(router_, std::min(t + n + few, tree_end));
        FetchedAhead ahead(next, next_end - next, stride_ / kTileRows * n * of.panels() * x.steps());
        for (int64_t row = 0; row < count_; row += kTileRows)
          for (int64_t i = 0; i < n; ++i) {
            score_ = scratch_.score.data() + i * tree_scores;
            descend_sixteen(t + i, row, x, scratch_.reached.data() + i * stride_ + row, ahead);
          }
        for (int64_t i = 0; i < n; ++i) {
          score_ = scratch_.score.data() + i * tree_scores;
          finish_tiled(t + i, scratch_.reached.data() + i * stride_);
        }
      }
    }
  }

  // The scores of sixteen rows on the first levels of a tree, and the nodes that they reach, counted from the first of
  // their level. One vector is the rows' scores at a node.
  template <class Rows, class Ahead>
  void descend_sixteen(int64_t t, int64_t row, const Rows& x, int32_t* reached, Ahead& ahead) {
    const TiledWeights of = tiled_weights(router_);
    auto* product = reinterpret_cast<float(*)[kTileRows]>(scratch_.product.data());
    const char* panel = view_.panel(router_, t);
    for (int64_t p = 0; p < of.panels(); ++p, panel += x.steps() * 2 * kTileBytes)
      panel_products(panel, x.at(row), x.steps(), product + p * kTileRows, ahead);
    float scale[kTileRows], most_doubt[kTileRows];
    rows_.sixteen(row, count_, weight_row(t, 0, 0), of.tiled_rows, scale, most_doubt);
    const int64_t own = weight_row(t, 0, 0);
    for (int64_t j = 0; j < of.tiled_rows; ++j)
      for (int64_t l = 0; l < kTileRows; ++l) product[j][l] = rows_.scaled(scale[l], own + j, product[j][l]);
    int32_t node[kTileRows] = {};
    float least[kTileRows];
    std::fill_n(least, kTileRows, std::numeric_limits<float>::infinity());
    for (int level = 0; (int64_t{1} << level) <= of.tiled_rows; ++level) {
      const float* at = product[(int64_t{1} << level) - 1];
      float* value = score(level) + row;
      for (int64_t l = 0; l < kTileRows; ++l) {
        value[l] = at[node[l] * kTileRows + l];
        least[l] = std::fabs(value[l]) >= least[l] ? least[l] : std::fabs(value[l]);
        node[l] = 2 * node[l] + (value[l] > 0 ? 1 : 0);
      }
    }
    for (int64_t l = 0; l < std::min(kTileRows, count_ - row); ++l)
      if (!(least[l] > most_doubt[l])) node[l] = descend_again(t, row + l, product, l);
    std::copy_n(node, kTileRows, reached);
  }

  // One row of sixteen, some of whose scores may be in doubt.
  int32_t descend_again(int64_t t, int64_t row, const float (*product)[kTileRows], int64_t lane) {
    int32_t node = 0;
    for (int level = 0; (int64_t{1} << level) <= tiled_weights(router_).tiled_rows; ++level) {
      const float own = product[(int64_t{1} << level) - 1 + node][lane];
      const float value = score(level)[row] = rows_.decided_score(row, weight_row(t, level, node), own);
      node = 2 * node + (value > 0 ? 1 : 0);
    }
    return node;
  }

  void finish_tiled(int64_t t, const int32_t* reached) {
    if (router_.depth > kTiledLevels) {
      group(reached, int64_t{1} << kTiledLevels);
      return passes(t, kTiledLevels);
    }
    const T* gate = gates();
    for (int64_t i = 0; i < count_; ++i) put(i, t, reached[i], gate[i]);
    if (out_.scores) put_scores(t);
  }

  // Groups the rows by the node that each has reached.
  void group(const int32_t* reached, int64_t nodes) {
    std::fill_n(groups_.start, nodes + 1, 0);
    for (int64_t i = 0; i < count_; ++i) ++groups_.start[reached[i] + 1];
    for (int64_t g = 0; g < nodes; ++g) groups_.start[g + 1] += groups_.start[g];
    for (int64_t i = 0; i < count_; ++i) groups_.order[groups_.start[reached[i]]++] = static_cast<int32_t>(i);
    for (int64_t g = nodes; g > 0; --g) groups_.start[g] = groups_.start[g - 1];
    groups_.start[0] = 0;
  }
#endif

  // ---- few rows ----

  void few_rows(int64_t tree, int64_t tree_end) {
    const int64_t items = (tree_end - tree) * count_;
    stride_ = padded(items);
    score_ = scratch_.score.at_least(router_.depth * stride_ + kPad);
    std::fill_n(score_, router_.depth * stride_, T(0));
    int32_t* reached = scratch_.reached.at_least(items);
    std::fill_n(reached, items, 0);
    const int64_t bytes = rows_.n() * static_cast<int64_t>(sizeof(W));
    if (router_.depth > 0)
      for (int64_t t = tree; t < tree_end; ++t) fetch_soon(view_.at(weight_row(t, 0, 0)), bytes);
    for (int level = 0; level < router_.depth; ++level)
      for (int64_t i = 0; i < items; i += 4) descend_four(tree, level, i, items, reached, bytes);
    T* gate = scratch_.gate.at_least(stride_);
    path_gates(router_, score_, stride_, items, gate);
    for (int64_t i = 0; i < items; ++i) put(i % count_, tree + i / count_, reached[i], gate[i]);
    if (out_.scores)
      for (int64_t i = 0; i < items; ++i)
        for (int level = 0; level < router_.depth; ++level)
          score_out(i % count_, tree + i / count_)[level] = score(level)[i];
  }

  // Item i is row i % count_ in tree `tree` + i / count_.
  void descend_four(int64_t tree, int level, int64_t i, int64_t items, int32_t* reached, int64_t bytes) {
    const int64_t n = std::min<int64_t>(4, items - i);
    const W *w[4], *x[4];
    int64_t at[4];
    for (int64_t k = 0; k < 4; ++k) {
      const int64_t item = i + std::min(k, n - 1);
      at[k] = weight_row(tree + item / count_, level, reached[item]);
      w[k] = view_.at(at[k]);
      x[k] = rows_.row(item % count_);
    }
    T product[4];
    Products<W>::each(x, w, rows_.n(), product);
    for (int64_t k = 0; k < n; ++k) {
      const T value = rows_.decided((i + k) % count_, at[k], product[k]);
      score(level)[i + k] = value;
      reached[i + k] = 2 * reached[i + k] + (value > T(0));
      if (level + 1 < router_.depth)
        fetch_soon(view_.at(weight_row(tree + (i + k) / count_, level + 1, reached[i + k])), bytes);
    }
  }

  const Router& router_;
  const RouterView<T, W>& view_;
  const Chosen<T>& out_;
  RoutedRows<T, W> rows_;
  TreesScratch<T>& scratch_;
  int64_t first_ = 0, count_ = 0, stride_ = 0;
  T* score_ = nullptr;  // [depth][stride_], of the tree in work
  const char *later_ = nullptr, *later_end_ = nullptr;
  int64_t later_bytes_ = 0;

  // Rows grouped by node: those of node g of a level are order[start[g]] up to order[start[g + 1]].
  struct Groups {
    int32_t *order, *start;
  };
  Groups groups_{}, next_{};
};

}  // namespace
}  // namespace fastff
