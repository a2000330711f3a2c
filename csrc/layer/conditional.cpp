// The C boundary of conditional matrix multiplication on plain tensors: checks, and the split of one call over threads.
#include "layer/conditional.h"

#include <algorithm>
#include <vector>

#include "base/errors.h"
#include "base/threads.h"
#include "layer/conditional_arguments.h"
#include "layer/visits_sort.h"

namespace fastff {
namespace {

constexpr int64_t kItemsAPiece = 16;
constexpr int64_t kColumnsAPiece = 64;
constexpr int64_t kBlockBytes = 3 << 19;  // of x that stay in the cache while all leaves pass

template <class T>
struct ThreadMemory {
  SortedVisits visits;
  std::vector<T> coef, dscore;

  static ThreadMemory& local() {
    static thread_local ThreadMemory memory;
    return memory;
  }
};

template <class T>
void forward_block(const Leaves& leaves, const LeafWeights<T>& w, const ItemArrays<T>& in, T* y, T* scores, int threads) {
  ThreadMemory<T>& memory = ThreadMemory<T>::local();
  const Visits visits = memory.visits.sort(in.leaf, in.rows, in.k, leaves.leaves);
  memory.coef.resize(visits.items() * (leaves.width + 1));
  T* coef = memory.coef.data();
  const ConditionalKernels<T>& kernels = conditional_kernels<T>();
  parallel(visits.items(), kItemsAPiece, threads, [&](int64_t begin, int64_t end) {
    kernels.scores(leaves, w, visits, in.x, in.gate, begin, end, scores, coef);
  });
  parallel(leaves.out_features, kColumnsAPiece, threads,
           [&](int64_t begin, int64_t end) { kernels.outputs(leaves, w, visits, coef, begin, end, y); });
}

template <class T>
int32_t forward(const fastff_leaves* given, const LeafWeights<T>& w, const ItemArrays<T>& in, T* y, T* scores,
                int threads) {
  return guarded([&] {
    const Leaves leaves = checked(given);
    need_weights(leaves, w);
    need_items(leaves, in);
    const int64_t per_item = leaves.in_rows();
    const Array outputs[] = {array("y", y, in.rows * leaves.out_features), array("scores", scores, in.items() * per_item)};
    need(in.rows == 0 || y, "y must not be NULL");
    need_aligned({outputs[0], outputs[1]});
    need_disjoint({outputs[0], outputs[1]},
                  {w_in_array(leaves, "w_in", w.w_in), b_in_array(leaves, "b_in", w.b_in),
                   w_out_array(leaves, "w_out", w.w_out), b_out_array(leaves, "b_out", w.b_out), x_array(leaves, in),
                   leaf_array(in), gate_array(in)});
    const int64_t block = std::max<int64_t>(64, kBlockBytes / (leaves.in_features * static_cast<int64_t>(sizeof(T))));
    for (int64_t row = 0; row < in.rows; row += block) {
      const int64_t rows = std::min(block, in.rows - row);
      forward_block(leaves, w, in.part(leaves, row, rows), y + row * leaves.out_features,
                    scores ? scores + row * in.k * per_item : nullptr, threads);
    }
  });
}

template <class T>
void zero(T* data, int64_t n) {
  if (data) std::fill(data, data + n, T(0));
}

// Zeros for the leaves in [begin, end) that nobody chose.
template <class T>
void zero_unvisited(const Leaves& leaves, const Visits& visits, int64_t begin, int64_t end, const LeafGradients<T>& out) {
  const int32_t* next = std::lower_bound(visits.leaf, visits.leaf + visits.items(), begin);
  for (int64_t leaf = begin; leaf < end; ++leaf) {
    while (next != visits.leaf + visits.items() && *next < leaf) ++next;
    if (next != visits.leaf + visits.items() && *next == leaf) continue;
    const int64_t w_in = leaves.in_rows() * leaves.in_features, w_out = leaves.width * leaves.out_features;
    if (out.w_in) zero(out.w_in + leaf * w_in, w_in);
    if (out.b_in) zero(out.b_in + leaf * leaves.in_rows(), leaves.in_rows());
    if (out.w_out) zero(out.w_out + leaf * w_out, w_out);
    if (out.b_out) zero(out.b_out + leaf * leaves.out_features, leaves.out_features);
  }
}

// The first position from here on at which a group of one leaf begins.
int64_t group_start(const Visits& visits, int64_t position) {
  while (position > 0 && position < visits.items() && visits.leaf[position] == visits.leaf[position - 1]) ++position;
  return position;
}

template <class T>
struct Wanted {
  T *x, *gate;
  LeafGradients<T> leaves;
};

template <class T>
void backward_rows(const Leaves& leaves, const LeafWeights<T>& w, const ItemArrays<T>& in, const T* grad_y,
                   const T* scores, const Wanted<T>& out, int threads) {
  ThreadMemory<T>& memory = ThreadMemory<T>::local();
  const Visits visits = memory.visits.sort(in.leaf, in.rows, in.k, leaves.leaves);
  memory.coef.resize(visits.items() * (leaves.width + 1));
  memory.dscore.resize(visits.items() * leaves.in_rows());
  const ItemGradients<T> items = {memory.dscore.data(), memory.coef.data(), out.gate};
  const ConditionalKernels<T>& kernels = conditional_kernels<T>();
  parallel(visits.items(), kItemsAPiece, threads, [&](int64_t begin, int64_t end) {
    kernels.backward_items(leaves, w, visits, in.gate, scores, grad_y, begin, end, items);
  });
  if (out.x)
    parallel(leaves.in_features, kColumnsAPiece, threads, [&](int64_t begin, int64_t end) {
      kernels.backward_x(leaves, w, visits, items.dscore, begin, end, out.x);
    });
  parallel(visits.items(), kItemsAPiece, threads, [&](int64_t begin, int64_t end) {
    kernels.backward_weights(leaves, visits, in.x, grad_y, items, group_start(visits, begin), group_start(visits, end),
                             out.leaves);
  });
  parallel(leaves.leaves, 1, threads,
           [&](int64_t begin, int64_t end) { zero_unvisited(leaves, visits, begin, end, out.leaves); });
}

template <class T>
int32_t backward(const fastff_leaves* given, const LeafWeights<T>& w, const ItemArrays<T>& in, const T* grad_y,
                 const T* scores, const Wanted<T>& out, int threads) {
  return guarded([&] {
    const Leaves leaves = checked(given);
    need_weights(leaves, w);
    need_items(leaves, in);
    need(in.rows == 0 || grad_y, "grad_y must not be NULL");
    need(in.items() == 0 || scores, "scores must not be NULL");
    const Arrays inputs = {w_in_array(leaves, "w_in", w.w_in),
                           w_out_array(leaves, "w_out", w.w_out),
                           b_out_array(leaves, "b_out", w.b_out),
                           x_array(leaves, in),
                           leaf_array(in),
                           gate_array(in),
                           array("grad_y", grad_y, in.rows * leaves.out_features),
                           array("scores", scores, in.items() * leaves.in_rows())};
    const Arrays outputs = {array("grad_x", out.x, in.rows * leaves.in_features),
                            array("grad_gate", out.gate, in.items()),
                            w_in_array(leaves, "grad_w_in", out.leaves.w_in),
                            b_in_array(leaves, "grad_b_in", out.leaves.b_in),
                            w_out_array(leaves, "grad_w_out", out.leaves.w_out),
                            b_out_array(leaves, "grad_b_out", out.leaves.b_out)};
    need_aligned(inputs);
    need_aligned(outputs);
    need_disjoint(outputs, inputs);
    backward_rows(leaves, w, in, grad_y, scores, out, threads);
  });
}

}  // namespace
}  // namespace fastff

