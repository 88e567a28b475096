// Products of packed weights with rows of activations. Included after wide.inl.
//
// One lane is one output row, so there is no horizontal sum. Per 32-column block the integer dot product is exact and
// enters the float accumulator with one fused multiply-add (two for formats with scales per 16, one more for a min),
// blocks in ascending order: the result of a row depends on nothing but that row and the weight.

constexpr int kQStep = R::L * 4;  // code bytes of one 4-column group that fit a register

struct Codes {
  R::I q[8];  // group g: columns 4g .. 4g+3 of R::L rows
};

inline void nibbles(const uint8_t* w, Codes& c) {
  const R::I mask = R::set1b(15);
  for (int g = 0; g < 4; ++g) {
    const R::I both = R::loadi(w + 64 * g);
    c.q[g] = R::band(both, mask);
    c.q[g + 4] = R::band(R::template shr16<4>(both), mask);
  }
}

template <int G>
inline void add_bit(const R::I& plane, Codes& c, int weight_shift) {
  // bit G of each byte becomes bit `weight_shift` (4 or 2) of the code
  const R::I bit = R::band(R::template shr16<G>(plane), R::set1b(1));
  c.q[G] = R::bor(c.q[G], weight_shift == 4 ? R::template shl16<4>(bit) : R::template shl16<2>(bit));
}
inline void bit_plane(const uint8_t* w, Codes& c, int weight_shift) {
  const R::I plane = R::loadi(w);
  add_bit<0>(plane, c, weight_shift);
  add_bit<1>(plane, c, weight_shift);
  add_bit<2>(plane, c, weight_shift);
  add_bit<3>(plane, c, weight_shift);
  add_bit<4>(plane, c, weight_shift);
  add_bit<5>(plane, c, weight_shift);
  add_bit<6>(plane, c, weight_shift);
  add_bit<7>(plane, c, weight_shift);
}

inline void two_bits(const uint8_t* w, R::I (&out)[8]) {
  const R::I mask = R::set1b(3);
  for (int h = 0; h < 2; ++h) {
    const R::I plane = R::loadi(w + 64 * h);
    out[4 * h] = R::band(plane, mask);
    out[4 * h + 1] = R::band(R::template shr16<2>(plane), mask);
    out[4 * h + 2] = R::band(R::template shr16<4>(plane), mask);
    out[4 * h + 3] = R::band(R::template shr16<6>(plane), mask);
  }
}

inline void through_codebook(Codes& c) {
  const R::I table = R::codebook();  // codebook + 128, so that codes stay unsigned
  for (int g = 0; g < 8; ++g) c.q[g] = R::lut(table, c.q[g]);
}

struct Header {
  R::F d, dmin;
};

// Each format: kOffset8 = offset of the codes / 8 (zero point = 8 * kOffset8; kHalfOffset: zero point 4),
// kSubs scales per block, kMin whether a min follows, and how to load a block of R::L rows starting at lane `at`.
struct Plain {
  static constexpr int kHeader = 0;
  static void header(const uint8_t*, int, Header&) {}
};
struct WithScale : Plain {
  static constexpr int kHeader = 32;
  static void header(const uint8_t* w, int at, Header& h) { h.d = R::loadh(w + 2 * at); }
};
struct WithScaleAndMin : Plain {
  static constexpr int kHeader = 64;
  static void header(const uint8_t* w, int at, Header& h) {
    h.d = R::loadh(w + 2 * at);
    h.dmin = R::loadh(w + 32 + 2 * at);
  }
};

template <int kFormat>
struct Fmt;

