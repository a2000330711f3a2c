// Leaves laid out for inference, and what one instruction set provides to run them.
//
// Weights lie in lines of 64 bytes, 16 words of 4 bytes; a word holds one fp32, two bfloat16 or four int8 weights, these as
// unsigned numbers 128 above their value. A leaf's rows of w_in are `outputs`: groups of 16, a line for each word of x, and
// for what is left, if it is 8 or less, one group of 8, a line for each two words of x (words 2n and 2n + 1 of the line
// belong to output n). With swiglu the first half of a group are gates, the second half the values of the same neurons. The
// rows of w_out are lines of 16 columns, one for each word of neurons, a leaf's steps of 16 columns one after another; those
// of leaves of one word lie in blocks of columns, in each the leaves one after another, so that a block is read in order.
#pragma once

#include <cstdint>

#include "base/dispatch.h"
#include "layer/conditional.h"
#include "layer/visits.h"

namespace fastff {

struct LeafLayout {
  Leaves leaves;
  int weights;       // enum fastff_weights
  bool biased;       // has b_in
  int64_t elements;  // weights a word
  int64_t x_words;   // of a row of x, a multiple of 16
  int64_t wide;      // groups of 16 outputs in a leaf
  int64_t narrow;    // groups of 8: none or one
  int64_t neuron_words;
  int64_t steps;      // of 16 columns of y
  int64_t head;       // bytes before a leaf's rows of w_in
  int64_t in_bytes;   // from leaf to leaf
  int64_t block;      // steps of a block of columns of w_out
  int64_t out_bytes;  // from leaf to leaf in a block

  int64_t blocks() const { return (steps + block - 1) / block; }
  int64_t all_out_bytes() const { return blocks() * leaves.leaves * out_bytes; }
  // Where the lines of a leaf's step lie; those of the block's later steps follow.
  int64_t out_at(int64_t leaf, int64_t step) const {
    return (step / block * leaves.leaves + leaf) * out_bytes + step % block * neuron_words * 64;
  }
  int64_t outputs() const { return 16 * wide + 8 * narrow; }
  int64_t wide_neurons() const { return leaves.swiglu() ? 8 : 16; }  // of a group
  int64_t neurons() const { return wide_neurons() * wide + wide_neurons() / 2 * narrow; }  // a leaf's, with padding
  // Where a neuron's row of w_in is among the outputs: its gate, or the value beside it.
  int64_t output(int64_t neuron, bool value) const {
    const int64_t of_group = wide_neurons(), group = neuron / of_group;
    if (group < wide) return 16 * group + neuron % of_group + (value ? 8 : 0);
    return 16 * wide + neuron % of_group + (value ? 4 : 0);
  }
};

// What is stored before a leaf's rows of w_in; null where the layout has no such thing.
struct LeafHead {
  const float *scale_in, *b_in, *scale_out;  // [outputs], [outputs], [neurons]

  LeafHead(const LeafLayout& layout, const char* leaf) {
    const float* at = reinterpret_cast<const float*>(leaf);
    const bool scaled = layout.weights == FASTFF_INT8;
    scale_in = scaled ? at : nullptr;
    scale_out = scaled ? at + layout.outputs() : nullptr;
    b_in = layout.biased ? at + (scaled ? layout.outputs() + layout.neurons() : 0) : nullptr;
  }
  static int64_t bytes(const LeafLayout& layout) {
    const bool scaled = layout.weights == FASTFF_INT8;
    return 4 * ((scaled ? layout.outputs() + layout.neurons() : 0) + (layout.biased ? layout.outputs() : 0));
  }
};

// One call. An item's place is row * k + its rank among the row's leaves in ascending order.
struct LeafCall {
  const LeafLayout& layout;
  const char *in, *out;  // weights
  const float* b_out;    // [leaves][out_features] or null
  Visits visits;
  const float *x, *gate;
  float* y;
  bool few;  // so few rows that hardly two of them chose one leaf

  const int32_t* place;   // [items], of each sorted position
  const int32_t* chosen;  // [items], the leaf at each place
  char* xs;               // [rows][x_words]: x as the products take it; fp32 rows without padding are x itself
  float* x_scale;         // int8, [rows]; likewise:
  int32_t* x_correction;  // 128 times the sum of the row's numbers, what unsigned weights add
  float* gates;           // [items], by place
  float* h;               // [items][neurons], by place: the factors of the rows of w_out
  char* hs;               // [rows][hs_bytes]: as the products take them, int8 in two planes, the upper 8 bits and the lower
  int64_t hs_bytes;
  float* h_scale;  // int8, [rows]; likewise:
  int32_t* h_correction;
};

// The kernels trust their caller. Each row's, item's and column's result depends on its own inputs alone.
struct LeafKernels {
  void (*prepare)(const LeafCall&, int64_t begin, int64_t end);  // rows: fill xs
  void (*scores)(const LeafCall&, int64_t begin, int64_t end);   // sorted positions: fill gates and h
  void (*factors)(const LeafCall&, int64_t begin, int64_t end);  // rows: fill hs
  void (*outputs)(const LeafCall&, int64_t begin, int64_t end);  // steps of 16 columns: write y
};
struct LeafTable {
  LeafKernels f32, bf16, int8;
};
FASTFF_DECLARE_TILE_TABLES(LeafTable, packed_leaves);

inline const LeafKernels& leaf_kernels(int weights) {
  const LeafTable& table = FASTFF_CHOSEN_TILE_TABLE(LeafTable, packed_leaves);
  return weights == FASTFF_F32 ? table.f32 : weights == FASTFF_BF16 ? table.bf16 : table.int8;
}

}  // namespace fastff
