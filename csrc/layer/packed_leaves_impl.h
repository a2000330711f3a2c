// The kernels of packed leaves, the same source for every instruction set: Words<W> (isa/words_*.h) multiplies lines.
//
// Scores. Items that chose one leaf lie side by side and share its lines; up to `tile` rows broadcast their words of x
// against each line. With few rows hardly any leaf is shared: then four leaves are read side by side, because one stream
// alone does not keep the memory busy, while what comes next of each is on its way to the second-level cache: their next
// group, or of leaves of one group the four after the next. More than that, or w_out too, only gets in the way.
// Outputs. Narrow leaves: row by row over blocks of columns whose weights of all leaves fit the second-level cache, so that
// y is written once. Wide leaves: leaf by leaf over blocks of columns in which y fits it.
// int8 sums are exact. The others run in one order for any number of rows, and so a row's bits never depend on it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa/table.h"
#include "layer/activations.h"
#include "layer/packed_leaves.h"
#include "layer/scratch.h"

namespace fastff {
namespace {

constexpr int kItems = 8;                         // of one leaf scored before their activations
constexpr int kStreams = 4;                       // leaves read side by side
constexpr int64_t kAheadBytes = 96 << 10;         // of weights on their way to the second-level cache
constexpr int64_t kFirstBytes = 16 << 10;         // likewise when a range begins
constexpr int64_t kBlockBytes = 640 << 10;        // of the second-level cache for a block of columns
constexpr int64_t kNearBytes = 8 << 10;          // of a large leaf, before it is computed
constexpr int kOutTile = 4;                       // rows of y that share a line of w_out

inline void fetch(const char* p) { __builtin_prefetch(p, 0, 2); }
inline void fetch_all(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) fetch(p + i);
}

template <class E>
struct PackedScratch {
  Buffer<E> raw;
  Buffer<float> score, gate, value, act;

  static PackedScratch& local() {
    static thread_local PackedScratch scratch;
    return scratch;
  }
};

// ---- x and h as the products take them ----

// The nearest integer, ties to even, of a number of at most 2^22.
inline int32_t nearest(float v) {
  const float shifted = v + 12582912.0f;  // 1.5 * 2^23
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4b400000;
}

inline uint16_t to_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return static_cast<uint16_t>(v != v ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// What a row is divided by to become integers of at most `top`; NaN for a row that is not finite, 0 for one of zeros. The
// bits of magnitudes are ordered as the magnitudes are, NaN above infinity.
inline float row_scale(const float* v, int64_t n, float top) {
  int32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, v + i, sizeof bits);
    most = std::max(most, bits & 0x7fffffff);
  }
  float size;
  std::memcpy(&size, &most, sizeof size);
  return most >= 0x7f800000 ? NAN : size < 1e-30f ? 0.0f : size / top;
}

// Rounded to integers; returns their sum.
inline int32_t to_int8(const float* v, int64_t n, float scale, int8_t* to) {
  if (!(scale > 0)) {
    std::fill(to, to + n, int8_t{0});
    return 0;
  }
  const float inverse = 1 / scale;
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t q = nearest(v[i] * inverse);
    to[i] = static_cast<int8_t>(q);
    sum += q;
  }
  return sum;
}

// Rounded to 16 bits in two signed bytes, the upper ones first; returns the sum.
inline int32_t to_planes(const float* v, int64_t n, float scale, int8_t* to) {
  if (!(scale > 0)) {
    std::fill(to, to + 2 * n, int8_t{0});
    return 0;
  }
  const float inverse = 1 / scale;
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t q = nearest(v[i] * inverse), upper = (q + 128) >> 8;
    to[i] = static_cast<int8_t>(upper);
    to[n + i] = static_cast<int8_t>(q - upper * 256);
    sum += q;
  }
  return sum;
}

// An int8 sum without what unsigned weights added; both wrap around, their difference does not.
inline float corrected(int32_t total, int32_t correction, float scale) {
  return static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(total) - static_cast<uint32_t>(correction))) * scale;
}

