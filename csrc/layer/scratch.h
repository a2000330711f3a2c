// What one thread keeps between calls, and early fetches of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "base/bf16.h"

namespace fastff {
namespace {

constexpr int64_t kLineBytes = 64;

template <class T>
void prefetch(const T* row, int64_t elements, int64_t from_line = 0, int64_t lines = 1 << 20) {
  const char* p = reinterpret_cast<const char*>(row);
  const int64_t end = std::min<int64_t>(elements * static_cast<int64_t>(sizeof(T)), (from_line + lines) * kLineBytes);
  for (int64_t at = from_line * kLineBytes; at < end; at += kLineBytes) __builtin_prefetch(p + at, 0, 3);
}

// std::vector would be a weak symbol that the linker may take from the file of a newer instruction set than the CPU's.
template <class E>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  E* data() const { return data_; }
  E* at_least(int64_t n) {
    if (n <= size_) return data_;
    std::free(data_);
    size_ = 0;
    data_ = static_cast<E*>(std::aligned_alloc(kLineBytes, (n * sizeof(E) + kLineBytes - 1) / kLineBytes * kLineBytes));
    if (!data_) throw std::bad_alloc();
    size_ = n;
    return data_;
  }

 private:
  E* data_ = nullptr;
  int64_t size_ = 0;
};

// Buffers of one thread, kept between calls. They grow and never shrink.
template <class T>
struct Scratch {
  Buffer<T> scores, raw, value, slope, coef, gate, grad, norm, scale;
  Buffer<int32_t> order, side, mark;
  Buffer<const T*> weights, outputs;
  Buffer<const Bf16*> bf16_weights, bf16_outputs;
  Buffer<const int8_t*> int8_weights, int8_outputs;

  // Room for pointers to weight rows of any type.
  template <class W>
  Buffer<const W*>& weights_of() {
    if constexpr (std::is_same_v<W, Bf16>) return bf16_weights;
    else if constexpr (std::is_same_v<W, int8_t>) return int8_weights;
    else return weights;
  }
  template <class W>
  Buffer<const W*>& outputs_of() {
    if constexpr (std::is_same_v<W, Bf16>) return bf16_outputs;
    else if constexpr (std::is_same_v<W, int8_t>) return int8_outputs;
    else return outputs;
  }

  static Scratch& local() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

}  // namespace
}  // namespace fastff
