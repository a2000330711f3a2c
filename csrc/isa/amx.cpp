// The families of kernels that gain from tiles of int8, for AMX beside AVX-512 with VNNI and BF16.
#define FASTFF_ISA_NAME amx
#include "isa/avx512.h"
#include "isa/groups_avx512.h"
#include "isa/words_avx512.h"

#include "layer/dot_families.h"
#include "model/experts_impl.h"
#include "model/families.h"
