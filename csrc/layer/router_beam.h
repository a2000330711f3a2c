// The best k leaves of every tree, by a beam that keeps k nodes a level.
//
// The beams of sixteen rows go down side by side, a row in a lane: candidate c of all of them is one vector. Which of a
// level's candidates are kept follows from their ranks, the numbers of better ones, which take comparisons and no branch.
// Quantised, a row whose intervals leave a choice in doubt is decided as in router_top.h, alone.
#pragma once

#include "layer/router_top.h"

namespace fastff {
namespace {

constexpr int64_t kVisitedRows = 8;   // up to so many, the scores of the nodes that a beam visits are computed alone
constexpr int64_t kLanes = 16;        // rows side by side
constexpr int64_t kMostRanked = 64;   // candidates: more are chosen row by row, in time that grows less

// A number of each lane, wherever it stands.
template <class T>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float type __attribute__((vector_size(kLanes * sizeof(float)), aligned(kLineBytes), may_alias));
};
template <>
struct LanesOf<double> {
  typedef double type __attribute__((vector_size(kLanes * sizeof(double)), aligned(kLineBytes), may_alias));
};
template <class T>
using Lanes = typename LanesOf<T>::type;

template <class T>
struct BeamScratch {
  Buffer<T> sum, sum_doubt, value, doubt, product;
  Buffer<int32_t> node, keep;

  static BeamScratch& local() {
    static thread_local BeamScratch scratch;
    return scratch;
  }
};

template <class T, class W>
class Beams : Chooser<T, W> {
  using Base = Chooser<T, W>;
  using Base::router_, Base::view_, Base::rows_, Base::scratch_, Base::width_, Base::count_, Base::kQuantised;
  using Mask = decltype(Lanes<T>() > Lanes<T>());

 public:
  using Base::Base;

  void run(const T* x, const RoutePiece& piece) {
    BeamScratch<T>& scratch = BeamScratch<T>::local();
    const int64_t room = (2 * router_.chosen + 1) * kLanes;
    sum_ = scratch.sum.at_least(room);
    sum_doubt_ = scratch.sum_doubt.at_least(room);
    value_ = scratch.value.at_least(room);
    doubt_ = scratch.doubt.at_least(room);
    product_ = scratch.product.at_least(room);
    node_ = scratch.node.at_least(room);
    keep_ = scratch.keep.at_least(room);
    for (int64_t at = piece.row; at < piece.row_end; at += kTopBlockRows) {
      this->take(x, at, piece.row_end);
      every_node_ = count_ > kVisitedRows && router_.nodes() > 0;
      for (tree_ = piece.tree; tree_ < piece.tree_end; ++tree_) {
        if (every_node_) this->all_products(tree_ * router_.nodes(), router_.nodes());
        for (row_ = 0; row_ < count_; row_ += kLanes) follow();
      }
    }
  }

 private:
  int64_t in_use() const { return std::min(kLanes, count_ - row_); }
  int64_t row_of(int64_t lane) const { return std::min(row_ + lane, count_ - 1); }  // lanes without a row repeat the last
  int64_t first_of(int level) const { return (int64_t{1} << level) - 1; }           // node of a level, in heap order
  Lanes<T>& lanes(T* of, int64_t c) const { return *reinterpret_cast<Lanes<T>*>(of + c * kLanes); }

  // The beams of the lanes' rows, from the root to the outputs.
  void follow() {
    this->forget(in_use() * router_.nodes());
    std::fill_n(node_, kLanes, 0);
    std::fill_n(sum_, kLanes, T(0));
    std::fill_n(sum_doubt_, kLanes, T(0));
    int64_t kept = 1;
    for (int level = 0; level < router_.depth; ++level) {
      if (every_node_) look_up(level, kept);
      else visit(level, kept);
      grow(level, kept);
      kept *= 2;
      if (kept > router_.chosen) {
        thin(level + 1, kept);
        kept = router_.chosen;
      }
      fetch_children(level + 1, kept);
    }
    int32_t* leaf = scratch_.index.at_least(kept);
    T* score = scratch_.chosen_score.at_least(kept);
    for (int64_t l = 0; l < in_use(); ++l) {
      for (int64_t c = 0; c < kept; ++c) {
        leaf[c] = node_[c * kLanes + l];
        score[c] = sum_[c * kLanes + l];
      }
      this->put(row_ + l, tree_, leaf, score);
    }
  }

  // ---- products with the kept nodes of a level ----

  void look_up(int level, int64_t kept) {
    const T* own[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) own[l] = scratch_.product.data() + row_of(l) * width_ + first_of(level);
    for (int64_t c = 0; c < kept; ++c)
      for (int64_t l = 0; l < kLanes; ++l) product_[c * kLanes + l] = own[l][node_[c * kLanes + l]];
  }

