// Laying leaves out for inference.
#pragma once

#include "layer/packed_leaves.h"

namespace fastff {

LeafLayout leaf_layout(const Leaves& leaves, int weights, bool biased);

// Copies w_in, b_in and w_out of all leaves. in: leaves * in_bytes, zeroed; out: all_out_bytes().
void fill_leaves(const LeafLayout& layout, const LeafWeights<float>& from, char* in, char* out);

}  // namespace fastff