template <class W>
void prepare(const LeafCall& call, int64_t begin, int64_t end) {
  const int64_t n = call.layout.leaves.in_features, padded_n = call.layout.x_words * 4 / static_cast<int64_t>(sizeof(W));
  for (int64_t row = begin; row < end; ++row) {
    const float* x = call.x + row * n;
    W* to = reinterpret_cast<W*>(call.xs) + row * padded_n;
    if constexpr (sizeof(W) == 4) {
      if (reinterpret_cast<const char*>(call.x) == call.xs) return;
      std::copy_n(x, n, to);
    } else if constexpr (sizeof(W) == 2) {
      for (int64_t i = 0; i < n; ++i) to[i].bits = to_bf16(x[i]);
    } else {
      call.x_scale[row] = row_scale(x, n, 127);
      call.x_correction[row] = 128 * to_int8(x, n, call.x_scale[row], to);
    }
    std::fill(to + n, to + padded_n, W());
  }
}

// int8: 16 bits in two signed bytes, and fewer where the sum of that many products could overflow.
template <class W>
void factors(const LeafCall& call, int64_t begin, int64_t end) {
  const int64_t n = call.visits.k * call.layout.neurons();
  for (int64_t row = begin; row < end; ++row) {
    const float* h = call.h + row * n;
    char* to = call.hs + row * call.hs_bytes;
    if constexpr (sizeof(W) == 2) {
      for (int64_t i = 0; i < n; ++i) reinterpret_cast<Bf16*>(to)[i].bits = to_bf16(h[i]);
    } else if constexpr (sizeof(W) == 1) {
      const float top = std::min(32512.0f, std::floor(2147483647.0f / 128 / static_cast<float>(std::max<int64_t>(n, 1))));
      call.h_scale[row] = row_scale(h, n, top);
      const uint32_t sum = static_cast<uint32_t>(to_planes(h, n, call.h_scale[row], reinterpret_cast<int8_t*>(to)));
      call.h_correction[row] = static_cast<int32_t>(128 * sum);
    }
  }
}

// ---- scores ----

// out[n] = 16 (pairs: 8) sums a group of N rows with `groups` groups of a leaf; fetches as many bytes from `ahead`.
template <class W, int N, int G, bool kPairs, bool kFetch>
void score_tile(const char* w, int64_t lines, const char* const* x, Sum<W>* const* out, const char* ahead) {
  using V = Words<W>;
  constexpr int kXBytes = kPairs ? 8 : 4;
  typename V::Acc acc[N][G][V::parts][V::chains];
  for (auto& row : acc)
    for (auto& group : row)
      for (auto& part : group)
        for (auto& chain : part) chain = V::zero();
  const char* xs[N];
  for (int n = 0; n < N; ++n) xs[n] = x[n];
  for (int64_t i = 0; i < lines; i += 4) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      typename V::Line line[G][V::parts];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const int64_t at = (g * lines + i + u) * kLineBytes;
        if (kFetch) fetch(ahead + at);
#pragma GCC unroll 4
        for (int p = 0; p < V::parts; ++p) line[g][p] = V::load(w + at, p);
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const auto word = kPairs ? V::pair(xs[n] + (i + u) * kXBytes) : V::word(xs[n] + (i + u) * kXBytes);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
          for (int p = 0; p < V::parts; ++p) {
            auto& sum = acc[n][g][p][u % V::chains];
            sum = V::dot(sum, line[g][p], word);
          }
      }
    }
  }
  for (int n = 0; n < N; ++n)
    for (int g = 0; g < G; ++g)
      for (int p = 0; p < V::parts; ++p) {
        auto total = acc[n][g][p][0];
        for (int u = 1; u < V::chains; ++u) total = V::add(total, acc[n][g][p][u]);
        if (kPairs) V::store_pairs(out[n], total, p);
        else V::store(out[n] + 16 * g, total, p);
      }
}

