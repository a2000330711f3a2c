#include "base/errors.h"

#include <cstdio>
#include <new>

namespace fastff {
namespace {

thread_local char message[512];  // of fixed size: keeping a message must not fail for want of memory

int32_t keep(int32_t status, const char* text) noexcept {
  std::snprintf(message, sizeof message, "%s", text);
  return status;
}

}  // namespace

const char* last_error() noexcept { return message; }

void clear_error() noexcept { message[0] = '\0'; }

int32_t current_exception_status() noexcept {
  try {
    throw;
  } catch (const std::invalid_argument& e) {
    return keep(FASTFF_BAD_ARGUMENT, e.what());
  } catch (const std::bad_alloc&) {
    return keep(FASTFF_OUT_OF_MEMORY, "out of memory");
  } catch (const BadIsa& e) {
    return keep(FASTFF_BAD_ISA, e.what());
  } catch (const std::exception& e) {
    return keep(FASTFF_INTERNAL, e.what());
  } catch (...) {
    return keep(FASTFF_INTERNAL, "an exception of an unknown type");
  }
}

}  // namespace fastff
