#include "model/encoder.h"

#include <algorithm>
#include <cmath>

#include "base/bf16.h"
#include "base/checks.h"
#include "base/threads.h"
#include "model/bidirectional.h"

namespace fastff {

// Rows [begin, begin + rows) of all tokens.
struct Encoder::Group {
  int64_t begin, rows, sequences;
  const int64_t* lengths;
};

namespace {

constexpr int64_t kGroupRows = 192;  // of a group: enough for a matrix to be worth its reading, few enough for the cache
constexpr int64_t kConditionalRows = 1024;  // at most, that pass a conditional layer together: they share its leaves
constexpr int64_t kGrainRows = 32;   // whose norms are worth another thread

// What one thread needs between products; kept from call to call.
struct Workspace {
  std::vector<uint16_t> qkv;  // bfloat16
  std::vector<float> wide, context, normed, neurons, conditional;
  QuantisedRows numbers;

  static Workspace& local() {
    static thread_local Workspace workspace;
    return workspace;
  }
  template <class T>
  static T* room(std::vector<T>& of, int64_t numbers) {
    if (static_cast<int64_t>(of.size()) < numbers) of.resize(numbers);
    return of.data();
  }
};

void norm_rows(const Norm& norm, const float* x, int64_t rows, float* y, int threads) {
  const auto kernel = row_kernels().norm;
  parallel(rows, kGrainRows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernel(norm, x + r * norm.features, y + r * norm.features);
  });
}

constexpr int kAttendedBits = 8;  // of attention's output, means of values, which lose nothing by it

void product(const Dense& dense, const float* x, int64_t rows, int bits, const Epilogue& epilogue, const ProductRows& y,
             int threads) {
  QuantisedRows& numbers = Workspace::local().numbers;
  quantise_rows(x, dense.matrix.in_features, rows, dense.matrix.in_features, dense.factors, bits, threads, numbers,
                dense.matrix.grouped());
  multiply(dense.matrix, numbers, epilogue, y, threads);
}

inline void add_to(const float* __restrict x, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] += x[i];
}

}  // namespace

// Queries and keys by their positions, and all as bfloat16.
void Encoder::rotate(const EncoderLayer& layer, const Group& group, float* qkv, uint16_t* narrow) const {
  const int64_t hidden = shape_.hidden, head_dim = hidden / shape_.heads, half = head_dim / 2;
  const int64_t table = layer.window > 0 ? shape_.positions * half : 0;
  const auto kernel = row_kernels().rotate;
  int64_t row = 0;
  for (int64_t s = 0; s < group.sequences; ++s)
    for (int64_t i = 0; i < group.lengths[s]; ++i, ++row) {
      float* of_row = qkv + row * 3 * hidden;
      const float *cosine = cosines_.data() + table + i * half, *sine = sines_.data() + table + i * half;
      for (int64_t at = 0; at < 2 * hidden; at += head_dim) kernel(of_row + at, cosine, sine, half);
      for (int64_t c = 0; c < 3 * hidden; ++c) narrow[row * 3 * hidden + c] = to_bf16(of_row[c]);
    }
}

void Encoder::embed(const int32_t* ids, const int32_t* types, const Group& group, float* x, int threads) const {
  const int64_t hidden = shape_.hidden;
  int64_t row = 0;
  for (int64_t s = 0; s < group.sequences; ++s)
    for (int64_t i = 0; i < group.lengths[s]; ++i, ++row) {
      const float* word = embedding_ + ids[group.begin + row] * hidden;
      float* to = x + row * hidden;
      std::copy_n(word, hidden, to);
      if (positions_) add_to(positions_ + (shape_.first_position + i) * hidden, hidden, to);
      if (!types_) continue;
      const float* type = types_ + (types ? types[group.begin + row] : 0) * hidden;
      add_to(type, hidden, to);
    }
  norm_rows(embedding_norm_, x, group.rows, x, threads);
}

void Encoder::attention(const EncoderLayer& layer, const Group& group, const float* x, float* y, int threads) const {
  const int64_t hidden = shape_.hidden, heads = shape_.heads, head_dim = hidden / heads;
  Workspace& w = Workspace::local();
  uint16_t* qkv = Workspace::room(w.qkv, group.rows * 3 * hidden);
  float* context = Workspace::room(w.context, group.rows * hidden);
  float* wide = shape_.rotary ? Workspace::room(w.wide, group.rows * 3 * hidden) : nullptr;
  product(layer.qkv, x, group.rows, shape_.activation_bits, layer.qkv.epilogue(),
          {wide, wide ? nullptr : qkv, 3 * hidden}, threads);
  if (wide) rotate(layer, group, wide, qkv);
  std::vector<BidirectionalCall> calls;
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  for (int64_t s = 0, row = 0; s < group.sequences; row += group.lengths[s++])
    calls.push_back({qkv + row * 3 * hidden, 3 * hidden, group.lengths[s], heads, head_dim, scale,
                     layer.window, bias_, shape_.positions, context + row * hidden});
  const auto attend = bidirectional_kernels().attend;
  parallel(group.sequences * heads, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t first = at % heads, heads_here = std::min(heads - first, end - at);
      attend(calls[at / heads], first, first + heads_here);
      at += heads_here;
    }
  });
  product(layer.out, context, group.rows, kAttendedBits, layer.out.epilogue(FASTFF_IDENTITY, true), {y, nullptr, hidden},
          threads);
}

