#include "limits.h"

#include <atomic>
#include <chrono>

#include "ops.h"
#include "threads.h"

namespace bise {

namespace {

std::atomic<int64_t> sink;  // keeps loops that compute nothing of use

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

double read_rate(const uint8_t* data, int64_t bytes, int threads) {
  constexpr int64_t kChunk = 1 << 20;
  const auto sum = chosen_ops().read_all;
  const int64_t chunks = bytes / kChunk;
  Pool pool(threads);
  pool.parallel_for(threads, 1, [&](int64_t, int64_t, int) { sink += sum(data, kChunk); });  // wakes the threads
  const double start = now();
  pool.parallel_for(chunks, 1, [&](int64_t begin, int64_t end, int) {
    sink += sum(data + begin * kChunk, (end - begin) * kChunk);
  });
  return double(chunks * kChunk) / (now() - start);
}

double arithmetic_rate(Arithmetic kind, int threads, double seconds) {
  const Ops& ops = chosen_ops();
  if (&ops == &ops_scalar) return 0;  // says nothing about the processor
  const auto loop = kind == Arithmetic::kInt8 ? ops.dot_steps : ops.float_steps;
  Pool pool(threads);
  std::atomic<int64_t> done{0};
  const double start = now(), stop = start + seconds;
  pool.parallel_for(threads, 1, [&](int64_t, int64_t, int) {
    int64_t mine = 0;
    do mine += loop();
    while (now() < stop);
    done += mine;
  });
  return double(done) / (now() - start);
}

}  // namespace bise
