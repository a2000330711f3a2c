// Scores and activations of packed leaves.
//
// Many rows: items that chose one leaf lie side by side and share its lines; up to `tile` rows broadcast their words of x
// against each line. Few rows: hardly any leaf is shared, and four leaves are read side by side, because one stream alone
// does not keep the memory busy, while what comes next of each is on its way to the second-level cache: their next group,
// or of leaves of one group the four after the next. More than that, or w_out too, only gets in the way.
#pragma once

#include <algorithm>
#include <cstring>

#include "layer/activations.h"
#include "layer/packed_leaves_numbers.h"

namespace fastff {
namespace {

constexpr int kItems = 8;                         // of one leaf scored before their activations
constexpr int kStreams = 4;                       // leaves read side by side
constexpr int64_t kAheadBytes = 192 << 10;         // of weights on their way to the second-level cache
constexpr int64_t kFirstBytes = 16 << 10;         // likewise when a range begins
constexpr int64_t kNearBytes = 8 << 10;           // of a large leaf, before it is computed

template <class E>
struct PackedScratch {
  Buffer<E> raw;
  Buffer<float> score, gate, value, act;

  static PackedScratch& local() {
    static thread_local PackedScratch scratch;
    return scratch;
  }
};

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
      : call_(call),
        l_(call.layout),
        outputs_(l_.outputs()),
        neurons_(l_.neurons()),
        scratch_(PackedScratch<Sum<W>>::local()) {
    raw_ = scratch_.raw.at_least(kItems * outputs_);
    score_ = scratch_.score.at_least(outputs_);
    gate_ = scratch_.gate.at_least(padded(kItems * neurons_));
    value_ = scratch_.value.at_least(padded(kItems * neurons_));
    act_ = scratch_.act.at_least(padded(kItems * neurons_));
    for (int i = 0; i < kItems; ++i) out_[i] = raw_ + i * outputs_;
  }

  void run(int64_t begin, int64_t end) {
    if (call_.few) return few(begin, end);
    many(begin, end);
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
        lines_of(at, n);
        finish(at, n);
        at += n;
      }
      ahead_bytes_ -= l_.in_bytes;
    }
  }

  void lines_of(int64_t at, int64_t n) {
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
      split(score_, gate_ + i * neurons_, value_ + i * neurons_);
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
  void split(const float* score, float* gate, float* value) {
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
  PackedScratch<Sum<W>>& scratch_;
  Sum<W>* raw_;
  Sum<W>* out_[kItems];
  float *score_, *gate_, *value_, *act_;
  int64_t ahead_ = 0, ahead_at_ = 0, ahead_bytes_ = 0, end_ = 0;  // of the fetched leaves
};

template <class W>
void scores(const LeafCall& call, int64_t begin, int64_t end) {
  Scores<W>(call).run(begin, end);
}

}  // namespace
}  // namespace fastff
