// The best k leaves by scores: flat routers, product keys, and beams down trees.
//
// Quantised: every candidate's comparison value lies in an interval. Which leaves are among the best in any case, and
// which in none, follows from the intervals; those in between are computed again in fp32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "layer/router_products.h"
#include "layer/router_rows.h"
#include "layer/router_select.h"

namespace fastff {
namespace {

constexpr int64_t kTopBlockRows = 64;   // rows whose scores of all leaves are kept at a time
constexpr int64_t kVisitedRows = 8;     // up to so many, a beam computes the scores of the nodes that it visits alone

template <class T>
struct TopScratch {
  Buffer<T> product, score, value, doubt, bound, best, sum, sum_doubt, chosen_score, memo;
  Buffer<int32_t> index, node, open, known, place;

  static TopScratch& local() {
    static thread_local TopScratch scratch;
    return scratch;
  }
};

// Of n candidates with values in value[i] +- doubt[i], doubt finite where value is, the k best. exact(i) gives a
// candidate's fp32 value and may be asked of any; the ones that it gave are kept in value, with doubt 0.
template <class T, class Exact>
void choose_in_doubt(T* value, T* doubt, int64_t n, int64_t k, TopScratch<T>& s, int32_t* index, const Exact& exact) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  T* bound = s.bound.at_least(n);
  T* best = s.best.at_least(k + 1);
  int32_t* open = s.open.at_least(std::max(n, k + 1));
  const auto lower = [&](int64_t i) { return value[i] - doubt[i]; };
  const auto upper = [&](int64_t i) { return value[i] + doubt[i]; };
  for (int64_t i = 0; i < n; ++i) bound[i] = lower(i);
  Best<T> lowest(best, open, k);
  lowest.offer_all(bound, n);
  const T floor = lowest.full() ? lowest.worst() : -kInfinity;
  int64_t candidates = 0;
  for (int64_t i = 0; i < n; ++i)
    if (!(upper(i) < floor)) index[candidates++] = static_cast<int32_t>(i);
  if (candidates > k) {
    for (int64_t c = 0; c < candidates; ++c) bound[c] = upper(index[c]);
    Best<T> highest(best, open, k + 1);
    highest.offer_all(bound, candidates);
    const T ceiling = highest.full() ? highest.worst() : kInfinity;
    for (int64_t c = 0; c < candidates; ++c) {
      const int32_t i = index[c];
      const bool sure = lower(i) > ceiling;
      if (!sure && doubt[i] > T(0)) {
        value[i] = exact(i);
        doubt[i] = 0;
      }
      bound[c] = sure ? kInfinity : value[i];
    }
    // The sure ones first: no more than k of them, so the others' order among themselves decides the rest.
    int32_t* place = s.place.at_least(k);
    choose(bound, candidates, k, best, place);
    for (int64_t c = 0; c < k; ++c) index[c] = index[place[c]];
  }
}

template <class T, class W>
class TopChosen {
  static constexpr bool kQuantised = !std::is_same_v<T, W>;

 public:
  TopChosen(const Router& router, const RouterView<T, W>& view, const Chosen<T>& out)
      : router_(router), view_(view), out_(out), rows_(router, view), scratch_(TopScratch<T>::local()) {}

  void run(const T* x, const RoutePiece& piece) {
    for (int64_t at = piece.row; at < piece.row_end; at += kTopBlockRows) {
      first_ = at;
      count_ = std::min(kTopBlockRows, piece.row_end - at);
      rows_.take(x + at * router_.in_features, count_ * router_.halves());
      if (router_.kind == FASTFF_PATHS) {
        for (int64_t t = piece.tree; t < piece.tree_end; ++t) paths(t);
      } else {
        all_products(0, router_.weight_rows());
        for (int64_t i = 0; i < count_; ++i) router_.kind == FASTFF_FLAT ? flat(i) : product_keys(i);
      }
    }
  }

 private:
  // ---- scores ----

