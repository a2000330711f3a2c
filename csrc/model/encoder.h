// An encoder for inference: immutable weights, and one function from token ids to hidden states.
//
// Sequences lie end to end, so that no position is padding. Rows of activations are rounded to 16 or 8 bits before every
// product, channels times their factors before, which the columns of the weights are divided by.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "fastff.h"
#include "model/dense.h"
#include "model/feedforward.h"
#include "model/norm.h"
#include "model/weights_file.h"

namespace fastff {

struct EncoderShape {
  int64_t vocab_size, hidden, layers, heads;
  int64_t positions;        // tokens of a sequence at most
  int64_t first_position;   // row of the positions' table that the first token takes
  int64_t types;            // segments; 0 for none
  int activation_bits;      // 8 or 16, to which a row is rounded before a product, except attention's output: 8
  bool rotary;              // heads are rotated by position, and no position is added to the embeddings
  bool distances;           // a bias of the distance from query to key is added to scores
  bool pre_norm;            // norms before attention and feedforward and a last one, else after each
};

struct EncoderLayer {
  Norm attention_norm, feedforward_norm;  // the first is without features where rows are taken as they are
  int64_t window = 0;                     // positions before and after a token that it attends to; 0: all
  Dense qkv, out;
  Feedforward feedforward;
};

class Encoder {
 public:
  explicit Encoder(const WeightsFile& file);  // which must outlive it; throws std::invalid_argument

  const EncoderShape& shape() const { return shape_; }

  // Tokens of all sequences, one after the other; types may be null: all of the first segment. hidden: [tokens][hidden].
  void run(const int32_t* ids, const int32_t* types, const int64_t* lengths, int64_t sequences, float* hidden,
           int threads) const;

 private:
  struct Group;  // sequences that pass the layers together

  void rotate(const EncoderLayer& layer, const Group& group, float* qkv, uint16_t* narrow) const;
  void embed(const int32_t* ids, const int32_t* types, const Group& group, float* x, int threads) const;
  void attend(const EncoderLayer& layer, const Group& group, float* x, int threads) const;
  void feed(const EncoderLayer& layer, float* x, int64_t rows, int threads) const;
  void attention(const EncoderLayer& layer, const Group& group, const float* x, float* y, int threads) const;
  void feedforward(const Feedforward& part, const float* x, int64_t rows, float* y, int threads) const;
  void through(const std::vector<Group>& groups, int64_t begin, int64_t end, const int32_t* ids, const int32_t* types,
               float* hidden, int threads) const;

  EncoderShape shape_;
  const float* embedding_;  // [vocab_size][hidden]
  const float* positions_ = nullptr;   // [first_position + positions][hidden]
  const float* bias_ = nullptr;        // [heads][2 * positions - 1], of distances
  std::vector<float> cosines_, sines_;  // [2][positions][head_dim / 2], of layers without and with a window
  const float* types_ = nullptr;
  Norm embedding_norm_, norm_;
  std::vector<EncoderLayer> layers_;
};

}  // namespace fastff
