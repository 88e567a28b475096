// Products of packed weights with rows of activations. Included after wide.inl.
//
// One lane is one output row, so there is no horizontal sum. Per 32-column block the integer dot product is exact and
// enters the float accumulator with one fused multiply-add (two for formats with scales per 16, one more for a min),
// blocks in ascending order: the result of a row depends on nothing but that row and the weight.

// How codes are stored. `pair<G>` returns the codes of column groups G and G + 4 (G < 4) of R::L rows; `w` points at
// the block's bytes of the first of these rows.
struct Bytes8 {
  static constexpr int kBytes = 512;
  template <int G>
  static void pair(const uint8_t* w, R::I& lo, R::I& hi) {
    lo = R::loadi(w + 64 * G);
    hi = R::loadi(w + 64 * (G + 4));
  }
  // Low and high four bits of the codes of both groups.
  template <int G>
  static void nibbles(const uint8_t* w, R::I (&low)[2], R::I (&high)[2]) {
    for (int half = 0; half < 2; ++half) {
      const R::I codes = R::loadi(w + 64 * (G + 4 * half));
      low[half] = R::band(codes, R::set1b(15));
      high[half] = R::band(R::template shr16<4>(codes), R::set1b(15));
    }
  }
};
struct Nibbles {
  static constexpr int kBytes = 256;
  template <int G>
  static void pair(const uint8_t* w, R::I& lo, R::I& hi) {
    const R::I both = R::loadi(w + 64 * G);
    lo = R::band(both, R::set1b(15));
    hi = R::band(R::template shr16<4>(both), R::set1b(15));
  }
};
struct Eighths : Nibbles {  // 8 x the code
  template <int G>
  static void pair(const uint8_t* w, R::I& lo, R::I& hi) {
    const R::I both = R::loadi(w + 64 * G);
    lo = R::band(R::template shl16<3>(both), R::set1b(0x78));
    hi = R::band(R::template shr16<1>(both), R::set1b(0x78));
  }
};
struct Codebook : Nibbles {
  template <int G>
  static void pair(const uint8_t* w, R::I& lo, R::I& hi) {
    Nibbles::pair<G>(w, lo, hi);
    lo = R::lut(R::codebook(), lo);  // codebook + 128, so that codes stay unsigned
    hi = R::lut(R::codebook(), hi);
  }
  template <int G>
  static void nibbles(const uint8_t* w, R::I (&low)[2], R::I (&high)[2]) {
    const R::I mask = R::set1b(15), lows = R::band(R::codebook(), mask);
    const R::I highs = R::band(R::template shr16<4>(R::codebook()), mask);
    R::I codes[2];
    Nibbles::pair<G>(w, codes[0], codes[1]);
    for (int half = 0; half < 2; ++half) {
      low[half] = R::lut(lows, codes[half]);
      high[half] = R::lut(highs, codes[half]);
    }
  }
};
struct TwoBits {
  static constexpr int kBytes = 128;
  template <int G>
  static void pair(const uint8_t* w, R::I& lo, R::I& hi) {
    lo = R::band(R::template shr16<2 * G>(R::loadi(w)), R::set1b(3));
    hi = R::band(R::template shr16<2 * G>(R::loadi(w + 64)), R::set1b(3));
  }
};
// Codes of `Low` with one more bit, at bit kShift, from a plane behind them.
template <class Low, int kShift>
struct PlusBit {
  static constexpr int kBytes = Low::kBytes + 64;
  template <int G>
  static void pair(const uint8_t* w, R::I& lo, R::I& hi) {
    Low::template pair<G>(w, lo, hi);
    const R::I plane = R::loadi(w + Low::kBytes);
    const R::I one = R::set1b(1);
    lo = R::bor(lo, R::template shl16<kShift>(R::band(R::template shr16<G>(plane), one)));
    hi = R::bor(hi, R::template shl16<kShift>(R::band(R::template shr16<G + 4>(plane), one)));
  }
};
struct NibblesPlusTwo {
  static constexpr int kBytes = Nibbles::kBytes + TwoBits::kBytes;
  template <int G>
  static void pair(const uint8_t* w, R::I& lo, R::I& hi) {
    R::I low_bits, high_bits;
    Nibbles::pair<G>(w, lo, hi);
    TwoBits::pair<G>(w + Nibbles::kBytes, low_bits, high_bits);
    lo = R::bor(lo, R::template shl16<4>(low_bits));
    hi = R::bor(hi, R::template shl16<4>(high_bits));
  }
};