template <class W, int G, bool kPairs, int N = Words<W>::tile>
void score_rows(int64_t n, const char* w, int64_t lines, const char* const* x, Sum<W>* const* out, const char* ahead) {
  if constexpr (N > 1)
    if (n < N) return score_rows<W, G, kPairs, N - 1>(n, w, lines, x, out, ahead);
  if (ahead) score_tile<W, N, G, kPairs, true>(w, lines, x, out, ahead);
  else score_tile<W, N, G, kPairs, false>(w, lines, x, out, ahead);
}

// One group of each of four leaves, each with a row of its own. Fetches the same lines of four other leaves.
template <class W, bool kPairs>
void score_streams(const char* const* w, int64_t lines, const char* const* x, Sum<W>* const* out, const char* const* ahead) {
  using V = Words<W>;
  constexpr int kXBytes = kPairs ? 8 : 4;
  typename V::Acc acc[kStreams][V::parts][V::chains];
  for (auto& stream : acc)
    for (auto& part : stream)
      for (auto& chain : part) chain = V::zero();
  for (int64_t i = 0; i < lines; i += V::chains)
    for (int u = 0; u < V::chains; ++u)
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s) {
        if (ahead) fetch(ahead[s] + (i + u) * kLineBytes);
        const auto word = kPairs ? V::pair(x[s] + (i + u) * kXBytes) : V::word(x[s] + (i + u) * kXBytes);
        for (int p = 0; p < V::parts; ++p)
          acc[s][p][u] = V::dot(acc[s][p][u], V::load(w[s] + (i + u) * kLineBytes, p), word);
      }
  for (int s = 0; s < kStreams; ++s)
    for (int p = 0; p < V::parts; ++p) {
      auto total = acc[s][p][0];
      for (int u = 1; u < V::chains; ++u) total = V::add(total, acc[s][p][u]);
      if (kPairs) V::store_pairs(out[s], total, p);
      else V::store(out[s], total, p);
    }
}

template <class W>
class Scores {
 public:
  explicit Scores(const LeafCall& call)
      : call_(call), l_(call.layout), outputs_(l_.outputs()), neurons_(l_.neurons()) {
    auto& scratch = PackedScratch<Sum<W>>::local();
    raw_ = scratch.raw.at_least(kItems * outputs_);
    score_ = scratch.score.at_least(outputs_);
    gate_ = scratch.gate.at_least(padded(kItems * neurons_));
    value_ = scratch.value.at_least(padded(kItems * neurons_));
    act_ = scratch.act.at_least(padded(kItems * neurons_));
    for (int i = 0; i < kItems; ++i) out_[i] = raw_ + i * outputs_;
  }

  void run(int64_t begin, int64_t end) {
    if (call_.few) few(begin, end);
    else many(begin, end);
  }

 private:
  const char* leaf_in(int64_t position) const { return call_.in + call_.visits.leaf[position] * l_.in_bytes; }
  const char* x_row(int64_t position) const { return call_.xs + call_.visits.row(position) * l_.x_words * 4; }

  // ---- many rows: the items of one leaf together ----

  void many(int64_t begin, int64_t end) {
    ahead_ = begin;
    ahead_at_ = 0;
    ahead_bytes_ = 0;
    end_ = end;
    while (ahead_bytes_ < kFirstBytes) {
      const char* unit = next_ahead(l_.in_bytes);
      if (!unit) break;
      fetch_all(unit, l_.in_bytes);
    }
    for (int64_t at = begin; at < end;) {
      const int64_t stop = call_.visits.group_end(at, end);
      while (at < stop) {
        const int64_t left = stop - at, tile = Words<W>::tile;
        const int64_t n = left <= tile ? left : left < 2 * tile ? (left + 1) / 2 : tile;
        tile_of(at, n);
        finish(at, n);
        at += n;
      }
      ahead_bytes_ -= l_.in_bytes;
    }
  }