template <>
struct Fmt<kQ8> : Plain {
  static constexpr int kOffset8 = 16, kSubs = 1;
  static constexpr bool kMin = false;
  static void load(const uint8_t* w, int at, const Header&, Codes& c, R::F (&s)[2], R::F (&)[2]) {
    for (int g = 0; g < 8; ++g) c.q[g] = R::loadi(w + 64 * g + 4 * at);
    s[0] = R::loadh(w + 512 + 2 * at);
  }
};
template <>
struct Fmt<kQ4> : Plain {
  static constexpr int kOffset8 = 1, kSubs = 1;
  static constexpr bool kMin = false;
  static void load(const uint8_t* w, int at, const Header&, Codes& c, R::F (&s)[2], R::F (&)[2]) {
    nibbles(w + 4 * at, c);
    s[0] = R::loadh(w + 256 + 2 * at);
  }
};
template <>
struct Fmt<kQ41> : Plain {
  static constexpr int kOffset8 = 0, kSubs = 1;
  static constexpr bool kMin = true;
  static void load(const uint8_t* w, int at, const Header&, Codes& c, R::F (&s)[2], R::F (&m)[2]) {
    nibbles(w + 4 * at, c);
    s[0] = R::loadh(w + 256 + 2 * at);
    m[0] = R::loadh(w + 288 + 2 * at);
  }
};
template <>
struct Fmt<kQ5> : Plain {
  static constexpr int kOffset8 = 2, kSubs = 1;
  static constexpr bool kMin = false;
  static void load(const uint8_t* w, int at, const Header&, Codes& c, R::F (&s)[2], R::F (&)[2]) {
    nibbles(w + 4 * at, c);
    bit_plane(w + 256 + 4 * at, c, 4);
    s[0] = R::loadh(w + 320 + 2 * at);
  }
};
template <>
struct Fmt<kQ51> : Plain {
  static constexpr int kOffset8 = 0, kSubs = 1;
  static constexpr bool kMin = true;
  static void load(const uint8_t* w, int at, const Header&, Codes& c, R::F (&s)[2], R::F (&m)[2]) {
    nibbles(w + 4 * at, c);
    bit_plane(w + 256 + 4 * at, c, 4);
    s[0] = R::loadh(w + 320 + 2 * at);
    m[0] = R::loadh(w + 352 + 2 * at);
  }
};
template <>
struct Fmt<kN4> : Plain {
  static constexpr int kOffset8 = 16, kSubs = 1;
  static constexpr bool kMin = false;
  static void load(const uint8_t* w, int at, const Header&, Codes& c, R::F (&s)[2], R::F (&)[2]) {
    nibbles(w + 4 * at, c);
    through_codebook(c);
    s[0] = R::loadh(w + 256 + 2 * at);
  }
};
template <>
struct Fmt<kN4K> : WithScale {
  static constexpr int kOffset8 = 16, kSubs = 1;
  static constexpr bool kMin = false;
  static void load(const uint8_t* w, int at, const Header& h, Codes& c, R::F (&s)[2], R::F (&)[2]) {
    nibbles(w + 4 * at, c);
    through_codebook(c);
    s[0] = R::mul(h.d, R::from_s8(w + 256 + at));
  }
};
template <>
struct Fmt<kQ4K> : WithScaleAndMin {
  static constexpr int kOffset8 = 0, kSubs = 1;
  static constexpr bool kMin = true;
  static void load(const uint8_t* w, int at, const Header& h, Codes& c, R::F (&s)[2], R::F (&m)[2]) {
    nibbles(w + 4 * at, c);
    s[0] = R::mul(h.d, R::from_u8(w + 256 + at));
    m[0] = R::mul(h.dmin, R::from_u8(w + 272 + at));
  }
};
template <>
struct Fmt<kQ5K> : WithScaleAndMin {
  static constexpr int kOffset8 = 0, kSubs = 1;
  static constexpr bool kMin = true;
  static void load(const uint8_t* w, int at, const Header& h, Codes& c, R::F (&s)[2], R::F (&m)[2]) {
    nibbles(w + 4 * at, c);
    bit_plane(w + 256 + 4 * at, c, 4);
    s[0] = R::mul(h.d, R::from_u8(w + 320 + at));
    m[0] = R::mul(h.dmin, R::from_u8(w + 336 + at));
  }
};
template <>
struct Fmt<kQ6K> : WithScale {
  static constexpr int kOffset8 = 4, kSubs = 2;
  static constexpr bool kMin = false;
  static void load(const uint8_t* w, int at, const Header& h, Codes& c, R::F (&s)[2], R::F (&)[2]) {
    nibbles(w + 4 * at, c);
    R::I high[8];
    two_bits(w + 256 + 4 * at, high);
    for (int g = 0; g < 8; ++g) c.q[g] = R::bor(c.q[g], R::template shl16<4>(high[g]));
    s[0] = R::mul(h.d, R::from_s8(w + 384 + at));
    s[1] = R::mul(h.d, R::from_s8(w + 400 + at));
  }
};
template <>
struct Fmt<kQ3K> : WithScale {
  static constexpr int kOffset8 = -1, kSubs = 2;  // -1: zero point 4
  static constexpr bool kMin = false;
  static void load(const uint8_t* w, int at, const Header& h, Codes& c, R::F (&s)[2], R::F (&)[2]) {
    two_bits(w + 4 * at, c.q);
    bit_plane(w + 128 + 4 * at, c, 2);
    s[0] = R::mul(h.d, R::from_s8(w + 192 + at));
    s[1] = R::mul(h.d, R::from_s8(w + 208 + at));
  }
};
template <>
struct Fmt<kQ2K> : WithScaleAndMin {
  static constexpr int kOffset8 = 0, kSubs = 2;
  static constexpr bool kMin = true;
  static void load(const uint8_t* w, int at, const Header& h, Codes& c, R::F (&s)[2], R::F (&m)[2]) {
    two_bits(w + 4 * at, c.q);
    uint8_t part[16];
    for (int half = 0; half < 2; ++half) {
      const uint8_t* both = w + 128 + 16 * half + at;
      for (int i = 0; i < R::L; ++i) part[i] = both[i] & 15;
      s[half] = R::mul(h.d, R::from_u8(part));
      for (int i = 0; i < R::L; ++i) part[i] = both[i] >> 4;
      m[half] = R::mul(h.dmin, R::from_u8(part));
    }
  }
};

