#include "model/feedforward.h"

#include <stdexcept>
#include <utility>
#include <vector>

#include "base/checks.h"
#include "base/errors.h"

namespace fastff {
namespace {

constexpr int64_t kMostLeaves = 1 << 24, kMostWidth = 1 << 20, kMostTrees = 1 << 24;

fastff_router read_router(const Json& settings, int64_t hidden) {
  fastff_router router{};
  router.in_features = hidden;
  router.trees = settings.integer("trees", 1, kMostLeaves);
  router.candidates = settings.integer("candidates", 0, kMostLeaves);
  router.chosen = settings.integer("chosen", 1, kMostLeaves);
  router.kind = static_cast<int32_t>(settings.integer("kind", FASTFF_TREES, FASTFF_PRODUCT_KEYS));
  router.depth = static_cast<int32_t>(settings.integer("depth", 0, 24));
  router.gate = static_cast<int32_t>(settings.integer("gate", FASTFF_UNGATED, FASTFF_NORMALISED));
  router.tau = settings.number("tau");
  return router;
}

// A tensor that need not be there.
Floats optional(const WeightsFile& file, const std::string& name, const std::vector<int64_t>& shape) {
  return file.has(name) ? file.widened(name, shape) : Floats{};
}

void check_packed(int32_t status, const std::string& name) {
  if (status != FASTFF_OK) refuse(name + " " + last_error());
}


fastff_leaves read_leaves(const Json& settings, int64_t hidden) {
  fastff_leaves leaves{};
  leaves.in_features = leaves.out_features = hidden;
  leaves.leaves = settings.integer("leaves", 1, kMostLeaves);
  leaves.leaf_width = settings.integer("leaf_width", 1, kMostWidth);
  leaves.activation = static_cast<int32_t>(settings.integer("activation", FASTFF_GELU, FASTFF_ABS));
  return leaves;
}

bool is_tree(const fastff_router& router) { return router.kind == FASTFF_TREES || router.kind == FASTFF_PATHS; }

// How many leaves a router knows.
int64_t leaves_known(const fastff_router& router) {
  if (is_tree(router)) return router.trees << router.depth;
  return router.kind == FASTFF_FLAT ? router.candidates : router.candidates * router.candidates;
}

// A router's weights, from the file.
struct RouterWeights {
  Floats w, b, balance;

