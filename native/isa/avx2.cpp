// AVX2 + FMA + F16C: eight lanes a register; a panel is computed as two halves of eight rows.
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
  static constexpr int L = 8, kRegisters = 16;
  static constexpr bool kShortSums = true;
  using F = __m256;
  using I = __m256i;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static float sum(F x) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  static float top(F x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    m = _mm_max_ss(m, _mm_shuffle_ps(m, m, 1));
    return _mm_cvtss_f32(m);
  }
  static bool has_nan(F x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
  static F zero_below(F x, float bound, F y) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(bound), _CMP_LT_OQ), y);
  }
  static F scale2(F x, F n) {
    const I bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(bits));
  }
  static F loadh(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F loadbf(const uint8_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static uint16_t to_half(float x) { return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
  static F from_i(I x) { return _mm256_cvtepi32_ps(x); }
  static F from_s8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F from_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void store_s8(int8_t* p, F x) {
    const I whole = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  static void store_s16(int16_t* p, F x) {
    const I whole = _mm256_cvtps_epi32(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
  }
  static I load_pairs(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I load_pairs(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I mul_pairs(I a, I b) { return _mm256_madd_epi16(a, b); }
  static I dot_pairs(I acc, I a, I b) { return _mm256_add_epi32(acc, mul_pairs(a, b)); }
  static void storei(uint8_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static I loadi(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I set1i(int32_t x) { return _mm256_set1_epi32(x); }
  static I set1b(uint8_t x) { return _mm256_set1_epi8(char(x)); }
  static I band(I a, I b) { return _mm256_and_si256(a, b); }
  static I bor(I a, I b) { return _mm256_or_si256(a, b); }
  template <int N>
  static I shr16(I a) {
    return _mm256_srli_epi16(a, N);
  }
  template <int N>
  static I shl16(I a) {
    return _mm256_slli_epi16(a, N);
  }
  template <int N>
  static I shl32(I a) {
    return _mm256_slli_epi32(a, N);
  }
  template <int N>
  static I sar32(I a) {
    return _mm256_srai_epi32(a, N);
  }
  static I codebook() {
    alignas(16) uint8_t table[16];
    for (int i = 0; i < 16; ++i) table[i] = uint8_t(kCodebook[i] + 128);
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  }
  static I lut(I table, I index) { return _mm256_shuffle_epi8(table, index); }
  static I add8(I a, I b) { return _mm256_add_epi8(a, b); }
  static I spread16(I a) { return a; }  // not needed with short sums; the name must exist
  static I subi(I a, I b) { return _mm256_sub_epi32(a, b); }
  // Bit n of each lane becomes bit 16, those above it follow.
  static I to_bit16(I a, int n) { return _mm256_slli_epi32(_mm256_srl_epi32(a, _mm_cvtsi32_si128(n)), 16); }
  static F from_half(I a) {  // of halves, one in each lane
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
  }
  static I addi(I a, I b) { return _mm256_add_epi32(a, b); }
  template <class V>
  static void opaque(V& x) {
    __asm__ volatile("" : "+x"(x));
  }
  // Codes up to 15: eight pairs fit 16 bits, so a block needs one widening.
  // Sums are opaque: gcc would add the products in the order of a tree, and keep them all on the stack for that.
  static I dot16(I acc, I codes, I x) {
    acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, x));
    __asm__("" : "+x"(acc));
    return acc;
  }
  template <int W>
  static I widen16(I x) {
    return _mm256_madd_epi16(x, _mm256_set1_epi16(W));
  }
  // Codes below 128: pairs fit 16 bits (2 x 127 x 127 < 2^15), so maddubs does not saturate.
  static I dot(I acc, I codes, I x) {
    const I pairs = _mm256_maddubs_epi16(codes, x);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    __asm__("" : "+x"(acc));
    return acc;
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

extern const Ops ops_avx2;
const Ops ops_avx2 = {"avx2", kWidestTile, quantize, matmul, open_panel, matmul_float, norm, silu_mul, softmax, rotate,
                        store_kv, attend, peaks, weigh, read_all, dot_steps, float_steps};

}  // namespace bise
