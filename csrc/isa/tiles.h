// Matrix tiles (AMX), for instruction sets that have them: their shapes, and memory fetched beside their products.
#pragma once

#ifdef __AMX_INT8__
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace fastff {
namespace {

// Eight full ones, where nothing else is said.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Shapes the calling thread's tiles, until _tile_release.
inline void shape_tiles(const TileShapes& shapes) {
  asm volatile("" : : "m"(shapes));  // in memory as a whole: GCC takes the instruction to read its first bytes alone
  _tile_loadconfig(&shapes);
}

// What was stored before is in memory where a tile is loaded: GCC does not see that loads of tiles read memory.
inline void written_for_tiles() { asm volatile("" : : : "memory"); }

// The calling thread's tiles have their shapes while one of these lives.
class Tiles {
 public:
  explicit Tiles(const TileShapes& shapes = {}) { shape_tiles(shapes); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Memory on its way to the second-level cache, so much at every step of other work.
class FetchedAhead {
 public:
  FetchedAhead() = default;
  FetchedAhead(const void* from, int64_t bytes, int64_t steps)
      : at_(static_cast<const char*>(from)), end_(at_ + bytes), step_lines_((bytes / 64 + steps - 1) / std::max<int64_t>(1, steps)) {}

  void step() {
    for (int64_t i = 0; i < step_lines_ && at_ < end_; ++i, at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t step_lines_ = 0;
};

}  // namespace
}  // namespace fastff
#endif