// -zero * sum of codes, from -8 * sum: shifted in the register, so that the broadcast comes straight from memory
template <int kOffset8>
inline R::I offset_start(int32_t n8) {
  const R::I start = R::set1i(n8);
  if constexpr (kOffset8 == 0) return R::set1i(0);
  else if constexpr (kOffset8 == -1) return R::template sar32<1>(start);
  else if constexpr (kOffset8 == 1) return start;
  else if constexpr (kOffset8 == 2) return R::template shl32<1>(start);
  else if constexpr (kOffset8 == 4) return R::template shl32<2>(start);
  else return R::template shl32<4>(start);
}

// Codes of 8-bit and codebook formats use all 8 bits; the others stay below 64, which AVX2 can add with fewer steps.
template <int kFormat>
inline R::I dot(const R::I& acc, const R::I& codes, int32_t x) {
  if constexpr (kFormat == kQ8 || kFormat == kN4 || kFormat == kN4K) return R::dot_wide(acc, codes, x);
  else return R::dot(acc, codes, x);
}

template <int kFormat, int MT>
inline void matmul_lanes(const uint8_t* w, const uint8_t* a, int64_t blocks, int at, float* out, int64_t ldo) {
  using Format = Fmt<kFormat>;
  constexpr int kBlockBytes = kFormatInfo[kFormat].block_bytes;
  R::F acc[MT];
  for (int m = 0; m < MT; ++m) acc[m] = R::set1(0.0f);
  Header header = {R::set1(0.0f), R::set1(0.0f)};
  for (int64_t b = 0; b < blocks; ++b) {
    if constexpr (Format::kHeader != 0) {
      if (b % kSuperBlocks == 0) {
        Format::header(w, at, header);
        w += Format::kHeader;
      }
    }
    if constexpr (MT <= 4) {
      for (int line = 0; line < kBlockBytes; line += 64) R::prefetch(w + 4096 + line);
    }
    Codes c;
    R::F s[2], min[2];
    Format::load(w, at, header, c, s, min);
    w += kBlockBytes;
    const int32_t* n8 = reinterpret_cast<const int32_t*>(a + MT * 32);
    const float* scale = reinterpret_cast<const float*>(a + MT * 36);
    const int32_t* n8lo = reinterpret_cast<const int32_t*>(a + MT * 40);
    const float* ssum = reinterpret_cast<const float*>(a + MT * 44);
BISE_UNROLL(16)
    for (int m = 0; m < MT; ++m) {
      const int32_t* x = reinterpret_cast<const int32_t*>(a + m * 32);
      R::F r = acc[m];
      if constexpr (Format::kSubs == 1) {
        R::I i = offset_start<Format::kOffset8>(n8[m]);
BISE_UNROLL(8)
        for (int g = 0; g < 8; ++g) i = dot<kFormat>(i, c.q[g], x[g]);
        r = R::fma(R::from_i(i), R::mul(s[0], R::set1(scale[m])), r);
        if constexpr (Format::kMin) r = R::fnma(min[0], R::set1(ssum[m]), r);
      } else {
        R::I lo = offset_start<Format::kOffset8>(n8lo[m]);
        R::I hi = offset_start<Format::kOffset8>(n8[m] - n8lo[m]);
BISE_UNROLL(4)
        for (int g = 0; g < 4; ++g) {
          lo = dot<kFormat>(lo, c.q[g], x[g]);
          hi = dot<kFormat>(hi, c.q[g + 4], x[g + 4]);
        }
        const R::F sc = R::set1(scale[m]);
        r = R::fma(R::from_i(lo), R::mul(s[0], sc), r);
        r = R::fma(R::from_i(hi), R::mul(s[1], sc), r);
        if constexpr (Format::kMin) {
          const float lo_sum = scale[m] * float(n8lo[m] / -8);
          const float hi_sum = scale[m] * float((n8[m] - n8lo[m]) / -8);
          r = R::fnma(min[0], R::set1(lo_sum), r);
          r = R::fnma(min[1], R::set1(hi_sum), r);
        }
      }
      acc[m] = r;
    }
    a += MT * kTileRowBytes;
  }
  for (int m = 0; m < MT; ++m) R::store(out + m * ldo + at, acc[m]);
}