  RouterWeights(const WeightsFile& file, const std::string& name, const fastff_router& router) {
    const bool halves = router.kind == FASTFF_PRODUCT_KEYS;
    const int64_t leaves = leaves_known(router), nodes = leaves - router.trees, balanced = nodes + leaves;
    const int64_t rows = is_tree(router) ? nodes : router.candidates * (halves ? 2 : 1);
    w = file.widened(name + "router", {rows, halves ? router.in_features / 2 : router.in_features});
    b = optional(file, name + "router.bias", {rows});
    balance = optional(file, name + "balance", {is_tree(router) ? balanced : leaves});
  }
};

RoutedWeights read_routed(const WeightsFile& file, const Json& settings, const std::string& name, int64_t hidden) {
  const fastff_router router = read_router(settings, hidden);
  const fastff_leaves leaves = read_leaves(settings, hidden);
  RouterWeights of(file, name, router);
  const int64_t width = leaves.leaf_width, in_rows = width * (leaves.activation == FASTFF_SWIGLU ? 2 : 1);
  RoutedWeights read{router, leaves, std::move(of.w), std::move(of.b), std::move(of.balance), {}, {}, {}, {}};
  read.w_in = file.widened(name + "w_in", {leaves.leaves, in_rows, hidden});
  read.b_in = optional(file, name + "b_in", {leaves.leaves, in_rows});
  read.w_out = file.widened(name + "w_out", {leaves.leaves, width, hidden});
  read.b_out = optional(file, name + "b_out", {leaves.leaves, hidden});
  return read;
}

fastff_layer* pack_routed(const RoutedWeights& w, const std::string& name) {
  fastff_layer* layer = nullptr;
  check_packed(fastff_layer_pack_f32(&w.router, w.rows.data(), w.bias.data(), w.balance.data(), &w.leaves, w.w_in.data(),
                                     w.b_in.data(), w.w_out.data(), w.b_out.data(), FASTFF_INT8, &layer), name);
  return layer;
}

std::unique_ptr<GroupedLeaves> load_grouped(const WeightsFile& file, const Json& settings, const std::string& name,
                                            int64_t hidden) {
  const fastff_router router = read_router(settings, hidden);
  const fastff_leaves leaves = read_leaves(settings, hidden);
  const RouterWeights of(file, name, router);
  fastff_packed_router* packed = nullptr;
  check_packed(fastff_router_pack_f32(&router, of.w.data(), of.b.data(), of.balance.data(), FASTFF_INT8, &packed), name);
  std::unique_ptr<fastff_packed_router, FreeRouter> kept(packed);
  if (leaves_known(router) != leaves.leaves)
    refuse(name + " chooses among " + std::to_string(leaves_known(router)) + " leaves and has " +
           std::to_string(leaves.leaves));
  return std::make_unique<GroupedLeaves>(file, name, leaves, kept.release(), router.trees * router.chosen);
}

fastff_packed* load_trees(const WeightsFile& file, const Json& settings, const std::string& name, int64_t hidden) {
  fastff_tree tree{};
  tree.in_features = tree.out_features = hidden;
  tree.trees = settings.integer("trees", 1, kMostTrees);
  tree.leaf_width = settings.integer("leaf_width", 1, kMostWidth);
  tree.depth = static_cast<int32_t>(settings.integer("depth", 0, 24));
  tree.node_output = settings.flag("node_output");
  tree.activation = static_cast<int32_t>(settings.integer("activation", FASTFF_GELU, FASTFF_ABS));
  tree.gate = static_cast<int32_t>(settings.integer("gate", FASTFF_UNGATED, FASTFF_BOUNDARY_MIN));
  tree.tau = settings.number("tau");
  const int64_t leaves = int64_t{1} << tree.depth, nodes = leaves - 1, neurons = leaves * tree.leaf_width;
  const int64_t in_rows = nodes + neurons * (tree.activation == FASTFF_SWIGLU ? 2 : 1);
  const auto w_in = file.widened(name + "w_in", {tree.trees, in_rows, hidden});
  const auto w_out = file.widened(name + "w_out", {tree.trees, neurons + (tree.node_output ? nodes : 0), hidden});
  const auto b_in = optional(file, name + "b_in", {tree.trees, in_rows});
  const auto b_out = optional(file, name + "b_out", {tree.trees, leaves, hidden});
  fastff_packed* packed = nullptr;
  check_packed(fastff_pack_f32(&tree, w_in.data(), b_in.data(), w_out.data(), b_out.data(), FASTFF_INT8, &packed), name);
  return packed;
}

}  // namespace

void Feedforward::run_conditional(const float* x, int64_t rows, float* y, int threads) const {
  if (grouped) return grouped->run(x, rows, y, threads);
  const int32_t status = routed ? fastff_layer_infer_f32(routed.get(), x, y, rows, threads)
                                : fastff_infer_f32(trees.get(), x, y, rows, threads);
  if (status != FASTFF_OK) throw std::runtime_error(last_error());
}

Feedforward load_feedforward(const WeightsFile& file, const Json& settings, const std::string& prefix, int64_t hidden,
                             int bits) {
  const std::string conditional = prefix + "conditional.";
  Feedforward made;
  made.activation = static_cast<int32_t>(settings.integer("activation", FASTFF_GELU, FASTFF_ABS));
  if (const int64_t neurons = settings.integer("neurons", 0, kMostInputs)) {
    const bool gated = made.activation == FASTFF_SWIGLU || (settings.find("gated") && settings.flag("gated"));
    if (gated && made.activation != FASTFF_SWIGLU && made.activation != FASTFF_GELU)
      refuse(prefix + "up has gates of activation " + std::to_string(made.activation) + ", expected SwiGLU or GELU");
    made.up = load_dense(file, prefix + "up", neurons, hidden, gated);
    made.down = load_dense(file, prefix + "down", hidden, neurons);
  }
  if (const Json* trees = settings.find("trees")) made.trees.reset(load_trees(file, *trees, conditional, hidden));
  if (const Json* grouped = settings.find("grouped")) made.grouped = load_grouped(file, *grouped, conditional, hidden);
  if (const Json* routed = settings.find("routed")) {
    const RoutedWeights read = read_routed(file, *routed, conditional, hidden);
    if (bits && Experts::fit(read)) made.experts = std::make_unique<Experts>(read, bits == 8 ? made.up.factors : nullptr);
    else made.routed.reset(pack_routed(read, conditional));
  }
  if (file.has(conditional + "bias")) made.bias = file.numbers(conditional + "bias", {hidden});
  return made;
}

const std::vector<Json>& feedforward_settings(const WeightsFile& file, int64_t layers) {
  const auto& settings = file.model().member("feedforwards").items();
  if (static_cast<int64_t>(settings.size()) != layers)
    refuse(std::to_string(settings.size()) + " feedforwards, expected one for each of " + std::to_string(layers) +
           " layers");
  return settings;
}

}  // namespace fastff
