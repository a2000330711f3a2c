// The name of this instruction set's table of a family of kernels (base/dispatch.h). FASTFF_ISA_NAME is defined by the
// including file.
#pragma once

#define FASTFF_TABLE_OF_(family, isa) family##_##isa
#define FASTFF_TABLE_OF(family, isa) FASTFF_TABLE_OF_(family, isa)
#define FASTFF_TABLE(family) FASTFF_TABLE_OF(family, FASTFF_ISA_NAME)