// How scales are stored. `header` reads what the eight blocks behind it share, `scales` what lies at `w` behind the codes
// of block `b` of them. kSubs scales per block; kMin: a min per scale too; kZeroPoint: a zero point per block.
struct HalfScale {
  static constexpr int kHeader = 0, kSubs = 1;
  static constexpr bool kMin = false, kZeroPoint = false;
  struct Header {};
  static void header(const uint8_t*, int, Header&) {}
  static void scales(const uint8_t* w, int at, const Header&, int, R::F (&s)[2], R::F (&)[2]) {
    s[0] = R::loadh(w + 2 * at);
  }
};
struct HalfScaleAndMin : HalfScale {
  static constexpr bool kMin = true;
  static void scales(const uint8_t* w, int at, const Header&, int, R::F (&s)[2], R::F (&m)[2]) {
    s[0] = R::loadh(w + 2 * at);
    m[0] = R::loadh(w + 32 + 2 * at);
  }
};
struct ByteScale {
  static constexpr int kHeader = 32, kSubs = 1;
  static constexpr bool kMin = false, kZeroPoint = false;
  struct Header {
    R::F d;
  };
  static void header(const uint8_t* w, int at, Header& h) { h.d = R::loadh(w + 2 * at); }
  static void scales(const uint8_t* w, int at, const Header& h, int, R::F (&s)[2], R::F (&)[2]) {
    s[0] = R::mul(h.d, R::from_s8(w + at));
  }
};
struct TwoByteScales : ByteScale {
  static constexpr int kSubs = 2;
  static void scales(const uint8_t* w, int at, const Header& h, int, R::F (&s)[2], R::F (&)[2]) {
    s[0] = R::mul(h.d, R::from_s8(w + at));
    s[1] = R::mul(h.d, R::from_s8(w + 16 + at));
  }
};
struct SixBitScaleAndMin {
  static constexpr int kHeader = 256, kSubs = 1;
  static constexpr bool kMin = true, kZeroPoint = false;
  struct Header {
    R::F scale[kSuperBlocks], min[kSuperBlocks];
  };
  static void header(const uint8_t* w, int at, Header& h) {
    const R::F d = R::loadh(w + 2 * at), dmin = R::loadh(w + 32 + 2 * at);
    R::I words[3];
    for (int i = 0; i < 3; ++i) words[i] = R::loadi(w + 64 + 64 * i + 4 * at);
    block<0>(words, d, dmin, h);
  }
  template <int B>
  static BISE_INLINE void block(const R::I (&words)[3], R::F d, R::F dmin, Header& h) {
    h.scale[B] = R::mul(d, R::from_i(field<2 * B>(words)));
    h.min[B] = R::mul(dmin, R::from_i(field<2 * B + 1>(words)));
    if constexpr (B + 1 < kSuperBlocks) block<B + 1>(words, d, dmin, h);
  }
  template <int F>
  static BISE_INLINE R::I field(const R::I (&words)[3]) {
    if constexpr (F < 15) return R::band(R::template sar32<6 * (F % 5)>(words[F / 5]), R::set1i(63));
    R::I value = R::set1i(0);  // two bits of each word, of the last the highest
    for (int i = 2; i >= 0; --i)
      value = R::bor(R::template shl32<2>(value), R::band(R::template sar32<30>(words[i]), R::set1i(3)));
    return value;
  }
  static void scales(const uint8_t*, int, const Header& h, int b, R::F (&s)[2], R::F (&m)[2]) {
    s[0] = h.scale[b];
    m[0] = h.min[b];
  }
};
struct SevenBitScaleAndZero {
  static constexpr int kHeader = 256, kSubs = 1;
  static constexpr bool kMin = false, kZeroPoint = true;
  struct Header {
    R::F d;
    const uint8_t* words;
  };
  static void header(const uint8_t* w, int at, Header& h) {
    h.words = w + 4 * at;
    R::I half = R::set1i(0);
    for (int i = 3; i >= 0; --i)
      half = R::bor(R::template shl32<4>(half), R::band(R::template sar32<28>(R::loadi(h.words + 64 * i)), R::set1i(15)));
    h.d = R::mul(R::from_half(half), R::set1(kZ4Unit));
  }
  static R::I field(const Header& h, int bit, int b) {
    return R::band(R::shr32(R::loadi(h.words + b / 2 * 64), b % 2 * 14 + bit), R::set1i(127));
  }
  static void scales(const uint8_t*, int, const Header& h, int b, R::F (&s)[2], R::F (&)[2]) {
    s[0] = R::mul(h.d, R::from_i(field(h, 0, b)));
  }
  // 128 - z per lane with short sums, else z in each of a lane's bytes
  static R::I zero(const uint8_t*, int, const Header& h, int b) {
    const R::I z = field(h, 7, b);
    return R::kShortSums ? R::subi(R::set1i(128), z) : R::spread(z);
  }
};
struct OpenScaleAndZero {
  static constexpr int kHeader = 0, kSubs = 1;
  static constexpr bool kMin = false, kZeroPoint = true;
  struct Header {};
  static void header(const uint8_t*, int, Header&) {}
  static void scales(const uint8_t* w, int at, const Header&, int, R::F (&s)[2], R::F (&)[2]) {
    s[0] = R::load(reinterpret_cast<const float*>(w) + at);
  }
  static R::I zero(const uint8_t* w, int at, const Header&, int) { return R::loadi(w + 64 + 4 * at); }
};
struct TwoNibbleScalesAndMins {
  static constexpr int kHeader = 64, kSubs = 2;
  static constexpr bool kMin = true, kZeroPoint = false;
  struct Header {
    R::F d, dmin;
  };
  static void header(const uint8_t* w, int at, Header& h) {
    h.d = R::loadh(w + 2 * at);
    h.dmin = R::loadh(w + 32 + 2 * at);
  }
  static void scales(const uint8_t* w, int at, const Header& h, int, R::F (&s)[2], R::F (&m)[2]) {
    uint8_t part[16];
    for (int half = 0; half < 2; ++half) {
      const uint8_t* both = w + 16 * half + at;
      for (int i = 0; i < R::L; ++i) part[i] = both[i] & 15;
      s[half] = R::mul(h.d, R::from_u8(part));
      for (int i = 0; i < R::L; ++i) part[i] = both[i] >> 4;
      m[half] = R::mul(h.dmin, R::from_u8(part));
    }
  }
};

