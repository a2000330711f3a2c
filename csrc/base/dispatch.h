// The instruction set in use, and the choice of a family of kernels by it.
//
// Every file of csrc/isa defines one table of each family, named <family>_<instruction set>. A family declares them with
// FASTFF_DECLARE_TABLES(Type, family) and finds the one in use with FASTFF_CHOSEN_TABLE(Type, family). A family that gains
// from dot products of short numbers has a table for avx512dot too: FASTFF_DECLARE_DOT_TABLES, FASTFF_CHOSEN_DOT_TABLE;
// the others run their avx512 one there. One that gains from matrix tiles has a table for amx besides
// (FASTFF_DECLARE_TILE_TABLES, FASTFF_CHOSEN_TILE_TABLE); the others run there what they run on avx512dot.
#pragma once

namespace fastff {

// All that this build holds, the plainest first. The order is that of FASTFF_CHOSEN_TABLE.
enum class Isa : int {
  scalar,
#if defined(__x86_64__)
  avx2,
  avx512,
  avx512dot,  // with VNNI and BF16
  amx,        // avx512dot with tiles of int8 and bf16
#elif defined(__aarch64__)
  neon,
#endif
};

// The one in use: the best of this CPU, or the one that FASTFF_ISA names. Throws BadIsa at first use if that cannot run.
Isa isa();
const char* isa_name();
bool has_tiles();  // the one in use has matrix tiles
void set_isa(const char* name);  // throws BadIsa

template <class Table, int tables>
const Table& chosen(const Table* const (&table)[tables]) {
  return *table[static_cast<int>(isa())];
}

#if defined(__x86_64__)
#define FASTFF_DECLARE_TABLES(Type, family) extern const Type family##_scalar, family##_avx2, family##_avx512
#define FASTFF_CHOSEN_TABLE(Type, family) \
  ::fastff::chosen<Type>({&family##_scalar, &family##_avx2, &family##_avx512, &family##_avx512, \
                           &family##_avx512})
#define FASTFF_DECLARE_DOT_TABLES(Type, family) \
  FASTFF_DECLARE_TABLES(Type, family);          \
  extern const Type family##_avx512dot
#define FASTFF_CHOSEN_DOT_TABLE(Type, family) \
  ::fastff::chosen<Type>({&family##_scalar, &family##_avx2, &family##_avx512, &family##_avx512dot, \
                           &family##_avx512dot})
#define FASTFF_DECLARE_TILE_TABLES(Type, family) \
  FASTFF_DECLARE_DOT_TABLES(Type, family);       \
  extern const Type family##_amx
#define FASTFF_CHOSEN_TILE_TABLE(Type, family) \
  ::fastff::chosen<Type>({&family##_scalar, &family##_avx2, &family##_avx512, &family##_avx512dot, &family##_amx})
#elif defined(__aarch64__)
#define FASTFF_DECLARE_TABLES(Type, family) extern const Type family##_scalar, family##_neon
#define FASTFF_CHOSEN_TABLE(Type, family) ::fastff::chosen<Type>({&family##_scalar, &family##_neon})
#else
#define FASTFF_DECLARE_TABLES(Type, family) extern const Type family##_scalar
#define FASTFF_CHOSEN_TABLE(Type, family) ::fastff::chosen<Type>({&family##_scalar})
#endif
#if !defined(__x86_64__)
#define FASTFF_DECLARE_DOT_TABLES(Type, family) FASTFF_DECLARE_TABLES(Type, family)
#define FASTFF_CHOSEN_DOT_TABLE(Type, family) FASTFF_CHOSEN_TABLE(Type, family)
#define FASTFF_DECLARE_TILE_TABLES(Type, family) FASTFF_DECLARE_TABLES(Type, family)
#define FASTFF_CHOSEN_TILE_TABLE(Type, family) FASTFF_CHOSEN_TABLE(Type, family)
#endif

}  // namespace fastff
