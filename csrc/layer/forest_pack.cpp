// Packs of layers of several trees whose nodes only route: their routing and their leaves are those of any router.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "layer/joined_layer.h"
#include "layer/packed.h"

namespace fastff {
namespace {

constexpr int64_t kMostLeafFeatures = 1 << 17;  // of int8 leaves
constexpr int64_t kMostLeaves = (int64_t{1} << 31) - 1;
constexpr int64_t kRoutedRows = 2048;            // whose route is kept at a time

Router router_of(const Tree& tree) {
  return {tree.in_features, tree.trees, 0, 1, FASTFF_TREES, tree.depth, tree.gate, tree.tau};
}
fastff_leaves leaves_of(const Tree& tree) {
  return {tree.in_features, tree.out_features, tree.trees * tree.leaves(), tree.leaf_width, tree.activation};
}

// The rows of nodes, or of leaves, of all trees, one tree's after another's. Empty without an array.
std::vector<float> rows_of(const Tree& tree, const float* all, int64_t columns, bool leaves) {
  std::vector<float> rows;
  if (!all) return rows;
  const int64_t from = leaves ? tree.nodes() : 0, n = leaves ? tree.leaves() * tree.leaf_in_rows() : tree.nodes();
  rows.reserve(tree.trees * n * columns);
  for (int64_t t = 0; t < tree.trees; ++t) {
    const float* tree_rows = all + (t * tree.in_rows() + from) * columns;
    rows.insert(rows.end(), tree_rows, tree_rows + n * columns);
  }
  return rows;
}

// Of a thread, kept between calls.
struct ForestRoute {
  std::vector<int64_t> leaf;
  std::vector<float> gate, scores;

  static ForestRoute& local() {
    static thread_local ForestRoute route;
    return route;
  }
};

class ForestPack final : public fastff_packed {
 public:
  ForestPack(const Tree& t, int32_t weights) : fastff_packed(t), layer_(router_of(t), leaves_of(t), weights) {}

  void fill(const Weights<float>& w) override {
    const std::vector<float> nodes = rows_of(tree, w.w_in, tree.in_features, false), b_nodes = rows_of(tree, w.b_in, 1, false);
    const std::vector<float> leaves = rows_of(tree, w.w_in, tree.in_features, true), b_leaves = rows_of(tree, w.b_in, 1, true);
    layer_.fill(nodes.data(), w.b_in ? b_nodes.data() : nullptr, nullptr, leaves.data(), w.b_in ? b_leaves.data() : nullptr,
                w.w_out, w.b_out);
  }

  void forward(const float* x, int64_t rows, const Forward<float>& out, int threads) const override {
    need_forward(tree, x, rows, out);
    const int64_t block = std::min(rows, kRoutedRows), k = tree.trees;
    ForestRoute& route = ForestRoute::local();
    const auto room = [](auto& to, int64_t n) {
      if (static_cast<int64_t>(to.size()) < n) to.resize(n);
      return to.data();
    };
    int64_t* leaf = room(route.leaf, block * k);
    float* gate = room(route.gate, block * k);
    float* scores = out.margin ? room(route.scores, block * k * tree.depth) : nullptr;
    for (int64_t at = 0; at < rows; at += block) {
      const int64_t n = std::min(block, rows - at);
      layer_.forward(x + at * tree.in_features, n, {leaf, gate, scores}, out.y + at * tree.out_features, threads);
      if (out.leaf)
        for (int64_t i = 0; i < n * k; ++i) out.leaf[at * k + i] = leaf[i] % tree.leaves();
      if (out.margin) margins(scores, n, out.margin + at);
    }
  }

  int64_t bytes() const override { return layer_.bytes(); }

 private:
  void margins(const float* scores, int64_t rows, float* margin) const {
    const int64_t own = tree.trees * tree.depth;
    for (int64_t i = 0; i < rows; ++i) {
      float least = std::numeric_limits<float>::infinity();
      for (int64_t j = 0; j < own; ++j) {
        const float size = std::fabs(scores[i * own + j]);
        if (!(size >= least)) least = least != least ? least : size;  // NaN, once in, stays
      }
      margin[i] = least;
    }
  }

  fastff_layer layer_;
};

}  // namespace

bool is_forest(const Tree& tree, int32_t weights) {
  if (weights < FASTFF_F32 || weights > FASTFF_INT8) return false;
  return tree.trees > 1 && !tree.node_output && tree.trees * tree.leaves() <= kMostLeaves &&
         (weights != FASTFF_INT8 || tree.in_features <= kMostLeafFeatures);
}

std::unique_ptr<fastff_packed> make_forest_pack(const Tree& tree, int32_t weights) {
  return std::make_unique<ForestPack>(tree, weights);
}

}  // namespace fastff
