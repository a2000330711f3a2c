// Forward and backward of one tree, the same source for every instruction set.
//
// Forward. Rows are kept as a list of indices. `descend` computes one node's score for all rows of a list, splits the
// list in two and goes on with each side, so that a node's weights are read once for all its rows and a subtree's rows
// stay in cache. A list that has become short is not worth splitting: its rows join a small group that walks down in
// lockstep, so that the loads of one row hide the latency of another. At the leaf the path is known and y is built
// once, rows of one leaf together.
//
// Quantised weights (W is Bf16 or int8_t). The route is that of the fp32 layer: |<x, w> - <x, stored w>| is at most
// ||x|| * ||w - stored w|| (Cauchy and Schwarz), and a score within that bound, plus rounding, is computed again from
// the fp32 row, in the order in which the fp32 layer sums it.
//
// Backward. Rows sorted by leaf make every node's rows one contiguous range, so weight gradients are sums over ranges:
// no atomics, and a result that does not depend on the number of threads.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <type_traits>

#include "layer/activations.h"
#include "layer/kernels.h"
#include "layer/linear.h"
#include "layer/plan.h"

namespace fastff {
namespace {

constexpr int kTile = 4;  // rows of one leaf finished together
constexpr int64_t kStreamedBytes = 32 << 20;  // an output this large leaves the cache anyway before somebody reads it
constexpr int64_t kLineBytes = 64;
constexpr int64_t kFirstLines = 4;     // of a child, fetched before it is known which child is needed

template <class T>
void prefetch(const T* row, int64_t elements, int64_t from_line = 0, int64_t lines = 1 << 20) {
  const char* p = reinterpret_cast<const char*>(row);
  const int64_t end = std::min<int64_t>(elements * static_cast<int64_t>(sizeof(T)), (from_line + lines) * kLineBytes);
  for (int64_t at = from_line * kLineBytes; at < end; at += kLineBytes) __builtin_prefetch(p + at, 0, 3);
}

// std::vector would be a weak symbol that the linker may take from the file of a newer instruction set than the CPU's.
template <class E>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  E* data() const { return data_; }
  E* at_least(int64_t n) {
    if (n <= size_) return data_;
    std::free(data_);
    size_ = 0;
    data_ = static_cast<E*>(std::aligned_alloc(kLineBytes, (n * sizeof(E) + kLineBytes - 1) / kLineBytes * kLineBytes));
    if (!data_) throw std::bad_alloc();
    size_ = n;
    return data_;
  }

 private:
  E* data_ = nullptr;
  int64_t size_ = 0;
};

// Buffers of one thread, kept between calls. They grow and never shrink.
template <class T>
struct Scratch {
  Buffer<T> scores, raw, value, slope, coef, gate, grad, norm, scale;
  Buffer<int32_t> order, side, mark;
  Buffer<const T*> weights, outputs;
  Buffer<const Bf16*> bf16_weights, bf16_outputs;
  Buffer<const int8_t*> int8_weights, int8_outputs;

  // Room for pointers to weight rows of any type.
  template <class W>
  Buffer<const W*>& weights_of() {
    if constexpr (std::is_same_v<W, Bf16>) return bf16_weights;
    else if constexpr (std::is_same_v<W, int8_t>) return int8_weights;
    else return weights;
  }
  template <class W>
  Buffer<const W*>& outputs_of() {
    if constexpr (std::is_same_v<W, Bf16>) return bf16_outputs;
    else if constexpr (std::is_same_v<W, int8_t>) return int8_outputs;
    else return outputs;
  }