  // Products of the block's rows with weight rows [from, from + n).
  void all_products(int64_t from, int64_t n) {
    width_ = n;
    T* to = scratch_.product.at_least(count_ * n);
    const int64_t halves = router_.halves(), part = n / halves;
    const W* x[kTopBlockRows];
    for (int64_t h = 0; h < halves; ++h) {
      for (int64_t i = 0; i < count_; ++i) x[i] = rows_.row(i * halves + h);
      products(x, count_, view_.at(from + h * part), part, view_.stride, rows_.n(), to + h * part, n);
    }
  }

  // Scores of row i of x at weight rows [from, from + n), and their doubts: finite ones, since gates, too, see scores.
  void scores(int64_t i, int64_t from, int64_t n, const T* product, T* score, T* doubt) const {
    for (int64_t j = 0; j < n; ++j) score[j] = rows_.score(i, from + j, product[j]);
    if constexpr (kQuantised) {
      T most = 0;
      for (int64_t j = 0; j < n; ++j) {
        doubt[j] = rows_.doubt(i, from + j);
        most = doubt[j] > most ? doubt[j] : most;
      }
      if (most < std::numeric_limits<T>::infinity()) return;
      for (int64_t j = 0; j < n; ++j)
        if (!(doubt[j] < std::numeric_limits<T>::infinity())) {
          score[j] = rows_.exact(i, from + j);
          doubt[j] = 0;
        }
    }
  }

  // The fp32 score of row i of x at a weight row, computed once for each row of the block.
  T exact(int64_t i, int64_t at) {
    if constexpr (kQuantised) {
      if (!scratch_.known.data()[at]) {
        scratch_.known.data()[at] = 1;
        scratch_.memo.data()[at] = rows_.exact(i, at);
      }
      return scratch_.memo.data()[at];
    } else {
      return 0;  // never asked for: nothing is in doubt
    }
  }
  void forget(int64_t weight_rows) {
    if constexpr (kQuantised) {
      scratch_.memo.at_least(weight_rows);
      std::fill_n(scratch_.known.at_least(weight_rows), weight_rows, 0);
    }
  }
  bool is_exact(int64_t at) const { return kQuantised && scratch_.known.data()[at]; }

  // What is compared.
  T compared(T score, int64_t at) const { return view_.balance ? sigmoid(score) + view_.balance[at] : score; }
  // What it may be off by if the score may be off by `doubt`; `size` bounds what the score was added up from. The slope of
  // a sigmoid is at most a quarter.
  T compared_doubt(T doubt, T size, int64_t at) const {
    constexpr T kRounding = T(2.5e-7);
    return view_.balance ? T(0.25) * doubt + kRounding * (1 + std::fabs(view_.balance[at])) : doubt + kRounding * size;
  }

  template <class Exact>
  void choose_of(T* value, T* doubt, int64_t n, int32_t* index, const Exact& exact_value) {
    const int64_t k = router_.chosen;
    if constexpr (kQuantised) choose_in_doubt(value, doubt, n, k, scratch_, index, exact_value);
    else choose(value, n, k, scratch_.best.at_least(k + 1), index);
  }

  // Row i's part of every output: its chosen leaves in tree t, and their scores.
  void put(int64_t i, int64_t t, const int32_t* leaf, const T* score) const {
    const int64_t k = router_.chosen, at = (first_ + i) * router_.per_row() + t * k;
    for (int64_t c = 0; c < k; ++c) out_.leaf[at + c] = t * (router_.is_trees() ? router_.tree_leaves() : 0) + leaf[c];
    if (router_.gate == FASTFF_NORMALISED) normalise(score, k, out_.gate + at);
    else std::fill_n(out_.gate + at, k, T(1));
    if (out_.scores) std::copy_n(score, k, out_.scores + at);
  }

  // ---- one linear score to a leaf ----

