// The best few of many, and their gates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "layer/activations.h"
#include "layer/scratch.h"

namespace fastff {
namespace {

// The k best of the values seen so far, best first; of equal values the one seen first.
template <class T>
class Best {
 public:
  Best(T* values, int32_t* index, int64_t k) : values_(values), index_(index), k_(k) {}

  // NaN never gets in. Values must come in ascending order of i.
  void offer(T value, int32_t i) {
    if (!(count_ < k_ ? value == value : value > values_[k_ - 1])) return;
    int64_t at = count_ < k_ ? count_++ : k_ - 1;
    for (; at > 0 && value > values_[at - 1]; --at) {
      values_[at] = values_[at - 1];
      index_[at] = index_[at - 1];
    }
    values_[at] = value;
    index_[at] = i;
  }

  void offer_all(const T* values, int64_t n) {
    constexpr int64_t kStep = 32;
    int64_t i = 0;
    for (; i < n && count_ < k_; ++i) offer(values[i], static_cast<int32_t>(i));
    for (; i + kStep <= n; i += kStep) {
      const T worst = values_[k_ - 1];
      int better = 0;
      for (int64_t j = 0; j < kStep; ++j) better |= values[i + j] > worst;
      if (better)
        for (int64_t j = 0; j < kStep; ++j) offer(values[i + j], static_cast<int32_t>(i + j));
    }
    for (; i < n; ++i) offer(values[i], static_cast<int32_t>(i));
  }

  int64_t count() const { return count_; }
  bool full() const { return count_ == k_; }
  T worst() const { return values_[count_ - 1]; }

 private:
  T* values_;
  int32_t* index_;
  int64_t k_, count_ = 0;
};

inline void sort_ascending(int32_t* index, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const int32_t own = index[i];
    int64_t at = i;
    for (; at > 0 && index[at - 1] > own; --at) index[at] = index[at - 1];
    index[at] = own;
  }
}

// Which of n values are the k best (k <= n), ascending: NaN loses, a tie chooses the lower index.
template <class T>
void choose(const T* values, int64_t n, int64_t k, T* scratch, int32_t* index) {
  Best<T> best(scratch, index, k);
  best.offer_all(values, n);
  int64_t count = best.count();
  for (int64_t i = 0; i < n && count < k; ++i)
    if (values[i] != values[i]) index[count++] = static_cast<int32_t>(i);
  sort_ascending(index, k);
}

// Gates of one row's k chosen leaves. Relative to the best one, so that a sum of vanishing sigmoids is no 0 / 0.
template <class T>
void normalise(const T* score, int64_t k, T* gate) {
  T best = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < k; ++i) {
    // log sigmoid(s) = min(s, 0) - log(1 + exp(-|s|)); the second term is a factor below
    const T low = score[i] < T(0) ? score[i] : score[i] >= T(0) ? T(0) : score[i];
    gate[i] = low;
    best = low > best ? low : best;
  }
  T sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    gate[i] = exp_(gate[i] - best) / (T(1) + exp_(-std::fabs(score[i])));
    sum += gate[i];
  }
  const T factor = static_cast<T>(k) / sum;
  for (int64_t i = 0; i < k; ++i) gate[i] *= factor;
}

}  // namespace
}  // namespace fastff
