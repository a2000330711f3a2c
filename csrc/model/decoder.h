// A decoder-only transformer for inference: immutable weights, and sessions that hold what a conversation needs.
//
// Rows of activations are rounded to 16 bits before every product, so that weights alone lose precision, and every sum has
// one order: a prompt read at once leaves the same bits as one read token by token.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "base/half.h"
#include "base/huge_pages.h"
#include "model/attention.h"
#include "model/dense.h"
#include "model/feedforward.h"
#include "model/linear.h"
#include "model/norm.h"
#include "model/weights_file.h"

namespace fastff {

struct DecoderShape {
  int64_t vocab_size, hidden, layers, heads, key_heads, head_dim, positions;
  int64_t rotated;  // numbers of a head that positions rotate; 0: learned positions
  float score_scale, rotation_scale;

  int64_t qkv_features() const { return (heads + 2 * key_heads) * head_dim; }
};

struct DecoderLayer {
  Norm attention_norm, feedforward_norm;
  Norm query_norm, key_norm;  // of each head; without features there is none
  Dense qkv, out;
  Feedforward feedforward;
};

class Decoder {
 public:
  explicit Decoder(const WeightsFile& file);  // which must outlive it; throws std::invalid_argument

  const DecoderShape& shape() const { return shape_; }
  const std::vector<DecoderLayer>& layers() const { return layers_; }
  const Norm& norm() const { return norm_; }
  const Norm& embedding_norm() const { return embedding_norm_; }  // without features there is none
  const Dense& head() const { return head_; }
  const PackedMatrix& embedding() const { return embedding_; }
  const float* learned_positions() const { return learned_positions_; }  // [positions][hidden] or null
  const float* frequencies() const { return frequencies_; }              // [rotated / 2], radians a position

 private:
  DecoderShape shape_;
  std::vector<DecoderLayer> layers_;
  Norm norm_, embedding_norm_;
  PackedMatrix embedding_;
  Dense head_;
  const float* learned_positions_ = nullptr;
  const float* frequencies_ = nullptr;
};

class Session {
 public:
  // capacity: positions it can hold. Throws std::invalid_argument for more than the model has, or than memory can hold.
  Session(const Decoder& decoder, int64_t capacity);

  int64_t capacity() const { return cache_shape_.capacity; }
  int64_t length() const { return length_; }
  void rewind(int64_t length);  // forgets what follows

  // Reads tokens. With all_logits [count][vocab_size] writes what each predicts; logits() is what the last one does.
  void feed(const int32_t* ids, int64_t count, float* all_logits, int threads);
  const float* logits() const { return logits_.data(); }
  bool has_logits() const { return has_logits_; }

  std::atomic_flag in_use = ATOMIC_FLAG_INIT;

 private:
  void feed_rows(const int32_t* ids, int64_t rows, float* all_logits, bool last, int threads);
  void embed(const int32_t* ids, int64_t rows, int threads);
  void angles(int64_t rows);
  void norm_rows(const Norm& norm, const float* x, int64_t rows, float* y, int threads) const;
  void attention(int64_t layer, int64_t rows, int threads);
  void place_heads(const DecoderLayer& layer, int64_t row);
  void feedforward(const DecoderLayer& layer, int64_t rows, int threads);
  void product(const Dense& dense, const float* x, int64_t rows, const Epilogue& epilogue, float* y, int threads);
  void predict(const float* x, int64_t rows, float* logits, int threads);

  const Decoder& decoder_;
  const CacheShape cache_shape_;
  HugeBuffer cache_;
  int64_t length_ = 0;
  bool has_logits_ = false;
  std::vector<float> x_, normed_, qkv_, attended_, hidden_, cosine_, sine_, logits_;
  QuantisedRows quantised_;
};

}  // namespace fastff
