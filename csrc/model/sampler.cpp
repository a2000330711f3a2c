#include "model/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/checks.h"

namespace fastff {
namespace {

int64_t largest(const float* logits, int64_t count) {
  int64_t best = 0;
  bool not_a_number = false;
  for (int64_t i = 0; i < count; ++i) {
    not_a_number |= logits[i] != logits[i];
    if (logits[i] > logits[best]) best = i;
  }
  need(!not_a_number, "logits hold NaN");
  return best;
}

}  // namespace

double Random::next() {
  uint64_t z = state_ += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return static_cast<double>((z ^ z >> 31) >> 11) * 0x1p-53;
}

int64_t sample(const float* logits, int64_t count, const Sampling& sampling, Random& random, std::vector<int32_t>& room) {
  const int64_t best = largest(logits, count);
  if (sampling.temperature <= 0) return best;
  need(std::isfinite(logits[best]), "the largest logit is infinite: it leaves nothing to draw by");
  room.resize(count);
  std::iota(room.begin(), room.end(), 0);
  const auto likelier = [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
  int64_t kept = sampling.top_k > 0 ? std::min(sampling.top_k, count) : count;
  if (kept < count) std::nth_element(room.begin(), room.begin() + kept - 1, room.end(), likelier);
  if (kept < count || sampling.top_p < 1) std::sort(room.begin(), room.begin() + kept, likelier);
  const double inverse = 1 / static_cast<double>(sampling.temperature);
  const auto weight = [&](int64_t i) { return std::exp((logits[room[i]] - static_cast<double>(logits[best])) * inverse); };
  double total = 0;
  for (int64_t i = 0; i < kept; ++i) total += weight(i);
  if (sampling.top_p < 1) {
    const double wanted = std::max(0.0, static_cast<double>(sampling.top_p)) * total;
    double sum = 0;
    int64_t i = 0;
    do sum += weight(i++);
    while (i < kept && sum < wanted);
    kept = i;
    total = sum;
  }
  double left = random.next() * total;
  for (int64_t i = 0; i + 1 < kept; ++i)
    if ((left -= weight(i)) < 0) return room[i];
  return room[kept - 1];
}

}  // namespace fastff