  static Scratch& local() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

// The routing node at `level` on the way to `leaf`.
inline int64_t ancestor(const Tree& tree, int64_t leaf, int level) {
  return ((leaf + tree.leaves()) >> (tree.depth - level)) - 1;
}

// Weight rows that a path through `leaf` adds to y: nodes from the root (if they are neurons), the leaf's, its bias
// where it has the type of the weights.
template <class T, class W>
int64_t output_rows(const Tree& tree, const View<T, W>& view, int64_t leaf, const W** rows) {
  int64_t n = 0;
  if (tree.node_output)
    for (int level = 0; level < tree.depth; ++level) rows[n++] = view.out_row(ancestor(tree, leaf, level));
  for (int64_t j = 0; j < tree.leaf_width; ++j) rows[n++] = view.leaf_out_row(leaf, j);
  if constexpr (std::is_same_v<T, W>)
    if (view.b_out) rows[n++] = view.b_out + leaf * tree.out_features;
  return n;
}

// Scales of those rows.
template <class W>
void output_scales(const Tree& tree, const View<float, W>& view, int64_t leaf, float* scale) {
  if (tree.node_output)
    for (int level = 0; level < tree.depth; ++level)
      *scale++ = view.neuron(view.in_row(ancestor(tree, leaf, level))).scale_out;
  for (int64_t j = 0; j < tree.leaf_width; ++j) *scale++ = view.neuron(view.leaf_in_row(leaf, j)).scale_out;
}

inline float norm(const float* x, int64_t n) {
  const float squares = dot(x, x, n);
  if (squares > 1e-30f && squares < 1e37f) return std::sqrt(squares);
  double wide = 0;  // fp32 squares overflow or vanish
  for (int64_t i = 0; i < n; ++i) wide += static_cast<double>(x[i]) * x[i];
  return static_cast<float>(std::sqrt(wide));
}

// The factor below a node, of the factor above it and the node's own.
template <class T>
T narrowed(const Tree& tree, T above, T gate) {
  if (tree.gate == FASTFF_BOUNDARY) return above * gate;
  return gate < above || gate != gate ? gate : above;  // NaN, once in, stays
}

// ---- forward of one tree over one block of rows ----

template <class T, class W>
class Descent {
  static constexpr bool kQuantised = !std::is_same_v<T, W>;

 public:
  Descent(const Tree& tree, const View<T, W>& view, const T* x, T* norm, T* y, T* scores, int64_t score_stride,
          int64_t* leaf, bool accumulate)
      : tree_(tree), view_(view), x_(x), norm_(norm), y_(y), scores_(scores), score_stride_(score_stride), leaf_(leaf),
        accumulate_(accumulate), scratch_(Scratch<T>::local()),
        row_elements_(kQuantised ? view.neuron_at + sizeof(Neuron) / sizeof(W) : tree.in_features) {}

  void run(int64_t rows) {
    const bool beyond_cache = rows * tree_.out_features * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes;
    write_ = tree_.trees == 1 && beyond_cache ? Write::kStream : Write::kStore;
    int32_t* order = scratch_.order.at_least(rows);
    scratch_.side.at_least(rows);
    for (int64_t i = 0; i < rows; ++i) order[i] = static_cast<int32_t>(i);
    const int top = top_levels(tree_, rows);
    if (top > 0 && top < tree_.depth) sort_by_subtree(order, rows, top);
    else in_blocks(order, rows, top == 0 ? rows : kCachedRows, tree_.depth);  // so shallow a tree needs no sorting
    if (write_ == Write::kStream) fence();
  }

 private:
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
        if (!accumulate_)
          for (int64_t i = at; i < at + n; ++i) norm_[i] = norm(x_row(i), tree_.in_features);
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
      for (int64_t k = 0; k < m; ++k) xs[k] = x_row(rows[i + k]);
      dots(xs, m, &weight, 1, tree_.in_features, out, 1);
      for (int64_t k = 0; k < m; ++k) score_row(rows[i + k])[level] = settled(rows[i + k], node, weight, out[k]);
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
      for (int64_t k = 0; k < m; ++k) xs[k] = x_row(rows[i + k]);
      if (tree_.trees == 1)  // else x came into the cache with the first tree
        for (int64_t k = i + kTile; k < std::min(i + kTile + m, n); ++k) prefetch(x_row(rows[k]), tree_.in_features);
      dots(xs, m, weights, 3, tree_.in_features, out[0], 3);
      for (int64_t k = 0; k < m; ++k) {
        T* score = score_row(rows[i + k]) + level;
        score[0] = settled(rows[i + k], node, weights[0], out[k][0]);
        const int child = 1 + (score[0] > T(0));
        score[1] = settled(rows[i + k], nodes[child], weights[child], out[k][child]);
      }
    }
  }

