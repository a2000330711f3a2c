// The kernels of packed leaves, the same source for every instruction set: Words<W> (isa/words_*.h) multiplies lines.
//
// int8 sums are exact. The others run in one order for any number of rows, and so a row's bits never depend on it. Matrix
// tiles (AMX) multiply with w_out of leaves of 17 to 64 neurons. With narrower ones they are slower, for sums on their way to
// y go through memory, and w_in gains nothing: it waits for memory.
#pragma once

#include "isa/table.h"
#include "layer/packed_leaves_outputs.h"
#include "layer/packed_leaves_scores.h"

namespace fastff {
namespace {

template <class W>
constexpr LeafKernels kLeafKernels = {prepare<W>, scores<W>, factors<W>, outputs<W>};

}  // namespace

const LeafTable FASTFF_TABLE(packed_leaves) = {kLeafKernels<float>, kLeafKernels<Bf16>, kLeafKernels<int8_t>};

}  // namespace fastff
