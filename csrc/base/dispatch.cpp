// Probes the CPU once and chooses its best instruction set, or the one that FASTFF_ISA names.
#include "base/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}
bool has_avx512dot() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
// Linux gives a process the tiles' state when it asks for it; threads started before and after have it too.
bool has_amx() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
  return has_avx512dot() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const Candidate kByPreference[] = {
#if defined(__x86_64__)
    {Isa::amx, "amx", has_amx},
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

bool has_tiles() {
#if defined(__x86_64__)
  return isa() == Isa::amx;
#else
  return false;
#endif
}

void set_isa(const char* name) { current() = named(name); }

}  // namespace fastff