template <int kFormat>
void matmul_format(const uint8_t* panel, const uint8_t* tile, int64_t blocks, int mt, float* out, int64_t ldo) {
  for (int at = 0; at < 16; at += R::L) {
    switch (mt) {
      case 1: matmul_lanes<kFormat, 1>(panel, tile, blocks, at, out, ldo); break;
      case 2: matmul_lanes<kFormat, 2>(panel, tile, blocks, at, out, ldo); break;
      case 4: matmul_lanes<kFormat, 4>(panel, tile, blocks, at, out, ldo); break;
      case 8: matmul_lanes<kFormat, 8>(panel, tile, blocks, at, out, ldo); break;
      case 16: matmul_lanes<kFormat, 16>(panel, tile, blocks, at, out, ldo); break;
      default: __builtin_trap();
    }
  }
}

void matmul(int format, const uint8_t* panel, const uint8_t* tile, int64_t blocks, int mt, float* out, int64_t ldo) {
  switch (format) {
    case kQ8: return matmul_format<kQ8>(panel, tile, blocks, mt, out, ldo);
    case kQ4: return matmul_format<kQ4>(panel, tile, blocks, mt, out, ldo);
    case kQ41: return matmul_format<kQ41>(panel, tile, blocks, mt, out, ldo);
    case kQ5: return matmul_format<kQ5>(panel, tile, blocks, mt, out, ldo);
    case kQ51: return matmul_format<kQ51>(panel, tile, blocks, mt, out, ldo);
    case kN4: return matmul_format<kN4>(panel, tile, blocks, mt, out, ldo);
    case kN4K: return matmul_format<kN4K>(panel, tile, blocks, mt, out, ldo);
    case kQ4K: return matmul_format<kQ4K>(panel, tile, blocks, mt, out, ldo);
    case kQ5K: return matmul_format<kQ5K>(panel, tile, blocks, mt, out, ldo);
    case kQ6K: return matmul_format<kQ6K>(panel, tile, blocks, mt, out, ldo);
    case kQ3K: return matmul_format<kQ3K>(panel, tile, blocks, mt, out, ldo);
    case kQ2K: return matmul_format<kQ2K>(panel, tile, blocks, mt, out, ldo);
    default: __builtin_trap();
  }
}

template <int kFormat>
inline R::F load_column(const uint8_t* w, int at) {
  if constexpr (kFormat == kF32) return R::load(reinterpret_cast<const float*>(w) + at);
  else if constexpr (kFormat == kF16) return R::loadh(w + 2 * at);
  else return R::loadbf(w + 2 * at);
}

template <int kFormat, int MT>
inline void float_lanes(const uint8_t* w, const float* x, int64_t ldx, int64_t k, int at, float* out, int64_t ldo) {
  constexpr int kStep = kFormatInfo[kFormat].block_bytes;
  R::F acc[MT];
  for (int m = 0; m < MT; ++m) acc[m] = R::set1(0.0f);
  for (int64_t i = 0; i < k; ++i, w += kStep) {
    const R::F column = load_column<kFormat>(w, at);
BISE_UNROLL(8)
    for (int m = 0; m < MT; ++m) acc[m] = R::fma(column, R::set1(x[m * ldx + i]), acc[m]);
  }
  for (int m = 0; m < MT; ++m) R::store(out + m * ldo + at, acc[m]);
}

