// From activations of packed leaves to y.
//
// Narrow leaves: row by row over blocks of columns whose weights of all leaves fit the second-level cache, so that y is
// written once. Wide leaves: leaf by leaf over blocks of columns in which y fits it; in int8 by matrix tiles, if there are any.
#pragma once

#include <algorithm>
#include <cstring>

#include "layer/packed_leaves_numbers.h"
#include "layer/packed_leaves_tiles.h"

namespace fastff {
namespace {

constexpr int64_t kBlockBytes = 640 << 10;  // of the second-level cache for a block of columns of w_out, or of y
constexpr int64_t kNextBytes = 192 << 10;   // of weights on their way to it, leaf by leaf
constexpr int kOutTile = 4;                 // rows of y that share a line of w_out

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
    if (by_tiles() || by_leaf()) leaves(begin, end);
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

  // Leaf by leaf in matrix tiles, where the instruction set has them.
  bool by_tiles() const {
#ifdef __AMX_INT8__
    return sizeof(W) == 1 && !call_.few && l_.neuron_words >= kLeastTiledWords && l_.neuron_words <= kMostTiledWords &&
           call_.visits.items() >= kLeastTiledShare * l_.leaves.leaves;
#else
    return false;
#endif
  }

  // ---- row by row ----

  void rows(int64_t begin, int64_t end) {
    const int64_t fit = kBlockBytes / std::max<int64_t>(1, l_.leaves.leaves * step_bytes_);
    const int64_t most = call_.few ? end - begin : std::max<int64_t>(V::columns, fit / V::columns * V::columns);
    for (int64_t from = begin, to; from < end; from = to) {
      to = block_end(from, most, end);
      begin_fetch(to, to < end ? block_end(to, most, end) : end);
      const int64_t gathers = call_.visits.items() * ((to - from + V::columns - 1) / V::columns);
      fetch_now_ = call_.few ? 0 : fetch_lines_ / std::max<int64_t>(1, gathers) + 1;
      for (int64_t row = 0; row < call_.visits.rows; ++row) row_columns(row, from, to);
    }
  }

  // The end of the columns from `from` on that lie together, and are at most so many.
  int64_t block_end(int64_t from, int64_t most, int64_t end) const {
    return std::min({end, from + most, (from / l_.block + 1) * l_.block});
  }

