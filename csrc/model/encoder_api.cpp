// The C functions of encoders: checks of what a caller gives, then model/encoder.h.
#include <cmath>

#include "base/checks.h"
#include "base/errors.h"
#include "model/encoder.h"
#include "model/fastff_model.h"
#include "model/weights_file.h"

using namespace fastff;

struct fastff_encoder {
  fastff_encoder(const char* path, bool map) : file(path, map), encoder(file) {}

  const WeightsFile file;
  const Encoder encoder;
};

namespace {

void need_below(const char* name, const int32_t* values, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= limit)
      refuse(std::string(name) + " " + std::to_string(values[i]) + " is not 0 to " + std::to_string(limit - 1));
}

// Tokens of all sequences.
int64_t check_lengths(const EncoderShape& s, const int64_t* lengths, int64_t sequences) {
  need_in("sequences", sequences, 0, kMaxRows);
  need(sequences == 0 || lengths != nullptr, "lengths is NULL");
  int64_t tokens = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    need_in("length of a sequence", lengths[i], 1, s.positions);
    tokens += lengths[i];
  }
  need_in("tokens", tokens, 0, kMaxRows);
  return tokens;
}

}  // namespace

int32_t fastff_encoder_open(const char* path, int32_t map, fastff_encoder** encoder) {
  return guarded([&] {
    need(path != nullptr && encoder != nullptr, "path or encoder is NULL");
    *encoder = nullptr;
    *encoder = new fastff_encoder(path, map != 0);
  });
}

int32_t fastff_encoder_describe(const fastff_encoder* encoder, fastff_encoder_facts* facts) {
  return guarded([&] {
    need(encoder != nullptr && facts != nullptr, "encoder or facts is NULL");
    const EncoderShape& s = encoder->encoder.shape();
    *facts = {s.vocab_size, s.positions, s.types, s.hidden, s.layers, encoder->file.bytes()};
  });
}

int32_t fastff_encoder_run(const fastff_encoder* encoder, const int32_t* ids, const int32_t* types,
                           const int64_t* lengths, int64_t sequences, float* hidden, int32_t threads) {
  return guarded([&] {
    need(encoder != nullptr, "encoder is NULL");
    const EncoderShape& s = encoder->encoder.shape();
    const int64_t tokens = check_lengths(s, lengths, sequences);
    if (tokens == 0) return;
    need(ids != nullptr && hidden != nullptr, "ids or hidden is NULL");
    const Array ids_array = array("ids", ids, tokens), types_array = array("types", types, types ? tokens : 0);
    const Array lengths_array = array("lengths", lengths, sequences);
    const Array hidden_array = array("hidden", hidden, tokens * s.hidden);
    need_aligned({ids_array, types_array, lengths_array, hidden_array});
    need_disjoint({hidden_array}, {ids_array, types_array, lengths_array});
    need_below("token", ids, tokens, s.vocab_size);
    if (types) need_below("type", types, tokens, s.types > 0 ? s.types : 1);
    encoder->encoder.run(ids, types, lengths, sequences, hidden, threads);
  });
}

void fastff_encoder_free(fastff_encoder* encoder) { delete encoder; }