  void tile_of(int64_t at, int64_t n) {
    constexpr int kPair = Words<W>::parts == 1 && Words<W>::chains == 1 ? 2 : 1;
    const char* w = leaf_in(at) + l_.head;
    const char* x[kItems];
    for (int64_t i = 0; i < n; ++i) x[i] = x_row(at + i);
    Sum<W>* out[kItems];
    std::copy(out_, out_ + kItems, out);
    const int64_t bytes = l_.x_words * kLineBytes;
    int64_t group = 0;
    if constexpr (kPair == 2)
      for (; group + 2 <= l_.wide; group += 2, w += 2 * bytes) {
        score_rows<W, 2, false>(n, w, l_.x_words, x, out, next_ahead(2 * bytes));
        for (int64_t i = 0; i < n; ++i) out[i] += 32;
      }
    for (; group < l_.wide; ++group, w += bytes) {
      score_rows<W, 1, false>(n, w, l_.x_words, x, out, next_ahead(bytes));
      for (int64_t i = 0; i < n; ++i) out[i] += 16;
    }
    if (l_.narrow) score_rows<W, 1, true>(n, w, l_.x_words / 2, x, out, next_ahead(bytes / 2));
  }

  // The next so many bytes to fetch, of the visited leaves in order; null when enough are on their way.
  const char* next_ahead(int64_t bytes) {
    if (ahead_ >= end_ || ahead_bytes_ >= kAheadBytes) return nullptr;
    const char* leaf = leaf_in(ahead_);
    const int64_t from = std::min(ahead_at_, l_.in_bytes - bytes);
    ahead_bytes_ += bytes;
    ahead_at_ += bytes;
    if (ahead_at_ + l_.head >= l_.in_bytes) {
      ahead_ = call_.visits.group_end(ahead_, end_);
      ahead_at_ = 0;
      if (ahead_ < end_) fetch_all(leaf_in(ahead_) + l_.in_bytes - l_.head, l_.head);
    }
    return leaf + from;
  }

  // ---- few rows: four items side by side ----

  void few(int64_t begin, int64_t end) {
    // Leaves of several groups: a group is fetched while the one before it is computed. Others: four leaves after the next.
    const bool large = l_.wide + l_.narrow > 1;
    const int64_t first = large ? std::min(l_.in_bytes, kNearBytes) : l_.in_bytes;
    for (int64_t at = begin; at < std::min(begin + (large ? 1 : 2) * kStreams, end); ++at) fetch_all(leaf_in(at), first);
    for (int64_t at = begin; at < end; at += kStreams) {
      const int64_t n = std::min<int64_t>(kStreams, end - at);
      streams(at, n, end);
      finish(at, n);
    }
  }

  void streams(int64_t at, int64_t n, int64_t end) {
    const char *w[kStreams], *x[kStreams], *ahead[kStreams];
    Sum<W>* out[kStreams];
    const int64_t groups = l_.wide + l_.narrow, next = (groups > 1 ? 1 : 2) * kStreams;
    const bool more = at + next < end;
    for (int64_t s = 0; s < kStreams; ++s) {
      const int64_t item = std::min(at + s, at + n - 1);
      w[s] = leaf_in(item);
      x[s] = x_row(item);
      out[s] = out_[s];
      ahead[s] = leaf_in(more ? std::min(at + next + s, end - 1) : item);
      if (more) fetch_all(ahead[s], l_.head);
      w[s] += l_.head;
      ahead[s] += l_.head;
    }
    const int64_t bytes = l_.x_words * kLineBytes;
    const auto step = [&](int64_t by, int64_t outputs) {
      for (int64_t s = 0; s < kStreams; ++s) {
        w[s] += by;
        out[s] += outputs;
      }
    };
    const char* following[kStreams];
    for (int64_t group = 0; group < groups; ++group) {
      const bool last = group + 1 == groups, narrow = group == l_.wide;
      for (int64_t s = 0; s < kStreams; ++s) following[s] = last ? ahead[s] : w[s] + bytes;
      const char* const* fetched = !last || more ? following : nullptr;
      if (narrow) score_streams<W, true>(w, l_.x_words / 2, x, out, fetched);
      else score_streams<W, false>(w, l_.x_words, x, out, fetched);
      step(bytes, 16);
    }
  }

