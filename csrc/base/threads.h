// Work on many threads: the host's pool if it gave one, else fastff's own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "fastff.h"

namespace fastff {

void set_parallel_for(fastff_parallel_for host);

// While one lives, work of this thread runs on fastff's own pool even if the host gave one: for calls that cut hundreds of
// short pieces in turn, between which the host's pool may sleep.
class OwnPoolScope {
 public:
  OwnPoolScope();
  ~OwnPoolScope();
  OwnPoolScope(const OwnPoolScope&) = delete;
  OwnPoolScope& operator=(const OwnPoolScope&) = delete;

 private:
  bool before_;
};

int resolved_threads(int threads);  // a positive number as it is, else the processors that this process may use

// Run piece(begin, end) for `pieces` equal cuts of [0, n). What a piece throws is thrown again here.
void run_pieces(int64_t n, int64_t pieces, int threads, const std::function<void(int64_t, int64_t)>& piece);

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

}  // namespace fastff