// Adds to y.
void Encoder::feedforward(const Feedforward& part, const float* x, int64_t rows, float* y, int threads) const {
  Workspace& w = Workspace::local();
  const int64_t hidden = shape_.hidden, width = part.neurons();
  const int bits = shape_.activation_bits;
  float* neurons = Workspace::room(w.neurons, rows * width);
  if (part.up) product(part.up, x, rows, bits, part.up.epilogue(part.activation), {neurons, nullptr, width}, threads);
  if (part.experts) {
    if (!part.up || bits != 8) quantise_rows(x, hidden, rows, hidden, nullptr, 8, threads, w.numbers);
    part.experts->add(x, w.numbers, y, threads);
  } else if (part.conditional()) {  // before y, which may be x, is written
    float* given = Workspace::room(w.conditional, rows * hidden);
    part.run_conditional(x, rows, given, threads);
    for (int64_t i = 0; i < rows * hidden; ++i) y[i] += given[i];
  }
  if (part.bias)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < hidden; ++c) y[r * hidden + c] += part.bias[c];
  if (part.up)
    product(part.down, neurons, rows, bits, part.down.epilogue(FASTFF_IDENTITY, true), {y, nullptr, hidden}, threads);
}

// Attention and what is added to it, of one group.
void Encoder::attend(const EncoderLayer& layer, const Group& group, float* x, int threads) const {
  if (!shape_.pre_norm) {
    attention(layer, group, x, x, threads);
    norm_rows(layer.attention_norm, x, group.rows, x, threads);
    return;
  }
  if (layer.attention_norm.features == 0) return attention(layer, group, x, x, threads);
  float* normed = Workspace::room(Workspace::local().normed, group.rows * shape_.hidden);
  norm_rows(layer.attention_norm, x, group.rows, normed, threads);
  attention(layer, group, normed, x, threads);
}

void Encoder::feed(const EncoderLayer& layer, float* x, int64_t rows, int threads) const {
  if (!shape_.pre_norm) {
    if (layer.feedforward) feedforward(layer.feedforward, x, rows, x, threads);
    norm_rows(layer.feedforward_norm, x, rows, x, threads);
    return;
  }
  if (!layer.feedforward) return;
  float* normed = Workspace::room(Workspace::local().normed, rows * shape_.hidden);
  norm_rows(layer.feedforward_norm, x, rows, normed, threads);
  feedforward(layer.feedforward, normed, rows, x, threads);
}

// Groups [begin, end): each layer for all of them, then the next, so that its weights stay in the cache.
void Encoder::through(const std::vector<Group>& groups, int64_t begin, int64_t end, const int32_t* ids,
                      const int32_t* types, float* hidden, int threads) const {
  const auto of = [&](int64_t g) { return hidden + groups[g].begin * shape_.hidden; };
  for (int64_t g = begin; g < end; ++g) embed(ids, types, groups[g], of(g), threads);
  for (const EncoderLayer& layer : layers_) {
    for (int64_t g = begin; g < end; ++g) attend(layer, groups[g], of(g), threads);
    const int64_t most = layer.feedforward.conditional() ? kConditionalRows : 0;
    for (int64_t g = begin, rows = 0; g < end; ++g) {
      rows += groups[g].rows;
      if (g + 1 < end && rows + groups[g + 1].rows <= most) continue;
      feed(layer, of(g) + (groups[g].rows - rows) * shape_.hidden, rows, threads);
      rows = 0;
    }
  }
  if (!shape_.pre_norm) return;
  for (int64_t g = begin; g < end; ++g) norm_rows(norm_, of(g), groups[g].rows, of(g), threads);
}

void Encoder::run(const int32_t* ids, const int32_t* types, const int64_t* lengths, int64_t sequences, float* hidden,
                  int threads) const {
  int64_t tokens = 0;
  for (int64_t s = 0; s < sequences; ++s) tokens += lengths[s];
  threads = resolved_threads(threads);
  const int64_t rows_each = std::min<int64_t>(kGroupRows, (tokens + threads - 1) / threads);
  std::vector<Group> groups;
  for (int64_t s = 0, row = 0; s < sequences; row += lengths[s++]) {
    if (groups.empty() || groups.back().rows + lengths[s] / 2 >= rows_each) groups.push_back({row, 0, 0, lengths + s});
    groups.back().rows += lengths[s];
    ++groups.back().sequences;
  }
  const OwnPoolScope own_pool;
  const auto count = static_cast<int64_t>(groups.size());
  if (count < threads) return through(groups, 0, count, ids, types, hidden, threads);
  parallel(count, 1, threads,
           [&](int64_t begin, int64_t end) { through(groups, begin, end, ids, types, hidden, 1); });
}

}  // namespace fastff
