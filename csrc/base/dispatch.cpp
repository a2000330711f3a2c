// Probes the CPU once and chooses the kernels of its best instruction set, or the one that FASTFF_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "base/internal.h"

namespace fastff {
namespace {

const Isa* const kByPreference[] = {
#if defined(__x86_64__)
    &isa_avx512, &isa_avx2,
#elif defined(__aarch64__)
    &isa_neon,
#endif
    &isa_scalar};

const Isa* named(const char* name) {
  std::string known;
  for (const Isa* candidate : kByPreference) {
    known += std::string(known.empty() ? "" : ", ") + candidate->name;
    if (std::strcmp(candidate->name, name) != 0) continue;
    if (!candidate->supported())
      throw std::runtime_error(std::string("instruction set ") + name + " is not available on this CPU");
    return candidate;
  }
  throw std::runtime_error(std::string("instruction set '") + name + "' is not one of " + known);
}

const Isa* chosen() {
  const char* forced = std::getenv("FASTFF_ISA");
  if (forced && *forced) return named(forced);
  for (const Isa* candidate : kByPreference)
    if (candidate->supported()) return candidate;
  return &isa_scalar;
}

const Isa*& current() {
  static const Isa* isa = chosen();
  return isa;
}

}  // namespace

const Isa& isa() { return *current(); }

void set_isa(const char* name) { current() = named(name); }

template <>
const Kernels<float>& kernels<float>() {
  return isa().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return isa().f64;
}

}  // namespace fastff