  // ---- activations ----

  // gates and h of n items whose sums are in raw_.
  void finish(int64_t at, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      scale(at + i, raw_ + i * outputs_);
      spread(score_, gate_ + i * neurons_, value_ + i * neurons_);
    }
    std::fill(gate_ + n * neurons_, gate_ + padded(n * neurons_), 0.0f);
    activate(l_.leaves.activation, gate_, act_, n * neurons_);
    if (l_.leaves.swiglu())
      for (int64_t i = 0; i < n * neurons_; ++i) act_[i] *= value_[i];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t place = call_.place[at + i];
      const float gate = call_.gate[call_.visits.item[at + i]];
      const LeafHead head(l_, leaf_in(at + i));
      float* h = call_.h + place * neurons_;
      call_.gates[place] = gate;
      if constexpr (sizeof(W) == 1)
        for (int64_t j = 0; j < neurons_; ++j) h[j] = gate * act_[i * neurons_ + j] * head.scale_out[j];
      else
        for (int64_t j = 0; j < neurons_; ++j) h[j] = gate * act_[i * neurons_ + j];
    }
  }

  void scale(int64_t position, const Sum<W>* raw) {
    const LeafHead head(l_, leaf_in(position));
    if constexpr (sizeof(W) == 1) {
      const int64_t row = call_.visits.row(position);
      const int32_t correction = call_.x_correction[row];
      const float of_x = call_.x_scale[row];
      for (int64_t o = 0; o < outputs_; ++o)
        score_[o] = corrected(raw[o], correction, of_x * head.scale_in[o]);
    } else {
      for (int64_t o = 0; o < outputs_; ++o) score_[o] = raw[o];
    }
    if (head.b_in)
      for (int64_t o = 0; o < outputs_; ++o) score_[o] += head.b_in[o];
  }

  // The outputs of an item as gates and, with swiglu, values in the order of neurons.
  void spread(const float* score, float* gate, float* value) {
    if (!l_.leaves.swiglu()) {
      std::copy_n(score, outputs_, gate);
      return;
    }
    for (int64_t group = 0; group < l_.wide; ++group)
      for (int64_t j = 0; j < 8; ++j) {
        gate[8 * group + j] = score[16 * group + j];
        value[8 * group + j] = score[16 * group + 8 + j];
      }
    if (l_.narrow)
      for (int64_t j = 0; j < 4; ++j) {
        gate[8 * l_.wide + j] = score[16 * l_.wide + j];
        value[8 * l_.wide + j] = score[16 * l_.wide + 4 + j];
      }
  }

  const LeafCall& call_;
  const LeafLayout& l_;
  const int64_t outputs_, neurons_;
  Sum<W>* raw_;
  Sum<W>* out_[kItems];
  float *score_, *gate_, *value_, *act_;
  int64_t ahead_ = 0, ahead_at_ = 0, ahead_bytes_ = 0, end_ = 0;  // of the fetched leaves
};

template <class W>
void scores(const LeafCall& call, int64_t begin, int64_t end) {
  Scores<W>(call).run(begin, end);
}

// ---- outputs ----

template <class W>
constexpr int kPlanes = sizeof(W) == 1 ? 2 : 1;  // of h

// 16 columns of y of one row, at most to the end of the row.
inline void store_columns(const LeafCall& call, int64_t row, int64_t step, const float* columns) {
  const int64_t out = call.layout.leaves.out_features, n = std::min<int64_t>(16, out - 16 * step);
  float* y = call.y + row * out + 16 * step;
  if (n == 16) std::copy_n(columns, 16, y);
  else std::copy_n(columns, n, y);
}

template <class W>
class Outputs {
  using V = Words<W>;

 public:
  explicit Outputs(const LeafCall& call)
      : call_(call), l_(call.layout), k_(call.visits.k), step_bytes_(l_.neuron_words * kLineBytes),
        word_bytes_(l_.neurons() * static_cast<int64_t>(sizeof(W))) {}

