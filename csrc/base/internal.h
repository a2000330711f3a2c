// What the ISA-independent files share: the chosen kernels, errors across the C boundary, work on many threads.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <string>

#include "layer/kernels.h"
#include "layer/plan.h"

namespace fastff {

// The instruction set in use. Throws std::runtime_error at first use if FASTFF_ISA names one that cannot run.
const Isa& isa();
void set_isa(const char* name);

template <class T>
const Kernels<T>& kernels();

// Run piece(begin, end) for `pieces` equal cuts of [0, n) on the host's pool or fastff's own. What a piece throws is
// thrown again here.
void run_pieces(int64_t n, int64_t pieces, int threads, const std::function<void(int64_t, int64_t)>& piece);
int resolved_threads(int threads);  // a positive number as it is, else the processor's

// At most `threads` contiguous pieces of [0, n), of at least `grain` each; they depend on these numbers only.
inline int64_t pieces_of(int64_t n, int64_t grain, int threads) {
  return threads == 1 ? 1 : std::max<int64_t>(1, std::min<int64_t>(resolved_threads(threads), n / grain));
}
template <class F>
void parallel(int64_t n, int64_t grain, int threads, const F& piece) {
  if (n <= 0) return;
  const int64_t pieces = pieces_of(n, grain, threads);
  if (pieces <= 1) piece(int64_t{0}, n);
  else run_pieces(n, pieces, static_cast<int>(pieces), piece);
}
void set_parallel_for(fastff_parallel_for host);

// Checks a caller's tree. Throws std::invalid_argument naming the value seen and the one expected.
Tree checked(const fastff_tree* tree);

// Likewise a caller's weights: present, aligned, and a bias of the leaves only where leaves have one.
template <class T>
void need_weights(const Tree& tree, const T* w_in, const T* b_in, const T* w_out, const T* b_out);

template <class T>
View<T> plain_view(const Tree& tree, int64_t t, const T* w_in, const T* b_in, const T* w_out, const T* b_out);

// Throws std::invalid_argument for rows or pointers that do not fit.
template <class T>
void check_rows(const Tree& tree, const T* x, int64_t rows, const Forward<T>& out);

// All trees over all rows, split over threads. kernel: of the chosen instruction set, for these views.
template <class T, class W, class Kernel>
void forward_rows(const Kernel& kernel, const Tree& tree, const View<T, W>* views, const T* x, int64_t rows,
                  const Forward<T>& out, int threads) {
  check_rows(tree, x, rows, out);
  parallel(rows, rows_a_piece(tree), threads,
           [&](int64_t begin, int64_t end) { kernel(tree, views, x, begin, end, out); });
}

void clear_error() noexcept;
int32_t current_exception_status() noexcept;  // keeps its message for fastff_error()

// Runs body and turns what it throws into a status and a message.
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
