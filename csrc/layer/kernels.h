// Internal signatures: what one instruction set provides, and how it finds a layer's rows.
#pragma once

#include <cstdint>

#include "base/bf16.h"
#include "base/dispatch.h"
#include "fastff.h"

namespace fastff {

// A checked fastff_tree with its derived sizes.
struct Tree {
  int64_t in_features, out_features, trees, leaf_width;
  int depth;
  bool node_output;
  int activation;
  int gate;
  double tau;

  int64_t nodes() const { return (int64_t{1} << depth) - 1; }
  int64_t leaves() const { return int64_t{1} << depth; }
  bool gated() const { return gate != FASTFF_UNGATED; }
  bool swiglu() const { return activation == FASTFF_SWIGLU; }
  int64_t leaf_in_rows() const { return leaf_width * (swiglu() ? 2 : 1); }
  int64_t in_rows() const { return nodes() + leaves() * leaf_in_rows(); }
  int64_t out_rows() const { return (node_output ? nodes() : 0) + leaves() * leaf_width; }
  int64_t path_scores() const { return depth + leaf_in_rows(); }  // of one row in one tree
  int64_t path_outputs() const { return (node_output ? depth : 0) + leaf_width; }
};

// What a quantised neuron says of itself, in the cache line after its row of w_in.
struct Neuron {
  float scale_in, scale_out;  // a stored weight times its scale is the weight meant
  float error;                // what a score may be off by, as a multiple of ||x|| (store.h)
};

constexpr int64_t kNeuronBytes = 64;  // from a quantised row to what lies behind its Neuron

// Where the rows of one tree lie: plain tensors and packed buffers differ in strides only (counted in elements).
// T is the type of inputs, outputs and biases, W that of the weights: T itself, or Bf16 or int8_t in a quantised pack.
template <class T, class W = T>
struct View {
  const W* node_in;
  const W* node_out;  // unused unless node_output
  const W* leaf_in;
  const W* leaf_out;
  int64_t node_in_stride, node_out_stride;
  int64_t leaf_in_stride, leaf_out_stride;          // from leaf to leaf
  int64_t leaf_in_row_stride, leaf_out_row_stride;  // from neuron to neuron within a leaf
  const T* b_in;                                    // [in_rows] or null
  const T* b_out;                                   // [leaves][out_features] or null
  const T* exact_in;                                // quantised: the routing nodes' rows of w_in in full precision
  int64_t neuron_at;                                // quantised: from the start of a row of w_in to its Neuron

  const W* in_row(int64_t node) const { return node_in + node * node_in_stride; }
  const W* out_row(int64_t node) const { return node_out + node * node_out_stride; }
  const W* leaf_in_row(int64_t leaf, int64_t j) const { return leaf_in + leaf * leaf_in_stride + j * leaf_in_row_stride; }
  const W* leaf_out_row(int64_t leaf, int64_t j) const {
    return leaf_out + leaf * leaf_out_stride + j * leaf_out_row_stride;
  }
  const Neuron& neuron(const W* row) const { return *reinterpret_cast<const Neuron*>(row + neuron_at); }
  // Of a routing node's quantised row: what rounding left of it, rounded as well, and what the two rows together say of
  // themselves, scale_in being that of the rest.
  const int8_t* rest(const W* row) const { return reinterpret_cast<const int8_t*>(row + neuron_at) + kNeuronBytes; }
  const Neuron& neuron_with_rest(const W* row) const { return (&neuron(row))[1]; }
};

// A caller's weights as fastff.h lays them out; biases may be null.
template <class T>
struct Weights {
  const T *w_in, *b_in, *w_out, *b_out;
};

// Outputs of a forward; all but y may be null.
template <class T>
struct Forward {
  T* y;
  int64_t* leaf;
  T* margin;
  T* scores;
};

// Rows of a gradient: of a whole matrix, or only those that have a slot.
template <class T>
struct GradientRows {
  T* data;
  const int64_t* slot;  // of each row of the matrix; null: its own number
  int64_t columns;

  explicit operator bool() const { return data != nullptr; }
  T* at(int64_t row) const { return data + (slot ? slot[row] : row) * columns; }
};

// One tree's part of a backward. `order` sorts the rows by leaf; dscore and coef are indexed by row.
template <class T>
struct Backward {
  const T* x;
  const T* grad_y;
  const int64_t* leaf;  // [rows][trees], this tree's column first
  const T* scores;      // [rows][trees][path_scores], this tree's part first
  const int32_t* order;
  T* dscore;  // [rows][path_scores]
  T* coef;    // [rows][path_outputs + 1]: factors of the output rows, then the leaf's gate
  T* grad_x;
  bool accumulate_x;
  GradientRows<T> grad_w_in;  // this tree's part, zeroed by the caller; likewise below
  T* grad_b_in;
  GradientRows<T> grad_w_out;
  GradientRows<T> grad_b_out;
};

// The kernels of one instruction set for one element type. They trust their caller; `views` has one entry a tree.
template <class T>
struct Kernels {
  // Rows [begin, end) of x and of every output.
  void (*forward)(const Tree&, const View<T>* views, const T* x, int64_t begin, int64_t end, const Forward<T>&);
  // Sorted positions [begin, end): fill dscore and coef, write or add grad_x.
  void (*backward_rows)(const Tree&, const View<T>&, const Backward<T>&, int64_t begin, int64_t end);
  // Columns [begin, end) of grad_w_in over all rows; likewise grad_w_out and grad_b_out.
  void (*backward_w_in)(const Tree&, const Backward<T>&, int64_t rows, int64_t begin, int64_t end);
  void (*backward_w_out)(const Tree&, const Backward<T>&, int64_t rows, int64_t begin, int64_t end);
};

template <class W>
using QuantisedForward = void (*)(const Tree&, const View<float, W>* views, const float* x, int64_t begin, int64_t end,
                                  const Forward<float>&);

// The family of kernels of one instruction set (base/dispatch.h).
struct TreeKernels {
  Kernels<float> f32;
  Kernels<double> f64;
  QuantisedForward<Bf16> forward_bf16;
  QuantisedForward<int8_t> forward_int8;
};
FASTFF_DECLARE_TABLES(TreeKernels, tree_kernels);

inline const TreeKernels& tree_kernels() { return FASTFF_CHOSEN_TABLE(TreeKernels, tree_kernels); }

}  // namespace fastff
