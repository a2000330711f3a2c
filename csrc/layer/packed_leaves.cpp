// The layout of packed leaves, and weights copied into it.
#include "layer/packed_leaves.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/huge_pages.h"
#include "layer/packed_leaves_fill.h"
#include "layer/store.h"

namespace fastff {

namespace {

constexpr int64_t kBlockBytes = 640 << 10;  // of the second-level cache for a block of columns of all leaves

// Twelve steps, which is what registers take at once, or eight where twelve are too many.
int64_t column_block(const LeafLayout& l) {
  const int64_t fit = kBlockBytes / std::max<int64_t>(1, l.leaves.leaves * l.neuron_words * kLine);
  if (fit >= l.steps) return std::max<int64_t>(1, l.steps);
  return fit >= 12 ? fit / 12 * 12 : 8;
}

}  // namespace

LeafLayout leaf_layout(const Leaves& leaves, int weights, bool biased) {
  LeafLayout l{};
  l.leaves = leaves;
  l.weights = weights;
  l.biased = biased;
  l.elements = weights == FASTFF_F32 ? 1 : weights == FASTFF_BF16 ? 2 : 4;
  l.x_words = round_up(leaves.in_features, 16 * l.elements) / l.elements;
  const int64_t of_group = l.wide_neurons(), rest = leaves.width % of_group;
  l.narrow = rest > 0 && rest <= of_group / 2;
  l.wide = leaves.width / of_group + (rest > of_group / 2);
  l.neuron_words = (leaves.width + l.elements - 1) / l.elements;
  l.steps = (leaves.out_features + 15) / 16;
  l.head = round_up(LeafHead::bytes(l), kLine);
  l.in_bytes = l.head + kLine * l.x_words * l.wide + kLine / 2 * l.x_words * l.narrow;
  l.block = l.neuron_words == 1 ? column_block(l) : l.steps;
  // In one block an odd number of lines, so that the same columns of all leaves are spread over the sets of a cache.
  l.out_bytes = (l.blocks() == 1 ? l.steps * l.neuron_words | 1 : l.block * l.neuron_words) * kLine;
  return l;
}

namespace {

template <class W>
class Filler {
 public:
  Filler(const LeafLayout& layout, const LeafWeights<float>& from) : l_(layout), from_(from) {
    row_.resize(std::max(l_.leaves.in_features, l_.leaves.out_features));
  }

  static constexpr int kZero = sizeof(W) == 1 ? 128 : 0;

  // in: this leaf's; out: all leaves'.
  void leaf(int64_t leaf, char* in, char* out) {
    const Leaves& leaves = l_.leaves;
    const LeafHead head(l_, in);
    char* groups = in + l_.head;
    std::memset(groups, kZero, l_.in_bytes - l_.head);
    for (int64_t j = 0; j < leaves.width; ++j) {
      for (int value = 0; value <= (leaves.swiglu() ? 1 : 0); ++value) {
        const int64_t row = leaf * leaves.in_rows() + j + value * leaves.width, o = l_.output(j, value != 0);
        const float scale = store(row_.data(), from_.w_in + row * leaves.in_features, leaves.in_features);
        put_input(groups, o);
        if (head.scale_in) const_cast<float*>(head.scale_in)[o] = scale;
        if (head.b_in) const_cast<float*>(head.b_in)[o] = from_.b_in[row];
      }
      const float* w_out = from_.w_out + (leaf * leaves.width + j) * leaves.out_features;
      const float scale = store(row_.data(), w_out, leaves.out_features);
      if (head.scale_out) const_cast<float*>(head.scale_out)[j] = scale;
      put_output(leaf, out, j);
    }
  }

 private:
  static constexpr int64_t kElements = 4 / sizeof(W);

  static void put(char* to, W value) {
    if constexpr (sizeof(W) == 1) *to = static_cast<char>(static_cast<uint8_t>(value) ^ 128);
    else std::memcpy(to, &value, sizeof value);
  }

  void put_input(char* groups, int64_t output) const {
    const int64_t group = std::min(output / 16, l_.wide);
    const bool narrow = group == l_.wide;
    char* at = groups + group * l_.x_words * kLine + (output - 16 * group) * (narrow ? 8 : 4);
    for (int64_t i = 0; i < l_.leaves.in_features; ++i) {
      const int64_t word = i / kElements, within = i % kElements * static_cast<int64_t>(sizeof(W));
      put(at + (narrow ? word / 2 * kLine + word % 2 * 4 : word * kLine) + within, row_[i]);
    }
  }

  void put_output(int64_t leaf, char* out, int64_t neuron) const {
    const int64_t word = neuron / kElements, within = neuron % kElements * static_cast<int64_t>(sizeof(W));
    for (int64_t i = 0; i < l_.leaves.out_features; ++i)
      put(out + l_.out_at(leaf, i / 16) + word * kLine + i % 16 * 4 + within, row_[i]);
  }

  const LeafLayout& l_;
  const LeafWeights<float>& from_;
  std::vector<W> row_;
};

template <class W>
void fill(const LeafLayout& layout, const LeafWeights<float>& from, char* in, char* out) {
  Filler<W> filler(layout, from);
  std::memset(out, Filler<W>::kZero, layout.all_out_bytes());
  for (int64_t leaf = 0; leaf < layout.leaves.leaves; ++leaf) filler.leaf(leaf, in + leaf * layout.in_bytes, out);
}

}  // namespace

void fill_leaves(const LeafLayout& layout, const LeafWeights<float>& from, char* in, char* out) {
  switch (layout.weights) {
    case FASTFF_F32: return fill<float>(layout, from, in, out);
    case FASTFF_BF16: return fill<Bf16>(layout, from, in, out);
    default: return fill<int8_t>(layout, from, in, out);
  }
}

}  // namespace fastff
