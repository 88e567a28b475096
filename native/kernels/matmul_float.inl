// Products of float weights with float rows: one fused multiply-add per column, columns in ascending order. Included
// after wide.inl.

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
