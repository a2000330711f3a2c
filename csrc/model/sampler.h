// The next token from logits.
#pragma once

#include <cstdint>
#include <vector>

namespace fastff {

struct Sampling {
  float temperature = 0;  // 0: the largest logit, the lowest token of equal ones
  float top_p = 1;        // the likeliest tokens whose probabilities reach it
  int64_t top_k = 0;      // the likeliest tokens; 0: all
};

// Numbers in [0, 1) from a seed, the same on every machine (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  double next();

 private:
  uint64_t state_;
};

// Throws std::invalid_argument for logits that hold NaN, or to be drawn by whose largest is infinite. room is scratch.
int64_t sample(const float* logits, int64_t count, const Sampling& sampling, Random& random, std::vector<int32_t>& room);

}  // namespace fastff
