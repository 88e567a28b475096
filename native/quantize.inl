// Floats to q8, q4 and n4, a block of 16 rows x 32 columns at a time, and to z4. Included by pack.cpp.
//
// One lane is one row and columns are visited in ascending order, without fused operations: the bytes are the same on
// every processor. The functions marked BISE_CLONES are compiled once per instruction set (the loops over lanes become
// vectors) and chosen when the program starts.

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(BISE_SANITIZED)
#define BISE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define BISE_CLONES
#endif
#if defined(__GNUC__) && !defined(__clang__)
#define BISE_FAST __attribute__((optimize("O3", "no-trapping-math")))
#else
#define BISE_FAST
#endif
#define EACH_LANE for (int lane = 0; lane < kPanelRows; ++lane)

struct alignas(64) Lanes {
  float of[kPanelRows];
};

constexpr float kTooLarge = 1e7f;    // no scale that a half can hold reaches it
constexpr float kTooSmall = 1e-15f;  // every scale below it is zero as a half

// Candidate scales of a block: the value of largest magnitude becomes this code. Chosen greedily on normal, Laplace
// and t-distributed blocks; more candidates lower the error by less than 0.3 % (docs/quality.md).
constexpr float kCodebookTops[] = {-129, -138, -122, 115, 109, -133, 123, -108, -126, -147, 131, -102};
constexpr float kLinearTops[] = {-8.2f, -7.2f, -8.8f, -7.8f, -9.6f, -8.5f, -6.8f, -8.0f, 8.5f, -9.1f};

// Between two neighbouring values of the codebook the border lies in their middle.
constexpr float border(int i) { return 0.5f * float(kCodebook[i] + kCodebook[i + 1]); }
constexpr float step(int i) { return float(kCodebook[i + 1] - kCodebook[i]); }

inline __attribute__((always_inline)) float nearest_integer(float y, float low, float high) {
  const float above = y < low ? low : y;
  const float held = above > high ? high : above;
  return (held + 12582912.0f) - 12582912.0f;  // ties to even
}

template <int kFormat>
inline __attribute__((always_inline)) float nearest(float y) {
  if (kFormat == kQ4) return nearest_integer(y, -8.0f, 7.0f);
  // A sum of steps: small integers, exact in any order.
  return (((y > border(0) ? step(0) : 0.0f) + (y > border(1) ? step(1) : 0.0f)) +
          ((y > border(2) ? step(2) : 0.0f) + (y > border(3) ? step(3) : 0.0f))) +
         (((y > border(4) ? step(4) : 0.0f) + (y > border(5) ? step(5) : 0.0f)) +
          ((y > border(6) ? step(6) : 0.0f) + (y > border(7) ? step(7) : 0.0f))) +
         (((y > border(8) ? step(8) : 0.0f) + (y > border(9) ? step(9) : 0.0f)) +
          ((y > border(10) ? step(10) : 0.0f) + (y > border(11) ? step(11) : 0.0f))) +
         (((y > border(12) ? step(12) : 0.0f) + (y > border(13) ? step(13) : 0.0f)) +
          ((y > border(14) ? step(14) : 0.0f) + float(kCodebook[0])));
}

// The scale of each lane, as a share of the lane's top value, that is best for the codes of one of the candidates:
// for codes q the smallest sum of w (z - d q)^2 is reached at d = sum(w z q) / sum(w q^2) and lies sum(w z q) d below
// sum(w z^2). `weight` holds w, a value for each column.
template <int kFormat>
inline __attribute__((always_inline)) void best_share(const Lanes* z, const float* weight, Lanes& share) {
  const float* tops = kFormat == kN4 ? kCodebookTops : kLinearTops;
  const int count = int(kFormat == kN4 ? sizeof kCodebookTops : sizeof kLinearTops) / int(sizeof(float));
  Lanes best;
  EACH_LANE best.of[lane] = -1.0f, share.of[lane] = 0.0f;
  for (int i = 0; i < count; ++i) {
    Lanes zq = {}, qq = {};
    for (int j = 0; j < kBlockCols; ++j) {
      EACH_LANE {
        const float value = z[j].of[lane], q = nearest<kFormat>(value * tops[i]), weighted = q * weight[j];
        zq.of[lane] += weighted * value;
        qq.of[lane] += weighted * q;
      }
    }
    EACH_LANE {
      const float d = zq.of[lane] / qq.of[lane], gain = zq.of[lane] * d;
      const bool better = gain > best.of[lane];  // false where qq is zero
      share.of[lane] = better ? d : share.of[lane];
      best.of[lane] = better ? gain : best.of[lane];
    }
  }
}

