// AVX-512 with VNNI: sixteen lanes in one register. Compiled with its own flags; exports one symbol.
#include <immintrin.h>

#include <type_traits>

#include "../formats.h"
#include "../ops.h"

#define BISE_PRAGMA(x) _Pragma(#x)
#ifdef BISE_SANITIZED
#define BISE_UNROLL(n)
#else
#define BISE_UNROLL(n) BISE_PRAGMA(GCC unroll n)
#endif

namespace bise {
namespace {

struct R {
  static constexpr int L = 16, kRegisters = 32;
  static constexpr bool kShortSums = false;
  using F = __m512;
  using I = __m512i;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static float sum(F x) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  static float top(F x) { return _mm512_reduce_max_ps(x); }
  static bool has_nan(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
  static F zero_below(F x, float bound, F y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_NLT_UQ), y);
  }
  // x * 2^n for whole n in [-126, 127]
  static F scale2(F x, F n) { return _mm512_scalef_ps(x, n); }
  static F loadh(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F loadbf(const uint8_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static uint16_t to_half(float x) { return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
  static F from_i(I x) { return _mm512_cvtepi32_ps(x); }
  static F from_s8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F from_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store_s8(int8_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
  }
  static void store_s16(int16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
  }
  // 2 L values of 16 bits, and the sums of their pairwise products with b
  static I load_pairs(const int16_t* p) { return _mm512_loadu_si512(p); }
  static I load_pairs(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static I mul_pairs(I a, I b) { return _mm512_madd_epi16(a, b); }
  // The intrinsic makes gcc 12 copy every sum twice and spill what then no longer fits the registers.
  static I dot_pairs(I acc, I a, I b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
  static void storei(uint8_t* p, I x) { _mm512_storeu_si512(p, x); }
  static I loadi(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I set1i(int32_t x) { return _mm512_set1_epi32(x); }
  static I set1b(uint8_t x) { return _mm512_set1_epi8(char(x)); }
  static I band(I a, I b) { return _mm512_and_si512(a, b); }
  static I bor(I a, I b) { return _mm512_or_si512(a, b); }
  template <int N>
  static I shr16(I a) {
    return _mm512_srli_epi16(a, N);
  }
  template <int N>
  static I shl16(I a) {
    return _mm512_slli_epi16(a, N);
  }
  template <int N>
  static I shl32(I a) {
    return _mm512_slli_epi32(a, N);
  }
  template <int N>
  static I sar32(I a) {
    return _mm512_srai_epi32(a, N);
  }
  static I codebook() {
    alignas(16) uint8_t table[16];
    for (int i = 0; i < 16; ++i) table[i] = uint8_t(kCodebook[i] + 128);
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  }
  static I lut(I table, I index) { return _mm512_shuffle_epi8(table, index); }
  static I add8(I a, I b) { return _mm512_add_epi8(a, b); }
  // The third byte of each lane in all its bytes.
  static I spread16(I a) { return _mm512_shuffle_epi8(a, _mm512_set4_epi32(0x0e0e0e0e, 0x0a0a0a0a, 0x06060606, 0x02020202)); }
  static I subi(I a, I b) { return _mm512_sub_epi32(a, b); }
  // Bit n of each lane becomes bit 16, those above it follow.
  static I to_bit16(I a, int n) { return _mm512_rolv_epi32(a, _mm512_set1_epi32(16 - n)); }
  static F from_half(I a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }  // of halves, one in each lane
  static I addi(I a, I b) { return _mm512_add_epi32(a, b); }
  static I dot(I acc, I codes, I x) { return _mm512_dpbusd_epi32(acc, codes, x); }
  // Nothing to gain from 16-bit sums here (kShortSums); the names must exist.
  static I dot16(I acc, I codes, I x) { return dot(acc, codes, x); }
  template <int W>
  static I widen16(I x) {
    return x;
  }
  template <class V>
  static void opaque(V& x) {
    __asm__ volatile("" : "+v"(x));
  }
  static void prefetch_far(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
  static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
};

#include "../kernels/wide.inl"

#include "../kernels/layouts.inl"
#include "../kernels/matmul.inl"

#include "../kernels/matmul_float.inl"

#include "../kernels/fused.inl"

#include "../kernels/attention.inl"

#include "../kernels/attention_integer.inl"

#include "../kernels/choose.inl"
#include "../kernels/probe.inl"

}  // namespace

extern const Ops ops_avx512;
const Ops ops_avx512 = {"avx512", kWidestTile, quantize, matmul, open_panel, matmul_float, norm, silu_mul, softmax, rotate,
                        store_kv, attend, peaks, weigh, read_all, dot_steps, float_steps};

}  // namespace bise
