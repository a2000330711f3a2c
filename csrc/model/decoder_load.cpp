// A decoder read from its weights file: sizes bounded first, then every tensor checked against them.
#include <cmath>
#include <string>

#include "base/checks.h"
#include "model/decoder.h"

namespace fastff {
namespace {

constexpr int64_t kMostLayers = 4096, kMostHeads = 4096, kMostVocabulary = 1 << 24, kMostPositions = 1 << 24;

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
  s.positions = model.integer("positions", 1, kMostPositions);
  s.rotated = model.integer("rotated", 0, s.head_dim);
  s.score_scale = finite(model, "score_scale");
  s.rotation_scale = finite(model, "rotation_scale");
  if (s.heads % s.key_heads) refuse("heads " + std::to_string(s.heads) + " is no multiple of key_heads");
  if (!(s.score_scale > 0)) refuse("score_scale " + std::to_string(s.score_scale) + " is not above 0");
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

  // settings: of this layer's feedforward.
  DecoderLayer layer(int64_t number, const Json& settings) const {
    const std::string name = "layers." + std::to_string(number) + ".";
    const int64_t attended = s_.heads * s_.head_dim;
    DecoderLayer layer;
    layer.attention_norm = norm(name + "attention_norm", s_.hidden);
    layer.query_norm = head_norm(name + "query_norm");
    layer.key_norm = head_norm(name + "key_norm");
    layer.qkv = load_dense(file_, name + "qkv", s_.qkv_features(), s_.hidden);
    layer.out = load_dense(file_, name + "out", s_.hidden, attended);
    layer.feedforward = load_feedforward(file_, settings, name, s_.hidden);
    if (layer.feedforward) layer.feedforward_norm = norm(name + "feedforward_norm", s_.hidden);
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
  const auto& feedforwards = feedforward_settings(file, s.layers);
  for (int64_t i = 0; i < s.layers; ++i) layers_.push_back(load.layer(i, feedforwards[i]));
  if (file.has("embedding_norm.weight")) embedding_norm_ = load.norm("embedding_norm", s.hidden);
  norm_ = load.norm("norm", s.hidden);
  head_ = load_dense(file, "head", s.vocab_size, s.hidden);
  embedding_ = file.has("embedding") ? file.matrix("embedding", s.vocab_size, s.hidden) : head_.matrix;
  if (s.rotated > 0) frequencies_ = file.numbers("frequencies", {s.rotated / 2});
  else learned_positions_ = file.numbers("positions", {s.positions, s.hidden});
}

}  // namespace fastff
