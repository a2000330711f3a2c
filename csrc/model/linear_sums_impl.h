// Sums of rows of bytes with a panel of weights, by dot products and by tiles, for the instruction set whose Words<int8_t>
// the including file has defined.
#pragma once

#include <cstdint>

#include "isa/tiles.h"
#include "model/linear.h"

namespace fastff {
namespace {

constexpr int64_t kStepBytes = kPanel * 4;  // of a panel: four inputs of all its rows
constexpr int64_t kLineLanes = 16;          // of a line of 64 bytes
constexpr int64_t kBlockLanes = 32;         // of a panel, whose sums are finished together
constexpr int kMostByteRows = 6;            // whose sums stay in registers

enum class Fetch { kNothing, kLine, kStep };  // of the memory ahead, for every step: a line, or as much as the step reads

// sums[m][64] of M rows of bytes with a panel.
template <int M, Fetch fetch>
inline void panel_sums(const uint8_t* panel, const int8_t* x, int64_t stride, int64_t steps, const uint8_t* ahead,
                       int32_t* sums) {
  using B = Words<int8_t>;
  // Lines of 16 outputs that are summed together: all four of a step where there are registers for them.
  constexpr int kLines = B::columns >= 4 ? 4 : M <= 2 ? 2 : 1;
  for (int line = 0; line < 4; line += kLines) {
    typename B::Acc acc[M][kLines][B::parts];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int l = 0; l < kLines; ++l)
#pragma GCC unroll 2
        for (int p = 0; p < B::parts; ++p) acc[m][l][p] = B::zero();
    const char* w = reinterpret_cast<const char*>(panel) + line * 64;
    for (int64_t k = 0; k < steps; ++k, w += kStepBytes) {
      if (fetch == Fetch::kStep && line == 0) {
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) __builtin_prefetch(ahead + k * kStepBytes + l * 64, 0, 2);
      } else if (fetch == Fetch::kLine && line == 0) {
        __builtin_prefetch(ahead + k * 64, 0, 2);
      }
      typename B::Line weights[kLines][B::parts];
#pragma GCC unroll 4
      for (int l = 0; l < kLines; ++l)
#pragma GCC unroll 2
        for (int p = 0; p < B::parts; ++p) weights[l][p] = B::load(w + l * 64, p);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const auto word = B::word(reinterpret_cast<const char*>(x + m * stride + k * 4));
#pragma GCC unroll 4
        for (int l = 0; l < kLines; ++l)
#pragma GCC unroll 2
          for (int p = 0; p < B::parts; ++p) acc[m][l][p] = B::dot(acc[m][l][p], weights[l][p], word);
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int l = 0; l < kLines; ++l)
#pragma GCC unroll 2
        for (int p = 0; p < B::parts; ++p) B::store(sums + m * kPanel + (line + l) * 16, acc[m][l][p], p);
  }
}

template <Fetch fetch>
void panel_sums_of(int byte_rows, const uint8_t* panel, const int8_t* x, int64_t stride, int64_t steps,
                   const uint8_t* ahead, int32_t* sums) {
  switch (byte_rows) {
    case 1: return panel_sums<1, fetch>(panel, x, stride, steps, ahead, sums);
    case 2: return panel_sums<2, fetch>(panel, x, stride, steps, ahead, sums);
    case 3: return panel_sums<3, fetch>(panel, x, stride, steps, ahead, sums);
    case 4: return panel_sums<4, fetch>(panel, x, stride, steps, ahead, sums);
    case 5: return panel_sums<5, fetch>(panel, x, stride, steps, ahead, sums);
    default: return panel_sums<6, fetch>(panel, x, stride, steps, ahead, sums);
  }
}

#ifdef __AMX_INT8__
constexpr int64_t kTileByteRows = 32, kTilesFromByteRows = 8;

// sums[32][32] of 32 rows of bytes with two times 16 lanes of a panel, whose weights begin at w and `apart` bytes later.
// meanwhile: called at every 16 steps, since tiles leave the other units free.
template <class Meanwhile>
inline void tile_sums(const uint8_t* w, int64_t apart, const int8_t* x, int64_t stride, int64_t steps, int32_t* sums,
                      const Meanwhile& meanwhile) {
  written_for_tiles();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < steps; k += 16, w += 16 * kStepBytes) {
    _tile_loadd(6, w, kStepBytes);
    _tile_loadd(7, w + apart, kStepBytes);
    _tile_loadd(4, x + k * 4, stride);
    _tile_loadd(5, x + 16 * stride + k * 4, stride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
    meanwhile();
  }
  constexpr int64_t kSumsStride = kBlockLanes * sizeof(int32_t);
  _tile_stored(0, sums, kSumsStride);
  _tile_stored(1, sums + 16, kSumsStride);
  _tile_stored(2, sums + 16 * kBlockLanes, kSumsStride);
  _tile_stored(3, sums + 16 * kBlockLanes + 16, kSumsStride);
}
#endif

}  // namespace
}  // namespace fastff
