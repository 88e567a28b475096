// Portable: sixteen lanes as plain arrays. The definition that the other instruction sets are tested against.
#include <type_traits>

#include "../formats.h"
#include "../half.h"
#include "../ops.h"

#define BISE_UNROLL(n)

namespace bise {
namespace {

struct R {
  static constexpr int L = 16, kRegisters = 16;
  static constexpr bool kShortSums = false;
  struct F {
    float v[16];
  };
  struct I {
    union {
      int32_t w[16];
      uint16_t h[32];
      uint8_t b[64];
    };
  };

#define LANES for (int i = 0; i < 16; ++i)
  static F load(const float* p) {
    F r;
    LANES r.v[i] = p[i];
    return r;
  }
  static void store(float* p, const F& x) { LANES p[i] = x.v[i]; }
  static F set1(float x) {
    F r;
    LANES r.v[i] = x;
    return r;
  }
  static F fma(const F& a, const F& b, const F& c) {
    F r;
    LANES r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return r;
  }
  static F fnma(const F& a, const F& b, const F& c) {
    F r;
    LANES r.v[i] = __builtin_fmaf(-a.v[i], b.v[i], c.v[i]);
    return r;
  }
  static F mul(const F& a, const F& b) {
    F r;
    LANES r.v[i] = a.v[i] * b.v[i];
    return r;
  }
  static F add(const F& a, const F& b) {
    F r;
    LANES r.v[i] = a.v[i] + b.v[i];
    return r;
  }
  static F sub(const F& a, const F& b) {
    F r;
    LANES r.v[i] = a.v[i] - b.v[i];
    return r;
  }
  static F div(const F& a, const F& b) {
    F r;
    LANES r.v[i] = a.v[i] / b.v[i];
    return r;
  }
  static F max(const F& a, const F& b) {
    F r;
    LANES r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return r;
  }
  static F min(const F& a, const F& b) {
    F r;
    LANES r.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return r;
  }
  static F round(const F& x) {
    F r;
    LANES r.v[i] = __builtin_rintf(x.v[i]);
    return r;
  }
  static float sum(const F& x) {
    F t = x;
    for (int width = 8; width; width /= 2)
      for (int j = 0; j < width; ++j) t.v[j] = t.v[j] + t.v[j + width];
    return t.v[0];
  }
  static float top(const F& x) {
    float m = x.v[0];
    LANES m = x.v[i] > m ? x.v[i] : m;
    return m;
  }
  static bool has_nan(const F& x) {
    bool found = false;
    LANES found = found || x.v[i] != x.v[i];
    return found;
  }
  static F zero_below(const F& x, float bound, const F& y) {
    F r;
    LANES r.v[i] = x.v[i] < bound ? 0.0f : y.v[i];
    return r;
  }
  static F scale2(const F& x, const F& n) {
    F r;
    LANES {
      // NaN reaches this with any n: the product stays NaN. Out of range the result is not used.
      const int whole = n.v[i] >= -126.0f && n.v[i] <= 127.0f ? int(n.v[i]) : 0;
      const uint32_t bits = uint32_t(whole + 127) << 23;
      float power;
      __builtin_memcpy(&power, &bits, 4);
      r.v[i] = x.v[i] * power;
    }
    return r;
  }
  static F loadh(const uint8_t* p) {
    F r;
    LANES {
      uint16_t h;
      __builtin_memcpy(&h, p + 2 * i, 2);
      r.v[i] = half_to_float(h);
    }
    return r;
  }
  static F loadbf(const uint8_t* p) {
    F r;
    LANES {
      uint16_t h;
      __builtin_memcpy(&h, p + 2 * i, 2);
      const uint32_t bits = uint32_t(h) << 16;
      __builtin_memcpy(&r.v[i], &bits, 4);
    }
    return r;
  }
  static uint16_t to_half(float x) { return float_to_half(x); }
  static F from_i(const I& x) {
    F r;
    LANES r.v[i] = float(x.w[i]);
    return r;
  }
  static F from_s8(const uint8_t* p) {
    F r;
    LANES r.v[i] = float(int8_t(p[i]));
    return r;
  }
  static F from_u8(const uint8_t* p) {
    F r;
    LANES r.v[i] = float(p[i]);
    return r;
  }
  static void store_s8(int8_t* p, const F& x) {
    LANES {
      const float whole = __builtin_rintf(x.v[i]);
      p[i] = int8_t(whole > 127.0f ? 127.0f : whole < -128.0f ? -128.0f : whole);
    }
  }
  static void store_s16(int16_t* p, const F& x) {
    LANES {
      const float whole = __builtin_rintf(x.v[i]);
      p[i] = int16_t(whole > 32767.0f ? 32767.0f : whole < -32768.0f ? -32768.0f : whole);
    }
  }
  template <class T>
  static I load_pairs(const T* p) {
    I r;
    for (int i = 0; i < 32; ++i) r.h[i] = uint16_t(p[i]);
    return r;
  }
  static I mul_pairs(const I& a, const I& b) {
    I r;
    LANES r.w[i] = int16_t(a.h[2 * i]) * int16_t(b.h[2 * i]) + int16_t(a.h[2 * i + 1]) * int16_t(b.h[2 * i + 1]);
    return r;
  }
  static I dot_pairs(const I& acc, const I& a, const I& b) { return addi(acc, mul_pairs(a, b)); }
  static void storei(uint8_t* p, const I& x) { __builtin_memcpy(p, x.b, 64); }
  static I loadi(const uint8_t* p) {
    I r;
    __builtin_memcpy(r.b, p, 64);
    return r;
  }
  static I set1i(int32_t x) {
    I r;
    LANES r.w[i] = x;
    return r;
  }
  static I set1b(uint8_t x) {
    I r;
    for (int i = 0; i < 64; ++i) r.b[i] = x;
    return r;
  }
  static I band(const I& a, const I& b) {
    I r;
    LANES r.w[i] = a.w[i] & b.w[i];
    return r;
  }
  static I bor(const I& a, const I& b) {
    I r;
    LANES r.w[i] = a.w[i] | b.w[i];
    return r;
  }
  template <int N>
  static I shr16(const I& a) {
    I r;
    for (int i = 0; i < 32; ++i) r.h[i] = uint16_t(a.h[i] >> N);
    return r;
  }
  template <int N>
  static I shl16(const I& a) {
    I r;
    for (int i = 0; i < 32; ++i) r.h[i] = uint16_t(a.h[i] << N);
    return r;
  }
  template <int N>
  static I shl32(const I& a) {
    I r;
    LANES r.w[i] = a.w[i] << N;
    return r;
  }
  template <int N>
  static I sar32(const I& a) {
    I r;
    LANES r.w[i] = a.w[i] >> N;
    return r;
  }
  static I codebook() {
    I r;
    for (int i = 0; i < 64; ++i) r.b[i] = uint8_t(kCodebook[i % 16] + 128);
    return r;
  }
  static I lut(const I& table, const I& index) {
    I r;
    for (int i = 0; i < 64; ++i) r.b[i] = table.b[index.b[i] & 15];
    return r;
  }
  static I add8(const I& a, const I& b) {
    I r;
    for (int i = 0; i < 64; ++i) r.b[i] = uint8_t(a.b[i] + b.b[i]);
    return r;
  }
  // The third byte of each lane in all its bytes.
  static I spread16(const I& a) {
    I r;
    for (int i = 0; i < 64; ++i) r.b[i] = a.b[i / 4 * 4 + 2];
    return r;
  }
  static I subi(const I& a, const I& b) {
    I r;
    LANES r.w[i] = a.w[i] - b.w[i];
    return r;
  }
  // Bit n of each lane becomes bit 16, those above it follow.
  static I to_bit16(const I& a, int n) {
    I r;
    LANES r.w[i] = int32_t(uint32_t(a.w[i]) >> n << 16);
    return r;
  }
  static F from_half(const I& a) {  // of halves, one in each lane
    F r;
    LANES r.v[i] = half_to_float(uint16_t(a.w[i]));
    return r;
  }
  static I addi(const I& a, const I& b) {
    I r;
    LANES r.w[i] = a.w[i] + b.w[i];
    return r;
  }
  static I dot(const I& acc, const I& codes, const I& x) {
    I r;
    LANES {
      const uint8_t* c = codes.b + 4 * i;
      const uint8_t* b = x.b + 4 * i;
      r.w[i] = acc.w[i] + c[0] * int8_t(b[0]) + c[1] * int8_t(b[1]) + c[2] * int8_t(b[2]) + c[3] * int8_t(b[3]);
    }
    return r;
  }
  // Nothing to gain from 16-bit sums here (kShortSums); the names must exist.
  static I dot16(const I& acc, const I& codes, const I& x) { return dot(acc, codes, x); }
  template <int W>
  static I widen16(const I& x) {
    return x;
  }
  template <class V>
  static void opaque(V& x) {
    __asm__ volatile("" : "+m"(x));
  }
  static void prefetch_far(const uint8_t*) {}
  static void prefetch(const uint8_t*) {}
#undef LANES
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

extern const Ops ops_scalar;
const Ops ops_scalar = {"scalar", kWidestTile, quantize, matmul, open_panel, matmul_float, norm, silu_mul, softmax, rotate,
                        store_kv, attend, peaks, weigh, read_all, dot_steps, float_steps};

}  // namespace bise
