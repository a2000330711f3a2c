// An encoder read from its weights file: sizes bounded first, then every tensor checked against them.
#include <cmath>
#include <string>

#include "base/checks.h"
#include "base/errors.h"
#include "model/conditional_load.h"
#include "model/encoder.h"

namespace fastff {
namespace {

constexpr int64_t kMostLayers = 4096, kMostHeads = 4096, kMostVocabulary = 1 << 24, kMostPositions = 1 << 24;
constexpr int64_t kMostTrees = 1 << 24, kMostWidth = 1 << 20;

EncoderShape read_shape(const Json& model) {
  if (model.text("kind") != "encoder") refuse("the model is of kind '" + model.text("kind") + "', expected 'encoder'");
  EncoderShape s{};
  s.vocab_size = model.integer("vocab_size", 1, kMostVocabulary);
  s.hidden = model.integer("hidden", 1, kMostInputs);
  s.layers = model.integer("layers", 0, kMostLayers);
  s.heads = model.integer("heads", 1, kMostHeads);
  s.positions = model.integer("positions", 1, kMostPositions);
  s.first_position = model.integer("first_position", 0, kMostPositions);
  s.types = model.integer("types", 0, kMostVocabulary);
  s.activation_bits = static_cast<int>(model.integer("activation_bits", 8, 16));
  if (s.activation_bits != 8 && s.activation_bits != 16)
    refuse("activation_bits " + std::to_string(s.activation_bits) + " is neither 8 nor 16");
  s.pre_norm = model.flag("pre_norm");
  if (s.hidden % s.heads) refuse("hidden " + std::to_string(s.hidden) + " is no multiple of heads");
  return s;
}

// Tensors that need not be there have no numbers.
std::vector<float> optional(const WeightsFile& file, const std::string& name, const std::vector<int64_t>& shape) {
  return file.has(name) ? file.widened(name, shape) : std::vector<float>{};
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
  const int32_t status = fastff_pack_f32(&tree, w_in.data(), b_in.empty() ? nullptr : b_in.data(), w_out.data(),
                                         b_out.empty() ? nullptr : b_out.data(), FASTFF_INT8, &packed);
  if (status != FASTFF_OK) refuse(name + " " + last_error());
  return packed;
}

class Loader {
 public:
  Loader(const WeightsFile& file, const EncoderShape& shape)
      : file_(file), s_(shape), epsilon_(static_cast<float>(file.model().number("norm_epsilon"))) {
    if (!std::isfinite(epsilon_) || epsilon_ < 0) refuse("norm_epsilon is not a finite number of at least 0");
  }

  Norm norm(const std::string& name) const {
    Norm norm{s_.hidden, epsilon_, true, file_.numbers(name + ".weight", {s_.hidden}), nullptr};
    if (file_.has(name + ".bias")) norm.bias = file_.numbers(name + ".bias", {s_.hidden});
    return norm;
  }

  Dense dense(const std::string& name, int64_t out_features, int64_t in_features, bool gated = false) const {
    return load_dense(file_, name, out_features, in_features, gated);
  }

  // settings: of this layer's feedforward, {"neurons", "activation", and of a conditional one "trees" or "routed"}.
  EncoderLayer layer(int64_t number, const Json& settings) const {
    const std::string name = "layers." + std::to_string(number) + ".", conditional = name + "conditional.";
    EncoderLayer layer;
    layer.attention_norm = norm(name + "attention_norm");
    layer.qkv = dense(name + "qkv", 3 * s_.hidden, s_.hidden);
    layer.out = dense(name + "out", s_.hidden, s_.hidden);
    layer.activation = static_cast<int32_t>(settings.integer("activation", FASTFF_GELU, FASTFF_ABS));
    if (const int64_t neurons = settings.integer("neurons", 0, kMostInputs)) {
      layer.up = dense(name + "up", neurons, s_.hidden, layer.activation == FASTFF_SWIGLU);
      layer.down = dense(name + "down", s_.hidden, neurons);
    }
    if (const Json* trees = settings.find("trees"))
      layer.trees.reset(load_trees(file_, *trees, conditional, s_.hidden));
    if (const Json* routed = settings.find("routed"))
      layer.routed.reset(load_conditional(file_, *routed, name, s_.hidden));
    if (file_.has(conditional + "bias")) layer.bias = file_.numbers(conditional + "bias", {s_.hidden});
    const bool feeds = layer.up || layer.conditional() || layer.bias;
    if (feeds || !s_.pre_norm) layer.feedforward_norm = norm(name + "feedforward_norm");
    return layer;
  }

 private:
  const WeightsFile& file_;
  const EncoderShape& s_;
  const float epsilon_;
};

}  // namespace

Encoder::Encoder(const WeightsFile& file) : shape_(read_shape(file.model())) {
  const EncoderShape& s = shape_;
  const Loader load(file, s);
  embedding_ = file.numbers("embedding", {s.vocab_size, s.hidden});
  positions_ = file.numbers("positions", {s.first_position + s.positions, s.hidden});
  if (s.types > 0) types_ = file.numbers("types", {s.types, s.hidden});
  embedding_norm_ = load.norm("embedding_norm");
  if (s.pre_norm) norm_ = load.norm("norm");
  const auto& feedforwards = file.model().member("feedforwards").items();
  if (static_cast<int64_t>(feedforwards.size()) != s.layers)
    refuse(std::to_string(feedforwards.size()) + " feedforwards, expected one for each of " + std::to_string(s.layers) +
           " layers");
  for (int64_t i = 0; i < s.layers; ++i) layers_.push_back(load.layer(i, feedforwards[i]));
}

}  // namespace fastff
