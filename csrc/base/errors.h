// Errors across the C boundary: what a function's body throws becomes a status and a message of this thread.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "fastff.h"

namespace fastff {

// An instruction set that is unknown or that this CPU lacks.
struct BadIsa : std::runtime_error {
  using std::runtime_error::runtime_error;
};

const char* last_error() noexcept;  // never null; "" after a success
void clear_error() noexcept;
int32_t current_exception_status() noexcept;  // keeps its message for last_error()

// Runs body. std::invalid_argument becomes FASTFF_BAD_ARGUMENT, std::bad_alloc FASTFF_OUT_OF_MEMORY, BadIsa
// FASTFF_BAD_ISA, anything else FASTFF_INTERNAL.
template <class F>
int32_t guarded(const F& body) noexcept {
  try {
    clear_error();
    body();
    return FASTFF_OK;
  } catch (...) {
    return current_exception_status();
  }
}

}  // namespace fastff
