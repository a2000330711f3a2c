// A copy of a layer's weights for inference: the rows of a neuron side by side, in one buffer on huge pages, in fp32 or
// quantised.
#include <cstring>
#include <memory>
#include <vector>

#include "base/errors.h"
#include "base/huge_pages.h"
#include "layer/forward_rows.h"
#include "layer/packed.h"
#include "layer/store.h"

using namespace fastff;

namespace {

template <class W>
class Pack final : public fastff_packed {
 public:
  explicit Pack(const Tree& t)
      : fastff_packed(t),
        in_row_(row_elements<W>(t.in_features)),
        in_unit_(in_row_ + (kIsQuantised<W> ? kNeuronBytes / static_cast<int64_t>(sizeof(W)) : 0)),
        node_in_unit_(in_unit_ + (kIsQuantised<W> ? row_elements<int8_t>(t.in_features) / static_cast<int64_t>(sizeof(W)) : 0)),
        out_row_(row_elements<W>(t.out_features)),
        node_stride_(node_in_unit_ + (t.node_output ? out_row_ : 0)),
        leaf_stride_(t.leaf_in_rows() * in_unit_ + t.leaf_width * out_row_),
        tree_stride_(t.nodes() * node_stride_ + t.leaves() * leaf_stride_),
        exact_stride_(kIsQuantised<W> ? t.nodes() * t.in_features : 0),
        weights_(t.trees * tree_stride_ * static_cast<int64_t>(sizeof(W))),
        exact_(t.trees * exact_stride_ * static_cast<int64_t>(sizeof(float))) {}

  void fill(const Weights<float>& w) override {
    assign(b_in_, w.b_in, tree.trees * tree.in_rows());
    assign(b_out_, w.b_out, tree.trees * tree.leaves() * tree.out_features);
    views_.clear();
    for (int64_t t = 0; t < tree.trees; ++t) {
      views_.push_back(view(t));
      fill_tree(views_.back(), plain_view(tree, t, w));
    }
  }

  void forward(const float* x, int64_t rows, const Forward<float>& out, int threads) const override {
    forward_rows(kernel(), tree, views_.data(), x, rows, out, threads);
  }

  int64_t bytes() const override { return weights_.bytes() + exact_.bytes(); }

 private:
  static auto kernel() {
    if constexpr (std::is_same_v<W, Bf16>) return tree_kernels().forward_bf16;
    else if constexpr (std::is_same_v<W, int8_t>) return tree_kernels().forward_int8;
    else return tree_kernels().f32.forward;
  }

  View<float, W> view(int64_t t) const {
    View<float, W> v{};
    v.node_in = reinterpret_cast<const W*>(weights_.data()) + t * tree_stride_;
    v.node_out = v.node_in + node_in_unit_;
    v.node_in_stride = v.node_out_stride = node_stride_;
    v.leaf_in = v.node_in + tree.nodes() * node_stride_;
    v.leaf_out = v.leaf_in + tree.leaf_in_rows() * in_unit_;
    v.leaf_in_stride = v.leaf_out_stride = leaf_stride_;
    v.leaf_in_row_stride = in_unit_;
    v.leaf_out_row_stride = out_row_;
    v.b_in = b_in_.empty() ? nullptr : b_in_.data() + t * tree.in_rows();
    v.b_out = b_out_.empty() ? nullptr : b_out_.data() + t * tree.leaves() * tree.out_features;
    v.exact_in = reinterpret_cast<const float*>(exact_.data()) + t * exact_stride_;
    v.neuron_at = in_row_;
    return v;
  }

  void fill_tree(const View<float, W>& to, const View<float>& from) {
    for (int64_t n = 0; n < tree.nodes(); ++n) {
      put(to, to.in_row(n), from.in_row(n), tree.node_output ? to.out_row(n) : nullptr,
          tree.node_output ? from.out_row(n) : nullptr);
      if constexpr (kIsQuantised<W>) put_exact(to, n, from.in_row(n));
    }
    for (int64_t leaf = 0; leaf < tree.leaves(); ++leaf)
      for (int64_t j = 0; j < tree.leaf_in_rows(); ++j) {
        const bool has_output = j < tree.leaf_width;
        put(to, to.leaf_in_row(leaf, j), from.leaf_in_row(leaf, j), has_output ? to.leaf_out_row(leaf, j) : nullptr,
            has_output ? from.leaf_out_row(leaf, j) : nullptr);
      }
  }

