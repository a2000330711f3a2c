// Products of 64-byte lines of weights, one element at a time: for instruction sets without a form of their own.
//
// A line holds 16 words of 4 bytes, a word one fp32, two bfloat16 or four int8 weights. Words<W> keeps a line in `parts`
// registers and multiplies each of its words with a word of x: acc += <weights, x> in each of the 16 lanes. int8 weights are
// stored as unsigned numbers, 128 above their value. `pair` and `store_pairs` serve lines whose words 2n and 2n + 1 belong to
// one output.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/bf16.h"

namespace fastff {
namespace {

template <class W>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<int8_t> {
  using type = int32_t;
};
template <class W>
using Sum = typename SumOf<W>::type;  // of products

template <class W>
struct Words {
  struct Line {
    uint32_t word[16];
  };
  struct Acc {
    Sum<W> lane[16];
  };
  static constexpr int parts = 1;  // registers a line
  // Partial sums of one product, which hide latency and round less; the same for any number of rows.
  static constexpr int chains = sizeof(W) == 1 ? 1 : 4;
  static constexpr int tile = 4;     // rows that share a line
  static constexpr int columns = 2;  // lines of 16 columns of y summed together

  static Acc zero() { return {}; }
  static Line load(const char* p, int) {
    Line line;
    std::memcpy(line.word, p, sizeof line.word);
    return line;
  }
  static Line word(const char* p) {
    uint32_t one;
    std::memcpy(&one, p, sizeof one);
    Line line;
    for (uint32_t& w : line.word) w = one;
    return line;
  }
  static Line pair(const char* p) {
    Line line;
    for (int i = 0; i < 16; ++i) std::memcpy(line.word + i, p + i % 2 * 4, 4);
    return line;
  }
  static Acc dot(Acc acc, const Line& w, const Line& x) {
    for (int i = 0; i < 16; ++i) acc.lane[i] += product(w.word[i], x.word[i]);
    return acc;
  }
  static Acc add(Acc a, const Acc& b) {
    for (int i = 0; i < 16; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  // Of int8 sums with the upper and the lower plane of a number in two bytes; wraps around.
  static Acc join(const Acc& high, Acc low) {
    for (int i = 0; i < 16; ++i)
      low.lane[i] = static_cast<Sum<W>>(static_cast<uint32_t>(high.lane[i]) * 256 + static_cast<uint32_t>(low.lane[i]));
    return low;
  }
  static void store(Sum<W>* to, const Acc& acc, int) { std::memcpy(to, acc.lane, sizeof acc.lane); }
  static void store_pairs(Sum<W>* to, const Acc& acc, int) {
    for (int i = 0; i < 8; ++i) to[i] = acc.lane[2 * i] + acc.lane[2 * i + 1];
  }
  static Acc load_sums(const Sum<W>* p, int) {
    Acc acc;
    std::memcpy(acc.lane, p, sizeof acc.lane);
    return acc;
  }

 private:
  static Sum<W> product(uint32_t w, uint32_t x) {
    if constexpr (sizeof(W) == 4) {
      float a, b;
      std::memcpy(&a, &w, 4);
      std::memcpy(&b, &x, 4);
      return a * b;
    } else if constexpr (sizeof(W) == 2) {
      return to_float(Bf16{static_cast<uint16_t>(w)}) * to_float(Bf16{static_cast<uint16_t>(x)}) +
             to_float(Bf16{static_cast<uint16_t>(w >> 16)}) * to_float(Bf16{static_cast<uint16_t>(x >> 16)});
    } else {
      int32_t total = 0;
      for (int i = 0; i < 32; i += 8)
        total += static_cast<int32_t>(w >> i & 255) * static_cast<int8_t>(static_cast<uint8_t>(x >> i));
      return total;
    }
  }
};

}  // namespace
}  // namespace fastff
