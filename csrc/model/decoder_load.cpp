// A decoder read from its weights file: sizes bounded first, then every tensor checked against them.
#include <cmath>
#include <string>

#include "base/checks.h"
#include "model/conditional_load.h"
#include "model/decoder.h"

namespace fastff {
namespace {

constexpr int64_t kMostLayers = 4096, kMostHeads = 4096, kMostVocabulary = 1 << 24, kMostPositions = 1 << 24;

// Activations by their names in a header: those of enum fastff_activation.
int32_t activation_of(const std::string& name) {
  static const char* const kNames[] = {"gelu", "gelu_tanh", "relu", "silu", "identity", "swiglu", "abs"};
  for (int32_t i = 0; i < 7; ++i)
    if (name == kNames[i]) return i;
  refuse("activation '" + name + "' is not known");
}

float finite(const Json& model, const char* name) {
  const auto value = static_cast<float>(model.number(name));
  if (!std::isfinite(value)) refuse(std::string(name) + " is not a finite number");
  return value;
}

DecoderShape read_shape(const Json& model) {
  DecoderShape s{};
  s.vocab_size = model.integer("vocab_size", 1, kMostVocabulary);
  s.hidden = model.integer("hidden", 1, kMostInputs);
  s.layers = model.integer("layers", 1, kMostLayers);
  s.heads = model.integer("heads", 1, kMostHeads);
  s.key_heads = model.integer("key_heads", 1, s.heads);
  s.head_dim = model.integer("head_dim", 1, kMostInputs / s.heads);
  s.neurons = model.integer("neurons", 0, kMostInputs);
  s.positions = model.integer("positions", 1, kMostPositions);
  s.rotated = model.integer("rotated", 0, s.head_dim);
  s.activation = activation_of(model.text("activation"));
  s.score_scale = finite(model, "score_scale");
  s.rotation_scale = finite(model, "rotation_scale");
  if (s.heads % s.key_heads) refuse("heads " + std::to_string(s.heads) + " is no multiple of key_heads");
  if (s.rotated % 2) refuse("rotated " + std::to_string(s.rotated) + " is odd");
  return s;
}

class Loader {
 public:
  Loader(const WeightsFile& file, const DecoderShape& shape)
      : file_(file), s_(shape), epsilon_(finite(file.model(), "norm_epsilon")), centred_(file.model().flag("norm_centred")) {}

  Norm norm(const std::string& name, int64_t features) const {
    Norm norm{features, epsilon_, centred_, file_.numbers(name + ".weight", {features}), nullptr};
    if (file_.has(name + ".bias")) norm.bias = file_.numbers(name + ".bias", {features});
    return norm;
  }

  // RMSNorm of each head, in models that have one.
  Norm head_norm(const std::string& name) const {
    if (!file_.has(name + ".weight")) return {};
    return {s_.head_dim, epsilon_, false, file_.numbers(name + ".weight", {s_.head_dim}), nullptr};
  }

  Dense dense(const std::string& name, int64_t out_features, int64_t in_features, bool gated = false) const {
    return load_dense(file_, name, out_features, in_features, gated);
  }

  DecoderLayer layer(int64_t number) const {
    const std::string name = "layers." + std::to_string(number) + ".";
    const int64_t attended = s_.heads * s_.head_dim;
    DecoderLayer layer;
    layer.attention_norm = norm(name + "attention_norm", s_.hidden);
    layer.feedforward_norm = norm(name + "feedforward_norm", s_.hidden);
    layer.query_norm = head_norm(name + "query_norm");
    layer.key_norm = head_norm(name + "key_norm");
    layer.qkv = dense(name + "qkv", s_.qkv_features(), s_.hidden);
    layer.out = dense(name + "out", s_.hidden, attended);
    if (s_.neurons > 0) {
      layer.up = dense(name + "up", s_.neurons, s_.hidden, s_.gated());
      layer.down = dense(name + "down", s_.hidden, s_.neurons);
    }
    if (const Json* conditional = file_.model().find("conditional"))
      layer.conditional.reset(load_conditional(file_, *conditional, name, s_.hidden));
    return layer;
  }

 private:
  const WeightsFile& file_;
  const DecoderShape& s_;
  const float epsilon_;
  const bool centred_;
};

}  // namespace

Decoder::Decoder(const WeightsFile& file) : shape_(read_shape(file.model())) {
  const DecoderShape& s = shape_;
  const Loader load(file, s);
  for (int64_t i = 0; i < s.layers; ++i) layers_.push_back(load.layer(i));
  norm_ = load.norm("norm", s.hidden);
  head_ = load.dense("head", s.vocab_size, s.hidden);
  embedding_ = file.has("embedding") ? file.matrix("embedding", s.vocab_size, s.hidden) : head_.matrix;
  if (s.rotated > 0) frequencies_ = file.numbers("frequencies", {s.rotated / 2});
  else learned_positions_ = file.numbers("positions", {s.positions, s.hidden});
}

}  // namespace fastff