// A format: its codes, its scales, its zero point and its largest code. Instruction sets without a four-way dot
// product add codes up to 15 in 16 bits over a block (8 x 2 x 15 x 127 < 2^15), and the two nibbles of codes above 127
// likewise, each on its own (kShortSums).
template <class CodesT, class ScalesT, int kZeroT, int kMaxT>
struct Layout {
  using Codes = CodesT;
  using Scales = ScalesT;
  static constexpr int kZero = kZeroT;
  static constexpr bool kWide = kMaxT > 127, kShort = R::kShortSums && kMaxT <= 15;
};
template <int kFormat>
struct LayoutOf;
template <>
struct LayoutOf<kQ8> : Layout<Bytes8, HalfScale, 128, 255> {};
template <>
struct LayoutOf<kQ4> : Layout<Nibbles, HalfScale, 8, 15> {};
template <>
struct LayoutOf<kQ41> : Layout<Nibbles, HalfScaleAndMin, 0, 15> {};
template <>
struct LayoutOf<kQ5> : Layout<PlusBit<Nibbles, 4>, HalfScale, 16, 31> {};
template <>
struct LayoutOf<kQ51> : Layout<PlusBit<Nibbles, 4>, HalfScaleAndMin, 0, 31> {};
template <>
struct LayoutOf<kN4> : Layout<Codebook, HalfScale, 128, 255> {};
template <>
struct LayoutOf<kN4K> : Layout<Codebook, ByteScale, 128, 255> {};
template <>
struct LayoutOf<kZ4>
    : Layout<std::conditional_t<R::kShortSums, Nibbles, Eighths>, SevenBitScaleAndZero, 128, R::kShortSums ? 15 : 255> {
};
template <>
struct LayoutOf<kZ4Open>
    : Layout<std::conditional_t<R::kShortSums, Nibbles, Eighths>, OpenScaleAndZero, 128, R::kShortSums ? 15 : 255> {};
