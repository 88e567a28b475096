// How the formats store codes and scales. Included after wide.inl, before the products.

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
  static constexpr int kOdd = 14;                              // bits before the fields of odd blocks
  static constexpr int32_t kScales[2] = {127, 127 << kOdd};  // the scales stay where they are in their words
  struct Header {
    R::F d[2];  // as even and odd blocks multiply it
    const uint8_t* words;
  };
  static void header(const uint8_t* w, int at, Header& h) {
    h.words = w + 4 * at;
    R::I half = R::set1i(0);
    for (int i = 3; i >= 0; --i)
      half = R::bor(R::template shl32<4>(half), R::band(R::template sar32<28>(R::loadi(h.words + 64 * i)), R::set1i(15)));
    h.d[0] = R::mul(R::from_half(half), R::set1(kZ4Unit));
    h.d[1] = R::mul(h.d[0], R::set1(1.0f / (1 << kOdd)));
  }
  static R::I word(const Header& h, int b) { return R::loadi(h.words + b / 2 * 64); }
  static void scales(const uint8_t*, int, const Header& h, int b, R::F (&s)[2], R::F (&)[2]) {
    s[0] = R::mul(h.d[b % 2], R::from_i(R::band(word(h, b), R::set1i(kScales[b % 2]))));
  }
  // z in each of a lane's bytes; with short sums 128 - z in the high half of the lane, to be multiplied by -sum, the high
  // half of `sums` of the activations
  static R::I zero(const uint8_t*, int, const Header& h, int b) {
    const R::I z = R::band(R::to_bit16(word(h, b), b % 2 * kOdd + 7), R::set1i(127 << 16));
    return R::kShortSums ? R::subi(R::set1i(128 << 16), z) : R::spread16(z);
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
