// Products with weights in groups of inputs, for the instruction set whose Words<int8_t> and Groups the including file
// has defined.
//
// A row's result adds its groups in ascending order, so that its bits depend neither on the rows beside it nor on which
// kernel takes it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "model/linear.h"
#include "model/linear_sums_impl.h"

namespace fastff {
namespace {

constexpr int kMostGroupRows = 3;  // whose sums stay in registers

// Where the parts of a group of a panel are: numbers, then scales of all lanes, then, with a minimum, those.
template <MatrixForm form>
struct GroupPlace {
  static constexpr int64_t steps = group_inputs(form) / 4;  // of four inputs
  static constexpr int64_t numbers = steps * kStepBytes / (in_bytes(form) ? 1 : 2);
  static constexpr int64_t halves = kPanel * static_cast<int64_t>(sizeof(Half));
  static constexpr int64_t bytes = numbers + (form == MatrixForm::kGroups4Least ? 2 : 1) * halves;
};

// Rows of x as one kernel reads them.
struct GroupRows {
  const int8_t* bytes;
  int64_t stride;         // from one row of bytes to the next
  const int32_t* sums;    // [rows][sums_stride]: of the numbers of every 32 inputs
  int64_t sums_stride;
};

// Sums of R rows of x with L lines of 16 lanes of a panel.
template <MatrixForm form, int planes, int R, int L>
class GroupSums {
  using B = Words<int8_t>;
  using G = Groups;
  using Place = GroupPlace<form>;
  static constexpr bool kLeast = form == MatrixForm::kGroups4Least, kBytes = in_bytes(form);

 public:
  explicit GroupSums(const GroupRows& x) : x_(x) {
#pragma GCC unroll 24
    for (int i = 0; i < R * L * B::parts; ++i) total_[i / (L * B::parts)][i / B::parts % L][i % B::parts] = G::zero();
  }

  // w: the group's first line of these lanes; scales: of these lanes. fetched: whether as much as a panel's group is
  // fetched from `ahead` bytes further.
  template <bool fetched>
  inline __attribute__((always_inline)) void add(int64_t g, const char* w, const Half* scales, int64_t ahead) {
    typename B::Acc acc[R][planes][L][B::parts];
    begin(g, acc);
#pragma GCC unroll 8
    for (int64_t k = 0; k < Place::steps; k += kBytes ? 1 : 2, w += kStepBytes) {
      if constexpr (fetched) {
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) __builtin_prefetch(w + ahead + l * 64, 0, 2);
      }
      steps(g * Place::steps + k, w, acc);
    }
    if constexpr (fetched)
#pragma GCC unroll 4
      for (int l = 0; l < kScaleLines; ++l) __builtin_prefetch(reinterpret_cast<const char*>(scales) + ahead + l * 64, 0, 2);
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int l = 0; l < L; ++l)
#pragma GCC unroll 2
        for (int p = 0; p < B::parts; ++p) {
          auto sums = acc[r][planes - 1][l][p];
          if constexpr (planes == 2) sums = B::join(acc[r][0][l][p], sums);
          total_[r][l][p] = G::scaled(total_[r][l][p], sums, scales + l * 16, p);
          if constexpr (kLeast)
            total_[r][l][p] = G::added(total_[r][l][p], static_cast<float>(of_x(r, g)), scales + kPanel + l * 16, p);
        }
  }

  void store(float* y) const {
    for (int r = 0; r < R; ++r)
      for (int l = 0; l < L; ++l)
        for (int p = 0; p < B::parts; ++p) G::store(y + r * kPanel + l * 16, total_[r][l][p], p);
  }

 private:
  using Accs = typename B::Acc[R][planes][L][B::parts];
  using Lines = typename B::Line[L][B::parts];

  static constexpr int kScaleLines = (Place::bytes - Place::numbers) / 64;

  int32_t of_x(int r, int64_t g) const {
    const int32_t* sums = x_.sums + r * x_.sums_stride;
    return group_inputs(form) == kGroup ? sums[g] : sums[2 * g] + sums[2 * g + 1];
  }

  // Weights are stored above their value, unless there is a minimum: sums begin at what that adds to them.
  inline __attribute__((always_inline)) void begin(int64_t g, Accs& acc) const {
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) {
      const auto start = G::all(kLeast ? 0 : -(kBytes ? 128 : 8) * of_x(r, g));
#pragma GCC unroll 4
      for (int l = 0; l < L; ++l)
#pragma GCC unroll 2
        for (int p = 0; p < B::parts; ++p) {
          acc[r][planes - 1][l][p] = start;
          if constexpr (planes == 2) acc[r][0][l][p] = B::zero();
        }
    }
  }

  // The step whose numbers a line of each holds, or the two of 4 bits.
  inline __attribute__((always_inline)) void steps(int64_t step, const char* w, Accs& acc) const {
    Lines low, high;
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l)
#pragma GCC unroll 2
      for (int p = 0; p < B::parts; ++p) {
        low[l][p] = B::load(w + l * 64, p);
        if constexpr (!kBytes) {
          high[l][p] = G::upper(low[l][p]);
          low[l][p] = G::lower(low[l][p]);
        }
      }
    dots(step, low, acc);
    if constexpr (!kBytes) dots(step + 1, high, acc);
  }

  inline __attribute__((always_inline)) void dots(int64_t step, const Lines& weights, Accs& acc) const {
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int plane = 0; plane < planes; ++plane) {
        const auto word = B::word(reinterpret_cast<const char*>(x_.bytes + (r * planes + plane) * x_.stride + step * 4));
#pragma GCC unroll 4
        for (int l = 0; l < L; ++l)
#pragma GCC unroll 2
          for (int p = 0; p < B::parts; ++p) acc[r][plane][l][p] = B::dot(acc[r][plane][l][p], weights[l][p], word);
      }
  }

  const GroupRows x_;
  typename G::Floats total_[R][L][B::parts];
};

// y[row][64] of R rows of x with a panel: what the whole numbers give, without the rows' scales. ahead: bytes from what is
// read to what is fetched, 0 for nothing.
template <MatrixForm form, int planes, int R>
inline void group_panel(const uint8_t* panel, const GroupRows& x, int64_t groups, int64_t ahead, float* y) {
  using Place = GroupPlace<form>;
  constexpr int kColumns = Words<int8_t>::columns;
  constexpr int kLines = kColumns >= 4 && R == 1 ? 4 : kColumns >= 4 && R * planes <= 6 ? 2 : 1;
  for (int line = 0; line < 4; line += kLines) {
    GroupSums<form, planes, R, kLines> sums(x);
    const uint8_t* group = panel;
    for (int64_t g = 0; g < groups; ++g, group += Place::bytes) {
      const char* w = reinterpret_cast<const char*>(group) + line * 64;
      const Half* scales = reinterpret_cast<const Half*>(group + Place::numbers) + line * 16;
      if (ahead > 0 && line == 0) sums.template add<true>(g, w, scales, ahead);
      else sums.template add<false>(g, w, scales, 0);
    }
    sums.store(y + line * 16);
  }
}

template <MatrixForm form, int planes>
void group_panel_of(int rows, const uint8_t* panel, const GroupRows& x, int64_t groups, int64_t ahead, float* y) {
  switch (rows) {
    case 1: return group_panel<form, planes, 1>(panel, x, groups, ahead, y);
    case 2: return group_panel<form, planes, 2>(panel, x, groups, ahead, y);
    default: return group_panel<form, planes, 3>(panel, x, groups, ahead, y);
  }
}

}  // namespace
}  // namespace fastff
