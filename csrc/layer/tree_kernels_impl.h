// The table of the trees' kernels for one instruction set.
#include "isa/table.h"
#include "layer/backward_impl.h"
#include "layer/descent.h"
#include "layer/kernels.h"

namespace fastff {
namespace {

template <class T>
constexpr Kernels<T> kKernels = {forward<T, T>, backward_rows<T>, backward_w_in<T>, backward_w_out<T>};

}  // namespace

const TreeKernels FASTFF_TABLE(tree_kernels) = {kKernels<float>, kKernels<double>, forward<float, Bf16>,
                                                forward<float, int8_t>};

}  // namespace fastff
