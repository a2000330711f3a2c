// Every family of kernels for neon.
#define FASTFF_ISA_NAME neon
#include "isa/neon.h"
#include "isa/groups_plain.h"
#include "isa/words_plain.h"

#include "layer/families.h"
#include "model/families.h"