  // Rows that turn left at this level first, each side in its old order; returns how many do.
  int64_t split(int level, int32_t* rows, int64_t n) {
    int32_t* side = scratch_.side.data();
    int64_t left = 0, right = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t row = rows[i];
      const bool turns_right = score_row(row)[level] > T(0);
      rows[left] = row;
      side[right] = row;
      left += !turns_right;
      right += turns_right;
    }
    std::copy(side, side + right, rows + left);
    return left;
  }

  // Take the waiting rows down to stop_, one level of each in turn.
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
    const T score = settled(w.row, w.node, weight, dot(x_row(w.row), weight, tree_.in_features));
    score_row(w.row)[w.level] = score;
    if (kQuantised && tree_.node_output) prefetch(view_.out_row(w.node), tree_.out_features);  // no gain with fp32 rows
    w.node = 2 * w.node + 1 + (score > T(0));
    ++w.level;
    if (more) prefetch(view_.in_row(w.node), row_elements_, kFirstLines);
    else prefetch(view_.leaf_in_row(w.node - tree_.nodes(), 0), row_elements_);
  }

  // A node's score from its product with a row. In doubt about its sign the product is taken again in full precision.
  T settled(int32_t row, int64_t node, const W* weight, T product) const {
    const T bias = view_.b_in ? view_.b_in[node] : T(0);
    if constexpr (kQuantised) {
      const Neuron& neuron = view_.neuron(weight);
      const T score = product * neuron.scale_in + bias;
      if (std::fabs(score) > norm_[row] * neuron.error) return score;
      product = dot(x_row(row), view_.exact_in + node * tree_.in_features, tree_.in_features);
    }
    return product + bias;
  }

  void arrive(int64_t node, const int32_t* rows, int64_t n) {
    if (stop_ < tree_.depth) {
      for (int64_t i = 0; i < n; ++i) scratch_.mark.data()[rows[i]] = static_cast<int32_t>(node);
      return;
    }
    const int64_t leaf = node - tree_.nodes();
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
    if (leaf_)
      for (int64_t i = 0; i < n; ++i) leaf_[rows[i] * tree_.trees] = leaf;
  }

  void score_leaf(int64_t leaf, const W* const* weights, int64_t neurons, const int32_t* rows, int64_t m) {
    const T* xs[kTile];
    for (int64_t k = 0; k < m; ++k) xs[k] = x_row(rows[k]);
    T* raw = scratch_.raw.at_least(padded(kTile * tree_.path_scores()));
    dots(xs, m, weights, neurons, tree_.in_features, raw, neurons);
    const T* bias = view_.b_in ? view_.b_in + tree_.nodes() + leaf * neurons : nullptr;
    for (int64_t k = 0; k < m; ++k) {
      T* score = score_row(rows[k]) + tree_.depth;
      for (int64_t j = 0; j < neurons; ++j) {
        T product = raw[k * neurons + j];
        if constexpr (kQuantised) product *= view_.neuron(weights[j]).scale_in;
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
      std::copy_n(score_row(rows[k]), scores, raw + k * scores);
      ys[k] = y_ + rows[k] * tree_.out_features;
    }
    std::fill(raw + m * scores, raw + padded(m * scores), T(0));
    activate(tree_.activation, raw, value, m * scores);
    const T* gate = tree_.gated() ? gates(raw, m) : nullptr;
    for (int64_t k = 0; k < m; ++k)
      weigh(raw + k * scores, value + k * scores, gate ? gate + k * scores : nullptr, coef + k * factors);
    if constexpr (kQuantised) {
      if (output_bias)
        combine(ys, m, &output_bias, 1, {coef + factors - 1, factors, 1}, 0, tree_.out_features,
                accumulate_ ? Write::kAdd : Write::kStore);
      const T* scale = scratch_.scale.data();
      for (int64_t k = 0; k < m; ++k)
        for (int64_t j = 0; j < count; ++j) coef[k * factors + j] *= scale[j];
    }
    const bool add = accumulate_ || (kQuantised && output_bias);
    combine(ys, m, outputs, count, {coef, factors, 1}, 0, tree_.out_features, add ? Write::kAdd : write_);
  }

  const T* gates(const T* raw, int64_t m) {
    const int64_t n = m * tree_.path_scores();
    T* gate = scratch_.gate.at_least(padded(n));
    const T inverse = static_cast<T>(1 / tree_.tau);
    for (int64_t i = 0; i < padded(n); ++i) gate[i] = tanh_(std::fabs(raw[i]) * inverse);
    return gate;
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

  const T* x_row(int64_t row) const { return x_ + row * tree_.in_features; }
  T* score_row(int32_t row) const { return scores_ + row * score_stride_; }

  const Tree& tree_;
  const View<T, W>& view_;
  const T* x_;
  T* norm_;  // quantised: of each row, filled by the first tree
  T* y_;
  T* scores_;
  int64_t score_stride_;
  int64_t* leaf_;
  bool accumulate_;
  Scratch<T>& scratch_;
  int64_t row_elements_;  // of a weight row as stored
  Write write_ = Write::kStore;
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
  const int64_t block = block_rows(tree, sizeof(W), sizeof(T));
  for (int64_t at = begin; at < end; at += block) {
    const int64_t rows = std::min(block, end - at);
    T* norms = std::is_same_v<T, W> ? nullptr : Scratch<T>::local().norm.at_least(rows);
    if (out.margin) std::fill_n(out.margin + at, rows, std::numeric_limits<T>::infinity());
    for (int64_t t = 0; t < tree.trees; ++t) {
      const int64_t own = tree.path_scores();
      const int64_t stride = out.scores ? tree.trees * own : own;
      T* scores = out.scores ? out.scores + at * stride + t * own : Scratch<T>::local().scores.at_least(rows * own);
      int64_t* leaf = out.leaf ? out.leaf + at * tree.trees + t : nullptr;
      Descent<T, W>(tree, views[t], x + at * tree.in_features, norms, out.y + at * tree.out_features, scores, stride,
                    leaf, t > 0)
          .run(rows);
      if (out.margin) lower_margin(scores, stride, rows, tree.depth, out.margin + at);
    }
  }
}

// ---- backward of one tree ----

// Slopes of one row: dscore from grad, the product <grad_y, output row> of each output row of its path.
template <class T>
struct RowGradient {
  const Tree& tree;
  const T* score;
  const T* value;
  const T* slope;
  const T* gate;  // tanh(|score| / tau), or null
  const T* grad;
  T* dscore;
  T* coef;  // path_outputs factors, then the leaf's gate

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
      dscore[level] += dgate * (T(1) - t * t) * sign / static_cast<T>(tree.tau);
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
      const T inverse = static_cast<T>(1 / tree_.tau);
      for (int64_t i = 0; i < padded(m * scores); ++i) gate[i] = tanh_(std::fabs(raw[i]) * inverse);
    }
    for (int64_t k = 0; k < m; ++k) {
      const int64_t at = k * scores;
      T* dscore = b_.dscore + rows[k] * scores;
      RowGradient<T>{tree_, raw + at, value + at, slope + at, gate ? gate + at : nullptr, grad + k * width, dscore,
                     b_.coef + rows[k] * width}
          .run(view_.b_out != nullptr);
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

template <class T>
constexpr Kernels<T> kKernels = {forward<T, T>, backward_rows<T>, backward_w_in<T>, backward_w_out<T>};

}  // namespace

#define FASTFF_CAT_(a, b) a##b
#define FASTFF_CAT(a, b) FASTFF_CAT_(a, b)
#define FASTFF_STR_(a) #a
#define FASTFF_STR(a) FASTFF_STR_(a)
extern const Isa FASTFF_CAT(isa_, FASTFF_ISA_NAME);
const Isa FASTFF_CAT(isa_, FASTFF_ISA_NAME) = {FASTFF_STR(FASTFF_ISA_NAME), supported, kKernels<float>,
                                               kKernels<double>, forward<float, Bf16>, forward<float, int8_t>};

}  // namespace fastff