template <>
struct LayoutOf<kQ4K> : Layout<Nibbles, SixBitScaleAndMin, 0, 15> {};
template <>
struct LayoutOf<kQ5K> : Layout<PlusBit<Nibbles, 4>, SixBitScaleAndMin, 0, 31> {};
template <>
struct LayoutOf<kQ6K> : Layout<NibblesPlusTwo, TwoByteScales, 32, 63> {};
template <>
struct LayoutOf<kQ3K> : Layout<PlusBit<TwoBits, 2>, TwoByteScales, 4, 7> {};
template <>
struct LayoutOf<kQ2K> : Layout<TwoBits, TwoNibbleScalesAndMins, 0, 3> {};

// -zero * sum of codes, from -8 * sum: shifted in the register, so that the broadcast comes straight from memory
template <int kZero>
inline R::I offset_start(int32_t n8) {
  if constexpr (kZero == 0) return R::set1i(0);
  else if constexpr (kZero == 4) return R::template sar32<1>(R::set1i(n8));
  else if constexpr (kZero == 8) return R::set1i(n8);
  else if constexpr (kZero == 16) return R::template shl32<1>(R::set1i(n8));
  else if constexpr (kZero == 32) return R::template shl32<2>(R::set1i(n8));
  else return R::template shl32<4>(R::set1i(n8));
}

// Rows of the widest tile.
constexpr int kWidestTile = R::kRegisters >= 32 ? 8 : 6;

// A block of kPanels panels x MT rows: integer sums and the float accumulators.
template <int kFormat, int MT, int kPanels>
struct Block {
  using Form = LayoutOf<kFormat>;
  using Header = Form::Scales::Header;
  static constexpr int kSubs = Form::Scales::kSubs;
  static constexpr bool kSplit = R::kShortSums && Form::kWide;
  // Two sums instead of one: of two sub-blocks, of low and high nibbles, or for few rows, whose products would wait for
  // each other. Integers: the split does not change the result.
  static constexpr int kChains = kSubs == 2 || kSplit || MT <= 2 ? 2 : 1;

  template <int G>
  static void add_groups(const uint8_t* const (&w)[kPanels], const R::I (&zero)[kPanels], const uint8_t* a,
                         R::I (&sum)[kPanels][kChains][MT]) {
    R::I codes[2][kPanels];
    if constexpr (kSplit) {
      R::I low[2], high[2];
      static_assert(kPanels == 1);
      Form::Codes::template nibbles<G>(w[0], low, high);
      for (int half = 0; half < 2; ++half) {
        BISE_UNROLL(8)
        for (int m = 0; m < MT; ++m) {
          const R::I x = group(a, m, G + 4 * half);
          sum[0][0][m] = R::dot16(sum[0][0][m], low[half], x);
          sum[0][1][m] = R::dot16(sum[0][1][m], high[half], x);
        }
      }
    } else {
      for (int p = 0; p < kPanels; ++p) {
        Form::Codes::template pair<G>(w[p], codes[0][p], codes[1][p]);
        if constexpr (Form::Scales::kZeroPoint && !Form::kShort)
          for (int half = 0; half < 2; ++half) codes[half][p] = R::add8(codes[half][p], zero[p]);
      }
      if constexpr (R::kRegisters < 32) {  // one half after the other: fewer registers at a time
        for (int half = 0; half < 2; ++half) {
          BISE_UNROLL(8)
          for (int m = 0; m < MT; ++m) add_row(codes[half], group(a, m, G + 4 * half), sum, half, m);
        }
      } else {
        BISE_UNROLL(8)
        for (int m = 0; m < MT; ++m)
          for (int half = 0; half < 2; ++half) add_row(codes[half], group(a, m, G + 4 * half), sum, half, m);
      }
    }
  }

