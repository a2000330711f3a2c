// Conditional matrix multiplication on plain tensors, the same source for every instruction set. Items that chose one leaf
// lie side by side, so that the leaf's weights are read once for all of them; a gradient of weights is a sum over one such
// group, in one order whatever the number of threads.
#include <algorithm>

#include "isa/table.h"
#include "layer/activations.h"
#include "layer/conditional.h"
#include "layer/linear.h"
#include "layer/scratch.h"

namespace fastff {
namespace {

constexpr int64_t kItemTile = 4;           // items of one leaf worked on together
constexpr int64_t kColumnBytes = 1 << 20;  // of all rows' columns of an output that stay in the cache from leaf to leaf

template <class T>
struct LeafScratch {
  Buffer<T> raw, value, slope, packed, grad;
  Buffer<const T*> weights;

  static LeafScratch& local() {
    static thread_local LeafScratch scratch;
    return scratch;
  }
};

// visit(position, items) for every tile of [begin, end) whose items chose one leaf.
template <class F>
void for_tiles(const Visits& visits, int64_t begin, int64_t end, const F& visit) {
  for (int64_t at = begin; at < end;) {
    const int64_t stop = visits.group_end(at, std::min(end, at + kItemTile));
    visit(at, stop - at);
    at = stop;
  }
}

template <class T>
const T* const* row_pointers(const T* first, int64_t rows, int64_t columns, const T** to) {
  for (int64_t i = 0; i < rows; ++i) to[i] = first + i * columns;
  return to;
}

// Rows of w_out of a leaf, then its bias if it has one.
template <class T>
int64_t leaf_outputs(const Leaves& leaves, const LeafWeights<T>& w, int64_t leaf, const T** to) {
  row_pointers(w.w_out + leaf * leaves.width * leaves.out_features, leaves.width, leaves.out_features, to);
  if (!w.b_out) return leaves.width;
  to[leaves.width] = w.b_out + leaf * leaves.out_features;
  return leaves.width + 1;
}

template <class T>
const T* const* leaf_inputs(const Leaves& leaves, const LeafWeights<T>& w, int64_t leaf, const T** to) {
  return row_pointers(w.w_in + leaf * leaves.in_rows() * leaves.in_features, leaves.in_rows(), leaves.in_features, to);
}

template <class T>
void conditional_scores(const Leaves& leaves, const LeafWeights<T>& w, const Visits& visits, const T* x, const T* gate,
                        int64_t begin, int64_t end, T* scores, T* coef) {
  LeafScratch<T>& scratch = LeafScratch<T>::local();
  const int64_t in_rows = leaves.in_rows(), width = leaves.width;
  T* raw = scratch.raw.at_least(padded(kItemTile * in_rows));
  T* value = scratch.value.at_least(padded(kItemTile * in_rows));
  const T** weights = scratch.weights.at_least(in_rows);
  for_tiles(visits, begin, end, [&](int64_t at, int64_t m) {
    const int64_t leaf = visits.leaf[at];
    const T* xs[kItemTile];
    for (int64_t i = 0; i < m; ++i) xs[i] = x + visits.row(at + i) * leaves.in_features;
    dots(xs, m, leaf_inputs(leaves, w, leaf, weights), in_rows, leaves.in_features, raw, in_rows);
    if (w.b_in)
      for (int64_t i = 0; i < m * in_rows; ++i) raw[i] += w.b_in[leaf * in_rows + i % in_rows];
    std::fill(raw + m * in_rows, raw + padded(m * in_rows), T(0));
    activate(leaves.activation, raw, value, m * in_rows);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t item = visits.item[at + i];
      const T *score = raw + i * in_rows, *act = value + i * in_rows;
      T* to = coef + item * (width + 1);
      for (int64_t j = 0; j < width; ++j) to[j] = gate[item] * (leaves.swiglu() ? act[j] * score[width + j] : act[j]);
      to[width] = gate[item];
      if (scores) std::copy_n(score, in_rows, scores + item * in_rows);
    }
  });
}

// Columns [begin, end) of all rows of `out` += the sum over a row's items of factors times `inputs` rows of the leaf, which
// `rows_of(leaf, to)` names and counts.
template <class T, class RowsOf>
void add_items(const Visits& visits, const T* factors, int64_t stride, int64_t most, int64_t columns, int64_t begin,
               int64_t end, T* out, const RowsOf& rows_of) {
  LeafScratch<T>& scratch = LeafScratch<T>::local();
  T* packed = scratch.packed.at_least(kItemTile * most);
  const T** rows = scratch.weights.at_least(most);
  const int64_t fit = kColumnBytes / (std::max<int64_t>(1, visits.rows) * static_cast<int64_t>(sizeof(T)));
  const int64_t block = std::max<int64_t>(64, fit / 64 * 64);
  for (int64_t from = begin; from < end; from += block) {
    const int64_t to = std::min(end, from + block);
    for (int64_t row = 0; row < visits.rows; ++row) std::fill(out + row * columns + from, out + row * columns + to, T(0));
    for_tiles(visits, 0, visits.items(), [&](int64_t at, int64_t m) {
      const int64_t inputs = rows_of(visits.leaf[at], rows);
      T* outs[kItemTile];
      for (int64_t i = 0; i < m; ++i) {
        outs[i] = out + visits.row(at + i) * columns;
        std::copy_n(factors + visits.item[at + i] * stride, inputs, packed + i * most);
      }
      combine(outs, m, rows, inputs, Factors<T>{packed, most, 1}, from, to, Write::kAdd);
    });
  }
}

template <class T>
void conditional_outputs(const Leaves& leaves, const LeafWeights<T>& w, const Visits& visits, const T* coef, int64_t begin,
                         int64_t end, T* y) {
  add_items(visits, coef, leaves.width + 1, leaves.width + 1, leaves.out_features, begin, end, y,
            [&](int64_t leaf, const T** to) { return leaf_outputs(leaves, w, leaf, to); });
}

template <class T>
void conditional_backward_x(const Leaves& leaves, const LeafWeights<T>& w, const Visits& visits, const T* dscore,
                            int64_t begin, int64_t end, T* grad_x) {
  add_items(visits, dscore, leaves.in_rows(), leaves.in_rows(), leaves.in_features, begin, end, grad_x,
            [&](int64_t leaf, const T** to) {
              leaf_inputs(leaves, w, leaf, to);
              return leaves.in_rows();
            });
}

template <class T>
void conditional_backward_items(const Leaves& leaves, const LeafWeights<T>& w, const Visits& visits, const T* gate,
                                const T* scores, const T* grad_y, int64_t begin, int64_t end,
                                const ItemGradients<T>& out) {
  LeafScratch<T>& scratch = LeafScratch<T>::local();
  const int64_t in_rows = leaves.in_rows(), width = leaves.width, stride = width + 1;
  T* raw = scratch.raw.at_least(padded(kItemTile * in_rows));
  T* value = scratch.value.at_least(padded(kItemTile * in_rows));
  T* slope = scratch.slope.at_least(padded(kItemTile * in_rows));
  T* grad = scratch.grad.at_least(kItemTile * stride);
  const T** outputs = scratch.weights.at_least(stride);
  for_tiles(visits, begin, end, [&](int64_t at, int64_t m) {
    const T* grads[kItemTile];
    for (int64_t i = 0; i < m; ++i) {
      grads[i] = grad_y + visits.row(at + i) * leaves.out_features;
      std::copy_n(scores + visits.item[at + i] * in_rows, in_rows, raw + i * in_rows);
    }
    std::fill(raw + m * in_rows, raw + padded(m * in_rows), T(0));
    activate_with_slope(leaves.activation, raw, value, slope, m * in_rows);
    const int64_t count = leaf_outputs(leaves, w, visits.leaf[at], outputs);
    dots(grads, m, outputs, count, leaves.out_features, grad, stride);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t item = visits.item[at + i];
      const T *act = value + i * in_rows, *d = slope + i * in_rows, *g = grad + i * stride, *pair = raw + i * in_rows + width;
      T *dscore = out.dscore + item * in_rows, *coef = out.coef + item * stride;
      T total = w.b_out ? g[width] : T(0);
      for (int64_t j = 0; j < width; ++j) {
        const T other = leaves.swiglu() ? pair[j] : T(1);
        dscore[j] = gate[item] * d[j] * other * g[j];
        if (leaves.swiglu()) dscore[width + j] = gate[item] * act[j] * g[j];
        coef[j] = gate[item] * act[j] * other;
        total += act[j] * other * g[j];
      }
      coef[width] = gate[item];
      if (out.grad_gate) out.grad_gate[item] = total;
    }
  });
}

