// Half precision to float and back (round to nearest even), without processor support.
#pragma once
#include <cstdint>

namespace bise {
namespace {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  uint32_t exponent = (h >> 10) & 31, fraction = h & 1023, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | (fraction << 13) | (fraction ? 0x400000 : 0);
  } else if (exponent == 0) {
    const float value = float(fraction) * 0x1p-24f;
    __builtin_memcpy(&bits, &value, 4);
    bits |= sign;
  } else {
    bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  }
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t float_to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00 | ((magnitude >> 13) & 0x1ff));
  if (magnitude >= 0x47800000) return uint16_t(sign | 0x7c00);  // 65536 and above
  if (magnitude < 0x38800000) {                                  // below 2^-14: multiples of 2^-24
    float tiny;
    __builtin_memcpy(&tiny, &magnitude, 4);
    return uint16_t(sign | uint16_t(int(__builtin_rintf(tiny * 0x1p24f))));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return uint16_t(sign | ((rounded - 0x38000000) >> 13));
}

}  // namespace
}  // namespace bise
