// The C functions of a backward: checks, and its work split over threads.
#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "base/errors.h"
#include "layer/forward_rows.h"
#include "layer/visited.h"

namespace fastff {
namespace {

constexpr int64_t kColumnsAPiece = 64;
constexpr int64_t kZerosAPiece = 1 << 18;

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() {
  return tree_kernels().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return tree_kernels().f64;
}

// What a backward reads beside the tree.
template <class T>
struct Inputs {
  Weights<T> weights;
  const T *x, *grad_y;
  int64_t rows;
  const int64_t* leaf;
  const T* scores;
};

template <class T>
struct Gradients {
  T *x, *w_in, *b_in, *w_out, *b_out;
};

// Elements of the gradients of weights, of all rows or of the visited ones.
struct GradientSizes {
  GradientSizes(const Tree& tree, const Visited* visited)
      : w_in((visited ? visited->w_in.count : tree.trees * tree.in_rows()) * tree.in_features),
        w_out((visited ? visited->w_out.count : tree.trees * tree.out_rows()) * tree.out_features),
        b_out((visited ? visited->b_out.count : tree.trees * tree.leaves()) * tree.out_features) {}
  int64_t w_in, w_out, b_out;
};

// Rows sorted by the leaf they reached in one tree, whose column of `leaf` is given; equal leaves keep their order.
void sort_by_leaf(const Tree& tree, const int64_t* leaf, int64_t rows, std::vector<int32_t>& order) {
  order.resize(rows);
  if (tree.leaves() > 4 * rows) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return leaf[a * tree.trees] < leaf[b * tree.trees]; });
    return;
  }
  std::vector<int64_t> start(tree.leaves() + 1);
  for (int64_t i = 0; i < rows; ++i) ++start[leaf[i * tree.trees] + 1];
  std::partial_sum(start.begin(), start.end(), start.begin());
  for (int64_t i = 0; i < rows; ++i) order[start[leaf[i * tree.trees]]++] = static_cast<int32_t>(i);
}

// Part of a gradient that belongs to tree t, `rows` rows to a tree; with slots, of visited rows only.
template <class T>
GradientRows<T> part(T* data, const Visited::Slots* slots, int64_t t, int64_t rows, int64_t columns) {
  if (!data || !slots) return {data ? data + t * rows * columns : nullptr, nullptr, columns};
  return {data, slots->of.data() + t * rows, columns};
}

template <class T>
void zero(T* data, int64_t n, int threads) {
  if (data) parallel(n, kZerosAPiece, threads, [&](int64_t b, int64_t e) { std::fill(data + b, data + e, T(0)); });
}

// One tree's part of the call, but for what is scratch.
template <class T>
Backward<T> backward_of(const Tree& tree, int64_t t, const Inputs<T>& in, const Gradients<T>& grad,
                        const Visited* visited) {
  Backward<T> b{};
  b.x = in.x;
  b.grad_y = in.grad_y;
  b.leaf = in.leaf + t;
  b.scores = in.scores + t * tree.path_scores();
  b.grad_x = grad.x;
  b.accumulate_x = t > 0;
  b.grad_w_in = part(grad.w_in, visited ? &visited->w_in : nullptr, t, tree.in_rows(), tree.in_features);
  b.grad_b_in = grad.b_in ? grad.b_in + t * tree.in_rows() : nullptr;
  b.grad_w_out = part(grad.w_out, visited ? &visited->w_out : nullptr, t, tree.out_rows(), tree.out_features);
  b.grad_b_out = part(grad.b_out, visited ? &visited->b_out : nullptr, t, tree.leaves(), tree.out_features);
  return b;
}

template <class T>
void backward_trees(const Tree& tree, const Inputs<T>& in, const Gradients<T>& grad, const Visited* visited,
                    const GradientSizes& size, int threads) {
  zero(grad.w_in, size.w_in, threads);
  zero(grad.w_out, size.w_out, threads);
  zero(grad.b_in, tree.trees * tree.in_rows(), 1);
  zero(grad.b_out, size.b_out, threads);
  const int64_t rows = in.rows;
  std::vector<T> dscore(rows * tree.path_scores()), coef(rows * (tree.path_outputs() + 1));
  std::vector<int32_t> order;
  const Kernels<T>& k = kernels<T>();
  for (int64_t t = 0; t < tree.trees; ++t) {
    const View<T> view = plain_view(tree, t, in.weights);
    sort_by_leaf(tree, in.leaf + t, rows, order);
    Backward<T> b = backward_of(tree, t, in, grad, visited);
    b.order = order.data();
    b.dscore = dscore.data();
    b.coef = coef.data();
    parallel(rows, kPathsAPiece, threads, [&](int64_t from, int64_t to) { k.backward_rows(tree, view, b, from, to); });
    parallel(tree.in_features, kColumnsAPiece, threads,
             [&](int64_t from, int64_t to) { k.backward_w_in(tree, b, rows, from, to); });
    parallel(tree.out_features, kColumnsAPiece, threads,
             [&](int64_t from, int64_t to) { k.backward_w_out(tree, b, rows, from, to); });
  }
}

