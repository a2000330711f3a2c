// The C boundary: checks, errors, and the split of one call's work over threads.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "base/internal.h"

namespace fastff {
namespace {

thread_local std::string last_error;

constexpr double kAddressable = 140737488355328.0;  // 2^47 bytes, the user space of a process
constexpr int64_t kColumnsAPiece = 64;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void need(bool holds, const char* message) {
  if (!holds) refuse(message);
}
void need_in(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    refuse(std::string(name) + " " + std::to_string(value) + " is not " + std::to_string(low) + " to " +
           std::to_string(high));
}
constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxSize = int64_t{1} << 46;

// A caller's array: what is checked about it before a kernel trusts it.
struct Array {
  const char* name;
  const void* data;
  int64_t bytes;
  int64_t element = 1;
};
using Arrays = std::initializer_list<Array>;

template <class E>
Array array(const char* name, const E* data, int64_t elements) {
  return {name, data, elements * static_cast<int64_t>(sizeof(E)), static_cast<int64_t>(sizeof(E))};
}

void need_aligned(Arrays arrays) {
  for (const Array& a : arrays)
    if (reinterpret_cast<uintptr_t>(a.data) % a.element)
      refuse(std::string(a.name) + " is not aligned to its elements of " + std::to_string(a.element) + " bytes");
}

bool overlap(const Array& a, const Array& b) {
  const auto p = reinterpret_cast<uintptr_t>(a.data), q = reinterpret_cast<uintptr_t>(b.data);
  return p && q && p < q + b.bytes && q < p + a.bytes;
}
void need_disjoint(Arrays outputs, Arrays inputs) {
  for (auto out = outputs.begin(); out != outputs.end(); ++out) {
    for (const Array& in : inputs)
      if (overlap(*out, in)) refuse(std::string(out->name) + " overlaps " + in.name);
    for (auto other = outputs.begin(); other != out; ++other)
      if (overlap(*out, *other)) refuse(std::string(out->name) + " overlaps " + other->name);
  }
}

// So that no later product of sizes overflows.
void need_rows(const Tree& tree, int64_t rows) {
  need_in("rows", rows, 0, kMaxRows);
  const double widest = std::max({static_cast<double>(tree.in_features), static_cast<double>(tree.out_features),
                                  static_cast<double>(tree.trees) * static_cast<double>(tree.path_scores() + 1)});
  need(static_cast<double>(rows) * widest * sizeof(double) < kAddressable,
       "rows need more memory than can be addressed");
}

template <class T>
Array w_in_array(const Tree& tree, const char* name, const T* data) {
  return array(name, data, tree.trees * tree.in_rows() * tree.in_features);
}
template <class T>
Array b_in_array(const Tree& tree, const char* name, const T* data) {
  return array(name, data, tree.trees * tree.in_rows());
}
template <class T>
Array w_out_array(const Tree& tree, const char* name, const T* data) {
  return array(name, data, tree.trees * tree.out_rows() * tree.out_features);
}
template <class T>
Array b_out_array(const Tree& tree, const char* name, const T* data) {
  return array(name, data, tree.trees * tree.leaves() * tree.out_features);
}

// What the outputs of a forward must not overlap: x and, where the caller still owns them, the weights.
template <class T>
void need_outputs(const Tree& tree, int64_t rows, const Forward<T>& out, Arrays inputs) {
  const Array y = array("y", out.y, rows * tree.out_features), leaf = array("leaf", out.leaf, rows * tree.trees),
              margin = array("margin", out.margin, rows),
              scores = array("scores", out.scores, rows * tree.trees * tree.path_scores());
  need_aligned({y, leaf, margin, scores});
  need_disjoint({y, leaf, margin, scores}, inputs);
}

template <class T>
int32_t forward_plain(const fastff_tree* given, const T* w_in, const T* b_in, const T* w_out, const T* b_out,
                      const T* x, int64_t rows, const Forward<T>& out, int threads) {
  return guarded([&] {
    const Tree tree = checked(given);
    need_rows(tree, rows);
    need_weights(tree, w_in, b_in, w_out, b_out);
    need_outputs(tree, rows, out, {w_in_array(tree, "w_in", w_in), b_in_array(tree, "b_in", b_in),
                                          w_out_array(tree, "w_out", w_out), b_out_array(tree, "b_out", b_out)});
    std::vector<View<T>> views;
    views.reserve(tree.trees);
    for (int64_t t = 0; t < tree.trees; ++t) views.push_back(plain_view(tree, t, w_in, b_in, w_out, b_out));
    forward_rows(kernels<T>().forward, tree, views.data(), x, rows, out, threads);
  });
}

// Rows sorted by the leaf they reached in tree t; equal leaves keep their order.
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

template <class T>
struct Gradients {
  T *x, *w_in, *b_in, *w_out, *b_out;
};

// Rows of w_in, w_out and b_out, counted over all trees, that some row of x visits: in ascending order the visited ones
// have the slots 0, 1, 2 ...; the others have -1.
class Visited {
 public:
  Visited(const Tree& tree, const int64_t* leaf, int64_t rows) {
    const int64_t nodes = tree.nodes(), leaves = tree.leaves();
    std::vector<bool> heap(nodes + leaves);
    for (int64_t t = 0; t < tree.trees; ++t) {
      std::fill(heap.begin(), heap.end(), false);
      for (int64_t i = 0; i < rows; ++i) heap[nodes + leaf[i * tree.trees + t]] = true;
      for (int64_t n = nodes - 1; n >= 0; --n) heap[n] = heap[2 * n + 1] || heap[2 * n + 2];
      for (int64_t n = 0; n < nodes + leaves; ++n) {
        const bool is_leaf = n >= nodes;
        w_in.add(heap[n], is_leaf ? tree.leaf_in_rows() : 1);
        w_out.add(heap[n], is_leaf ? tree.leaf_width : tree.node_output ? 1 : 0);
        b_out.add(heap[n], is_leaf ? 1 : 0);
      }
    }
  }

