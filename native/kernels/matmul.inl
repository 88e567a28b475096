// Products of packed weights with rows of activations. Included after layouts.inl.
//
// One lane is one output row, so there is no horizontal sum. Per 32-column block the integer dot product is exact and
// enters the float accumulator with one fused multiply-add (two for formats with scales per 16, one more for a min),
// blocks in ascending order: the result of a row depends on nothing but that row and the weight.

// -zero * sum of codes, from -8 * sum: shifted in the register, so that the broadcast comes straight from memory; from
// -128 * sum nothing needs to be shifted
template <int kZero>
inline R::I offset_start(int32_t n8, int32_t n128) {
  if constexpr (kZero == 0) return R::set1i(0);
  else if constexpr (kZero == 4) return R::template sar32<1>(R::set1i(n8));
  else if constexpr (kZero == 8) return R::set1i(n8);
  else if constexpr (kZero == 16) return R::template shl32<1>(R::set1i(n8));
  else if constexpr (kZero == 32) return R::template shl32<2>(R::set1i(n8));
  else return R::set1i(n128);
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
    const int32_t* sums = reinterpret_cast<const int32_t*>(a + MT * 40);
    const float* ssum = reinterpret_cast<const float*>(a + MT * 44);
    const int32_t* n128 = reinterpret_cast<const int32_t*>(a + MT * 48);
    const uint8_t* codes[kPanels];
    R::I zero[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      codes[p] = w[p] + 4 * at;
      if constexpr (Form::Scales::kZeroPoint) zero[p] = Form::Scales::zero(w[p] + Form::Codes::kBytes, at, header[p], b);
    }
    const auto low8 = [&](int m) { return int32_t(int16_t(sums[m])); };
    const auto start = [&](int p, int m, int chain) {
      if constexpr (kSubs == 2) return offset_start<Form::kZero>(chain ? n8[m] - low8(m) : low8(m), 0);
      else if (chain) return R::set1i(0);
      else if constexpr (Form::Scales::kZeroPoint && Form::kShort) return R::mul_pairs(zero[p], R::set1i(sums[m]));
      else return offset_start<Form::kZero>(n8[m], n128[m]);
    };
    R::I sum[kPanels][kChains][MT];
    for (int p = 0; p < kPanels; ++p)
      for (int m = 0; m < MT; ++m)
        for (int c = 0; c < kChains; ++c) sum[p][c][m] = Form::kShort || kSplit ? R::set1i(0) : start(p, m, c);
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
          sum[p][0][m] = R::addi(start(p, m, 0), R::template widen16<1>(sum[p][0][m]));
          sum[p][1][m] = R::template widen16<16>(sum[p][1][m]);
        } else if constexpr (Form::kShort) {
          constexpr int kCode = Form::Scales::kZeroPoint ? 8 : 1;
          for (int c = 0; c < kChains; ++c)
            sum[p][c][m] = R::addi(start(p, m, c), R::template widen16<kCode>(sum[p][c][m]));
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
            r = R::fnma(min[0], R::set1(scale[m] * float(low8(m) / -8)), r);
            r = R::fnma(min[1], R::set1(scale[m] * float((n8[m] - low8(m)) / -8)), r);
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
inline void quantize_block(const float* x, int8_t* codes, int32_t& n8, float& scale, int32_t& sums, float& ssum) {
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
  sums = int32_t(uint32_t(-sum) << 16 | uint32_t(-8 * sum_lo & 0xffff));
  ssum = scale * float(sum);
}

void quantize(const float* x, int64_t ldx, int rows, int64_t k, int64_t b0, int64_t b1, int mt, uint8_t* tile) {
  for (int64_t b = b0; b < b1; ++b) {
    uint8_t* block = tile + b * mt * kTileRowBytes;
    int32_t* n8 = reinterpret_cast<int32_t*>(block + mt * 32);
    float* scale = reinterpret_cast<float*>(block + mt * 36);
    int32_t* sums = reinterpret_cast<int32_t*>(block + mt * 40);
    float* ssum = reinterpret_cast<float*>(block + mt * 44);
    int32_t* n128 = reinterpret_cast<int32_t*>(block + mt * 48);
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
      quantize_block(source, codes, n8[m], scale[m], sums[m], ssum[m]);
      n128[m] = 16 * n8[m];
    }
  }
}
