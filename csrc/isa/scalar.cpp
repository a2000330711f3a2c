// Every family of kernels for scalar.
#define FASTFF_ISA_NAME scalar
#include "isa/scalar.h"
#include "isa/groups_plain.h"
#include "isa/words_plain.h"

#include "layer/families.h"
#include "model/families.h"
