// Kernels of model/linear.h, for the instruction set whose Words<int8_t> the including file has defined.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "isa/table.h"
#include "layer/activations.h"
#include "model/linear.h"

#ifdef __AMX_INT8__
#include <immintrin.h>
#endif

namespace fastff {
namespace {

constexpr int64_t kStepBytes = kPanel * 4;  // of a panel: four inputs of all its rows
constexpr int kMostByteRows = 6;            // whose sums stay in registers

// ---- rows of x in whole numbers ----

// x as bits of its absolute value: NaN and infinity are above every number, and a maximum of them vectorises.
inline uint32_t largest_bits(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    most = most > bits ? most : bits;
  }
  return most;
}

// x * scale, rounded to nearest even; |x * scale| below 2^22.
inline int32_t rounded(float x, float scale) {
  const float shifted = x * scale + 12582912.0f;  // 1.5 * 2^23
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4b400000;
}

// The largest whole number of a row: sums of its products with weights of 8 bits must fit 32 bits.
inline float number_range(int64_t features, int planes) {
  return planes == 1 ? 127.0f : static_cast<float>(std::min<int64_t>(32000, 2147483647 / (127 * features) - 1));
}

inline void quantise_row(const float* x, int64_t row, QuantisedRows& to) {
  const int64_t n = to.features;
  int8_t* upper = to.bytes + row * to.planes * to.stride;
  std::memset(upper + n, 0, to.stride - n);
  if (to.planes == 2) std::memset(upper + to.stride + n, 0, to.stride - n);
  const uint32_t bits = largest_bits(x, n);
  float largest;
  std::memcpy(&largest, &bits, sizeof bits);
  const float range = number_range(n, to.planes);
  if (bits >= 0x7f800000u || largest < range * std::numeric_limits<float>::min()) {
    std::memset(upper, 0, to.planes * to.stride);
    to.scale[row] = bits >= 0x7f800000u ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    to.offset[row] = 0;
    return;
  }
  const float inverse = range / largest;
  uint32_t sum = 0;
  if (to.planes == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t v = rounded(x[i], inverse);
      sum += static_cast<uint32_t>(v);
      upper[i] = static_cast<int8_t>(v);
    }
  } else {
    int8_t* lower = upper + to.stride;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t v = rounded(x[i], inverse);
      sum += static_cast<uint32_t>(v);
      upper[i] = static_cast<int8_t>((v + 128) >> 8);
      lower[i] = static_cast<int8_t>(v);
    }
  }
  to.scale[row] = largest / range;
  to.offset[row] = static_cast<int32_t>(sum * 128);
}

void quantise_linear(const float* x, int64_t x_stride, int64_t begin, int64_t end, QuantisedRows& to) {
  for (int64_t r = begin; r < end; ++r) quantise_row(x + r * x_stride, r, to);
}

// ---- sums of a panel ----

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

// Eight full tiles: 4 of sums, 2 of rows, 2 of weights.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// sums[32][64] of 32 rows of bytes with a panel. With ahead, fetches half as many bytes from there as a panel has.
inline void tile_sums(const uint8_t* panel, const int8_t* x, int64_t stride, int64_t steps, const uint8_t* ahead,
                      int32_t* sums) {
  for (int half = 0; half < 2; ++half) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const uint8_t* w = panel + half * 128;
    for (int64_t k = 0; k < steps; k += 16, w += 16 * kStepBytes) {
      if (ahead)
        for (int l = 0; l < 16; ++l) __builtin_prefetch(ahead + (k * 2 + half * 16 + l) * 64, 0, 2);
      _tile_loadd(4, x + k * 4, stride);
      _tile_loadd(6, w, kStepBytes);
      _tile_loadd(7, w + 64, kStepBytes);
      _tile_loadd(5, x + 16 * stride + k * 4, stride);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    int32_t* to = sums + half * 32;
    constexpr int64_t kSumsStride = kPanel * sizeof(int32_t);
    _tile_stored(0, to, kSumsStride);
    _tile_stored(1, to + 16, kSumsStride);
    _tile_stored(2, to + 16 * kPanel, kSumsStride);
    _tile_stored(3, to + 16 * kPanel + 16, kSumsStride);
  }
}
#endif

// ---- from sums to y ----

struct PanelOutput {
  const PackedMatrix& matrix;
  const QuantisedRows& x;
  const Epilogue& epilogue;
  float* y;
  int64_t y_stride, panel;
};

