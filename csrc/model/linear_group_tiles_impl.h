// Products of many rows with weights in groups of inputs by tiles of AMX: the numbers that linear_groups_impl.h gives, to
// the bit.
//
// The sums of a group's numbers leave the tiles as whole numbers and are added to floats that stay in registers: sixteen
// rows with a line of 16 lanes at a time. Tiles multiply the next group meanwhile.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "isa/tiles.h"
#include "layer/scratch.h"
#include "model/linear_groups_impl.h"

namespace fastff {
namespace {

constexpr int64_t kGroupTileRows = 16;      // of x, that pass together
constexpr int64_t kGroupTilesFromRows = 6;  // fewer are faster by dot products
constexpr int64_t kGroupLines = kPanel / kLineLanes;
constexpr int64_t kChunkInputs = 576;       // whose numbers of sixteen rows stay in the first cache for all lines

// Twice two tiles of sums, two of a group's numbers of 16 rows, one of weights: 8 or 16 steps of 16 lanes.
struct GroupTileShapes : TileShapes {
  explicit GroupTileShapes(int64_t inputs) {
    row_bytes[4] = row_bytes[5] = static_cast<uint16_t>(inputs);
    rows[6] = static_cast<uint8_t>(inputs / 4);
  }
};

// A panel as the tiles take it: signed numbers [4 lines][groups][steps][16][4], and [groups][64] scales and minima.
template <MatrixForm form>
class WidePanel {
  static constexpr bool kLeast = form == MatrixForm::kGroups4Least, kBytes = in_bytes(form);
  static constexpr int64_t kSteps = GroupPlace<form>::steps;

 public:
  void read(const uint8_t* panel, int64_t groups) {
    int8_t* to = numbers_.at_least(groups * kLineNumbers * kGroupLines);
    float* scales = scales_.at_least(groups * kPanel * kParts);
    groups_ = groups;
    for (int64_t g = 0; g < groups; ++g, panel += GroupPlace<form>::bytes) {
      for (int64_t line = 0; line < kGroupLines; ++line) read_line(panel + line * 64, to + (line * groups + g) * kLineNumbers);
      const auto* halves = reinterpret_cast<const __m256i*>(panel + GroupPlace<form>::numbers);
      for (int64_t at = 0; at < kGroupLines * kParts; ++at, scales += kLineLanes)
        _mm512_storeu_ps(scales, _mm512_cvtph_ps(_mm256_loadu_si256(halves + at)));
    }
  }

  const int8_t* numbers(int64_t group, int64_t line) const {
    return numbers_.data() + (line * groups_ + group) * kLineNumbers;
  }
  const float* scales(int64_t group, int64_t line) const { return scales_.data() + group * kPanel * kParts + line * kLineLanes; }

  static constexpr int64_t kParts = kLeast ? 2 : 1, kScales = kPanel * kParts, kLineNumbers = kSteps * 64;  // of a group

 private:
  static void read_line(const uint8_t* from, int8_t* to) {
    for (int64_t k = 0; k < kSteps; k += kBytes ? 1 : 2, from += kStepBytes) {
      const __m512i line = _mm512_loadu_si512(from);
      if constexpr (kBytes) {
        _mm512_storeu_si512(to + k * 64, _mm512_xor_si512(line, _mm512_set1_epi8(-128)));
      } else {
        const __m512i above = _mm512_set1_epi8(kLeast ? 0 : 8);
        _mm512_storeu_si512(to + k * 64, _mm512_sub_epi8(Groups::lower(line), above));
        _mm512_storeu_si512(to + (k + 1) * 64, _mm512_sub_epi8(Groups::upper(line), above));
      }
    }
  }

  int64_t groups_ = 0;
  Buffer<int8_t> numbers_;
  Buffer<float> scales_;
};

// Where the tiles' operands of a group with a line are.
struct GroupOperands {
  const int8_t *weights, *upper, *lower;
  int64_t stride;         // from a row of x to the next
  const float* scales;    // minima are kPanel further
  const int32_t* x_sums;  // of a group's numbers, for minima; those of the next row are sums_stride further
  int64_t sums_stride;
};

// Sums of a group leave for one of two places by turns.
template <int parity, int planes>
inline __attribute__((always_inline)) void multiply_group(const GroupOperands& of) {
  _tile_loadd(6, of.weights, 64);
  if constexpr (planes == 2) _tile_loadd(4, of.upper, of.stride);
  _tile_loadd(5, of.lower, of.stride);
  if constexpr (parity == 0) {
    _tile_zero(0);
    if constexpr (planes == 2) _tile_dpbssd(0, 4, 6);
    _tile_zero(1);
    _tile_dpbssd(1, 5, 6);
  } else {
    _tile_zero(2);
    if constexpr (planes == 2) _tile_dpbssd(2, 4, 6);
    _tile_zero(3);
    _tile_dpbssd(3, 5, 6);
  }
}

using GroupTileSums = int32_t[2][kGroupTileRows * kLineLanes];  // of the upper and of the lower bytes

template <int parity, int planes>
inline __attribute__((always_inline)) void store_group(GroupTileSums& sums) {
  if constexpr (parity == 0) {
    if constexpr (planes == 2) _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
  } else {
    if constexpr (planes == 2) _tile_stored(2, sums[0], 64);
    _tile_stored(3, sums[1], 64);
  }
}

template <MatrixForm form, int planes>
inline __attribute__((always_inline)) void add_group(const GroupTileSums& sums, const GroupOperands& of,
                                                     __m512 (&total)[kGroupTileRows]) {
  const __m512 scale = _mm512_loadu_ps(of.scales);
#pragma GCC unroll 16
  for (int r = 0; r < kGroupTileRows; ++r) {
    __m512i sum = _mm512_load_si512(sums[1] + r * kLineLanes);
    if constexpr (planes == 2)
      sum = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(sums[0] + r * kLineLanes), 8), sum);
    total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total[r]);
    if constexpr (form == MatrixForm::kGroups4Least) {
      const __m512 of_x = _mm512_set1_ps(static_cast<float>(of.x_sums[r * of.sums_stride]));
      total[r] = _mm512_fmadd_ps(of_x, _mm512_loadu_ps(of.scales + kPanel), total[r]);
    }
  }
}