  void flat(int64_t i) {
    const int64_t n = router_.candidates, k = router_.chosen;
    T *score = scratch_.score.at_least(n), *value = scratch_.value.at_least(n), *doubt = scratch_.doubt.at_least(n);
    scores(i, 0, n, scratch_.product.data() + i * width_, score, doubt);
    for (int64_t j = 0; j < n; ++j) value[j] = compared(score[j], j);
    if constexpr (kQuantised)
      for (int64_t j = 0; j < n; ++j) doubt[j] = compared_doubt(doubt[j], std::fabs(score[j]), j);
    forget(n);
    int32_t* leaf = scratch_.index.at_least(n);
    choose_of(value, doubt, n, leaf, [&](int64_t j) { return compared(exact(i, j), j); });
    T* chosen = scratch_.chosen_score.at_least(k);
    for (int64_t c = 0; c < k; ++c) chosen[c] = is_exact(leaf[c]) ? exact(i, leaf[c]) : score[leaf[c]];
    put(i, 0, leaf, chosen);
  }

  // ---- sums of two codebooks' scores ----

  void product_keys(int64_t i) {
    const int64_t n = router_.candidates, leaves = n * n, k = router_.chosen;
    T *score = scratch_.score.at_least(2 * n), *row_doubt = scratch_.sum.at_least(2 * n);
    const T* product = scratch_.product.data() + i * width_;
    scores(2 * i, 0, n, product, score, row_doubt);
    scores(2 * i + 1, n, n, product + n, score + n, row_doubt + n);
    T *value = scratch_.value.at_least(leaves), *doubt = scratch_.doubt.at_least(leaves);
    for (int64_t a = 0; a < n; ++a)
      for (int64_t b = 0; b < n; ++b) {
        const int64_t leaf = a * n + b;
        value[leaf] = compared(score[a] + score[n + b], leaf);
        if constexpr (kQuantised)
          doubt[leaf] = compared_doubt(row_doubt[a] + row_doubt[n + b], std::fabs(score[a]) + std::fabs(score[n + b]), leaf);
      }
    forget(2 * n);
    const auto exact_sum = [&](int64_t leaf) { return exact(2 * i, leaf / n) + exact(2 * i + 1, n + leaf % n); };
    int32_t* leaf = scratch_.index.at_least(leaves);
    choose_of(value, doubt, leaves, leaf, [&](int64_t j) { return compared(exact_sum(j), j); });
    T* chosen = scratch_.chosen_score.at_least(k);
    for (int64_t c = 0; c < k; ++c) {
      const int64_t a = leaf[c] / n, b = n + leaf[c] % n;
      chosen[c] = is_exact(a) && is_exact(b) ? exact_sum(leaf[c]) : score[a] + score[b];
    }
    put(i, 0, leaf, chosen);
  }

  // ---- a beam down a tree ----

  void paths(int64_t t) {
    const int64_t k = router_.chosen, nodes = router_.nodes(), root = t * nodes;
    const bool every_node = count_ > kVisitedRows && nodes > 0;
    if (every_node) all_products(root, nodes);
    const int64_t room = 2 * k;
    beam_ = {scratch_.index.at_least(room),        scratch_.node.at_least(room), scratch_.sum.at_least(room),
             scratch_.sum_doubt.at_least(room),    scratch_.value.at_least(room), scratch_.doubt.at_least(room),
             scratch_.chosen_score.at_least(room)};
    for (int64_t i = 0; i < count_; ++i) {
      forget(router_.weight_rows());
      beam_.node[0] = 0;
      beam_.sum[0] = beam_.sum_doubt[0] = 0;
      int64_t kept = 1;
      for (int level = 0; level < router_.depth; ++level) {
        const int64_t first = (int64_t{1} << level) - 1;
        if (every_node)
          for (int64_t c = 0; c < kept; ++c) beam_.product[c] = scratch_.product.data()[i * width_ + first + beam_.node[c]];
        else visit(i, root + first, kept);
        kept = grow(i, t, level, kept);
      }
      put(i, t, beam_.node, beam_.sum);
    }
  }

  // Products of row i with the kept nodes of a level that starts at weight row `first`.
  void visit(int64_t i, int64_t first, int64_t kept) {
    const W *w[4], *x[4];
    for (int64_t c = 0; c < kept; c += 4) {
      const int64_t n = std::min<int64_t>(4, kept - c);
      for (int64_t j = 0; j < 4; ++j) {
        w[j] = view_.at(first + beam_.node[c + std::min(j, n - 1)]);
        x[j] = rows_.row(i);
      }
      T product[4];
      Products<W>::each(x, w, rows_.n(), product);
      std::copy_n(product, n, beam_.product + c);
    }
  }