  void visit(int level, int64_t kept) {
    const int64_t first = tree_ * router_.nodes() + first_of(level);
    const W *w[4], *x[4];
    for (int64_t l = 0; l < in_use(); ++l)
      for (int64_t c = 0; c < kept; c += 4) {
        const int64_t n = std::min<int64_t>(4, kept - c);
        for (int64_t j = 0; j < 4; ++j) {
          w[j] = view_.at(first + node_[(c + std::min(j, n - 1)) * kLanes + l]);
          x[j] = rows_.row(row_of(l));
        }
        T product[4];
        Products<W>::each(x, w, rows_.n(), product);
        for (int64_t j = 0; j < n; ++j) product_[(c + j) * kLanes + l] = product[j];
      }
    for (int64_t c = 0; c < kept; ++c)
      for (int64_t l = in_use(); l < kLanes; ++l) product_[c * kLanes + l] = product_[c * kLanes + in_use() - 1];
  }

  void fetch_children(int level, int64_t kept) const {
    if (every_node_ || level == router_.depth) return;
    const int64_t first = tree_ * router_.nodes() + first_of(level);
    for (int64_t l = 0; l < in_use(); ++l)
      for (int64_t c = 0; c < kept; ++c)
        fetch_soon(view_.at(first + node_[c * kLanes + l]), rows_.n() * static_cast<int64_t>(sizeof(W)));
  }

  // ---- the next level's candidates ----

  // Nodes and sums of the kept nodes' children. From the last one on: a parent's place becomes that of a child before it.
  void grow(int level, int64_t kept) {
    const int64_t first = tree_ * router_.nodes() + first_of(level);
    for (int64_t c = kept - 1; c >= 0; --c) {
      T score[kLanes], doubt[kLanes];
      int32_t* node = node_ + c * kLanes;
      T *sum = sum_ + c * kLanes, *sum_doubt = sum_doubt_ + c * kLanes;
      scores(first, node, product_ + c * kLanes, score, doubt);
      int32_t* to_node = node_ + 2 * c * kLanes;
      T *to_sum = sum_ + 2 * c * kLanes, *to_doubt = sum_doubt_ + 2 * c * kLanes;
      for (int64_t l = 0; l < kLanes; ++l) {
        const int32_t own = node[l];
        const T above = sum[l];
        if constexpr (kQuantised) {
          const T total = doubt[l] + (sum_doubt[l] + T(1.2e-7) * (std::fabs(score[l]) + std::fabs(above)));
          to_doubt[l] = to_doubt[kLanes + l] = total;
        }
        to_node[l] = 2 * own;
        to_node[kLanes + l] = 2 * own + 1;
        to_sum[l] = above - score[l];
        to_sum[kLanes + l] = above + score[l];
      }
    }
  }

  // As Chooser::scores, a node for each lane.
  void scores(int64_t first, const int32_t* node, const T* product, T* score, T* doubt) const {
    for (int64_t l = 0; l < kLanes; ++l) score[l] = rows_.score(row_of(l), first + node[l], product[l]);
    if constexpr (kQuantised)
      for (int64_t l = 0; l < kLanes; ++l) {
        doubt[l] = rows_.doubt(row_of(l), first + node[l]);
        if (doubt[l] < std::numeric_limits<T>::infinity()) continue;
        score[l] = rows_.exact(row_of(l), first + node[l]);
        doubt[l] = 0;
      }
  }

  // Keeps the best `chosen` of so many nodes of a level.
  void thin(int level, int64_t nodes) {
    const int64_t first = tree_ * (router_.nodes() + router_.tree_leaves()) + first_of(level);
    if (view_.balance) values<true>(nodes, view_.balance + first);
    else values<false>(nodes, nullptr);
    unsigned in_doubt = ~0u;
    if (nodes <= kMostRanked) in_doubt = rank(nodes);
    else std::fill_n(keep_, nodes * kLanes, 0);  // of lanes without a row, which nobody decides, too
    for (int64_t l = 0; l < in_use(); ++l)
      if (in_doubt >> l & 1) decide(l, level, first, nodes);
    compact(nodes);
  }

  // What is compared of the candidates, and its doubt. balance: of the level's nodes.
  template <bool kBalanced>
  void values(int64_t nodes, const T* balance) {
    const T *sum = sum_, *sum_doubt = sum_doubt_;
    const int32_t* node = node_;
    T *value = value_, *doubt = doubt_;
    for (int64_t c = 0; c < nodes; ++c) {
      T own[kLanes] = {}, balanced[kLanes];
      if constexpr (kBalanced)
        for (int64_t l = 0; l < kLanes; ++l) own[l] = balance[node[c * kLanes + l]];
      for (int64_t l = 0; l < kLanes; ++l) balanced[l] = fastff::compared<kBalanced>(sum[c * kLanes + l], own[l]);
      if constexpr (kQuantised)
        for (int64_t l = 0; l < kLanes; ++l)
          doubt[c * kLanes + l] = fastff::compared_doubt<kBalanced>(sum_doubt[c * kLanes + l], std::fabs(sum[c * kLanes + l]),
                                                            balanced[l], own[l]);
      std::copy_n(balanced, kLanes, value + c * kLanes);
    }
  }

