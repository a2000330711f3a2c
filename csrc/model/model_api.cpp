// The C functions of models and sessions: checks of what a caller gives, then model/decoder.h.
#include <limits>
#include <memory>
#include <string>

#include "base/checks.h"
#include "base/errors.h"
#include "model/decoder.h"
#include "model/fastff_model.h"
#include "model/sampler.h"
#include "model/weights_file.h"

using namespace fastff;

struct fastff_model {
  fastff_model(const char* path, bool map) : file(path, map), decoder(file) {}

  const WeightsFile file;
  const Decoder decoder;
};

struct fastff_session {
  fastff_session(const fastff_model& of, int64_t capacity) : model(of), session(of.decoder, capacity) {}

  const fastff_model& model;
  Session session;
  Random random{0};
  std::vector<int32_t> room;
};

namespace {

// The session for one call; refuses a second thread.
class SessionUse {
 public:
  explicit SessionUse(fastff_session* session) : session_(session) {
    need(session != nullptr, "session is NULL");
    need(!session->session.in_use.test_and_set(std::memory_order_acquire), "the session is in use by another thread");
  }
  ~SessionUse() { session_->session.in_use.clear(std::memory_order_release); }
  SessionUse(const SessionUse&) = delete;
  SessionUse& operator=(const SessionUse&) = delete;

 private:
  fastff_session* session_;
};

void check_sampling(const fastff_sampling* sampling) {
  need(sampling != nullptr, "sampling is NULL");
  const float temperature = sampling->temperature, top_p = sampling->top_p;
  if (!(temperature >= 0 && temperature <= 1e6f)) refuse("temperature " + std::to_string(temperature) + " is not 0 to 1e6");
  if (!(top_p > 0 && top_p <= 1)) refuse("top_p " + std::to_string(top_p) + " is not above 0 and at most 1");
  need_in("top_k", sampling->top_k, 0, std::numeric_limits<int64_t>::max());
}

}  // namespace

int32_t fastff_model_open(const char* path, int32_t map, fastff_model** model) {
  return guarded([&] {
    need(path != nullptr && model != nullptr, "path or model is NULL");
    *model = nullptr;
    *model = new fastff_model(path, map != 0);
  });
}

int32_t fastff_model_describe(const fastff_model* model, fastff_model_facts* facts) {
  return guarded([&] {
    need(model != nullptr && facts != nullptr, "model or facts is NULL");
    const DecoderShape& s = model->decoder.shape();
    *facts = {s.vocab_size, s.positions, s.hidden, s.layers, model->file.bytes()};
  });
}

void fastff_model_free(fastff_model* model) { delete model; }

int32_t fastff_session_new(const fastff_model* model, int64_t capacity, fastff_session** session) {
  return guarded([&] {
    need(model != nullptr && session != nullptr, "model or session is NULL");
    *session = nullptr;
    *session = new fastff_session(*model, capacity);
  });
}

int64_t fastff_session_length(const fastff_session* session) { return session ? session->session.length() : 0; }

int32_t fastff_session_rewind(fastff_session* session, int64_t length) {
  return guarded([&] {
    const SessionUse use(session);
    session->session.rewind(length);
  });
}

int32_t fastff_session_feed(fastff_session* session, const int32_t* ids, int64_t count, float* logits, int32_t threads) {
  return guarded([&] {
    const SessionUse use(session);
    need_in("count", count, 0, kMaxRows);
    need(count == 0 || ids != nullptr, "ids is NULL");
    const int64_t numbers = logits ? count * session->model.decoder.shape().vocab_size : 0;
    const Array ids_array = array("ids", ids, count), logits_array = array("logits", logits, numbers);
    need_aligned({ids_array, logits_array});
    need_disjoint({logits_array}, {ids_array});
    session->session.feed(ids, count, logits, threads);
  });
}

int32_t fastff_session_seed(fastff_session* session, uint64_t seed) {
  return guarded([&] {
    const SessionUse use(session);
    session->random = Random(seed);
  });
}

int32_t fastff_session_sample(fastff_session* session, const fastff_sampling* sampling, int32_t* id) {
  return guarded([&] {
    const SessionUse use(session);
    check_sampling(sampling);
    need(id != nullptr, "id is NULL");
    need(session->session.has_logits(), "no token was read since the session began or was rewound");
    const Session& s = session->session;
    *id = static_cast<int32_t>(sample(s.logits(), session->model.decoder.shape().vocab_size,
                                      {sampling->temperature, sampling->top_p, sampling->top_k}, session->random,
                                      session->room));
  });
}

void fastff_session_free(fastff_session* session) { delete session; }