// sums: [planes][64] of one row.
inline void finish_row(const PanelOutput& o, const float* scales, const int32_t* sums, int64_t row) {
  alignas(64) float v[kPanel];
  const float scale = o.x.scale[row];
  const auto offset = static_cast<uint32_t>(o.x.offset[row]);
  const bool wide = o.x.planes == 2;
  const int32_t* lower = wide ? sums + kPanel : sums;
  const uint32_t upper_factor = wide ? 256 : 0;
  for (int64_t i = 0; i < kPanel; ++i) {
    const uint32_t sum = static_cast<uint32_t>(sums[i]) * upper_factor + static_cast<uint32_t>(lower[i]) - offset;
    v[i] = static_cast<float>(static_cast<int32_t>(sum)) * (scales[i] * scale);
  }
  if (const float* bias = o.epilogue.bias)
    for (int64_t i = 0; i < kPanel; ++i) v[i] += bias[o.panel * kPanel + i];
  const int64_t outputs = o.matrix.panel_outputs();
  if (o.matrix.gated) {
    for (int64_t i = 0; i < kPanel / 2; ++i) v[i] = Silu::value(v[i]) * v[kPanel / 2 + i];
  } else if (o.epilogue.activation != FASTFF_IDENTITY) {
    activate(o.epilogue.activation, v, v, kPanel);
  }
  const int64_t first = o.panel * outputs, n = std::min(outputs, o.matrix.out_features - first);
  float* y = o.y + row * o.y_stride + first;
  if (o.epilogue.add)
    for (int64_t i = 0; i < n; ++i) v[i] += y[i];
  std::memcpy(y, v, n * sizeof(float));
  if (o.epilogue.largest) {
    const uint32_t bits = largest_bits(v, n);
    std::memcpy(o.epilogue.largest + row * o.matrix.panels() + o.panel, &bits, sizeof bits);
  }
}

inline void finish_rows(const PanelOutput& o, const int32_t* sums, int64_t first_row, int64_t rows) {
  alignas(64) float scales[kPanel];
  std::memcpy(scales, o.matrix.data + (o.panel + 1) * o.matrix.panel_bytes() - sizeof scales, sizeof scales);
  for (int64_t r = 0; r < rows; ++r) finish_row(o, scales, sums + r * o.x.planes * kPanel, first_row + r);
}

// ---- a panel with all rows ----

constexpr int64_t kAhead = 2048;  // bytes, from what is read of a stream to what is fetched

void panel_by_dots(const PanelOutput& o) {
  const QuantisedRows& x = o.x;
  const int64_t steps = o.matrix.steps(), byte_rows = x.rows * x.planes, bytes = o.matrix.panel_bytes();
  const uint8_t* panel = o.matrix.data + o.panel * bytes;
  const bool many = byte_rows > 4 * kMostByteRows;  // then the panel is in the cache, and a quarter of the next one is
                                                    // fetched by each of the first four groups of rows
  alignas(64) int32_t sums[kMostByteRows * kPanel];
  for (int64_t b = 0, group = 0; b < byte_rows; b += kMostByteRows, ++group) {
    const int n = static_cast<int>(std::min<int64_t>(kMostByteRows, byte_rows - b));
    const int8_t* rows = x.bytes + b * x.stride;
    if (many && group < 4)
      panel_sums_of<Fetch::kLine>(n, panel, rows, x.stride, steps, panel + bytes + group * steps * 64, sums);
    else if (!many && group == 0)
      panel_sums_of<Fetch::kStep>(n, panel, rows, x.stride, steps, panel + kAhead, sums);
    else panel_sums_of<Fetch::kNothing>(n, panel, rows, x.stride, steps, panel, sums);
    finish_rows(o, sums, b / x.planes, n / x.planes);
  }
}

#ifdef __AMX_INT8__
void panel_by_tiles(const PanelOutput& o) {
  const QuantisedRows& x = o.x;
  const int64_t byte_rows = x.rows * x.planes, bytes = o.matrix.panel_bytes();
  const uint8_t* panel = o.matrix.data + o.panel * bytes;
  alignas(64) int32_t sums[kTileByteRows * kPanel];
  for (int64_t b = 0; b < byte_rows; b += kTileByteRows) {
    const int64_t n = std::min(kTileByteRows, byte_rows - b);
    // The first two groups of rows each fetch half of the next panel.
    const int64_t group = b / kTileByteRows;
    const uint8_t* ahead = group < 2 ? panel + bytes + group * (bytes / 2) : nullptr;
    tile_sums(panel, x.bytes + b * x.stride, x.stride, o.matrix.steps(), ahead, sums);
    finish_rows(o, sums, b / x.planes, n / x.planes);
  }
}
#endif

void multiply_linear(const PackedMatrix& matrix, const QuantisedRows& x, const Epilogue& epilogue, float* y,
                     int64_t y_stride, int64_t begin, int64_t end) {
#ifdef __AMX_INT8__
  if (x.rows * x.planes >= kTilesFromByteRows) {
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
    for (int64_t p = begin; p < end; ++p) panel_by_tiles({matrix, x, epilogue, y, y_stride, p});
    _tile_release();
    return;
  }
#endif
  for (int64_t p = begin; p < end; ++p) panel_by_dots({matrix, x, epilogue, y, y_stride, p});
}

}  // namespace

const LinearKernels FASTFF_TABLE(linear) = {quantise_linear, multiply_linear};

}  // namespace fastff
