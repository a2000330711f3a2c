// Checks of a caller's leaves and of the items that visit them. Each throws std::invalid_argument naming the value seen and
// the one expected.
#pragma once

#include <algorithm>

#include "base/checks.h"
#include "layer/conditional.h"

namespace fastff {

// Rows and the leaves that were chosen for them.
template <class T>
struct ItemArrays {
  const T* x;           // [rows][in_features]
  const int64_t* leaf;  // [rows][k]
  const T* gate;        // [rows][k]
  int64_t rows, k;

  int64_t items() const { return rows * k; }
  ItemArrays part(const Leaves& leaves, int64_t row, int64_t n) const {
    return {x + row * leaves.in_features, leaf + row * k, gate + row * k, n, k};
  }
};

inline Leaves checked(const fastff_leaves* given) {
  need(given != nullptr, "leaves must not be NULL");
  need_in("in_features", given->in_features, 1, kMaxSize);
  need_in("out_features", given->out_features, 1, kMaxSize);
  need_in("leaves", given->leaves, 1, kMaxRows);
  need_in("leaf_width", given->leaf_width, 1, kMaxSize);
  need_in("activation", given->activation, FASTFF_GELU, FASTFF_ABS);
  const double widest = static_cast<double>(std::max(given->in_features, given->out_features) + 1);
  need(2.0 * static_cast<double>(given->leaf_width) * widest * static_cast<double>(given->leaves) * sizeof(double) <
           kAddressable,
       "weights need more memory than can be addressed");
  return {given->in_features, given->out_features, given->leaves, given->leaf_width, given->activation};
}

template <class T>
Array w_in_array(const Leaves& leaves, const char* name, const T* data) {
  return array(name, data, leaves.leaves * leaves.in_rows() * leaves.in_features);
}
template <class T>
Array b_in_array(const Leaves& leaves, const char* name, const T* data) {
  return array(name, data, leaves.leaves * leaves.in_rows());
}
template <class T>
Array w_out_array(const Leaves& leaves, const char* name, const T* data) {
  return array(name, data, leaves.leaves * leaves.width * leaves.out_features);
}
template <class T>
Array b_out_array(const Leaves& leaves, const char* name, const T* data) {
  return array(name, data, leaves.leaves * leaves.out_features);
}
template <class T>
Array x_array(const Leaves& leaves, const ItemArrays<T>& in) {
  return array("x", in.x, in.rows * leaves.in_features);
}
template <class T>
Array leaf_array(const ItemArrays<T>& in) {
  return array("leaf", in.leaf, in.items());
}
template <class T>
Array gate_array(const ItemArrays<T>& in) {
  return array("gate", in.gate, in.items());
}

template <class T>
void need_weights(const Leaves& leaves, const LeafWeights<T>& w) {
  need(w.w_in && w.w_out, "w_in and w_out must not be NULL");
  need_aligned({w_in_array(leaves, "w_in", w.w_in), b_in_array(leaves, "b_in", w.b_in),
                w_out_array(leaves, "w_out", w.w_out), b_out_array(leaves, "b_out", w.b_out)});
}

inline void need_leaf_numbers(const int64_t* leaf, int64_t items, int64_t leaves) {
  bool within = true;
  for (int64_t i = 0; i < items; ++i) within &= static_cast<uint64_t>(leaf[i]) < static_cast<uint64_t>(leaves);
  for (int64_t i = 0; !within && i < items; ++i) need_in("leaf", leaf[i], 0, leaves - 1);
}

// Also so that no later product of sizes overflows.
template <class T>
void need_items(const Leaves& leaves, const ItemArrays<T>& in) {
  need_in("rows", in.rows, 0, kMaxRows);
  need_in("k", in.k, 0, in.rows ? kMaxRows / in.rows : kMaxRows);
  const double row = static_cast<double>(std::max(leaves.in_features, leaves.out_features)) +
                     static_cast<double>(in.k) * 2 * static_cast<double>(leaves.width + 1);
  need(static_cast<double>(in.rows) * row * sizeof(double) < kAddressable, "rows need more memory than can be addressed");
  need(in.rows == 0 || in.x, "x must not be NULL");
  need(in.items() == 0 || (in.leaf && in.gate), "leaf and gate must not be NULL");
  need_aligned({x_array(leaves, in), leaf_array(in), gate_array(in)});
  need_leaf_numbers(in.leaf, in.items(), leaves.leaves);
}

}  // namespace fastff