// A walk over groups [first, end) of inputs, line by line.
template <MatrixForm form, int planes>
class GroupWalk {
  using Wide = WidePanel<form>;

 public:
  GroupWalk(const WidePanel<form>& panel, const GroupRows& x, int64_t first, int64_t end)
      : panel_(panel), x_(x), first_(first), end_(end) {
    begin_line();
  }

  const GroupOperands& here() const { return of_; }
  int64_t line() const { return line_; }
  bool at_first() const { return group_ == first_; }

  void advance() {
    if (++group_ == end_) {
      if (++line_ < kGroupLines) begin_line();
      else group_ = first_;
      return;
    }
    of_.weights += Wide::kLineNumbers, of_.scales += Wide::kScales, ++of_.x_sums;
    of_.upper += group_inputs(form), of_.lower += group_inputs(form);
  }

 private:
  void begin_line() {
    group_ = first_;
    const int8_t* upper = x_.bytes + first_ * group_inputs(form);
    of_ = {panel_.numbers(first_, line_), upper, upper + (planes - 1) * x_.stride, planes * x_.stride,
           panel_.scales(first_, line_), x_.sums + first_, x_.sums_stride};
  }

  const WidePanel<form>& panel_;
  const GroupRows& x_;
  const int64_t first_, end_;
  int64_t line_ = 0, group_ = 0;
  GroupOperands of_{};
};

// The floats that a line's sums are added to, while they are in registers; v[2 halves][16 rows][32] has those of all lines.
struct LineTotals {
  float* v;
  bool gated;  // then a half is a line of gates and one of values
  bool zero;   // what the lines begin with, not what is in v

  float* place(int64_t line) const {
    const int64_t half = gated ? line % 2 : line / 2, part = gated ? line / 2 : line % 2;
    return v + half * kGroupTileRows * kBlockLanes + part * kLineLanes;
  }
};

inline __attribute__((always_inline)) void load_totals(const float* from, bool zero, __m512 (&total)[kGroupTileRows]) {
#pragma GCC unroll 16
  for (int r = 0; r < kGroupTileRows; ++r) total[r] = zero ? _mm512_setzero_ps() : _mm512_loadu_ps(from + r * kBlockLanes);
}

inline __attribute__((always_inline)) void store_totals(const __m512 (&total)[kGroupTileRows], float* to) {
#pragma GCC unroll 16
  for (int r = 0; r < kGroupTileRows; ++r) _mm512_storeu_ps(to + r * kBlockLanes, total[r]);
}

// Adds the sums of the group that the walk is at, and goes on.
template <MatrixForm form, int planes>
inline __attribute__((always_inline)) void add_next(const GroupTileSums& sums, GroupWalk<form, planes>& walk,
                                                    const LineTotals& lines, __m512 (&total)[kGroupTileRows]) {
  add_group<form, planes>(sums, walk.here(), total);
  walk.advance();
  if (!walk.at_first()) return;
  store_totals(total, lines.place(walk.line() - 1));
  load_totals(lines.place(walk.line() % kGroupLines), lines.zero, total);
}

// Adds groups [first, end) of all lines. Tiles multiply a group while the sums of the one before leave them and those of the
// one before that are added, also from one line to the next. (Tiles take much longer where their stores and the next
// products do not overlap.)
template <MatrixForm form, int planes>
inline void group_tile_lines(const WidePanel<form>& panel, const GroupRows& x, int64_t first, int64_t end,
                             const LineTotals& lines) {
  alignas(64) GroupTileSums even, odd;
  GroupWalk<form, planes> multiplied(panel, x, first, end), added(panel, x, first, end);
  __m512 total[kGroupTileRows];
  written_for_tiles();
  load_totals(lines.place(0), lines.zero, total);
  const auto multiply_next = [&]<int parity>() {
    multiply_group<parity, planes>(multiplied.here());
    multiplied.advance();
  };
  multiply_next.template operator()<0>();
  const int64_t steps = kGroupLines * (end - first);  // an even number
  for (int64_t left = steps; left > 0; left -= 2) {
    multiply_next.template operator()<1>();
    store_group<0, planes>(even);
    if (left < steps) add_next(odd, added, lines, total);
    if (left > 2) multiply_next.template operator()<0>();
    store_group<1, planes>(odd);
    add_next(even, added, lines, total);
  }
  add_next(odd, added, lines, total);
}

// Sixteen rows of x, filled up, with a panel: v[2 halves][16 rows][32]. gated: a half is a line of gates and one of values.
template <MatrixForm form, int planes>
inline void group_tile_block(const WidePanel<form>& panel, const GroupRows& x, int64_t groups, bool gated, float* v) {
  constexpr int64_t kMost = kChunkInputs / group_inputs(form);
  const int64_t chunks = (groups + kMost - 1) / kMost, chunk = (groups + chunks - 1) / chunks;
  for (int64_t g = 0; g < groups; g += chunk)
    group_tile_lines<form, planes>(panel, x, g, std::min(groups, g + chunk), {v, gated, g == 0});
}

}  // namespace
}  // namespace fastff
