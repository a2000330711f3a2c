#include "model/decoder.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/checks.h"
#include "base/threads.h"

namespace fastff {
namespace {

constexpr int64_t kMostRows = 256;  // of a prompt that pass the layers together
constexpr int64_t kGrainRows = 32;  // whose norms are worth another thread

CacheShape checked_cache(const DecoderShape& s, int64_t capacity) {
  need_in("capacity", capacity, 1, s.positions);
  const CacheShape shape{s.layers, s.key_heads, s.head_dim, capacity};
  const double bytes = 2.0 * sizeof(Half) * s.layers * s.key_heads * s.head_dim * capacity;
  const double memory = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  if (bytes > memory)
    refuse("a cache of " + std::to_string(capacity) + " positions takes " + std::to_string(int64_t(bytes / 1e6)) +
           " MB, more than the memory of " + std::to_string(int64_t(memory / 1e6)) + " MB");
  return shape;
}

void ensure(std::vector<float>& room, int64_t numbers) {
  if (static_cast<int64_t>(room.size()) < numbers) room.resize(numbers);
}

}  // namespace

Session::Session(const Decoder& decoder, int64_t capacity)
    : decoder_(decoder), cache_shape_(checked_cache(decoder.shape(), capacity)), cache_(cache_shape_.bytes()) {
  logits_.resize(decoder.shape().vocab_size);
}

void Session::rewind(int64_t length) {
  need_in("length", length, 0, length_);
  has_logits_ = has_logits_ && length == length_;
  length_ = length;
}

void Session::feed(const int32_t* ids, int64_t count, float* all_logits, int threads) {
  const DecoderShape& s = decoder_.shape();
  if (count > capacity() - length_)
    refuse(std::to_string(count) + " tokens after " + std::to_string(length_) + " do not fit the session's " +
           std::to_string(capacity()) + " positions");
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= s.vocab_size)
      refuse("token " + std::to_string(ids[i]) + " is outside the vocabulary of " + std::to_string(s.vocab_size));
  const OwnPoolScope own_pool;
  for (int64_t done = 0; done < count; done += kMostRows) {
    const int64_t rows = std::min(kMostRows, count - done);
    feed_rows(ids + done, rows, all_logits ? all_logits + done * s.vocab_size : nullptr, done + rows == count, threads);
  }
}

void Session::feed_rows(const int32_t* ids, int64_t rows, float* all_logits, bool last, int threads) {
  const DecoderShape& s = decoder_.shape();
  ensure(x_, rows * s.hidden);
  ensure(normed_, rows * s.hidden);
  ensure(qkv_, rows * s.qkv_features());
  ensure(attended_, rows * s.heads * s.head_dim);
  embed(ids, rows, threads);
  angles(rows);
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    attention(layer, rows, threads);
    feedforward(decoder_.layers()[layer], rows, threads);
  }
  length_ += rows;
  has_logits_ = last;
  if (all_logits) {
    predict(x_.data(), rows, all_logits, threads);
    if (last) std::copy_n(all_logits + (rows - 1) * s.vocab_size, s.vocab_size, logits_.data());
  } else if (last) {
    predict(x_.data() + (rows - 1) * s.hidden, 1, logits_.data(), threads);
  }
}

void Session::embed(const int32_t* ids, int64_t rows, int threads) {
  const int64_t hidden = decoder_.shape().hidden;
  for (int64_t r = 0; r < rows; ++r) {
    float* x = x_.data() + r * hidden;
    unpack_row(decoder_.embedding(), ids[r], x);
    if (const float* learned = decoder_.learned_positions())
      for (int64_t i = 0; i < hidden; ++i) x[i] += learned[(length_ + r) * hidden + i];
  }
  if (decoder_.embedding_norm().features > 0) norm_rows(decoder_.embedding_norm(), x_.data(), rows, x_.data(), threads);
}

