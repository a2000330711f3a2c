// Every family of kernels for avx512.
#define FASTFF_ISA_NAME avx512
#include "isa/avx512.h"
#include "isa/groups_avx512.h"
#include "isa/words_avx512.h"

#include "layer/families.h"
#include "model/families.h"