// Rows `to` of a gradient = the sum over positions [begin, end) of factors times the items' rows of `source`.
template <class T>
void sum_items(const Visits& visits, int64_t begin, int64_t end, const T* source, int64_t columns, const T* factors,
               int64_t stride, T* to, int64_t rows) {
  constexpr int64_t kRun = 16;  // short partial sums: rounding errors grow with the run, not with the items
  for (int64_t j = 0; j < rows; j += kItemTile) {
    const int64_t n = std::min(kItemTile, rows - j);
    T* outs[kItemTile];
    for (int64_t i = 0; i < n; ++i) outs[i] = to + (j + i) * columns;
    for (int64_t at = begin; at < end; at += kRun) {
      const int64_t m = std::min(kRun, end - at);
      const T* ins[kRun];
      T packed[kRun * kItemTile];
      for (int64_t i = 0; i < m; ++i) {
        ins[i] = source + visits.row(at + i) * columns;
        for (int64_t k = 0; k < n; ++k) packed[i * kItemTile + k] = factors[visits.item[at + i] * stride + j + k];
      }
      combine(outs, n, ins, m, Factors<T>{packed, 1, kItemTile}, 0, columns, at == begin ? Write::kStore : Write::kAdd);
    }
  }
}

template <class T>
void conditional_backward_weights(const Leaves& leaves, const Visits& visits, const T* x, const T* grad_y,
                                  const ItemGradients<T>& items, int64_t begin, int64_t end, const LeafGradients<T>& out) {
  const int64_t in_rows = leaves.in_rows(), width = leaves.width;
  for (int64_t at = begin; at < end;) {
    const int64_t stop = visits.group_end(at, end), leaf = visits.leaf[at];
    if (out.w_in)
      sum_items(visits, at, stop, x, leaves.in_features, items.dscore, in_rows,
                out.w_in + leaf * in_rows * leaves.in_features, in_rows);
    if (out.w_out)
      sum_items(visits, at, stop, grad_y, leaves.out_features, items.coef, width + 1,
                out.w_out + leaf * width * leaves.out_features, width);
    if (out.b_out)
      sum_items(visits, at, stop, grad_y, leaves.out_features, items.coef + width, width + 1,
                out.b_out + leaf * leaves.out_features, 1);
    if (out.b_in)
      for (int64_t j = 0; j < in_rows; ++j) {
        T total = 0;
        for (int64_t i = at; i < stop; ++i) total += items.dscore[visits.item[i] * in_rows + j];
        out.b_in[leaf * in_rows + j] = total;
      }
    at = stop;
  }
}

template <class T>
constexpr ConditionalKernels<T> kConditional = {conditional_scores<T>, conditional_outputs<T>,
                                                conditional_backward_items<T>, conditional_backward_x<T>,
                                                conditional_backward_weights<T>};

}  // namespace

const ConditionalTable FASTFF_TABLE(conditional) = {kConditional<float>, kConditional<double>};

}  // namespace fastff