  // keep_ of every candidate by its rank; returns the lanes in which that leaves a doubt, one bit each.
  unsigned rank(int64_t nodes) {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const Mask chosen = Mask{} + static_cast<std::remove_reference_t<decltype(Mask{}[0])>>(router_.chosen);
    Lanes<T> lowest = Lanes<T>{} + kInfinity, highest = Lanes<T>{} - kInfinity;
    Mask numbers = chosen == chosen;
    for (int64_t c = 0; c < nodes; ++c) {
      const Lanes<T> own = lanes(value_, c);
      Mask better{};  // minus their number, of a tie the earlier one
      for (int64_t d = 0; d < c; ++d) better += lanes(value_, d) >= own;
      for (int64_t d = c + 1; d < nodes; ++d) better += lanes(value_, d) > own;
      const Mask kept = -better < chosen;
      numbers &= own == own;
      for (int64_t l = 0; l < kLanes; ++l) keep_[c * kLanes + l] = kept[l] ? 1 : 0;
      if constexpr (kQuantised) {
        const Lanes<T> lower = own - lanes(doubt_, c), upper = own + lanes(doubt_, c);
        lowest = (kept & (lower < lowest)) ? lower : lowest;
        highest = (~kept & (upper > highest)) ? upper : highest;
      }
    }
    if constexpr (kQuantised) numbers &= lowest > highest;
    unsigned in_doubt = 0;
    for (int64_t l = 0; l < kLanes; ++l) in_doubt |= (numbers[l] ? 0u : 1u) << l;
    return in_doubt;
  }

  // keep_ of one lane's candidates, with fp32 sums where it takes them.
  void decide(int64_t lane, int level, int64_t first, int64_t nodes) {
    T *value = scratch_.value.at_least(nodes), *doubt = scratch_.doubt.at_least(nodes);
    for (int64_t c = 0; c < nodes; ++c) {
      value[c] = value_[c * kLanes + lane];
      if constexpr (kQuantised) doubt[c] = doubt_[c * kLanes + lane];
    }
    int32_t* index = scratch_.index.at_least(nodes);
    this->choose_of(value, doubt, nodes, index, [&](int64_t c) {
      const int64_t at = c * kLanes + lane;
      sum_[at] = exact_sum(lane, level, node_[at]);
      sum_doubt_[at] = 0;
      return view_.balance ? fastff::compared<true>(sum_[at], view_.balance[first + node_[at]]) : sum_[at];
    });
    for (int64_t c = 0; c < nodes; ++c) keep_[c * kLanes + lane] = 0;
    for (int64_t c = 0; c < router_.chosen; ++c) keep_[index[c] * kLanes + lane] = 1;
  }

  // Moves the kept candidates of each lane to its first places, in their order.
  void compact(int64_t nodes) {
    int32_t place[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) place[l] = static_cast<int32_t>(l);
    for (int64_t c = 0; c < nodes; ++c)
      for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t from = c * kLanes + l, to = place[l];  // never behind what is read
        node_[to] = node_[from];
        sum_[to] = sum_[from];
        if constexpr (kQuantised) sum_doubt_[to] = sum_doubt_[from];
        place[l] += keep_[from] * static_cast<int32_t>(kLanes);
      }
  }

  // The fp32 sum along the path to a node of a level, added from the root on.
  T exact_sum(int64_t lane, int level, int64_t node) {
    const int64_t nodes = router_.nodes();
    T sum = 0;
    for (int above = 0; above < level; ++above) {
      const int64_t at = first_of(above) + (node >> (level - above));
      const T score = this->exact(row_of(lane), tree_ * nodes + at, lane * nodes + at);
      sum = node >> (level - above - 1) & 1 ? sum + score : sum - score;
    }
    return sum;
  }

  // Of the lanes' candidates, c * kLanes + lane: nodes numbered from the first of their level, sums along their paths.
  int32_t *node_ = nullptr, *keep_ = nullptr;
  T *sum_ = nullptr, *sum_doubt_ = nullptr, *value_ = nullptr, *doubt_ = nullptr, *product_ = nullptr;
  int64_t tree_ = 0, row_ = 0;
  bool every_node_ = false;
};

}  // namespace
}  // namespace fastff
