#include "base/checks.h"

#include <stdexcept>

namespace fastff {
namespace {

bool overlap(const Array& a, const Array& b) {
  const auto p = reinterpret_cast<uintptr_t>(a.data), q = reinterpret_cast<uintptr_t>(b.data);
  return p && q && p < q + b.bytes && q < p + a.bytes;
}

}  // namespace

void refuse(const std::string& message) { throw std::invalid_argument(message); }

void need(bool holds, const char* message) {
  if (!holds) refuse(message);
}

void need_in(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    refuse(std::string(name) + " " + std::to_string(value) + " is not " + std::to_string(low) + " to " +
           std::to_string(high));
}

void need_aligned(Arrays arrays) {
  for (const Array& a : arrays)
    if (reinterpret_cast<uintptr_t>(a.data) % a.element)
      refuse(std::string(a.name) + " is not aligned to its elements of " + std::to_string(a.element) + " bytes");
}

void need_disjoint(Arrays outputs, Arrays inputs) {
  for (auto out = outputs.begin(); out != outputs.end(); ++out) {
    for (const Array& in : inputs)
      if (overlap(*out, in)) refuse(std::string(out->name) + " overlaps " + in.name);
    for (auto other = outputs.begin(); other != out; ++other)
      if (overlap(*out, *other)) refuse(std::string(out->name) + " overlaps " + other->name);
  }
}

}  // namespace fastff
