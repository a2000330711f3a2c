// Products of rows of x with rows of routing weights in 16 bits by matrix tiles: sixteen of both at a time.
//
// A number in 16 bits is an upper byte with a sign and a lower one without. Sums of the four products of bytes are exact;
// put together they are the exact sum of the products, rounded once to fp32, which is what Vec<int16_t>::sums gives on
// this instruction set. So a row's products are the same bits however they were computed.
#pragma once

#include "isa/tiles.h"

#ifdef __AMX_INT8__
#include <algorithm>
#include <cstdint>

#include "layer/router.h"
#include "layer/router_rows.h"
#include "layer/scratch.h"

namespace fastff {
namespace {

constexpr int64_t kFewTiledRows = 9;  // fewer leave tiles too empty

inline void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// A block of rows of x as the tiles take them: of sixteen rows and 64 features a tile of upper bytes and one of lower ones.
class TiledRows {
 public:
  // Rows first, first + step, ... of `rows`; lanes beyond the last repeat it.
  template <class T>
  void take(const RoutedRows<T, int16_t>& rows, int64_t first, int64_t step, int64_t count) {
    steps_ = tile_steps(rows.n());
    char* to = room().at_least((count + kTileRows - 1) / kTileRows * steps_ * 2 * kTileBytes);
    data_ = to;
    for (int64_t row = 0; row < count; row += kTileRows) {
      const int16_t* x[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r) x[r] = rows.row(first + step * std::min(row + r, count - 1));
      for (int64_t at = 0; at < rows.n(); at += 2 * kUnit, to += 2 * kTileBytes) store(x, at, rows.n() - at > kUnit, to);
    }
  }
  int64_t steps() const { return steps_; }
  const char* at(int64_t row) const { return data_ + row / kTileRows * steps_ * 2 * kTileBytes; }  // of its sixteen

 private:
  static void store(const int16_t* const* x, int64_t at, bool whole, char* to) {
    const __m512i low = _mm512_set1_epi16(255);
    __m512i upper[kTileRows], lower[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) {
      const __m512i a = _mm512_loadu_si512(x[r] + at);
      const __m512i b = whole ? _mm512_loadu_si512(x[r] + at + kUnit) : _mm512_setzero_si512();
      upper[r] = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
      lower[r] = _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low));
    }
    transpose16(upper);
    transpose16(lower);
    for (int64_t r = 0; r < kTileRows; ++r) {
      _mm512_store_si512(to + r * kLineBytes, upper[r]);
      _mm512_store_si512(to + kTileBytes + r * kLineBytes, lower[r]);
    }
  }
  static Buffer<char>& room() {
    static thread_local Buffer<char> bytes;
    return bytes;
  }

  const char* data_ = nullptr;
  int64_t steps_ = 0;
};

// product[j][r] of sixteen rows of x with the sixteen rows of weights of a panel.
inline void panel_products(const char* w, const char* x, int64_t steps, float (*product)[kTileRows], FetchedAhead& ahead) {
  alignas(kLineBytes) int32_t sums[4][kTileRows][kTileRows];
  written_for_tiles();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, w += 2 * kTileBytes, x += 2 * kTileBytes) {
    _tile_loadd(4, w, kLineBytes);
    _tile_loadd(6, x, kLineBytes);
    _tile_loadd(7, x + kTileBytes, kLineBytes);
    _tile_loadd(5, w + kTileBytes, kLineBytes);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbuud(3, 5, 7);
    ahead.step();
  }
  _tile_stored(0, sums[0], kLineBytes);
  _tile_stored(1, sums[1], kLineBytes);
  _tile_stored(2, sums[2], kLineBytes);
  _tile_stored(3, sums[3], kLineBytes);
  for (int64_t j = 0; j < kTileRows; ++j)
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int32_t middle = sums[1][j][r] + sums[2][j][r];
      const int32_t lower = (middle & 255) * 256 + sums[3][j][r];
      const int32_t upper = sums[0][j][r] + (middle >> 8) + (lower >> 16);
      product[j][r] = static_cast<float>(upper) * 65536.0f + static_cast<float>(lower & 65535);
    }
}

}  // namespace
}  // namespace fastff
#endif
