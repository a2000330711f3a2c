// Every family of kernels of whole models, for the instruction set whose Vec<T>, Words<W> and
// Groups the including file has defined.
#include "model/attention_impl.h"
#include "model/bidirectional_impl.h"
#include "model/linear_impl.h"
#include "model/norm_impl.h"
