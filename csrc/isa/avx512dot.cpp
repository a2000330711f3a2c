// The families of kernels that gain from dot products of short numbers, for AVX-512 with VNNI and BF16.
#define FASTFF_ISA_NAME avx512dot
#include "isa/avx512.h"
#include "isa/groups_avx512.h"
#include "isa/words_avx512.h"

#include "layer/dot_families.h"
#include "model/families.h"