  static R::I group(const uint8_t* a, int m, int g) {
    return R::set1i(reinterpret_cast<const int32_t*>(a + m * 32)[g]);
  }

  static BISE_INLINE void add_row(const R::I (&codes)[kPanels], const R::I& x, R::I (&sum)[kPanels][kChains][MT],
                                  int half, int m) {
    for (int p = 0; p < kPanels; ++p) {
      R::I& to = sum[p][half * (kChains - 1)][m];
      to = Form::kShort ? R::dot16(to, codes[p], x) : R::dot(to, codes[p], x);
    }
  }

  // acc += the block of 32 columns at w (codes of lane `at` onward), the b-th under its header, times the tile's block
  // at a.
  static void add(const uint8_t* const (&w)[kPanels], int at, const Header (&header)[kPanels], int b, const uint8_t* a,
                  R::F (&acc)[kPanels][MT]) {
    const int32_t* n8 = reinterpret_cast<const int32_t*>(a + MT * 32);
    const float* scale = reinterpret_cast<const float*>(a + MT * 36);
    const int32_t* n8lo = reinterpret_cast<const int32_t*>(a + MT * 40);
    const float* ssum = reinterpret_cast<const float*>(a + MT * 44);
    const auto start = [&](int m, int chain) {
      if constexpr (kSubs == 2) return offset_start<Form::kZero>(chain ? n8[m] - n8lo[m] : n8lo[m]);
      else return chain ? R::set1i(0) : offset_start<Form::kZero>(n8[m]);
    };
    R::I sum[kPanels][kChains][MT];
    for (int p = 0; p < kPanels; ++p)
      for (int m = 0; m < MT; ++m)
        for (int c = 0; c < kChains; ++c) sum[p][c][m] = Form::kShort || kSplit ? R::set1i(0) : start(m, c);
    const uint8_t* codes[kPanels];
    R::I zero[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      codes[p] = w[p] + 4 * at;
      if constexpr (Form::Scales::kZeroPoint) zero[p] = Form::Scales::zero(w[p] + Form::Codes::kBytes, at, header[p], b);
    }
    add_groups<0>(codes, zero, a, sum);
    add_groups<1>(codes, zero, a, sum);
    add_groups<2>(codes, zero, a, sum);
    add_groups<3>(codes, zero, a, sum);
    for (int p = 0; p < kPanels; ++p) {
      R::F s[2], min[2];
      Form::Scales::scales(w[p] + Form::Codes::kBytes, at, header[p], b, s, min);
      BISE_UNROLL(8)
      for (int m = 0; m < MT; ++m) {
        if constexpr (kSplit) {
          sum[p][0][m] = R::addi(start(m, 0), R::template widen16<1>(sum[p][0][m]));
          sum[p][1][m] = R::template widen16<16>(sum[p][1][m]);
        } else if constexpr (Form::kShort && Form::Scales::kZeroPoint) {
          const R::I zero8 = R::dot_pairs(R::set1i(0), zero[p], R::set1i(n8[m]));  // both fit 16 bits
          for (int c = 0; c < kChains; ++c) sum[p][c][m] = R::template widen16<8>(sum[p][c][m]);
          sum[p][0][m] = R::addi(R::template sar32<3>(zero8), sum[p][0][m]);
        } else if constexpr (Form::kShort) {
          for (int c = 0; c < kChains; ++c) sum[p][c][m] = R::addi(start(m, c), R::template widen16<1>(sum[p][c][m]));
        }
        const R::F factor = R::set1(scale[m]);
        R::F r = acc[p][m];
        if constexpr (kSubs == 1) {
          R::I total = sum[p][0][m];
          if constexpr (kChains == 2) total = R::addi(total, sum[p][1][m]);
          r = R::fma(R::from_i(total), R::mul(s[0], factor), r);
          if constexpr (Form::Scales::kMin) r = R::fnma(min[0], R::set1(ssum[m]), r);
        } else {
          r = R::fma(R::from_i(sum[p][0][m]), R::mul(s[0], factor), r);
          r = R::fma(R::from_i(sum[p][1][m]), R::mul(s[1], factor), r);
          if constexpr (Form::Scales::kMin) {
            r = R::fnma(min[0], R::set1(scale[m] * float(n8lo[m] / -8)), r);
            r = R::fnma(min[1], R::set1(scale[m] * float((n8[m] - n8lo[m]) / -8)), r);
          }
        }
        acc[p][m] = r;
      }
    }
  }
};

