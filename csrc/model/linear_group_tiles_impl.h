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
constexpr int64_t kChunkInputs = 768;       // whose numbers of sixteen rows stay in the first cache for all lines

// Twice two tiles of sums, two of a group's numbers of 16 rows, one of weights: 8 or 16 steps of 16 lanes.
struct GroupTileShapes : TileShapes {
  explicit GroupTileShapes(int64_t inputs) {
    row_bytes[4] = row_bytes[5] = static_cast<uint16_t>(inputs);
    rows[6] = static_cast<uint8_t>(inputs / 4);
  }
};

// A panel as the tiles take it: signed numbers [groups][4 lines][steps][16][4], and [groups][64] scales and minima.
template <MatrixForm form>
class WidePanel {
  static constexpr bool kLeast = form == MatrixForm::kGroups4Least, kBytes = in_bytes(form);
  static constexpr int64_t kSteps = GroupPlace<form>::steps;

 public:
  void read(const uint8_t* panel, int64_t groups) {
    int8_t* to = numbers_.at_least(groups * kLineNumbers * kGroupLines);
    float* scales = scales_.at_least(groups * kPanel * kParts);
    for (int64_t g = 0; g < groups; ++g, panel += GroupPlace<form>::bytes) {
      for (int64_t line = 0; line < kGroupLines; ++line, to += kLineNumbers) read_line(panel + line * 64, to);
      const auto* halves = reinterpret_cast<const __m256i*>(panel + GroupPlace<form>::numbers);
      for (int64_t at = 0; at < kGroupLines * kParts; ++at, scales += kLineLanes)
        _mm512_storeu_ps(scales, _mm512_cvtph_ps(_mm256_loadu_si256(halves + at)));
    }
  }

  const int8_t* numbers(int64_t group, int64_t line) const {
    return numbers_.data() + (group * kGroupLines + line) * kLineNumbers;
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

  Buffer<int8_t> numbers_;
  Buffer<float> scales_;
};

// Where the tiles' operands of a group are; those of the next are `next_group` further.
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

// Adds `groups` groups to v[16][v_stride]. Tiles multiply a group while the sums of the one before leave them and those of the one
// before that are added. (Tiles take much longer where their stores and the next products do not overlap.)
template <MatrixForm form, int planes>
inline void group_tile_line(GroupOperands of, int64_t groups, float* v, int64_t v_stride) {
  using Wide = WidePanel<form>;
  alignas(64) GroupTileSums even, odd;
  __m512 total[kGroupTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < kGroupTileRows; ++r) total[r] = _mm512_loadu_ps(v + r * v_stride);
  GroupOperands added = of;
  const auto advance = [](GroupOperands& operands) __attribute__((always_inline)) {
    operands.weights += Wide::kLineNumbers * kGroupLines, operands.scales += Wide::kScales, ++operands.x_sums;
    operands.upper += group_inputs(form), operands.lower += group_inputs(form);
  };
  multiply_group<0, planes>(of);
  advance(of);
  int64_t left = groups;
  for (; left > 2; left -= 2) {
    multiply_group<1, planes>(of);
    advance(of);
    store_group<0, planes>(even);
    if (left < groups) {
      add_group<form, planes>(odd, added, total);
      advance(added);
    }
    multiply_group<0, planes>(of);
    advance(of);
    store_group<1, planes>(odd);
    add_group<form, planes>(even, added, total);
    advance(added);
  }
  if (left == 2) multiply_group<1, planes>(of);
  store_group<0, planes>(even);
  if (left < groups) {
    add_group<form, planes>(odd, added, total);
    advance(added);
  }
  if (left == 2) store_group<1, planes>(odd);
  add_group<form, planes>(even, added, total);
  advance(added);
  if (left == 2) add_group<form, planes>(odd, added, total);
#pragma GCC unroll 16
  for (int r = 0; r < kGroupTileRows; ++r) _mm512_storeu_ps(v + r * v_stride, total[r]);
}

// Sixteen rows of x, filled up, with a panel: v[2 halves][16 rows][32]. gated: a half is a line of gates and one of values.
template <MatrixForm form, int planes>
inline void group_tile_block(const WidePanel<form>& panel, const GroupRows& x, int64_t groups, bool gated, float* v) {
  constexpr int64_t kChunk = kChunkInputs / group_inputs(form);
  std::fill_n(v, kGroupTileRows * kPanel, 0.0f);
  for (int64_t g = 0; g < groups; g += kChunk)
    for (int64_t line = 0; line < kGroupLines; ++line) {
      const int8_t* upper = x.bytes + g * group_inputs(form);
      const GroupOperands first{panel.numbers(g, line), upper, upper + (planes - 1) * x.stride, planes * x.stride,
                                panel.scales(g, line), x.sums + g, x.sums_stride};
      const int64_t half = gated ? line % 2 : line / 2, part = gated ? line / 2 : line % 2;
      group_tile_line<form, planes>(first, std::min(kChunk, groups - g),
                                    v + half * kGroupTileRows * kBlockLanes + part * kLineLanes, kBlockLanes);
    }
}

}  // namespace
}  // namespace fastff
