// A block of rows of x in the form that routing wants, and scores with their doubt.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "layer/linear.h"
#include "layer/router.h"
#include "layer/router_quantise.h"
#include "layer/scratch.h"

namespace fastff {
namespace {

constexpr float kSmallestDoubt = 1e-30f;  // far above what flushed subnormal products can add up to

// Room for rows in 16 bits, kept by a thread between calls.
struct Rows16 {
  Buffer<int16_t> stored;
  Buffer<Row16> row;

  static Rows16& local() {
    static thread_local Rows16 rows;
    return rows;
  }
};

// Rows of x (contiguous, n features each) as W. In fp32 and fp64 they are x itself.
template <class T, class W>
class RoutedRows {
  static constexpr bool kQuantised = !std::is_same_v<T, W>;

 public:
  RoutedRows(const Router& router, const RouterView<T, W>& view)
      : view_(view), n_(router.weight_features()), padded_(kQuantised ? view.stride : n_) {}

  void take(const T* x, int64_t rows) {
    x_ = x;
    if constexpr (kQuantised) {
      int16_t* to = stored_ = Rows16::local().stored.at_least(rows * padded_);
      Row16* row = row_ = Rows16::local().row.at_least(rows);
      for (int64_t r = 0; r < rows; ++r) row[r] = store_row16(x + r * n_, n_, padded_, to + r * padded_);
    }
  }

  const W* row(int64_t r) const {
    if constexpr (kQuantised) return stored_ + r * padded_;
    else return x_ + r * n_;
  }
  int64_t n() const { return padded_; }  // elements of row(r)

  // The score of row r at weight row i, from its product.
  T score(int64_t r, int64_t i, T product) const {
    if constexpr (kQuantised) return scaled(row_[r].scale, i, product);
    else return view_.b ? product + view_.b[i] : product;
  }

  // What that score may differ from the fp32 one by; zero where nothing is quantised.
  T doubt(int64_t r, int64_t i) const {
    if constexpr (kQuantised) {
      const Row16& x = row_[r];
      T distance = x.norm * view_.error[i] + x.error * view_.reach[i] + kSmallestDoubt;
      if (view_.b) distance += std::fabs(view_.b[i]) * 2e-7f;
      return distance == distance ? distance : std::numeric_limits<T>::infinity();
    } else {
      return 0;
    }
  }

  // Of sixteen rows from r on (lanes beyond the last repeat it): their scales, and the most that their scores at weight rows
  // [i, i + n) may be in doubt. scaled() is score() of a lane.
  void sixteen(int64_t r, int64_t count, int64_t i, int64_t n, T* scale, T* most_doubt) const {
    T error = 0, reach = 0, b = 0;
    for (int64_t j = i; j < i + n; ++j) {
      error = std::max(error, view_.error[j]);
      reach = std::max(reach, view_.reach[j]);
      if (view_.b) b = std::max(b, std::fabs(view_.b[j]));
    }
    for (int64_t l = 0; l < 16; ++l) {
      const Row16& x = row_[std::min(r + l, count - 1)];
      scale[l] = x.scale;
      most_doubt[l] = (x.norm * error + x.error * reach + b * 2e-7f + kSmallestDoubt) * 1.001f;
    }
  }
  T scaled(T row_scale, int64_t i, T product) const {
    product *= row_scale * view_.scale[i];
    return view_.b ? product + view_.b[i] : product;
  }

  T exact(int64_t r, int64_t i) const {
    const T product = dot(x_ + r * n_, view_.exact + i * n_, n_);
    return view_.b ? product + view_.b[i] : product;
  }

  // A score whose sign is that of the fp32 score.
  T decided(int64_t r, int64_t i, T product) const { return decided_score(r, i, score(r, i, product)); }
  T decided_score(int64_t r, int64_t i, T own) const {
    if constexpr (kQuantised)
      if (!(std::fabs(own) > doubt(r, i))) return exact(r, i);
    return own;
  }

 private:
  const RouterView<T, W>& view_;
  const T* x_ = nullptr;
  int64_t n_, padded_;
  int16_t* stored_ = nullptr;
  Row16* row_ = nullptr;
};

}  // namespace
}  // namespace fastff
