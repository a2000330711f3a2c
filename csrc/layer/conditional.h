// Conditional matrix multiplication on plain tensors: what one instruction set provides.
#pragma once

#include <cstdint>

#include "base/dispatch.h"
#include "fastff.h"
#include "layer/visits.h"

namespace fastff {

// A checked fastff_leaves.
struct Leaves {
  int64_t in_features, out_features, leaves, width;
  int activation;

  bool swiglu() const { return activation == FASTFF_SWIGLU; }
  int64_t in_rows() const { return width * (swiglu() ? 2 : 1); }
};

template <class T>
struct LeafWeights {
  const T* w_in;
  const T* b_in;  // or null, likewise below
  const T* w_out;
  const T* b_out;
};

// What a backward keeps of each item. `coef`: the factors of the leaf's rows of w_out, then that of its bias, the gate.
template <class T>
struct ItemGradients {
  T* dscore;     // [items][in_rows]
  T* coef;       // [items][width + 1]
  T* grad_gate;  // [items] or null
};

template <class T>
struct LeafGradients {
  T *w_in, *b_in, *w_out, *b_out;  // each may be null
};

// The kernels trust their caller. Positions are those of the sorted visits; where a range of them must hold whole leaves,
// it says so.
template <class T>
struct ConditionalKernels {
  // Positions [begin, end): scores (or null) and factors [items][width + 1].
  void (*scores)(const Leaves&, const LeafWeights<T>&, const Visits&, const T* x, const T* gate, int64_t begin, int64_t end,
                 T* scores, T* coef);
  // Columns [begin, end) of y, written whole.
  void (*outputs)(const Leaves&, const LeafWeights<T>&, const Visits&, const T* coef, int64_t begin, int64_t end, T* y);
  // Positions [begin, end).
  void (*backward_items)(const Leaves&, const LeafWeights<T>&, const Visits&, const T* gate, const T* scores,
                         const T* grad_y, int64_t begin, int64_t end, const ItemGradients<T>&);
  // Columns [begin, end) of grad_x, written whole.
  void (*backward_x)(const Leaves&, const LeafWeights<T>&, const Visits&, const T* dscore, int64_t begin, int64_t end,
                     T* grad_x);
  // Positions [begin, end) of whole leaves: the gradients of these leaves, written whole.
  void (*backward_weights)(const Leaves&, const Visits&, const T* x, const T* grad_y, const ItemGradients<T>&,
                           int64_t begin, int64_t end, const LeafGradients<T>&);
};

struct ConditionalTable {
  ConditionalKernels<float> f32;
  ConditionalKernels<double> f64;
};
FASTFF_DECLARE_TABLES(ConditionalTable, conditional);

template <class T>
const ConditionalKernels<T>& conditional_kernels() {
  const ConditionalTable& table = FASTFF_CHOSEN_TABLE(ConditionalTable, conditional);
  if constexpr (sizeof(T) == sizeof(float)) return table.f32;
  else return table.f64;
}

}  // namespace fastff
