// The shapes of matrix tiles (AMX), for instruction sets that have them: eight full ones.
#pragma once

#ifdef __AMX_INT8__
#include <immintrin.h>

#include <cstdint>

namespace fastff {
namespace {

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The calling thread's tiles have their shapes while one of these lives.
class Tiles {
 public:
  Tiles() {
    static constexpr TileShapes kShapes;  // in memory as a whole: GCC takes the instruction to read its first bytes alone
    _tile_loadconfig(&kShapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace
}  // namespace fastff
#endif