template <int kFormat>
void float_format(const uint8_t* panel, const float* x, int64_t ldx, int64_t k, int rows, float* out, int64_t ldo) {
  for (int m = 0; m < rows;) {
    const int left = rows - m;
    const int mt = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const float* xm = x + m * ldx;
    float* om = out + m * ldo;
    for (int at = 0; at < 16; at += R::L) {
      if (mt == 8) float_lanes<kFormat, 8>(panel, xm, ldx, k, at, om, ldo);
      else if (mt == 4) float_lanes<kFormat, 4>(panel, xm, ldx, k, at, om, ldo);
      else if (mt == 2) float_lanes<kFormat, 2>(panel, xm, ldx, k, at, om, ldo);
      else float_lanes<kFormat, 1>(panel, xm, ldx, k, at, om, ldo);
    }
    m += mt;
  }
}

void matmul_float(int format, const uint8_t* panel, const float* x, int64_t ldx, int64_t k, int rows, float* out,
                  int64_t ldo) {
  if (format == kF32) float_format<kF32>(panel, x, ldx, k, rows, out, ldo);
  else if (format == kF16) float_format<kF16>(panel, x, ldx, k, rows, out, ldo);
  else float_format<kBF16>(panel, x, ldx, k, rows, out, ldo);
}

// Quantise 32 floats to int8 with scale max|x| / 127 (round to nearest even).
inline void quantize_block(const float* x, int8_t* codes, int32_t& n8, float& scale, int32_t& n8lo, float& ssum) {
  const F16 lo = load16(x), hi = load16(x + 16);
  const F16 zero = zero16();
  const float top = max_lanes(max16(max16(lo, sub16(zero, lo)), max16(hi, sub16(zero, hi))));
  // NaN and infinity must not vanish: they become a NaN scale that reaches the logits.
  const bool finite = !has_nan16(add16(sub16(lo, lo), sub16(hi, hi)));  // inf - inf is NaN
  scale = finite ? top / 127.0f : __builtin_nanf("");
  const float inverse = finite && top > 1e-36f ? 127.0f / top : 0.0f;
  const F16 factor = set16(inverse);
  const F16 a = finite ? mul16(lo, factor) : zero, b = finite ? mul16(hi, factor) : zero;
  for (int i = 0; i < kParts; ++i) R::store_s8(codes + i * R::L, a.v[i]);
  for (int i = 0; i < kParts; ++i) R::store_s8(codes + 16 + i * R::L, b.v[i]);
  int sum_lo = 0, sum = 0;
  for (int j = 0; j < 16; ++j) sum_lo += codes[j];
  for (int j = 16; j < 32; ++j) sum += codes[j];
  sum += sum_lo;
  n8 = -8 * sum;
  n8lo = -8 * sum_lo;
  ssum = scale * float(sum);
}

void quantize(const float* x, int64_t ldx, int rows, int64_t k, int64_t b0, int64_t b1, int mt, uint8_t* tile) {
  for (int64_t b = b0; b < b1; ++b) {
    uint8_t* block = tile + b * mt * kTileRowBytes;
    int32_t* n8 = reinterpret_cast<int32_t*>(block + mt * 32);
    float* scale = reinterpret_cast<float*>(block + mt * 36);
    int32_t* n8lo = reinterpret_cast<int32_t*>(block + mt * 40);
    float* ssum = reinterpret_cast<float*>(block + mt * 44);
    for (int m = 0; m < mt; ++m) {
      int8_t* codes = reinterpret_cast<int8_t*>(block) + m * 32;
      float padded[32];
      const float* source = padded;
      const int64_t left = m < rows ? k - b * 32 : 0;
      if (left >= 32) {
        source = x + m * ldx + b * 32;
      } else {
        for (int j = 0; j < 32; ++j) padded[j] = j < left ? x[m * ldx + b * 32 + j] : 0.0f;
      }
      quantize_block(source, codes, n8[m], scale[m], n8lo[m], ssum[m]);
    }
  }
}
