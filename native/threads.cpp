#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bise {

namespace {

constexpr uint64_t kGeneration = uint64_t(1) << 32;
constexpr uint64_t kInside = kGeneration - 1;
// Between two operations of one step Python needs a few microseconds: spin about 50 us, then sleep.
constexpr int kSpins = 2000;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
  stop_.store(true);
  wake_.fetch_add(1);
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

// Takes the next chunk; false when none is left.
bool Pool::claim(int64_t& begin, int64_t& end) {
  if (shrinking_) {
    begin = next_.load(std::memory_order_relaxed);
    do {
      if (begin >= n_) return false;
      const int64_t share = (n_ - begin) / (2 * size() * grain_);
      end = begin + (share > 1 ? share : 1) * grain_;
    } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
  } else {
    begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    end = begin + grain_;
  }
  if (end > n_) end = n_;
  return begin < n_;
}

void Pool::take_chunks(int thread) {
  for (int64_t begin, end; claim(begin, end);) body_(context_, begin, end, thread);
}

void Pool::run(int64_t n, int64_t grain, bool shrinking, Body body, void* context) {
  n_ = n;
  grain_ = grain;
  shrinking_ = shrinking;
  body_ = body;
  context_ = context;
  next_.store(0, std::memory_order_relaxed);
  state_.fetch_add(kGeneration);  // open
  if (sleepers_.load() > 0) {
    wake_.fetch_add(1);
    wake_.notify_all();
  }
  take_chunks(0);
  state_.fetch_add(kGeneration);  // close
  for (int spins = 0; state_.load(std::memory_order_acquire) & kInside; ++spins) {
    if (spins < 4 * kSpins) pause();
    else std::this_thread::yield();
  }
}

void Pool::work(int thread) {
  uint64_t seen = 0;  // generation of the last job taken
  for (;;) {
    uint64_t state = state_.load(std::memory_order_acquire);
    int spins = 0;
    while (!((state / kGeneration) & 1) || state / kGeneration == seen) {
      if (stop_.load(std::memory_order_relaxed)) return;
      if (++spins < kSpins) {
        pause();
      } else {
        const uint32_t ticket = wake_.load();
        sleepers_.fetch_add(1);
        state = state_.load();
        const bool open = ((state / kGeneration) & 1) && state / kGeneration != seen;
        if (!open && !stop_.load()) wake_.wait(ticket);
        sleepers_.fetch_sub(1);
        spins = 0;
      }
      state = state_.load(std::memory_order_acquire);
    }
    const uint64_t generation = state / kGeneration;
    if (!state_.compare_exchange_strong(state, state + 1, std::memory_order_acq_rel)) continue;
    seen = generation;
    take_chunks(thread);
    state_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

}  // namespace bise