  // From the kept nodes of a level to those of the next. Their numbers count from the first of their level.
  int64_t grow(int64_t i, int64_t t, int level, int64_t kept) {
    const int64_t k = router_.chosen, first = t * router_.nodes() + (int64_t{1} << level) - 1;
    for (int64_t c = kept - 1; c >= 0; --c) {  // from the last on: a parent's place becomes that of a child before it
      const int64_t at = first + beam_.node[c];
      T score, doubt = 0;
      scores(i, at, 1, beam_.product + c, &score, &doubt);
      const T sum = beam_.sum[c];
      if constexpr (kQuantised) doubt += beam_.sum_doubt[c] + T(1.2e-7) * (std::fabs(score) + std::fabs(sum));
      const int32_t node = beam_.node[c];
      for (int side = 1; side >= 0; --side) {
        beam_.node[2 * c + side] = 2 * node + side;
        beam_.sum[2 * c + side] = side ? sum + score : sum - score;
        beam_.sum_doubt[2 * c + side] = doubt;
      }
    }
    const int64_t children = 2 * kept;
    if (children > k) thin(i, t, level + 1, children);
    fetch_children(t, level + 1, std::min(children, k));
    return std::min(children, k);
  }

  // Keeps the best `chosen` of so many nodes of a level.
  void thin(int64_t i, int64_t t, int level, int64_t nodes) {
    const int64_t first = (int64_t{1} << level) - 1, balances = router_.nodes() + router_.tree_leaves();
    for (int64_t c = 0; c < nodes; ++c) {
      const int64_t at = t * balances + first + beam_.node[c];
      beam_.value[c] = compared(beam_.sum[c], at);
      if constexpr (kQuantised) beam_.doubt[c] = compared_doubt(beam_.sum_doubt[c], std::fabs(beam_.sum[c]), at);
    }
    choose_of(beam_.value, beam_.doubt, nodes, beam_.index, [&](int64_t c) {
      beam_.sum[c] = exact_sum(i, t, level, beam_.node[c]);
      beam_.sum_doubt[c] = 0;
      return compared(beam_.sum[c], t * balances + first + beam_.node[c]);
    });
    for (int64_t c = 0; c < router_.chosen; ++c) {
      const int32_t from = beam_.index[c];
      beam_.node[c] = beam_.node[from];
      beam_.sum[c] = beam_.sum[from];
      beam_.sum_doubt[c] = beam_.sum_doubt[from];
    }
  }

  // The fp32 sum along the path to a node of a level, added from the root on.
  T exact_sum(int64_t i, int64_t t, int level, int64_t node) {
    T sum = 0;
    for (int above = 0; above < level; ++above) {
      const int64_t at = t * router_.nodes() + (int64_t{1} << above) - 1 + (node >> (level - above));
      const T score = exact(i, at);
      sum = node >> (level - above - 1) & 1 ? sum + score : sum - score;
    }
    return sum;
  }

  void fetch_children(int64_t t, int level, int64_t kept) const {
    if (count_ > kVisitedRows || level == router_.depth) return;
    const int64_t first = t * router_.nodes() + (int64_t{1} << level) - 1;
    for (int64_t c = 0; c < kept; ++c)
      fetch_soon(view_.at(first + beam_.node[c]), rows_.n() * static_cast<int64_t>(sizeof(W)));
  }

  // One row's beam: nodes kept, the sums along their paths, and products with the row.
  struct Beam {
    int32_t *index, *node;
    T *sum, *sum_doubt, *value, *doubt, *product;
  };

  const Router& router_;
  const RouterView<T, W>& view_;
  const Chosen<T>& out_;
  RoutedRows<T, W> rows_;
  TopScratch<T>& scratch_;
  int64_t first_ = 0, count_ = 0, width_ = 0;
  Beam beam_{};
};

}  // namespace
}  // namespace fastff