  // One neuron: its row of w_in, and its row of w_out if it has one.
  void put(const View<float, W>& view, const W* in, const float* from_in, const W* out, const float* from_out) {
    Neuron neuron{};
    neuron.scale_in = store(const_cast<W*>(in), from_in, tree.in_features);
    if (out) neuron.scale_out = store(const_cast<W*>(out), from_out, tree.out_features);
    if constexpr (kIsQuantised<W>) {
      neuron.error = store_error(from_in, tree.in_features, StoredRow<W>{in, neuron.scale_in});
      const_cast<Neuron&>(view.neuron(in)) = neuron;
    }
  }

  // What decides where a routing node's row, which is stored, leaves a score in doubt.
  void put_exact(const View<float, W>& view, int64_t node, const float* from_in) {
    const int64_t n = tree.in_features;
    std::memcpy(const_cast<float*>(view.exact_in) + node * n, from_in, n * sizeof(float));
    const W* row = view.in_row(node);
    const StoredRow<W> stored = {row, view.neuron(row).scale_in};
    const StoredRow<int8_t> rest = store_rest(const_cast<int8_t*>(view.rest(row)), stored, from_in, n);
    const_cast<Neuron&>(view.neuron_with_rest(row)) = {rest.scale, 0, store_error(from_in, n, stored, rest)};
  }

  static void assign(std::vector<float>& to, const float* from, int64_t n) {
    if (from) to.assign(from, from + n);
    else to.clear();
  }

  int64_t in_row_, in_unit_, node_in_unit_, out_row_, node_stride_, leaf_stride_, tree_stride_, exact_stride_;
  HugeBuffer weights_, exact_;
  std::vector<float> b_in_, b_out_;
  std::vector<View<float, W>> views_;
};

void need_not_null(const void* pointer) {
  if (!pointer) throw std::invalid_argument("packed must not be NULL");
}

std::unique_ptr<fastff_packed> make_pack(const Tree& tree, int32_t weights) {
  if (is_forest(tree, weights)) return make_forest_pack(tree, weights);
  switch (weights) {
    case FASTFF_F32: return std::make_unique<Pack<float>>(tree);
    case FASTFF_BF16: return std::make_unique<Pack<Bf16>>(tree);
    case FASTFF_INT8: return std::make_unique<Pack<int8_t>>(tree);
    default: throw std::invalid_argument("weights " + std::to_string(weights) + " is not 0 (f32), 1 (bf16) or 2 (int8)");
  }
}

}  // namespace

extern "C" {

int32_t fastff_pack_f32(const fastff_tree* tree, const float* w_in, const float* b_in, const float* w_out,
                        const float* b_out, int32_t weights, fastff_packed** packed) {
  return guarded([&] {
    need_not_null(packed);
    const Tree valid = checked(tree);
    const Weights<float> w = {w_in, b_in, w_out, b_out};
    need_weights(valid, w);
    auto fresh = make_pack(valid, weights);
    fresh->fill(w);
    *packed = fresh.release();
  });
}

int64_t fastff_packed_bytes(const fastff_packed* packed) { return packed ? packed->bytes() : 0; }

int32_t fastff_packed_watch(fastff_packed* packed, const void* const* places, int32_t count) {
  return guarded([&] {
    need_not_null(packed);
    if (count < 0 || count > FASTFF_WATCHED || (count > 0 && !places))
      throw std::invalid_argument("count " + std::to_string(count) + " of places is not 0 to " +
                                  std::to_string(FASTFF_WATCHED));
    packed->watch(places, count);
  });
}

int32_t fastff_forward_packed_f32(const fastff_packed* packed, const float* x, int64_t rows, float* y, int64_t* leaf,
                                  float* margin, int32_t threads) {
  if (packed && packed->stale()) return FASTFF_STALE;
  return guarded([&] {
    need_not_null(packed);
    packed->forward(x, rows, {y, leaf, margin, nullptr}, threads);
  });
}

int32_t fastff_infer_f32(const fastff_packed* packed, const float* x, float* y, int64_t rows, int64_t threads) {
  return fastff_forward_packed_f32(packed, x, rows, y, nullptr, nullptr, static_cast<int32_t>(threads));
}

void fastff_packed_free(fastff_packed* packed) { delete packed; }

}  // extern "C"
