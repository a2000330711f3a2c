// The best k leaves by scores: flat routers and product keys. Beams down trees (router_beam.h) share the choosing.
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
#include "layer/router_tiles.h"

namespace fastff {
namespace {

constexpr int64_t kTopBlockRows = 64;   // rows whose scores of all leaves are kept at a time

template <class T>
struct TopScratch {
  Buffer<T> product, score, value, doubt, bound, best, sum, chosen_score, memo;
  Buffer<int32_t> index, open, known, place;

  static TopScratch& local() {
    static thread_local TopScratch scratch;
    return scratch;
  }
};

// What is compared of a score: where there is a balance, the sigmoid and it.
template <bool kBalanced, class T>
FASTFF_INLINE T compared(T score, T balance) {
  return kBalanced ? sigmoid(score) + balance : score;
}

// What such a value may be off by if its score may be off by `doubt`; `size` bounds what the score was added up from. The
// slope of a sigmoid p is p (1 - p), at most a quarter, and changes by a factor of at most e^doubt within the doubt.
template <bool kBalanced, class T>
FASTFF_INLINE T compared_doubt(T doubt, T size, T value, T balance) {
  constexpr T kRounding = T(2.5e-7);
  if (!kBalanced) return doubt + kRounding * size;
  const T rounding = 1 + std::fabs(balance), p = value - balance;
  T slope = p * (1 - p) * (1 + 2 * doubt) + 4 * kRounding * rounding;
  slope = slope < T(0.25) ? slope : T(0.25);
  slope = doubt < T(1) ? slope : T(0.25);
  return doubt * slope + kRounding * rounding;
}

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

// What every way of choosing does: scores of a block of rows, what is compared of them, and the outputs.
template <class T, class W>
class Chooser {
 public:
  Chooser(const Router& router, const RouterView<T, W>& view, const Chosen<T>& out)
      : router_(router), view_(view), out_(out), rows_(router, view), scratch_(TopScratch<T>::local()) {}

 protected:
  static constexpr bool kQuantised = !std::is_same_v<T, W>;

  // Takes up to kTopBlockRows rows from `at` on.
  void take(const T* x, int64_t at, int64_t end) {
    first_ = at;
    count_ = std::min(kTopBlockRows, end - at);
    rows_.take(x + at * router_.in_features, count_ * router_.halves());
  }

  // ---- scores ----

  // Products of the block's rows with weight rows [from, from + n).
  void all_products(int64_t from, int64_t n) {
    width_ = n;
    T* to = scratch_.product.at_least(count_ * n);
    const int64_t halves = router_.halves(), part = n / halves;
#ifdef __AMX_INT8__
    if constexpr (kQuantised)
      if (view_.tiles && count_ >= kFewTiledRows) return products_by_tiles(from, to);
#endif
    const W* x[kTopBlockRows];
    for (int64_t h = 0; h < halves; ++h) {
      for (int64_t i = 0; i < count_; ++i) x[i] = rows_.row(i * halves + h);
      products(x, count_, view_.at(from + h * part), part, view_.stride, rows_.n(), to + h * part, n);
    }
  }

#ifdef __AMX_INT8__
  void products_by_tiles(int64_t from, T* to) {
    const Tiles tiles;
    const TiledWeights of = tiled_weights(router_);
    FetchedAhead nothing;
    alignas(kLineBytes) float product[kTileRows][kTileRows];
    for (int64_t h = 0; h < router_.halves(); ++h) {
      TiledRows x;
      x.take(rows_, h, router_.halves(), count_);
      const char* panel = view_.panel(router_, from / of.group_rows + h);
      for (int64_t j = h * of.group_rows, left = of.group_rows; left > 0; j += kTileRows, left -= kTileRows) {
        for (int64_t row = 0; row < count_; row += kTileRows) {
          panel_products(panel, x.at(row), x.steps(), product, nothing);
          put_products(product, std::min(kTileRows, count_ - row), std::min(kTileRows, left), to + row * width_ + j);
        }
        panel += x.steps() * 2 * kTileBytes;
      }
    }
  }
  void put_products(const float (*product)[kTileRows], int64_t rows, int64_t n, T* to) const {
    __m512i column[kTileRows];
    for (int64_t j = 0; j < kTileRows; ++j) column[j] = _mm512_load_si512(product[j]);
    transpose16(column);
    for (int64_t r = 0; r < rows; ++r)
      _mm512_mask_storeu_epi32(to + r * width_, static_cast<__mmask16>((1u << n) - 1), column[r]);
  }
#endif

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