  struct Slots {
    std::vector<int64_t> of;
    int64_t count = 0;

    void add(bool visited, int64_t rows) {
      for (int64_t i = 0; i < rows; ++i) of.push_back(visited ? count++ : -1);
    }
    // Numbers of the visited rows, `count` of them.
    void list(int64_t* rows) const {
      if (rows)
        for (size_t row = 0; row < of.size(); ++row)
          if (of[row] >= 0) *rows++ = static_cast<int64_t>(row);
    }
  };
  Slots w_in, w_out, b_out;
};

void need_leaves(const Tree& tree, const int64_t* leaf, int64_t rows) {
  for (int64_t i = 0; i < rows * tree.trees; ++i) need_in("leaf", leaf[i], 0, tree.leaves() - 1);
}

// Elements of the gradients of weights, of all rows or of the visited ones.
struct GradientSizes {
  GradientSizes(const Tree& tree, const Visited* visited)
      : w_in((visited ? visited->w_in.count : tree.trees * tree.in_rows()) * tree.in_features),
        w_out((visited ? visited->w_out.count : tree.trees * tree.out_rows()) * tree.out_features),
        b_out((visited ? visited->b_out.count : tree.trees * tree.leaves()) * tree.out_features) {}
  int64_t w_in, w_out, b_out;
};

// Part of a gradient that belongs to tree t, `rows` rows to a tree; with slots, of visited rows only.
template <class T>
GradientRows<T> part(T* data, const Visited::Slots* slots, int64_t t, int64_t rows, int64_t columns) {
  if (!data || !slots) return {data ? data + t * rows * columns : nullptr, nullptr, columns};
  return {data, slots->of.data() + t * rows, columns};
}

template <class T>
void zero(T* data, int64_t n, int threads) {
  if (data) parallel(n, 1 << 18, threads, [&](int64_t b, int64_t e) { std::fill(data + b, data + e, T(0)); });
}

template <class T>
void backward_trees(const Tree& tree, const T* w_in, const T* w_out, const T* b_out, const T* x, const T* grad_y,
                    int64_t rows, const int64_t* leaf, const T* scores, const Gradients<T>& grad,
                    const Visited* visited, const GradientSizes& size, int threads) {
  const int64_t in_rows = tree.in_rows(), out_rows = tree.out_rows();
  zero(grad.w_in, size.w_in, threads);
  zero(grad.w_out, size.w_out, threads);
  zero(grad.b_in, tree.trees * in_rows, 1);
  zero(grad.b_out, size.b_out, threads);
  std::vector<T> dscore(rows * tree.path_scores()), coef(rows * (tree.path_outputs() + 1));
  std::vector<int32_t> order;
  for (int64_t t = 0; t < tree.trees; ++t) {
    const View<T> view = plain_view<T>(tree, t, w_in, nullptr, w_out, b_out);
    sort_by_leaf(tree, leaf + t, rows, order);
    const Backward<T> b = {x,
                           grad_y,
                           leaf + t,
                           scores + t * tree.path_scores(),
                           order.data(),
                           dscore.data(),
                           coef.data(),
                           grad.x,
                           t > 0,
                           part(grad.w_in, visited ? &visited->w_in : nullptr, t, in_rows, tree.in_features),
                           grad.b_in ? grad.b_in + t * in_rows : nullptr,
                           part(grad.w_out, visited ? &visited->w_out : nullptr, t, out_rows, tree.out_features),
                           part(grad.b_out, visited ? &visited->b_out : nullptr, t, tree.leaves(), tree.out_features)};
    const Kernels<T>& k = kernels<T>();
    parallel(rows, kPathsAPiece, threads, [&](int64_t from, int64_t to) { k.backward_rows(tree, view, b, from, to); });
    parallel(tree.in_features, kColumnsAPiece, threads,
             [&](int64_t from, int64_t to) { k.backward_w_in(tree, b, rows, from, to); });
    parallel(tree.out_features, kColumnsAPiece, threads,
             [&](int64_t from, int64_t to) { k.backward_w_out(tree, b, rows, from, to); });
  }
}

template <class T>
int32_t backward_plain(const fastff_tree* given, const T* w_in, const T* w_out, const T* b_out, const T* x,
                       const T* grad_y, int64_t rows, const int64_t* leaf, const T* scores, const Gradients<T>& grad,
                       bool only_visited, int threads) {
  return guarded([&] {
    const Tree tree = checked(given);
    need_rows(tree, rows);
    need_weights<T>(tree, w_in, nullptr, w_out, b_out);
    need(rows == 0 || (x && grad_y && leaf && scores), "x, grad_y, leaf and scores must not be NULL");
    need(!grad.b_out || !tree.node_output, "grad_b_out must be NULL with node_output = 1");
    const Arrays inputs = {w_in_array(tree, "w_in", w_in),
                           w_out_array(tree, "w_out", w_out),
                           b_out_array(tree, "b_out", b_out),
                           array("x", x, rows * tree.in_features),
                           array("grad_y", grad_y, rows * tree.out_features),
                           array("leaf", leaf, rows * tree.trees),
                           array("scores", scores, rows * tree.trees * tree.path_scores())};
    need_aligned(inputs);
    need_leaves(tree, leaf, rows);
    const std::unique_ptr<Visited> visited(only_visited ? new Visited(tree, leaf, rows) : nullptr);
    const GradientSizes size(tree, visited.get());
    const Arrays outputs = {array("grad_x", grad.x, rows * tree.in_features),
                            array("grad_w_in", grad.w_in, size.w_in),
                            b_in_array(tree, "grad_b_in", grad.b_in),
                            array("grad_w_out", grad.w_out, size.w_out),
                            array("grad_b_out", grad.b_out, size.b_out)};
    need_aligned(outputs);
    need_disjoint(outputs, inputs);
    backward_trees(tree, w_in, w_out, b_out, x, grad_y, rows, leaf, scores, grad, visited.get(), size, threads);
  });
}

}  // namespace

void clear_error() noexcept { last_error.clear(); }

int32_t current_exception_status() noexcept {
  try {
    throw;
  } catch (const std::invalid_argument& e) {
    last_error = e.what();
    return FASTFF_BAD_ARGUMENT;
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
    return FASTFF_OUT_OF_MEMORY;
  } catch (const std::exception& e) {
    last_error = e.what();
    return FASTFF_BAD_ISA;
  }
}

Tree checked(const fastff_tree* t) {
  need(t != nullptr, "tree must not be NULL");
  need_in("in_features", t->in_features, 1, kMaxSize);
  need_in("out_features", t->out_features, 1, kMaxSize);
  need_in("trees", t->trees, 1, kMaxSize);
  need_in("leaf_width", t->leaf_width, 1, kMaxSize);
  need_in("depth", t->depth, 0, 24);
  need_in("activation", t->activation, FASTFF_GELU, FASTFF_ABS);
  need_in("gate", t->gate, FASTFF_UNGATED, FASTFF_BOUNDARY_MIN);
  need(t->activation != FASTFF_SWIGLU || !t->node_output, "swiglu needs node_output = 0");
  need(t->gate == FASTFF_UNGATED || (t->tau > 0 && std::isfinite(t->tau)), "tau must be positive and finite");
  const double rows = std::ldexp(2.0 * t->leaf_width + 1, t->depth);
  const double widest = static_cast<double>(std::max(t->in_features, t->out_features));
  need(rows * widest * static_cast<double>(t->trees) * sizeof(double) < kAddressable,
       "weights need more memory than can be addressed");
  return {t->in_features, t->out_features, t->trees, t->leaf_width, t->depth, t->node_output != 0,
          t->activation, t->gate, t->tau};
}

template <class T>
void need_weights(const Tree& tree, const T* w_in, const T* b_in, const T* w_out, const T* b_out) {
  need(w_in && w_out, "w_in and w_out must not be NULL");
  need(!b_out || !tree.node_output, "b_out must be NULL with node_output = 1");
  need_aligned({array("w_in", w_in, 0), array("b_in", b_in, 0), array("w_out", w_out, 0), array("b_out", b_out, 0)});
}
template void need_weights(const Tree&, const float*, const float*, const float*, const float*);

template <class T>
View<T> plain_view(const Tree& tree, int64_t t, const T* w_in, const T* b_in, const T* w_out, const T* b_out) {
  View<T> v{};
  v.node_in = w_in + t * tree.in_rows() * tree.in_features;
  v.node_out = w_out + t * tree.out_rows() * tree.out_features;
  v.node_in_stride = v.leaf_in_row_stride = tree.in_features;
  v.node_out_stride = v.leaf_out_row_stride = tree.out_features;
  v.leaf_in = v.node_in + tree.nodes() * tree.in_features;
  v.leaf_out = v.node_out + (tree.node_output ? tree.nodes() * tree.out_features : 0);
  v.leaf_in_stride = tree.leaf_in_rows() * tree.in_features;
  v.leaf_out_stride = tree.leaf_width * tree.out_features;
  v.b_in = b_in ? b_in + t * tree.in_rows() : nullptr;
  v.b_out = b_out ? b_out + t * tree.leaves() * tree.out_features : nullptr;
  return v;
}
template View<float> plain_view(const Tree&, int64_t, const float*, const float*, const float*, const float*);
template View<double> plain_view(const Tree&, int64_t, const double*, const double*, const double*, const double*);

template <class T>
void check_rows(const Tree& tree, const T* x, int64_t rows, const Forward<T>& out) {
  need_rows(tree, rows);
  if (rows == 0) return;
  need(x && out.y, "x and y must not be NULL");
  need_aligned({array("x", x, 0)});
  need_outputs(tree, rows, out, {array("x", x, rows * tree.in_features)});
}
template void check_rows(const Tree&, const float*, int64_t, const Forward<float>&);

}  // namespace fastff

