// Every family of kernels, for the instruction set whose Vec<T> the including file has defined.
#include "layer/conditional_impl.h"
#include "layer/dot_families.h"
#include "layer/tree_kernels_impl.h"