// Bytes that one row of activations fetches its weights ahead: panels lie one behind the other, so the stream never
// ends. By sweep on a 2-core Zen 4, 22 Nov 2026 (docs/log.md).
constexpr int kAhead = 4096;

// What more rows fetch meanwhile into the L2: `step` bytes per block, from `next` on. `due` is where that ends by now.
struct Fetch {
  const uint8_t *next, *due;
  int64_t step;
};

// Lanes of a panel that are computed in one walk over it: all 16 of few rows, so that the walk is as fast as the
// memory; those of one register otherwise.
template <int MT>
constexpr int kWalkLanes = MT <= 2 ? kPanelRows : R::L;

template <int kFormat, int MT, int kPanels>
inline void matmul_lanes(const uint8_t* panel, int64_t stride, const uint8_t* a, int64_t blocks, int at, float* out,
                         int64_t ldo, Fetch& fetch) {
  using Scales = LayoutOf<kFormat>::Scales;
  constexpr int kBlockBytes = kFormatInfo[kFormat].block_bytes, kParts = kWalkLanes<MT> / R::L;
  const uint8_t* w[kPanels];
  R::F acc[kParts][kPanels][MT];
  typename Scales::Header header[kParts][kPanels];
  Fetch f = fetch;
  for (int p = 0; p < kPanels; ++p) {
    w[p] = panel + p * stride;
    for (int part = 0; part < kParts; ++part)
      for (int m = 0; m < MT; ++m) acc[part][p][m] = R::set1(0.0f);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    for (int p = 0; p < kPanels; ++p) {
      if constexpr (Scales::kHeader != 0) {
        if (b % kSuperBlocks == 0) {
          for (int part = 0; part < kParts; ++part) Scales::header(w[p], at + part * R::L, header[part][p]);
          if constexpr (MT == 1)
            for (int line = 0; line < Scales::kHeader; line += 64) R::prefetch(w[p] + kAhead + line);
          w[p] += Scales::kHeader;
        }
      }
      if constexpr (MT == 1)
        for (int line = 0; line < kBlockBytes; line += 64) R::prefetch(w[p] + kAhead + line);
    }
    if constexpr (MT > 1) {
      for (f.due += f.step; f.next < f.due; f.next += 64) R::prefetch_far(f.next);
    }
    for (int part = 0; part < kParts; ++part)
      Block<kFormat, MT, kPanels>::add(w, at + part * R::L, header[part], int(b % kSuperBlocks), a, acc[part]);
    for (int p = 0; p < kPanels; ++p) w[p] += kBlockBytes;
    a += MT * kTileRowBytes;
  }
  fetch = f;
  for (int part = 0; part < kParts; ++part)
    for (int p = 0; p < kPanels; ++p)
      for (int m = 0; m < MT; ++m) R::store(out + m * ldo + p * kPanelRows + at + part * R::L, acc[part][p][m]);
}

template <int kFormat, int MT, int kPanels>
void matmul_rows(const uint8_t* panel, int64_t stride, const uint8_t* tile, int64_t blocks, float* out, int64_t ldo,
                 Fetch& fetch) {
  for (int at = 0; at < kPanelRows; at += kWalkLanes<MT>) {
    matmul_lanes<kFormat, MT, kPanels>(panel, stride, tile, blocks, at, out, ldo, fetch);
    fetch.step = 0;  // the second walk over a panel finds it in the cache
  }
}