using namespace fastff;

extern "C" {

int32_t fastff_conditional_forward_f32(const fastff_leaves* leaves, const float* w_in, const float* b_in,
                                       const float* w_out, const float* b_out, const float* x, const int64_t* leaf,
                                       const float* gate, int64_t rows, int64_t k, float* y, float* scores,
                                       int32_t threads) {
  return forward<float>(leaves, {w_in, b_in, w_out, b_out}, {x, leaf, gate, rows, k}, y, scores, threads);
}
int32_t fastff_conditional_forward_f64(const fastff_leaves* leaves, const double* w_in, const double* b_in,
                                       const double* w_out, const double* b_out, const double* x, const int64_t* leaf,
                                       const double* gate, int64_t rows, int64_t k, double* y, double* scores,
                                       int32_t threads) {
  return forward<double>(leaves, {w_in, b_in, w_out, b_out}, {x, leaf, gate, rows, k}, y, scores, threads);
}

int32_t fastff_conditional_backward_f32(const fastff_leaves* leaves, const float* w_in, const float* w_out,
                                        const float* b_out, const float* x, const int64_t* leaf, const float* gate,
                                        const float* grad_y, int64_t rows, int64_t k, const float* scores, float* grad_x,
                                        float* grad_gate, float* grad_w_in, float* grad_b_in, float* grad_w_out,
                                        float* grad_b_out, int32_t threads) {
  return backward<float>(leaves, {w_in, nullptr, w_out, b_out}, {x, leaf, gate, rows, k}, grad_y, scores,
                         {grad_x, grad_gate, {grad_w_in, grad_b_in, grad_w_out, grad_b_out}}, threads);
}
int32_t fastff_conditional_backward_f64(const fastff_leaves* leaves, const double* w_in, const double* w_out,
                                        const double* b_out, const double* x, const int64_t* leaf, const double* gate,
                                        const double* grad_y, int64_t rows, int64_t k, const double* scores,
                                        double* grad_x, double* grad_gate, double* grad_w_in, double* grad_b_in,
                                        double* grad_w_out, double* grad_b_out, int32_t threads) {
  return backward<double>(leaves, {w_in, nullptr, w_out, b_out}, {x, leaf, gate, rows, k}, grad_y, scores,
                          {grad_x, grad_gate, {grad_w_in, grad_b_in, grad_w_out, grad_b_out}}, threads);
}

}  // extern "C"