  void run(int64_t begin, int64_t end) {
    if (by_leaf()) leaves(begin, end);
    else rows(begin, end);
    if (call_.b_out) biases(begin, end);
  }

 private:
  // Leaf by leaf a line of w_out serves several rows, but y is read and written for each item.
  bool by_leaf() const {
    const int64_t shared = call_.visits.items() / l_.leaves.leaves;  // by so many items
    constexpr int64_t kWide = sizeof(W) == 1 ? 4 : 2;  // more words of neurons than that pay for y, however many rows share
    return !call_.few && shared >= 2 && (l_.neuron_words > kWide || (l_.neuron_words >= 2 && shared < 8));
  }

  // ---- row by row ----

  void rows(int64_t begin, int64_t end) {
    const int64_t fit = kBlockBytes / std::max<int64_t>(1, l_.leaves.leaves * step_bytes_);
    const int64_t block = call_.few ? end - begin : std::max<int64_t>(V::columns, fit / V::columns * V::columns);
    for (int64_t from = begin; from < end; from += block) {
      const int64_t to = std::min(end, from + block), next = std::min(end, to + block);
      begin_fetch(to, next);
      const int64_t gathers = call_.visits.items() * ((to - from + V::columns - 1) / V::columns);
      fetch_now_ = call_.few ? 0 : fetch_lines_ / std::max<int64_t>(1, gathers) + 1;
      for (int64_t row = 0; row < call_.visits.rows; ++row) row_columns(row, from, to);
    }
  }

  void row_columns(int64_t row, int64_t from, int64_t to) {
    constexpr int kMost = V::columns, kSome = V::columns / 3 > 1 ? V::columns / 3 : 1;
    int64_t step = from;
    for (; step + kMost <= to; step += kMost) gather<kMost>(row, step);
    for (; step + kSome <= to; step += kSome) gather<kSome>(row, step);
    for (; step < to; ++step) gather<1>(row, step);
  }

  // C times 16 columns of y of one row: its leaves' lines times their words of h.
  template <int C>
  void gather(int64_t row, int64_t step) {
    typename V::Acc acc[C][kPlanes<W>][V::parts];
    for (auto& column : acc)
      for (auto& plane : column)
        for (auto& part : plane) part = V::zero();
    const int32_t* chosen = call_.chosen + row * k_;
    const char* h = call_.hs + row * call_.hs_bytes;
    const int64_t plane = k_ * l_.neurons();
    for (int64_t s = 0; s < k_; ++s, h += word_bytes_) {
      const char* w = call_.out + chosen[s] * l_.out_bytes + step * step_bytes_;
      fetch_some(fetch_now_);
      for (int64_t j = 0; j < l_.neuron_words; ++j) {
        const auto high = V::word(h + 4 * j);
#pragma GCC unroll 12
        for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
          for (int p = 0; p < V::parts; ++p) {
            const auto line = V::load(w + c * step_bytes_ + j * kLineBytes, p);
            acc[c][0][p] = V::dot(acc[c][0][p], line, high);
            if constexpr (kPlanes<W> == 2)
              acc[c][1][p] = V::dot(acc[c][1][p], line, V::word(h + plane + 4 * j));
          }
      }
    }
    for (int c = 0; c < C; ++c) {
      Sum<W> sums[16];
      float y[16];
      for (int p = 0; p < V::parts; ++p) {
        if constexpr (kPlanes<W> == 2) V::store(sums, V::join(acc[c][0][p], acc[c][1][p]), p);
        else V::store(sums, acc[c][0][p], p);
      }
      for (int i = 0; i < 16; ++i)
        y[i] = kPlanes<W> == 2 ? corrected(static_cast<int32_t>(sums[i]), call_.h_correction[row], call_.h_scale[row]) : sums[i];
      store_columns(call_, row, step + c, y);
    }
  }