  // The fp32 score of row i of x at a weight row, computed once since the last forget(), in place `memo` for it.
  T exact(int64_t i, int64_t at, int64_t memo) {
    if constexpr (kQuantised) {
      if (!scratch_.known.data()[memo]) {
        scratch_.known.data()[memo] = 1;
        scratch_.memo.data()[memo] = rows_.exact(i, at);
      }
      return scratch_.memo.data()[memo];
    } else {
      return 0;  // never asked for: nothing is in doubt
    }
  }
  T exact(int64_t i, int64_t at) { return exact(i, at, at); }
  void forget(int64_t memos) {
    if constexpr (kQuantised) {
      scratch_.memo.at_least(memos);
      std::fill_n(scratch_.known.at_least(memos), memos, 0);
    }
  }
  bool is_exact(int64_t at) const { return kQuantised && scratch_.known.data()[at]; }

  T compared(T score, int64_t at) const {
    return view_.balance ? fastff::compared<true>(score, view_.balance[at]) : score;
  }
  T compared_doubt(T doubt, T size, T value, int64_t at) const {
    return view_.balance ? fastff::compared_doubt<true>(doubt, size, value, view_.balance[at])
                         : fastff::compared_doubt<false>(doubt, size, value, T(0));
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

  const Router& router_;
  const RouterView<T, W>& view_;
  const Chosen<T>& out_;
  RoutedRows<T, W> rows_;
  TopScratch<T>& scratch_;
  int64_t first_ = 0, count_ = 0, width_ = 0;
};

template <class T, class W>
class TopChosen : Chooser<T, W> {
  using Base = Chooser<T, W>;
  using Base::router_, Base::scratch_, Base::width_, Base::count_, Base::kQuantised;

 public:
  using Base::Base;

  void run(const T* x, const RoutePiece& piece) {
    for (int64_t at = piece.row; at < piece.row_end; at += kTopBlockRows) {
      this->take(x, at, piece.row_end);
      this->all_products(0, router_.weight_rows());
      for (int64_t i = 0; i < count_; ++i) router_.kind == FASTFF_FLAT ? flat(i) : product_keys(i);
    }
  }

 private:
  // ---- one linear score to a leaf ----

  void flat(int64_t i) {
    const int64_t n = router_.candidates, k = router_.chosen;
    T *score = scratch_.score.at_least(n), *value = scratch_.value.at_least(n), *doubt = scratch_.doubt.at_least(n);
    this->scores(i, 0, n, scratch_.product.data() + i * width_, score, doubt);
    for (int64_t j = 0; j < n; ++j) value[j] = this->compared(score[j], j);
    if constexpr (kQuantised)
      for (int64_t j = 0; j < n; ++j) doubt[j] = this->compared_doubt(doubt[j], std::fabs(score[j]), value[j], j);
    this->forget(n);
    int32_t* leaf = scratch_.index.at_least(n);
    this->choose_of(value, doubt, n, leaf, [&](int64_t j) { return this->compared(this->exact(i, j), j); });
    T* chosen = scratch_.chosen_score.at_least(k);
    for (int64_t c = 0; c < k; ++c) chosen[c] = this->is_exact(leaf[c]) ? this->exact(i, leaf[c]) : score[leaf[c]];
    this->put(i, 0, leaf, chosen);
  }

  // ---- sums of two codebooks' scores ----

  void product_keys(int64_t i) {
    const int64_t n = router_.candidates, leaves = n * n, k = router_.chosen;
    T *score = scratch_.score.at_least(2 * n), *row_doubt = scratch_.sum.at_least(2 * n);
    const T* product = scratch_.product.data() + i * width_;
    this->scores(2 * i, 0, n, product, score, row_doubt);
    this->scores(2 * i + 1, n, n, product + n, score + n, row_doubt + n);
    T *value = scratch_.value.at_least(leaves), *doubt = scratch_.doubt.at_least(leaves);
    for (int64_t a = 0; a < n; ++a)
      for (int64_t b = 0; b < n; ++b) {
        const int64_t leaf = a * n + b;
        value[leaf] = this->compared(score[a] + score[n + b], leaf);
        if constexpr (kQuantised)
          doubt[leaf] = this->compared_doubt(row_doubt[a] + row_doubt[n + b], std::fabs(score[a]) + std::fabs(score[n + b]), value[leaf],
                                             leaf);
      }
    this->forget(2 * n);
    const auto exact_sum = [&](int64_t leaf) { return this->exact(2 * i, leaf / n) + this->exact(2 * i + 1, n + leaf % n); };
    int32_t* leaf = scratch_.index.at_least(leaves);
    this->choose_of(value, doubt, leaves, leaf, [&](int64_t j) { return this->compared(exact_sum(j), j); });
    T* chosen = scratch_.chosen_score.at_least(k);
    for (int64_t c = 0; c < k; ++c) {
      const int64_t a = leaf[c] / n, b = n + leaf[c] % n;
      chosen[c] = this->is_exact(a) && this->is_exact(b) ? exact_sum(leaf[c]) : score[a] + score[b];
    }
    this->put(i, 0, leaf, chosen);
  }
};

}  // namespace
}  // namespace fastff
