// Many threads: the host's pool if it gave one, else a small pool that spins briefly and then sleeps.
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "base/cpus.h"
#include "base/threads.h"

namespace fastff {
namespace {

constexpr int kMostThreads = 1024;

std::atomic<fastff_parallel_for> host_pool{nullptr};
thread_local bool inside_pool = false;
thread_local bool own_pool_only = false;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Workers wait for a new generation of work; every worker takes pieces from a shared counter.
class Pool {
 public:
  // With fewer workers where the system gives no more threads: then each takes more pieces.
  explicit Pool(int workers) {
    threads_.reserve(workers);
    try {
      while (static_cast<int>(threads_.size()) < workers) threads_.emplace_back([this] { work(); });
    } catch (const std::exception&) {  // std::system_error, or no memory for one more
    }
  }
  ~Pool() {
    stop_ = true;
    announce();
    for (auto& thread : threads_) thread.join();
  }

  void run(int64_t pieces, const std::function<void(int64_t)>& body) {
    body_ = &body;
    pieces_ = pieces;
    next_ = 0;
    busy_ = static_cast<int>(threads_.size());
    announce();
    take();
    while (busy_.load(std::memory_order_acquire)) relax();
  }

 private:
  static constexpr int kSpins = 20000;  // about 0.1 ms: the gap between the layers of a model

  void announce() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++generation_;
    }
    wake_.notify_all();
  }

  void take() {
    inside_pool = true;
    for (int64_t i; (i = next_.fetch_add(1)) < pieces_;) (*body_)(i);
    inside_pool = false;
  }

  void work() {
    for (uint64_t seen = 0;;) {
      for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spin) relax();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
      }
      if (stop_) return;
      take();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<bool> stop_{false};
  const std::function<void(int64_t)>* body_ = nullptr;
  int64_t pieces_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
};

struct OwnPool {
  std::mutex mutex;  // one caller at a time; another caller does its work alone
  std::unique_ptr<Pool> pool;
  int workers = 0;
};

// Leaked on purpose: threads must not be joined while the process is being torn down, nor in a forked child.
OwnPool*& own() {
  static OwnPool* instance = [] {
    pthread_atfork(nullptr, nullptr, [] { own() = new OwnPool; });  // a child has none of its parent's threads
    return new OwnPool;
  }();
  return instance;
}

void run_on_own_pool(int64_t pieces, int threads, const std::function<void(int64_t)>& body) {
  OwnPool& mine = *own();
  std::unique_lock<std::mutex> lock(mine.mutex, std::defer_lock);
  if (inside_pool || !lock.try_lock()) {  // inside, this thread may hold it already
    for (int64_t i = 0; i < pieces; ++i) body(i);
    return;
  }
  if (mine.workers < threads - 1) {
    mine.workers = 0;  // until there is a pool again
    mine.pool.reset();
    mine.pool = std::make_unique<Pool>(threads - 1);
    mine.workers = threads - 1;
  }
  mine.pool->run(pieces, body);
}

}  // namespace

OwnPoolScope::OwnPoolScope() : before_(own_pool_only) { own_pool_only = true; }
OwnPoolScope::~OwnPoolScope() { own_pool_only = before_; }

void set_parallel_for(fastff_parallel_for host) { host_pool = host; }

int resolved_threads(int threads) {
  return threads > 0 ? std::min(threads, kMostThreads) : usable_processors();
}

void run_pieces(int64_t n, int64_t pieces, int threads, const std::function<void(int64_t, int64_t)>& piece) {
  std::exception_ptr failure;
  std::mutex failing;
  const std::function<void(int64_t)> body = [&](int64_t i) {
    try {
      piece(n * i / pieces, n * (i + 1) / pieces);
    } catch (...) {
      std::lock_guard<std::mutex> lock(failing);
      failure = std::current_exception();
    }
  };
  const fastff_parallel_for host = own_pool_only ? nullptr : host_pool.load();
  if (host) {
    const auto range = [](int64_t begin, int64_t end, void* context) {
      for (int64_t i = begin; i < end; ++i) (*static_cast<const std::function<void(int64_t)>*>(context))(i);
    };
    if (host(0, pieces, 1, range, const_cast<std::function<void(int64_t)>*>(&body)))
      throw std::runtime_error("the host's thread pool failed");
  } else {
    run_on_own_pool(pieces, threads, body);
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace fastff