// Quantise x[32] to codes [32][16] and half scales; false when a value is not finite or too large.
template <int kFormat>
inline __attribute__((always_inline)) bool quantize_lanes(const Lanes* x, const float* weight, uint8_t* codes,
                                                          uint16_t* scales) {
  Lanes top = {}, size = {}, d, inverse;
  int bad = 0;
  for (int j = 0; j < kBlockCols; ++j) {
    EACH_LANE {
      const float value = x[j].of[lane], magnitude = std::fabs(value);
      bad |= !(magnitude <= kTooLarge);
      top.of[lane] = magnitude > size.of[lane] ? value : top.of[lane];
      size.of[lane] = magnitude > size.of[lane] ? magnitude : size.of[lane];
    }
  }
  if (bad) return false;
  if (kFormat == kQ8) {
    EACH_LANE d.of[lane] = size.of[lane] / 127.0f;
  } else {
    Lanes z[kBlockCols], share;
    EACH_LANE inverse.of[lane] = size.of[lane] > kTooSmall ? 1.0f / top.of[lane] : 0.0f;
    for (int j = 0; j < kBlockCols; ++j) EACH_LANE z[j].of[lane] = x[j].of[lane] * inverse.of[lane];
    best_share<kFormat>(z, weight, share);
    EACH_LANE d.of[lane] = size.of[lane] > kTooSmall ? share.of[lane] * top.of[lane] : 0.0f;
  }
  bool fits = true;
  EACH_LANE {
    scales[lane] = float_to_half(d.of[lane]);
    fits = fits && finite_half(scales[lane]);
    const float stored = half_to_float(scales[lane]);
    inverse.of[lane] = stored != 0.0f ? 1.0f / stored : 0.0f;
  }
  for (int j = 0; j < kBlockCols; ++j) {
    EACH_LANE {
      const float y = x[j].of[lane] * inverse.of[lane];
      int code = 0;
      if (kFormat == kN4)
        for (int i = 0; i < 15; ++i) code += y > border(i);
      else if (kFormat == kQ4) code = int(nearest_integer(y, -8.0f, 7.0f)) + 8;
      else code = int(nearest_integer(y, -127.0f, 127.0f)) + 128;
      codes[j * kPanelRows + lane] = uint8_t(code);
    }
  }
  return fits;
}

BISE_CLONES BISE_FAST bool quantize_q8(const Lanes* x, const float* weight, uint8_t* codes, uint16_t* scales) {
  return quantize_lanes<kQ8>(x, weight, codes, scales);
}
BISE_CLONES BISE_FAST bool quantize_q4(const Lanes* x, const float* weight, uint8_t* codes, uint16_t* scales) {
  return quantize_lanes<kQ4>(x, weight, codes, scales);
}
BISE_CLONES BISE_FAST bool quantize_n4(const Lanes* x, const float* weight, uint8_t* codes, uint16_t* scales) {
  return quantize_lanes<kN4>(x, weight, codes, scales);
}

// Write a block's codes [32][16] in the layout of formats.h; columns from `count` on and rows from `rows` on stay zero.
BISE_FAST void write_codes(int format, const uint8_t* codes, int rows, int count, uint8_t* block) {
  uint8_t held[kBlockCols][kPanelRows] = {};
  for (int j = 0; j < count; ++j) std::memcpy(held[j], codes + j * kPanelRows, size_t(rows));
  const int groups = format == kQ8 ? 8 : 4;
  for (int g = 0; g < groups; ++g) {
    for (int lane = 0; lane < kPanelRows; ++lane) {
      for (int c = 0; c < 4; ++c) {
        const uint8_t low = held[4 * g + c][lane];
        block[64 * g + 4 * lane + c] = format == kQ8 ? low : uint8_t(low | held[16 + 4 * g + c][lane] << 4);
      }
    }
  }
}

#include "quantize_super.inl"

bool pack_quantized(int format, const float* x, int rows, int64_t k, const float* importance, uint8_t* panel) {
  if (format == kZ4) {
    bool fine = true;
    for (int64_t k0 = 0; k0 < k && fine; k0 += kSuperCols) {
      const int count = int(k - k0 < kSuperCols ? k - k0 : kSuperCols);
      fine = pack_super(x, rows, k, k0, count, importance, panel + panel_bytes(format, k0));
    }
    return fine;
  }
  const int block_bytes = kFormatInfo[format].block_bytes;
  const auto quantize = format == kQ8 ? quantize_q8 : format == kQ4 ? quantize_q4 : quantize_n4;
  bool fits = true;
  for (int64_t b = 0; b * kBlockCols < k; ++b) {
    const int64_t first = b * kBlockCols;
    const int count = int(k - first < kBlockCols ? k - first : kBlockCols);
    Lanes values[kBlockCols] = {};
    float weights[kBlockCols] = {};
    for (int lane = 0; lane < rows; ++lane)
      for (int j = 0; j < count; ++j) values[j].of[lane] = x[lane * k + first + j];
    for (int j = 0; j < count; ++j) weights[j] = importance ? importance[first + j] : 1.0f;
    uint8_t codes[kBlockCols * kPanelRows];
    uint16_t scales[kPanelRows];
    uint8_t* block = panel + b * block_bytes;
    fits = quantize(values, weights, codes, scales) && fits;
    if (!fits) return false;
    write_codes(format, codes, rows, count, block);
    std::memcpy(block + block_bytes - 2 * kPanelRows, scales, size_t(rows) * 2);
  }
  return fits;
}

#undef BISE_CLONES
#undef BISE_FAST
#undef EACH_LANE
