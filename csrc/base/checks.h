// Checks of a caller's arguments. Each throws std::invalid_argument naming the value seen and the one expected.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

namespace fastff {

constexpr double kAddressable = 140737488355328.0;  // 2^47 bytes, the user space of a process
constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxSize = int64_t{1} << 46;  // of any one dimension

[[noreturn]] void refuse(const std::string& message);
void need(bool holds, const char* message);
void need_in(const char* name, int64_t value, int64_t low, int64_t high);

// A caller's array: what is checked about it before a kernel trusts it. Null data stands for an absent array.
struct Array {
  const char* name;
  const void* data;
  int64_t bytes;
  int64_t element = 1;  // bytes of one
};
using Arrays = std::initializer_list<Array>;

template <class E>
Array array(const char* name, const E* data, int64_t elements) {
  return {name, data, elements * static_cast<int64_t>(sizeof(E)), static_cast<int64_t>(sizeof(E))};
}

void need_aligned(Arrays arrays);
// No output may overlap an input or another output.
void need_disjoint(Arrays outputs, Arrays inputs);

}  // namespace fastff
