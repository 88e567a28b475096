// `parallel_for`: the only concurrency primitive. Work is cut into chunks taken from an atomic counter, so a slow
// core delays nobody else; which thread takes a chunk never changes a result.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace bise {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return int(workers_.size()) + 1; }

  // Calls fn(begin, end, thread) for chunks of [0, n) of at most `grain`; returns when all are done. `thread` is
  // below size(). Not reentrant; one caller at a time.
  template <class Fn>
  void parallel_for(int64_t n, int64_t grain, Fn&& fn) {
    parallel(n, grain, false, fn);
  }

  // The same with chunks that shrink: a share of what is left, in multiples of `grain`. Long streams of memory first,
  // and no thread waits long for the other at the end.
  template <class Fn>
  void parallel_shrinking(int64_t n, int64_t grain, Fn&& fn) {
    parallel(n, grain, true, fn);
  }

 private:
  template <class Fn>
  void parallel(int64_t n, int64_t grain, bool shrinking, Fn& fn) {
    if (n <= 0) return;
    if (workers_.empty() || n <= grain) {
      const int64_t step = shrinking ? n : grain;
      for (int64_t begin = 0; begin < n; begin += step) fn(begin, begin + step < n ? begin + step : n, 0);
      return;
    }
    run(n, grain, shrinking,
        [](void* context, int64_t begin, int64_t end, int thread) {
          (*static_cast<std::remove_reference_t<Fn>*>(context))(begin, end, thread);
        },
        &fn);
  }

  using Body = void (*)(void* context, int64_t begin, int64_t end, int thread);

  void run(int64_t n, int64_t grain, bool shrinking, Body body, void* context);
  bool claim(int64_t& begin, int64_t& end);
  void take_chunks(int thread);
  void work(int thread);

  // High half: generation, odd while a job is open. Low half: workers inside the job. A worker that wakes too late
  // finds the job closed and is not waited for.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> wake_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  int64_t n_ = 0, grain_ = 1;
  bool shrinking_ = false;
  Body body_ = nullptr;
  void* context_ = nullptr;
  std::vector<std::thread> workers_;
};

}  // namespace bise
