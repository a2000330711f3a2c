// Every family of kernels for avx2.
#define FASTFF_ISA_NAME avx2
#include "isa/avx2.h"
#include "isa/groups_avx2.h"
#include "isa/words_avx2.h"

#include "layer/families.h"
#include "model/families.h"