template <class T>
int32_t backward(const fastff_tree* given, const Inputs<T>& in, const Gradients<T>& grad, bool only_visited,
                 int threads) {
  return guarded([&] {
    const Tree tree = checked(given);
    need_rows(tree, in.rows);
    need_weights(tree, in.weights);
    need(in.rows == 0 || (in.x && in.grad_y && in.leaf && in.scores), "x, grad_y, leaf and scores must not be NULL");
    need(!grad.b_out || !tree.node_output, "grad_b_out must be NULL with node_output = 1");
    const Arrays inputs = {w_in_array(tree, "w_in", in.weights.w_in),
                           w_out_array(tree, "w_out", in.weights.w_out),
                           b_out_array(tree, "b_out", in.weights.b_out),
                           array("x", in.x, in.rows * tree.in_features),
                           array("grad_y", in.grad_y, in.rows * tree.out_features),
                           array("leaf", in.leaf, in.rows * tree.trees),
                           array("scores", in.scores, in.rows * tree.trees * tree.path_scores())};
    need_aligned(inputs);
    need_leaves(tree, in.leaf, in.rows);
    const std::unique_ptr<Visited> visited(only_visited ? new Visited(tree, in.leaf, in.rows) : nullptr);
    const GradientSizes size(tree, visited.get());
    const Arrays outputs = {array("grad_x", grad.x, in.rows * tree.in_features),
                            array("grad_w_in", grad.w_in, size.w_in),
                            b_in_array(tree, "grad_b_in", grad.b_in),
                            array("grad_w_out", grad.w_out, size.w_out),
                            array("grad_b_out", grad.b_out, size.b_out)};
    need_aligned(outputs);
    need_disjoint(outputs, inputs);
    backward_trees(tree, in, grad, visited.get(), size, threads);
  });
}

}  // namespace
}  // namespace fastff

using namespace fastff;

extern "C" {

// One signature four times: two element types, gradients of all rows or of the visited ones.
#define FASTFF_DEFINE_BACKWARD(name, T, only_visited)                                                                \
  int32_t name(const fastff_tree* tree, const T* w_in, const T* w_out, const T* b_out, const T* x, const T* grad_y,   \
               int64_t rows, const int64_t* leaf, const T* scores, T* grad_x, T* grad_w_in, T* grad_b_in,            \
               T* grad_w_out, T* grad_b_out, int32_t threads) {                                                      \
    const Inputs<T> in = {{w_in, nullptr, w_out, b_out}, x, grad_y, rows, leaf, scores};                             \
    return backward<T>(tree, in, {grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out}, only_visited, threads);     \
  }
FASTFF_DEFINE_BACKWARD(fastff_backward_f32, float, false)
FASTFF_DEFINE_BACKWARD(fastff_backward_f64, double, false)
FASTFF_DEFINE_BACKWARD(fastff_backward_visited_f32, float, true)
FASTFF_DEFINE_BACKWARD(fastff_backward_visited_f64, double, true)
#undef FASTFF_DEFINE_BACKWARD

int32_t fastff_visited(const fastff_tree* given, const int64_t* leaf, int64_t rows, int64_t* w_in_rows,
                       int64_t* w_out_rows, int64_t* b_out_rows, int64_t* counts) {
  return guarded([&] {
    const Tree tree = checked(given);
    need_rows(tree, rows);
    need((rows == 0 || leaf) && counts, "leaf and counts must not be NULL");
    const Array input = array("leaf", leaf, rows * tree.trees);
    const Arrays outputs = {array("w_in_rows", w_in_rows, tree.trees * tree.in_rows()),
                            array("w_out_rows", w_out_rows, tree.trees * tree.out_rows()),
                            array("b_out_rows", b_out_rows, tree.trees * tree.leaves()), array("counts", counts, 3)};
    need_aligned({input});
    need_aligned(outputs);
    need_disjoint(outputs, {input});
    need_leaves(tree, leaf, rows);
    const Visited visited(tree, leaf, rows);
    visited.w_in.list(w_in_rows);
    visited.w_out.list(w_out_rows);
    visited.b_out.list(b_out_rows);
    counts[0] = visited.w_in.count;
    counts[1] = visited.w_out.count;
    counts[2] = visited.b_out.count;
  });
}

}  // extern "C"
