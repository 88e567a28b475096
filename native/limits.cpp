#include "limits.h"

#include <atomic>
#include <chrono>
#include <cstring>

#include "ops.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bise {

namespace {

std::atomic<int64_t> sink;  // keeps loops that compute nothing of use

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool chosen(const char* isa) { return !std::strcmp(chosen_ops().name, isa); }

int64_t sum_words(const uint8_t* p, int64_t bytes) {
  uint64_t a = 0, b = 0, c = 0, d = 0, w[4];
  for (int64_t i = 0; i + 32 <= bytes; i += 32) {
    std::memcpy(w, p + i, 32);
    a ^= w[0], b ^= w[1], c ^= w[2], d ^= w[3];
  }
  return int64_t(a ^ b ^ c ^ d);
}

// Rounds of independent instructions: enough to hide the latency of a fused multiply-add (4) on two ports.
constexpr int kChains = 12;
constexpr int64_t kLoop = 4096;

#if defined(__x86_64__)

// Operands come through `volatile` and results leave through `sink`, so that no loop is folded away.
volatile int one = 1;

__attribute__((target("avx512f"))) int64_t sum_avx512(const uint8_t* p, int64_t bytes) {
  __m512i x[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int j = 0; j < 4; ++j) x[j] = _mm512_xor_si512(x[j], _mm512_loadu_si512(p + i + 64 * j));
  return _mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(x[0], x[1]), _mm512_xor_si512(x[2], x[3])));
}

__attribute__((target("avx2"))) int64_t sum_avx2(const uint8_t* p, int64_t bytes) {
  __m256i x[4] = {};
  for (int64_t i = 0; i + 128 <= bytes; i += 128)
    for (int j = 0; j < 4; ++j)
      x[j] = _mm256_xor_si256(x[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + 32 * j)));
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(x[0], x[1]), _mm256_xor_si256(x[2], x[3]));
  return _mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 3);
}

// Each loop returns the operations it did; the empty asm makes the compiler keep every step.
__attribute__((target("avx512f,avx512bw,avx512vnni"))) int64_t int8_avx512() {
  __m512i sums[kChains] = {};
  const __m512i a = _mm512_set1_epi8(char(one)), b = _mm512_set1_epi8(char(one));
  for (int64_t i = 0; i < kLoop; ++i)
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      sums[c] = _mm512_dpbusd_epi32(sums[c], a, b);
      __asm__ volatile("" : "+v"(sums[c]));
    }
  for (const __m512i& s : sums) sink += _mm512_reduce_add_epi32(s);
  return kLoop * kChains * 128;
}

__attribute__((target("avx512f"))) int64_t float_avx512() {
  __m512 sums[kChains] = {};
  const __m512 a = _mm512_set1_ps(float(one)), b = _mm512_set1_ps(float(one));
  for (int64_t i = 0; i < kLoop; ++i)
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      sums[c] = _mm512_fmadd_ps(a, b, sums[c]);
      __asm__ volatile("" : "+v"(sums[c]));
    }
  for (const __m512& s : sums) sink += int64_t(_mm512_reduce_add_ps(s));
  return kLoop * kChains * 32;
}

__attribute__((target("avx2"))) int64_t int8_avx2() {
  __m256i sums[kChains] = {};
  const __m256i a = _mm256_set1_epi8(char(one)), b = _mm256_set1_epi8(char(one)), ones = _mm256_set1_epi16(1);
  for (int64_t i = 0; i < kLoop; ++i)
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      __m256i pairs = _mm256_maddubs_epi16(a, b);
      __asm__ volatile("" : "+x"(pairs));
      sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(pairs, ones));
      __asm__ volatile("" : "+x"(sums[c]));
    }
  for (const __m256i& s : sums) sink += _mm256_extract_epi64(s, 0);
  return kLoop * kChains * 64;
}

__attribute__((target("avx2,fma"))) int64_t float_avx2() {
  __m256 sums[kChains] = {};
  const __m256 a = _mm256_set1_ps(float(one)), b = _mm256_set1_ps(float(one));
  for (int64_t i = 0; i < kLoop; ++i)
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      sums[c] = _mm256_fmadd_ps(a, b, sums[c]);
      __asm__ volatile("" : "+x"(sums[c]));
    }
  for (const __m256& s : sums) sink += int64_t(_mm256_cvtss_f32(s));
  return kLoop * kChains * 16;
}

#endif

using Sum = int64_t (*)(const uint8_t*, int64_t);
using Loop = int64_t (*)();

Sum sum_loop() {
#if defined(__x86_64__)
  if (chosen("avx512")) return sum_avx512;
  if (chosen("avx2")) return sum_avx2;
#endif
  return sum_words;
}

Loop arithmetic_loop(Arithmetic kind) {
  const bool whole = kind == Arithmetic::kInt8;
#if defined(__x86_64__)
  if (chosen("avx512")) return whole ? int8_avx512 : float_avx512;
  if (chosen("avx2")) return whole ? int8_avx2 : float_avx2;
#endif
  (void)whole;
  return nullptr;
}

}  // namespace

double read_rate(const uint8_t* data, int64_t bytes, int threads) {
  constexpr int64_t kChunk = 1 << 20;
  const Sum sum = sum_loop();
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
  const Loop loop = arithmetic_loop(kind);
  if (!loop) return 0;
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