  void row_columns(int64_t row, int64_t from, int64_t to) {
    constexpr int kMost = V::columns, kMore = V::columns > 8 ? 8 : 1, kSome = V::columns / 3 > 1 ? V::columns / 3 : 1;
    int64_t step = from;
    for (; step + kMost <= to; step += kMost) gather<kMost>(row, step);
    if constexpr (kMore > kSome)
      for (; step + kMore <= to; step += kMore) gather<kMore>(row, step);
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
    const char* out = call_.out + l_.out_at(0, step);
    for (int64_t s = 0; s < k_; ++s, h += word_bytes_) {
      const char* w = out + chosen[s] * l_.out_bytes;
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

  // The lines of columns [from, to), which lie together, of all leaves, in order.
  void begin_fetch(int64_t from, int64_t to) {
    fetch_leaf_ = 0;
    fetch_from_ = call_.out + l_.out_at(0, from);
    fetch_at_ = 0;
    fetch_to_ = (to - from) * step_bytes_;
    fetch_lines_ = (to - from) * l_.neuron_words * l_.leaves.leaves;
  }
  void fetch_some(int64_t lines) {
    for (; lines > 0 && fetch_leaf_ < l_.leaves.leaves && fetch_to_ > 0; --lines) {
      fetch(fetch_from_ + fetch_at_);
      fetch_at_ += kLineBytes;
      if (fetch_at_ < fetch_to_) continue;
      fetch_at_ = 0;
      fetch_from_ += l_.out_bytes;
      ++fetch_leaf_;
    }
  }

  // ---- leaf by leaf ----

  void leaves(int64_t begin, int64_t end) {
    const int64_t fit = kBlockBytes / (16 * static_cast<int64_t>(sizeof(float)) * std::max<int64_t>(1, call_.visits.rows));
    const int64_t most = std::max<int64_t>(2, fit);
    for (int64_t from = begin, to; from < end; from = to) {
      to = block_end(from, most, end);
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
    const bool tiled = by_tiles();
    int64_t next = 0;  // the position whose leaf is fetched
    for (int64_t leaf = 0; leaf < std::max<int64_t>(1, kNextBytes / bytes) && next < visits.items(); ++leaf)
      next = visits.group_end(next, visits.items());
    for (int64_t at = 0; at < visits.items();) {
      const int64_t stop = visits.group_end(at, visits.items());
      leaves_ahead_ = next < visits.items() ? visits.leaf[next] - visits.leaf[at] : 0;
      if (leaves_ahead_) next = visits.group_end(next, visits.items());
      while (at < stop) {
        const int64_t n = tiled ? std::min(stop - at, kTiledItems) : distinct(at, stop);
        if (tiled) add_tiled(at, n, from, to);
        else add_items(at, n, from, to);
        at += n;
        leaves_ahead_ = 0;
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
  // As add_items, of up to kTiledItems items of any rows.
  void add_tiled([[maybe_unused]] int64_t at, [[maybe_unused]] int64_t n, [[maybe_unused]] int64_t from,
                 [[maybe_unused]] int64_t to) {
#ifdef __AMX_INT8__
    const int64_t out = l_.leaves.out_features, whole = std::min(to, out / 16);
    const char* w = call_.out + l_.out_at(call_.visits.leaf[at], from);
    const char* h[kTiledItems];
    float* y[kTiledItems];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t place = call_.place[at + i], row = place / k_;
      h[i] = call_.hs + row * call_.hs_bytes + place % k_ * word_bytes_;
      y[i] = call_.y + row * out;
    }
    tiles_.take(n, l_.neuron_words, k_ * l_.neurons(), [&](int64_t i) { return h[i]; });
    for (int64_t step = from; step < whole; w += 2 * step_bytes_, step += 2) {
      const bool pair = step + 2 <= whole;
      if (leaves_ahead_) fetch_all(w + leaves_ahead_ * l_.out_bytes, (pair ? 2 : 1) * step_bytes_);
      tiles_.add(w, pair ? w + step_bytes_ : nullptr, [&](int64_t i) { return y[i] + 16 * step; });
    }
    if (whole == to) return;
    const int64_t last = out - 16 * whole;
    float room[kTiledItems][16] = {};
    tiles_.add(call_.out + l_.out_at(call_.visits.leaf[at], whole), nullptr, [&](int64_t i) { return room[i]; });
    for (int64_t i = 0; i < n; ++i) add_integers(y[i] + 16 * whole, room[i], last);
#endif
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
    const char* w = call_.out + l_.out_at(call_.visits.leaf[at], step);
    const int64_t out = l_.leaves.out_features, plane = k_ * l_.neurons();
    const char* h[N];
    float* y[N];
    for (int n = 0; n < N; ++n) {
      const int64_t place = call_.place[at + n], row = place / k_;
      h[n] = call_.hs + row * call_.hs_bytes + place % k_ * word_bytes_;
      y[n] = call_.y + row * out + 16 * step;
    }
    const int64_t last = out - 16 * step;  // columns from here on
    if (leaves_ahead_) fetch_all(w + leaves_ahead_ * l_.out_bytes, C * step_bytes_);
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

  static void add_integers(float* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      uint32_t sum, more;
      std::memcpy(&sum, to + i, sizeof sum);
      std::memcpy(&more, from + i, sizeof more);
      sum += more;
      std::memcpy(to + i, &sum, sizeof sum);
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
  int64_t leaves_ahead_ = 0;  // leaf by leaf: from the leaf in work to the one that is fetched
  const char* fetch_from_ = nullptr;  // row by row: the lines that are fetched of the leaf whose turn it is
  int64_t fetch_leaf_ = 0, fetch_at_ = 0, fetch_to_ = 0, fetch_lines_ = 0, fetch_now_ = 0;
#ifdef __AMX_INT8__
  TiledItems tiles_;
#endif
};

template <class W>
void outputs(const LeafCall& call, int64_t begin, int64_t end) {
  Outputs<W>(call).run(begin, end);
}

}  // namespace
}  // namespace fastff