  // The lines of columns [from, to) of all leaves, in order.
  void begin_fetch(int64_t from, int64_t to) {
    fetch_leaf_ = 0;
    fetch_at_ = fetch_from_ = from * step_bytes_;
    fetch_to_ = to * step_bytes_;
    fetch_lines_ = (to - from) * l_.neuron_words * l_.leaves.leaves;
  }
  void fetch_some(int64_t lines) {
    for (; lines > 0 && fetch_leaf_ < l_.leaves.leaves && fetch_from_ < fetch_to_; --lines) {
      fetch(call_.out + fetch_leaf_ * l_.out_bytes + fetch_at_);
      fetch_at_ += kLineBytes;
      if (fetch_at_ < fetch_to_) continue;
      fetch_at_ = fetch_from_;
      ++fetch_leaf_;
    }
  }

  // ---- leaf by leaf ----

  void leaves(int64_t begin, int64_t end) {
    const int64_t fit = kBlockBytes / (16 * static_cast<int64_t>(sizeof(float)) * std::max<int64_t>(1, call_.visits.rows));
    const int64_t block = std::max<int64_t>(2, fit);
    for (int64_t from = begin; from < end; from += block) {
      const int64_t to = std::min(end, from + block);
      for (int64_t row = 0; row < call_.visits.rows; ++row) zero_columns(row, from, to);
      leaf_columns(from, to);
      if constexpr (kPlanes<W> == 2)
        for (int64_t row = 0; row < call_.visits.rows; ++row) correct_columns(row, from, to);
    }
  }

  int64_t last_column(int64_t step) const { return std::min(16 * step, l_.leaves.out_features); }

  void zero_columns(int64_t row, int64_t from, int64_t to) {
    float* y = call_.y + row * l_.leaves.out_features;
    std::fill(y + 16 * from, y + last_column(to), 0.0f);
  }

  void correct_columns(int64_t row, int64_t from, int64_t to) {
    float* y = call_.y + row * l_.leaves.out_features;
    for (int64_t i = 16 * from; i < last_column(to); ++i) {
      int32_t total;
      std::memcpy(&total, y + i, sizeof total);
      y[i] = corrected(total, call_.h_correction[row], call_.h_scale[row]);
    }
  }

  void leaf_columns(int64_t from, int64_t to) {
    const Visits& visits = call_.visits;
    const int64_t bytes = (to - from) * step_bytes_;
    int64_t next = 0;  // the position whose leaf is fetched
    for (int64_t leaf = 0; leaf < std::max<int64_t>(1, kAheadBytes / bytes) && next < visits.items(); ++leaf)
      next = visits.group_end(next, visits.items());
    for (int64_t at = 0; at < visits.items();) {
      const int64_t stop = visits.group_end(at, visits.items());
      ahead_ = next < visits.items() ? visits.leaf[next] - visits.leaf[at] : 0;
      if (ahead_) next = visits.group_end(next, visits.items());
      while (at < stop) {
        const int64_t n = distinct(at, stop);
        add_items(at, n, from, to);
        at += n;
        ahead_ = 0;
      }
    }
  }

  // Adds items of one leaf and of different rows to their columns.
  template <int N = kOutTile>
  void add_items(int64_t at, int64_t n, int64_t from, int64_t to) {
    if constexpr (N > 1)
      if (n < N) return add_items<N - 1>(at, n, from, to);
    constexpr int C = N > 2 ? 2 : 4;
    const int64_t whole = std::min(to, l_.leaves.out_features / 16);
    int64_t step = from;
    for (; step + C <= whole; step += C) add<N, C>(at, step);
    for (; step < to; ++step) add<N, 1>(at, step);
  }
  // How many items from here on are of different rows; a leaf may stand twice in a row, side by side.
  int64_t distinct(int64_t at, int64_t stop) const {
    int64_t n = 1;
    while (n < kOutTile && at + n < stop && call_.visits.row(at + n) != call_.visits.row(at + n - 1)) ++n;
    return n;
  }

