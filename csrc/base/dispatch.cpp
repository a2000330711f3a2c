// Probes the CPU once and chooses its best instruction set, or the one that FASTFF_ISA names.
#include "base/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "base/errors.h"

namespace fastff {
namespace {

struct Candidate {
  Isa isa;
  const char* name;
  bool (*supported)();
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}
bool has_avx512dot() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
#endif

const Candidate kByPreference[] = {
#if defined(__x86_64__)
    {Isa::avx512dot, "avx512dot", has_avx512dot},
    {Isa::avx512, "avx512", has_avx512},
    {Isa::avx2, "avx2", has_avx2},
#elif defined(__aarch64__)
    {Isa::neon, "neon", always},
#endif
    {Isa::scalar, "scalar", always}};

Isa named(const char* name) {
  std::string known;
  for (const Candidate& candidate : kByPreference) {
    known += std::string(known.empty() ? "" : ", ") + candidate.name;
    if (std::strcmp(candidate.name, name) != 0) continue;
    if (!candidate.supported()) throw BadIsa(std::string("instruction set ") + name + " is not available on this CPU");
    return candidate.isa;
  }
  throw BadIsa(std::string("instruction set '") + name + "' is not one of " + known);
}

Isa preferred() {
  const char* forced = std::getenv("FASTFF_ISA");
  if (forced && *forced) return named(forced);
  for (const Candidate& candidate : kByPreference)
    if (candidate.supported()) return candidate.isa;
  return Isa::scalar;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{preferred()};
  return isa;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

const char* isa_name() {
  for (const Candidate& candidate : kByPreference)
    if (candidate.isa == isa()) return candidate.name;
  return "";
}

void set_isa(const char* name) { current() = named(name); }

}  // namespace fastff
