// y of packed leaves by matrix tiles: the factors of up to sixteen items of one leaf with 32 columns of its rows of w_out.
//
// Sums of bytes are exact: they are those that Outputs adds up without tiles.
#pragma once

#include <cstdint>

#include "isa/tiles.h"

namespace fastff {
namespace {

constexpr int64_t kTiledItems = 16;
constexpr int64_t kLeastTiledWords = 5, kMostTiledWords = 16;  // of neurons of a leaf: fewer leave tiles too empty
constexpr int64_t kLeastTiledShare = 3;                        // items of a leaf on average; likewise

}  // namespace
}  // namespace fastff

#ifdef __AMX_INT8__
#include <algorithm>
#include <cstring>

#include "layer/packed_leaves_numbers.h"

namespace fastff {
namespace {

// Four tiles of sums, then two of factors, of `items` rows each, and two of `words` lines of weights.
struct FactorTiles : TileShapes {
  FactorTiles(int64_t items, int64_t words) {
    std::fill(rows, rows + 6, static_cast<uint8_t>(items));
    std::fill(rows + 6, rows + 8, static_cast<uint8_t>(words));
    row_bytes[4] = row_bytes[5] = static_cast<uint16_t>(4 * words);
  }
};

// Items of one leaf, whose factors lie in tiles.
class TiledItems {
 public:
  TiledItems() = default;
  ~TiledItems() {
    if (shaped_) _tile_release();
  }
  TiledItems(const TiledItems&) = delete;
  TiledItems& operator=(const TiledItems&) = delete;

  // factors(i): of an item, `words` words of upper bytes, and `plane` bytes behind them those of lower ones.
  template <class Factors>
  void take(int64_t items, int64_t words, int64_t plane, const Factors& factors) {
    alignas(kLineBytes) char upper[kTiledItems][kLineBytes], lower[kTiledItems][kLineBytes];
    for (int64_t i = 0; i < items; ++i) {
      const char* h = factors(i);
      std::memcpy(upper[i], h, 4 * words);
      std::memcpy(lower[i], h + plane, 4 * words);
    }
    items_ = items;
    if (shaped_ != items) shape_tiles(FactorTiles(items, words));
    shaped_ = items;
    _tile_loadd(4, upper, kLineBytes);
    _tile_loadd(5, lower, kLineBytes);
  }

  // Adds their products with the lines at w, and with those at `next` where that is not null, to 16 columns each of
  // y(i), where sums stand as integers.
  template <class Row>
  void add(const char* w, const char* next, const Row& y) const {
    alignas(kLineBytes) int32_t sums[4][kTiledItems][16];
    written_for_tiles();
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(6, w, kLineBytes);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 5, 6);
    if (next) {
      _tile_zero(2);
      _tile_zero(3);
      _tile_loadd(7, next, kLineBytes);
      _tile_dpbsud(2, 4, 7);
      _tile_dpbsud(3, 5, 7);
      _tile_stored(2, sums[2], kLineBytes);
      _tile_stored(3, sums[3], kLineBytes);
    }
    _tile_stored(0, sums[0], kLineBytes);
    _tile_stored(1, sums[1], kLineBytes);
    for (int64_t i = 0; i < items_; ++i) {
      float* to = y(i);
      add_line(to, sums[0][i], sums[1][i]);
      if (next) add_line(to + 16, sums[2][i], sums[3][i]);
    }
  }

 private:
  static void add_line(float* to, const int32_t* upper, const int32_t* lower) {
    const __m512i joined = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(upper), 8), _mm512_load_si512(lower));
    _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_loadu_si512(to), joined));
  }

  int64_t items_ = 0, shaped_ = 0;
};

}  // namespace
}  // namespace fastff
#endif
