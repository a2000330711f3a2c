// Every family of kernels that gains from dot products of short numbers, for the instruction set whose Vec<T> the including
// file has defined.
#include "layer/packed_leaves_impl.h"
#include "layer/router_kernels_impl.h"
