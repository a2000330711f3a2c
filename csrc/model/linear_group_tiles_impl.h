// Products of many rows with weights in groups of 32 inputs by tiles of AMX: the numbers that linear_groups_impl.h gives, to
// the bit.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "isa/tiles.h"
#include "layer/scratch.h"
#include "model/linear_groups_impl.h"

namespace fastff {
namespace {

constexpr int64_t kGroupTileByteRows = 32;       // that one step multiplies
constexpr int64_t kGroupTilesFromByteRows = 24;  // fewer are faster by dot products
constexpr int64_t kGroupBytes = kGroup * kPanel;  // of a panel's numbers in 8 bits

// Four tiles of sums, two of 16 rows of a group's numbers, two of weights: 8 steps of 16 lanes.
struct GroupTileShapes : TileShapes {
  GroupTileShapes() {
    row_bytes[4] = row_bytes[5] = kGroup;
    rows[6] = rows[7] = kGroupSteps;
  }
};

// sums[32][32] of 32 rows of bytes with two times 16 lanes of a group, whose weights begin at w and `apart` bytes later.
inline void group_tile_sums(const uint8_t* w, int64_t apart, const int8_t* x, int64_t stride, int32_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(6, w, kStepBytes);
  _tile_loadd(7, w + apart, kStepBytes);
  _tile_loadd(4, x, stride);
  _tile_loadd(5, x + 16 * stride, stride);
  _tile_dpbsud(0, 4, 6);
  _tile_dpbsud(1, 4, 7);
  _tile_dpbsud(2, 5, 6);
  _tile_dpbsud(3, 5, 7);
  constexpr int64_t kSumsStride = kBlockLanes * sizeof(int32_t);
  _tile_stored(0, sums, kSumsStride);
  _tile_stored(1, sums + 16, kSumsStride);
  _tile_stored(2, sums + 16 * kBlockLanes, kSumsStride);
  _tile_stored(3, sums + 16 * kBlockLanes + 16, kSumsStride);
}

// The numbers of a panel's groups in 8 bits, [groups][8][64][4].
template <MatrixForm form>
inline const uint8_t* panel_bytes_of(const uint8_t* panel, int64_t groups, Buffer<uint8_t>& room) {
  uint8_t* to = room.at_least(groups * kGroupBytes);
  for (int64_t g = 0; g < groups; ++g, panel += GroupPlace<form>::bytes) {
    if constexpr (form == MatrixForm::kGroups8) {
      std::copy_n(panel, kGroupBytes, to);
      to += kGroupBytes;
    } else {
      for (int64_t k = 0; k < kGroupSteps / 2; ++k, to += 2 * kStepBytes)
        for (int64_t at = 0; at < kStepBytes; at += 64) {
          const __m512i line = _mm512_loadu_si512(panel + k * kStepBytes + at);
          _mm512_storeu_si512(to + at, Groups::lower(line));
          _mm512_storeu_si512(to + kStepBytes + at, Groups::upper(line));
        }
    }
  }
  return room.data();
}

// One group's sums[rows * planes][32], added to v[rows][32].
template <MatrixForm form, int planes>
inline void add_group(const int32_t* sums, const GroupRows& x, int64_t rows, int64_t g, const Half* const* scales, float* v) {
  constexpr bool least = form == MatrixForm::kGroups4Least;
  constexpr int32_t above = least ? 0 : form == MatrixForm::kGroups8 ? 128 : 8;
  for (int64_t r = 0; r < rows; ++r, sums += planes * kBlockLanes, v += kBlockLanes) {
    const int32_t of_x = x.sums[r * x.sums_stride + g];
    const __m512i offset = _mm512_set1_epi32(above * of_x);
    for (int half = 0; half < 2; ++half) {
      __m512i sum = _mm512_loadu_si512(sums + (planes - 1) * kBlockLanes + half * 16);
      if (planes == 2) sum = _mm512_add_epi32(_mm512_slli_epi32(_mm512_loadu_si512(sums + half * 16), 8), sum);
      __m512 total = Groups::scaled(_mm512_loadu_ps(v + half * 16), _mm512_sub_epi32(sum, offset), scales[half], 0);
      if (least) total = Groups::added(total, static_cast<float>(of_x), scales[half] + kPanel, 0);
      _mm512_storeu_ps(v + half * 16, total);
    }
  }
}

// Rows of x, at most 32 of bytes, with the lanes of half a panel: v[rows][32].
template <MatrixForm form, int planes>
inline void group_tile_block(const uint8_t* panel, const uint8_t* bytes, const int64_t (&lanes)[2], const GroupRows& x,
                             int64_t rows, int64_t groups, float* v) {
  alignas(64) int32_t sums[kGroupTileByteRows * kBlockLanes];
  std::fill_n(v, rows * kBlockLanes, 0.0f);
  for (int64_t g = 0; g < groups; ++g, panel += GroupPlace<form>::bytes, bytes += kGroupBytes) {
    group_tile_sums(bytes + lanes[0] * 4, (lanes[1] - lanes[0]) * 4, x.bytes + g * kGroup, x.stride, sums);
    const auto* scale = reinterpret_cast<const Half*>(panel + GroupPlace<form>::numbers);
    const Half* const scales[] = {scale + lanes[0], scale + lanes[1]};
    add_group<form, planes>(sums, x, rows, g, scales, v);
  }
}

}  // namespace
}  // namespace fastff
