// An encoder read from its weights file: sizes bounded first, then every tensor checked against them.
#include <cmath>
#include <string>

#include "base/checks.h"
#include "model/encoder.h"

namespace fastff {
namespace {

constexpr int64_t kMostRotated = 1 << 17;  // positions
constexpr int64_t kMostAngles = 1 << 26;   // of a table: 256 MiB of cosines
constexpr int64_t kMostLayers = 4096, kMostHeads = 4096, kMostVocabulary = 1 << 24, kMostPositions = 1 << 24;

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
  s.rotary = model.find("rotary") && model.flag("rotary");
  s.distances = model.find("distances") && model.flag("distances");
  if (s.hidden % s.heads) refuse("hidden " + std::to_string(s.hidden) + " is no multiple of heads");
  if (s.rotary && (s.hidden / s.heads % 2 || s.positions > kMostRotated))
    refuse("rotary: heads of " + std::to_string(s.hidden / s.heads) + " numbers and " + std::to_string(s.positions) +
           " positions, expected an even number and at most " + std::to_string(kMostRotated));
  if (const int64_t angles = s.positions * (s.hidden / s.heads / 2); s.rotary && angles > kMostAngles)
    refuse("rotary: " + std::to_string(angles) + " angles, expected at most " + std::to_string(kMostAngles));
  return s;
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

  // settings: of this layer's feedforward.
  EncoderLayer layer(int64_t number, const Json& settings) const {
    const std::string name = "layers." + std::to_string(number) + ".";
    EncoderLayer layer;
    const bool normed = !s_.pre_norm || number > 0 || file_.has(name + "attention_norm.weight");
    if (normed) layer.attention_norm = norm(name + "attention_norm");
    if (file_.model().find("windows"))
      layer.window = file_.model().member("windows").items().at(number).as_integer("window", 0, kMostPositions);
    layer.qkv = load_dense(file_, name + "qkv", 3 * s_.hidden, s_.hidden);
    layer.out = load_dense(file_, name + "out", s_.hidden, s_.hidden);
    layer.feedforward = load_feedforward(file_, settings, name, s_.hidden, s_.activation_bits);
    if (layer.feedforward || !s_.pre_norm) layer.feedforward_norm = norm(name + "feedforward_norm");
    return layer;
  }

 private:
  const WeightsFile& file_;
  const EncoderShape& s_;
  const float epsilon_;
};

// Cosines and sines of every position and pair of numbers of a head.
void fill_angles(const float* frequencies, int64_t positions, int64_t half, std::vector<float>& cosines,
                 std::vector<float>& sines) {
  for (int table = 0; table < 2; ++table)
    for (int64_t p = 0; p < positions; ++p)
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<float>(p) * frequencies[table * half + i];
        cosines.push_back(static_cast<float>(std::cos(angle)));
        sines.push_back(static_cast<float>(std::sin(angle)));
      }
}

}  // namespace

Encoder::Encoder(const WeightsFile& file) : shape_(read_shape(file.model())) {
  const EncoderShape& s = shape_;
  const Loader load(file, s);
  embedding_ = file.numbers("embedding", {s.vocab_size, s.hidden});
  const int64_t half = s.hidden / s.heads / 2;
  if (s.rotary) fill_angles(file.numbers("frequencies", {2, half}), s.positions, half, cosines_, sines_);
  else positions_ = file.numbers("positions", {s.first_position + s.positions, s.hidden});
  if (s.distances) bias_ = file.numbers("distances", {s.heads, 2 * s.positions - 1});
  if (s.types > 0) types_ = file.numbers("types", {s.types, s.hidden});
  embedding_norm_ = load.norm("embedding_norm");
  if (s.pre_norm) norm_ = load.norm("norm");
  const Json* windows = file.model().find("windows");
  if (windows && static_cast<int64_t>(windows->items().size()) != s.layers)
    refuse(std::to_string(windows->items().size()) + " windows, expected one for each of " + std::to_string(s.layers) +
           " layers");
  const auto& feedforwards = feedforward_settings(file, s.layers);
  for (int64_t i = 0; i < s.layers; ++i) layers_.push_back(load.layer(i, feedforwards[i]));
}

}  // namespace fastff