using namespace fastff;

extern "C" {

int32_t fastff_abi_version(void) { return FASTFF_ABI_VERSION; }

const char* fastff_error(void) { return last_error.c_str(); }

const char* fastff_isa(void) {
  const char* name = "";
  guarded([&] {
    name = isa().name;
  });
  return name;
}

int32_t fastff_set_isa(const char* name) {
  return guarded([&] {
    need(name != nullptr, "name must not be NULL");
    set_isa(name);
  });
}

void fastff_set_parallel_for(fastff_parallel_for parallel_for) { set_parallel_for(parallel_for); }

int32_t fastff_forward_f32(const fastff_tree* tree, const float* w_in, const float* b_in, const float* w_out,
                           const float* b_out, const float* x, int64_t rows, float* y, int64_t* leaf, float* margin,
                           float* scores, int32_t threads) {
  return forward_plain<float>(tree, w_in, b_in, w_out, b_out, x, rows, {y, leaf, margin, scores}, threads);
}
int32_t fastff_forward_f64(const fastff_tree* tree, const double* w_in, const double* b_in, const double* w_out,
                           const double* b_out, const double* x, int64_t rows, double* y, int64_t* leaf, double* margin,
                           double* scores, int32_t threads) {
  return forward_plain<double>(tree, w_in, b_in, w_out, b_out, x, rows, {y, leaf, margin, scores}, threads);
}

int32_t fastff_plan_forward(const fastff_tree* given, int32_t weights, int64_t rows, int32_t threads,
                            fastff_plan* plan) {
  return guarded([&] {
    const Tree tree = checked(given);
    need_rows(tree, rows);
    need_in("weights", weights, FASTFF_F32, FASTFF_INT8);
    need(plan != nullptr, "plan must not be NULL");
    const int64_t sizes[] = {sizeof(float), sizeof(Bf16), sizeof(int8_t)};
    const int64_t pieces = pieces_of(rows, rows_a_piece(tree), threads);
    const int64_t block = block_rows(tree, sizes[weights], sizeof(float));
    const int top = top_levels(tree, std::min(block, (rows + pieces - 1) / pieces));
    *plan = {static_cast<int32_t>(pieces), top < tree.depth ? top : 0, block, kPairAtLeast, kSplitAtLeast};
  });
}

int32_t fastff_backward_f32(const fastff_tree* tree, const float* w_in, const float* w_out, const float* b_out,
                            const float* x, const float* grad_y, int64_t rows, const int64_t* leaf, const float* scores,
                            float* grad_x, float* grad_w_in, float* grad_b_in, float* grad_w_out, float* grad_b_out,
                            int32_t threads) {
  return backward_plain<float>(tree, w_in, w_out, b_out, x, grad_y, rows, leaf, scores,
                               {grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out}, false, threads);
}
int32_t fastff_backward_f64(const fastff_tree* tree, const double* w_in, const double* w_out, const double* b_out,
                            const double* x, const double* grad_y, int64_t rows, const int64_t* leaf,
                            const double* scores, double* grad_x, double* grad_w_in, double* grad_b_in,
                            double* grad_w_out, double* grad_b_out, int32_t threads) {
  return backward_plain<double>(tree, w_in, w_out, b_out, x, grad_y, rows, leaf, scores,
                                {grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out}, false, threads);
}

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

int32_t fastff_backward_visited_f32(const fastff_tree* tree, const float* w_in, const float* w_out, const float* b_out,
                                    const float* x, const float* grad_y, int64_t rows, const int64_t* leaf,
                                    const float* scores, float* grad_x, float* grad_w_in, float* grad_b_in,
                                    float* grad_w_out, float* grad_b_out, int32_t threads) {
  return backward_plain<float>(tree, w_in, w_out, b_out, x, grad_y, rows, leaf, scores,
                               {grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out}, true, threads);
}
int32_t fastff_backward_visited_f64(const fastff_tree* tree, const double* w_in, const double* w_out,
                                    const double* b_out, const double* x, const double* grad_y, int64_t rows,
                                    const int64_t* leaf, const double* scores, double* grad_x, double* grad_w_in,
                                    double* grad_b_in, double* grad_w_out, double* grad_b_out, int32_t threads) {
  return backward_plain<double>(tree, w_in, w_out, b_out, x, grad_y, rows, leaf, scores,
                                {grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out}, true, threads);
}

}  // extern "C"