  // Adds N items of one leaf to C times 16 columns of their rows of y; int8 sums stand there as integers.
  template <int N, int C>
  void add(int64_t at, int64_t step) {
    const char* w = call_.out + call_.visits.leaf[at] * l_.out_bytes + step * step_bytes_;
    const int64_t out = l_.leaves.out_features, plane = k_ * l_.neurons();
    const char* h[N];
    float* y[N];
    for (int n = 0; n < N; ++n) {
      const int64_t place = call_.place[at + n], row = place / k_;
      h[n] = call_.hs + row * call_.hs_bytes + place % k_ * word_bytes_;
      y[n] = call_.y + row * out + 16 * step;
    }
    const int64_t last = out - 16 * step;  // columns from here on
    if (ahead_) fetch_all(w + ahead_ * l_.out_bytes, C * step_bytes_);
    typename V::Acc acc[N][C][kPlanes<W>][V::parts];
    Sum<W> room[16] = {};
    for (int n = 0; n < N; ++n)
      for (int c = 0; c < C; ++c) {
        const Sum<W>* from = reinterpret_cast<const Sum<W>*>(y[n] + 16 * c);
        if (last < 16) std::memcpy(room, from, last * sizeof(float)), from = room;
        for (int p = 0; p < V::parts; ++p) {
          acc[n][c][0][p] = kPlanes<W> == 2 ? V::zero() : V::load_sums(from, p);
          if constexpr (kPlanes<W> == 2) acc[n][c][1][p] = V::load_sums(from, p);
        }
      }
    for (int64_t j = 0; j < l_.neuron_words; ++j)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
        for (int p = 0; p < V::parts; ++p) {
          const auto line = V::load(w + c * step_bytes_ + j * kLineBytes, p);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) {
            acc[n][c][0][p] = V::dot(acc[n][c][0][p], line, V::word(h[n] + 4 * j));
            if constexpr (kPlanes<W> == 2) acc[n][c][1][p] = V::dot(acc[n][c][1][p], line, V::word(h[n] + plane + 4 * j));
          }
        }
    for (int n = 0; n < N; ++n)
      for (int c = 0; c < C; ++c) {
        Sum<W>* to = last >= 16 ? reinterpret_cast<Sum<W>*>(y[n] + 16 * c) : room;
        for (int p = 0; p < V::parts; ++p) {
          if constexpr (kPlanes<W> == 2) V::store(to, V::join(acc[n][c][0][p], acc[n][c][1][p]), p);
          else V::store(to, acc[n][c][0][p], p);
        }
        if (last < 16) std::memcpy(y[n] + 16 * c, room, last * sizeof(float));
      }
  }

  // ---- biases ----

  void biases(int64_t begin, int64_t end) {
    const int64_t out = l_.leaves.out_features;
    for (int64_t row = 0; row < call_.visits.rows; ++row)
      for (int64_t s = 0; s < k_; ++s) {
        const int64_t place = row * k_ + s;
        const float* bias = call_.b_out + call_.chosen[place] * out;
        const float gate = call_.gates[place];
        float* y = call_.y + row * out;
        for (int64_t i = 16 * begin; i < last_column(end); ++i) y[i] += gate * bias[i];
      }
  }

  const LeafCall& call_;
  const LeafLayout& l_;
  const int64_t k_, step_bytes_, word_bytes_;
  int64_t ahead_ = 0;  // leaf by leaf: from the leaf in work to the one that is fetched
  int64_t fetch_leaf_ = 0, fetch_at_ = 0, fetch_from_ = 0, fetch_to_ = 0, fetch_lines_ = 0, fetch_now_ = 0;
};

template <class W>
void outputs(const LeafCall& call, int64_t begin, int64_t end) {
  Outputs<W>(call).run(begin, end);
}

template <class W>
constexpr LeafKernels kLeafKernels = {prepare<W>, scores<W>, factors<W>, outputs<W>};

}  // namespace

const LeafTable FASTFF_TABLE(packed_leaves) = {kLeafKernels<float>, kLeafKernels<Bf16>, kLeafKernels<int8_t>};

}  // namespace fastff