// Cosines and sines of the rows' positions. The angle is rounded to fp32 as it is in training.
void Session::angles(int64_t rows) {
  const DecoderShape& s = decoder_.shape();
  const int64_t half = s.rotated / 2;
  ensure(cosine_, rows * half);
  ensure(sine_, rows * half);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(length_ + r) * decoder_.frequencies()[i];
      cosine_[r * half + i] = static_cast<float>(std::cos(static_cast<double>(angle))) * s.rotation_scale;
      sine_[r * half + i] = static_cast<float>(std::sin(static_cast<double>(angle))) * s.rotation_scale;
    }
}

void Session::norm_rows(const Norm& norm, const float* x, int64_t rows, float* y, int threads) const {
  const auto kernel = row_kernels().norm;
  parallel(rows, kGrainRows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernel(norm, x + r * norm.features, y + r * norm.features);
  });
}

void Session::product(const Dense& dense, const float* x, int64_t rows, const Epilogue& epilogue, float* y, int threads) {
  quantise_rows(x, dense.matrix.in_features, rows, dense.matrix.in_features, dense.factors, 16, threads, quantised_,
                dense.matrix.grouped());
  multiply(dense.matrix, quantised_, epilogue, {y, nullptr, dense.matrix.out_features}, threads);
}

// Norms of a row's query and key heads, and their rotation.
void Session::place_heads(const DecoderLayer& layer, int64_t row) {
  const DecoderShape& s = decoder_.shape();
  const RowKernels& kernels = row_kernels();
  const int64_t half = s.rotated / 2;
  float* head = qkv_.data() + row * s.qkv_features();
  for (int64_t h = 0; h < s.heads + s.key_heads; ++h, head += s.head_dim) {
    const Norm& norm = h < s.heads ? layer.query_norm : layer.key_norm;
    if (norm.features > 0) kernels.norm(norm, head, head);
    if (half > 0) kernels.rotate(head, cosine_.data() + row * half, sine_.data() + row * half, half);
  }
}

void Session::attention(int64_t number, int64_t rows, int threads) {
  const DecoderShape& s = decoder_.shape();
  const DecoderLayer& layer = decoder_.layers()[number];
  norm_rows(layer.attention_norm, x_.data(), rows, normed_.data(), threads);
  product(layer.qkv, normed_.data(), rows, layer.qkv.epilogue(), qkv_.data(), threads);
  parallel(rows, kGrainRows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) place_heads(layer, r);
  });
  auto* cache = reinterpret_cast<Half*>(cache_.data());
  attend({cache_shape_, cache, number, rows, length_, s.heads, s.qkv_features(), qkv_.data(), attended_.data(),
          s.score_scale}, threads);
  product(layer.out, attended_.data(), rows, layer.out.epilogue(FASTFF_IDENTITY, true), x_.data(), threads);
}

void Session::feedforward(const DecoderLayer& layer, int64_t rows, int threads) {
  const Feedforward& part = layer.feedforward;
  if (!part) return;
  const int64_t hidden = decoder_.shape().hidden;
  norm_rows(layer.feedforward_norm, x_.data(), rows, normed_.data(), threads);
  if (part.up) {
    ensure(hidden_, rows * part.neurons());
    product(part.up, normed_.data(), rows, part.up.epilogue(part.activation), hidden_.data(), threads);
    product(part.down, hidden_.data(), rows, part.down.epilogue(FASTFF_IDENTITY, true), x_.data(), threads);
  }
  if (part.conditional()) {
    ensure(attended_, rows * hidden);  // whose contents are read already
    part.run_conditional(normed_.data(), rows, attended_.data(), threads);
    for (int64_t i = 0; i < rows * hidden; ++i) x_[i] += attended_[i];
  }
  if (part.bias)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < hidden; ++c) x_[r * hidden + c] += part.bias[c];
}

void Session::predict(const float* x, int64_t rows, float* logits, int threads) {
  norm_rows(decoder_.norm(), x, rows, normed_.data(), threads);
  product(decoder_.head(), normed_.data(), rows, decoder_.head().epilogue(), logits, threads);
}

}  // namespace fastff