// Two panels at once share each broadcast activation. One row gains nothing by that and reads one stream of memory
// faster than two; eight rows of two panels, and formats with two scales per block, have no registers for it.
template <int kFormat, int MT>
void matmul_tile(const uint8_t* panel, int panels, const uint8_t* tile, int64_t blocks, float* out, int64_t ldo,
                 const uint8_t* next, int64_t next_bytes) {
  using Scales = LayoutOf<kFormat>::Scales;
  const int64_t stride = panel_bytes(kFormat, blocks * kBlockCols);
  constexpr int kTogether = Scales::kSubs == 1 && R::kRegisters >= 32 && MT != 1 && MT <= 6 ? 2 : 1;
  const int64_t step = next_bytes * kTogether / (panels * blocks);
  Fetch fetch = {next, next, step};
  int p = 0;
  for (; p + kTogether <= panels; p += kTogether) {
    fetch.step = step;
    matmul_rows<kFormat, MT, kTogether>(panel + p * stride, stride, tile, blocks, out + p * kPanelRows, ldo, fetch);
  }
  if constexpr (kTogether == 2) {
    fetch.step = step / 2;
    if (p < panels)
      matmul_rows<kFormat, MT, 1>(panel + p * stride, stride, tile, blocks, out + p * kPanelRows, ldo, fetch);
  }
}

template <int kFormat>
void matmul_format(const uint8_t* panel, int panels, const uint8_t* tile, int64_t blocks, int mt, float* out,
                   int64_t ldo, const uint8_t* next, int64_t bytes) {
  switch (mt) {
    case 1: return matmul_tile<kFormat, 1>(panel, panels, tile, blocks, out, ldo, next, bytes);
    case 2: return matmul_tile<kFormat, 2>(panel, panels, tile, blocks, out, ldo, next, bytes);
    case 4: return matmul_tile<kFormat, 4>(panel, panels, tile, blocks, out, ldo, next, bytes);
    case 6: return matmul_tile<kFormat, 6>(panel, panels, tile, blocks, out, ldo, next, bytes);
  }
  if constexpr (kWidestTile == 8) {
    if (mt == 8) return matmul_tile<kFormat, 8>(panel, panels, tile, blocks, out, ldo, next, bytes);
  }
  __builtin_trap();
}

void matmul(int format, const uint8_t* panel, int panels, const uint8_t* tile, int64_t blocks, int mt, float* out,
            int64_t ldo, const uint8_t* next, int64_t bytes) {
  switch (format) {
    case kQ8: return matmul_format<kQ8>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    case kQ4: return matmul_format<kQ4>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    case kQ41: return matmul_format<kQ41>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    case kQ5: return matmul_format<kQ5>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    case kQ51: return matmul_format<kQ51>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    case kN4: return matmul_format<kN4>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    case kN4K: return matmul_format<kN4K>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    case kQ4K: return matmul_format<kQ4K>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    case kQ5K: return matmul_format<kQ5K>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    case kQ6K: return matmul_format<kQ6K>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    case kQ3K: return matmul_format<kQ3K>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    case kQ2K: return matmul_format<kQ2K>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    case kZ4: return matmul_format<kZ4>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    case kZ4Open: return matmul_format<kZ4Open>(panel, panels, tile, blocks, mt, out, ldo, next, bytes);
    default: __builtin_trap();
  }
}

void open_panel(const uint8_t* w, int64_t blocks, uint8_t* to) {
  using Scales = SevenBitScaleAndZero;
  constexpr int kCodes = Nibbles::kBytes;
  const uint8_t* head = w;
  for (int64_t b = 0; b < blocks; ++b) {
    if (b % kSuperBlocks == 0) {
      head = w;
      w += Scales::kHeader;
    }
    for (int i = 0; i < kCodes; i += int(sizeof(R::I))) R::storei(to + i, R::loadi(w + i));
    for (int at = 0; at < kPanelRows; at += R::L) {
      Scales::Header header;
      R::F s[2], unused[2];
      Scales::header(head, at, header);
      Scales::scales(w, at, header, int(b % kSuperBlocks), s, unused);
      R::store(reinterpret_cast<float*>(to + kCodes) + at, s[0]);
      R::storei(to + kCodes + 64 + 4 * at, Scales::zero(w, at, header, int(b % kSuperBlocks)));
    }
    w += kCodes;
    to += kFormatInfo[kZ4Open].block_bytes;
  }
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
