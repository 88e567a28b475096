// Floats to q4k: value = (d ls) q - (dmin lm) with codes q of 4 bits, ls and lm of 6 bits per block of 32 columns, halves
// d and dmin per eight blocks. Least squares throughout, 16 rows (lanes) at a time. Included by quantize.inl.

#define BISE_LANES inline __attribute__((always_inline))

constexpr int kSuperCols = kSuperBlocks * kBlockCols;
constexpr float kTopStep = 63.0f;  // largest ls and lm

// Shares of a block's span that a first guess cuts off at its ends. With these constants the squared error of normal,
// Laplace and t-distributed blocks lies within 1 % of what ten times the work finds (docs/log.md, 22 Nov 2026).
constexpr float kCuts[][2] = {{0, 0},         {0.03f, 0},     {0, 0.03f},     {0.06f, 0},     {0, 0.06f},
                              {0.03f, 0.03f}, {0.06f, 0.03f}, {0.03f, 0.06f}, {0.06f, 0.06f}, {0.1f, 0},
                              {0, 0.1f},      {0.1f, 0.05f},  {0.05f, 0.1f},  {0.1f, 0.1f},   {0.15f, 0.05f},
                              {0.05f, 0.15f}, {0.15f, 0.15f}, {0.15f, 0},     {0, 0.15f},     {0.2f, 0.1f},
                              {0.1f, 0.2f}};
constexpr int kRefits = 4;                // of the best guess
constexpr int kNear = 1, kAround = 4;     // scales tried on either side of the wished one: to find d, and in the end

// Of the codes of a block for one scale and min: sums over the columns with their weights.
struct CodeSums {
  Lanes q, qq, xq;
};

// The best scale and min of a block, of any precision, and what every fit of it needs.
struct BlockFit {
  Lanes scale, min, loss;  // loss: squared error less the sum of squares
  Lanes sum_x;
  float sum_w;
};

// ls and lm.
struct BlockSteps {
  Lanes scale, min, loss;
};

BISE_LANES Lanes inverse_of(const Lanes& x) {
  Lanes inverse;
  EACH_LANE inverse.of[lane] = x.of[lane] != 0.0f ? 1.0f / x.of[lane] : 0.0f;
  return inverse;
}

BISE_LANES float code_of(float x, float min, float inverse) { return nearest_integer((x + min) * inverse, 0.0f, 15.0f); }

BISE_LANES void sum_codes(const Lanes* x, const float* weight, const Lanes& scale, const Lanes& min, CodeSums& sums) {
  const Lanes inverse = inverse_of(scale);
  sums = {};
  for (int j = 0; j < kBlockCols; ++j) {
    EACH_LANE {
      const float value = x[j].of[lane], q = code_of(value, min.of[lane], inverse.of[lane]), weighted = weight[j] * q;
      sums.q.of[lane] += weighted;
      sums.qq.of[lane] += weighted * q;
      sums.xq.of[lane] += weighted * value;
    }
  }
}

// Sum of w (x - s q + m)^2, less that of w x^2.
BISE_LANES float loss_of(float s, float m, const CodeSums& sums, const BlockFit& block, int lane) {
  return s * (s * sums.qq.of[lane] - 2.0f * sums.xq.of[lane]) +
         m * (m * block.sum_w + 2.0f * block.sum_x.of[lane] - 2.0f * s * sums.q.of[lane]);
}

// Codes for a scale and min, then the scale and min that are best for these codes.
BISE_LANES void try_fit(const Lanes* x, const float* weight, const Lanes& scale, const Lanes& min, BlockFit& best) {
  CodeSums sums;
  sum_codes(x, weight, scale, min, sums);
  EACH_LANE {
    const float w = best.sum_w, x1 = best.sum_x.of[lane], q1 = sums.q.of[lane], q2 = sums.qq.of[lane];
    const float free_scale = (w * sums.xq.of[lane] - x1 * q1) / (w * q2 - q1 * q1);
    const float free_min = (free_scale * q1 - x1) / w;
    const bool above = !(free_min > 0.0f);  // a min is subtracted and not negative
    const float s = above ? sums.xq.of[lane] / q2 : free_scale, m = above ? 0.0f : free_min;
    const float loss = loss_of(s, m, sums, best, lane);
    const bool better = s > 0.0f && loss < best.loss.of[lane];  // false where all codes are alike
    best.scale.of[lane] = better ? s : best.scale.of[lane];
    best.min.of[lane] = better ? m : best.min.of[lane];
    best.loss.of[lane] = better ? loss : best.loss.of[lane];
  }
}

BISE_LANES void fit_block(const Lanes* x, const float* weight, BlockFit& best) {
  Lanes low = {}, high = x[0];
  best = {};
  for (int j = 0; j < kBlockCols; ++j) {
    best.sum_w += weight[j];
    EACH_LANE {
      const float value = x[j].of[lane];
      low.of[lane] = value < low.of[lane] ? value : low.of[lane];
      high.of[lane] = value > high.of[lane] ? value : high.of[lane];
      best.sum_x.of[lane] += weight[j] * value;
    }
  }
  for (const float(&cut)[2] : kCuts) {
    Lanes scale, min;
    EACH_LANE {
      const float span = high.of[lane] - low.of[lane];
      scale.of[lane] = span * ((1.0f - cut[0] - cut[1]) / 15.0f);
      min.of[lane] = -(low.of[lane] + span * cut[0]);
    }
    try_fit(x, weight, scale, min, best);
  }
  for (int i = 0; i < kRefits; ++i) {
    const Lanes scale = best.scale, min = best.min;
    try_fit(x, weight, scale, min, best);
  }
}

// The integers of a block under d and dmin: scales around the wished one, each with the wished min and with its own best.
BISE_LANES void choose_steps(const Lanes* x, const float* weight, const BlockFit& wish, const Lanes& d, const Lanes& dmin,
                             int reach, BlockSteps& best) {
  const Lanes per_d = inverse_of(d), per_dmin = inverse_of(dmin);
  best = {};
  for (int around = -reach; around <= reach; ++around) {
    Lanes ls, scale, lm, min;
    EACH_LANE {
      ls.of[lane] = nearest_integer(wish.scale.of[lane] * per_d.of[lane] + float(around), 0.0f, kTopStep);
      scale.of[lane] = ls.of[lane] * d.of[lane];
      min.of[lane] = wish.min.of[lane];
    }
    for (int pass = 0; pass < 2; ++pass) {
      CodeSums sums;
      EACH_LANE {
        lm.of[lane] = nearest_integer(min.of[lane] * per_dmin.of[lane], 0.0f, kTopStep);
        min.of[lane] = lm.of[lane] * dmin.of[lane];
      }
      sum_codes(x, weight, scale, min, sums);
      EACH_LANE {
        const float loss = loss_of(scale.of[lane], min.of[lane], sums, wish, lane);
        const bool better = loss < best.loss.of[lane];
        best.scale.of[lane] = better ? ls.of[lane] : best.scale.of[lane];
        best.min.of[lane] = better ? lm.of[lane] : best.min.of[lane];
        best.loss.of[lane] = better ? loss : best.loss.of[lane];
        min.of[lane] = (scale.of[lane] * sums.q.of[lane] - wish.sum_x.of[lane]) / wish.sum_w;
      }
    }
  }
}

// Integers of all blocks; returns the sum of their losses.
BISE_LANES Lanes choose_all(const Lanes* x, const float* weight, const BlockFit* wish, int blocks, const Lanes& d,
                            const Lanes& dmin, int reach, BlockSteps* steps) {
  Lanes loss = {};
  for (int b = 0; b < blocks; ++b) {
    choose_steps(x + b * kBlockCols, weight + b * kBlockCols, wish[b], d, dmin, reach, steps[b]);
    EACH_LANE loss.of[lane] += steps[b].loss.of[lane];
  }
  return loss;
}

// The d and dmin that are best for the integers and codes as they are: least squares in two unknowns.
BISE_LANES void refit_super(const Lanes* x, const float* weight, const BlockFit* wish, int blocks,
                            const BlockSteps* steps, Lanes& d, Lanes& dmin) {
  Lanes aa = {}, ab = {}, bb = {}, ax = {}, bx = {};  // a = ls q, b = lm
  for (int i = 0; i < blocks; ++i) {
    Lanes scale, min;
    CodeSums sums;
    EACH_LANE {
      scale.of[lane] = d.of[lane] * steps[i].scale.of[lane];
      min.of[lane] = dmin.of[lane] * steps[i].min.of[lane];
    }
    sum_codes(x + i * kBlockCols, weight + i * kBlockCols, scale, min, sums);
    EACH_LANE {
      const float ls = steps[i].scale.of[lane], lm = steps[i].min.of[lane];
      aa.of[lane] += ls * ls * sums.qq.of[lane];
      ab.of[lane] += ls * lm * sums.q.of[lane];
      bb.of[lane] += lm * lm * wish[i].sum_w;
      ax.of[lane] += ls * sums.xq.of[lane];
      bx.of[lane] += lm * wish[i].sum_x.of[lane];
    }
  }
  EACH_LANE {  // d aa - dmin ab = ax, d ab - dmin bb = bx
    const float det = aa.of[lane] * bb.of[lane] - ab.of[lane] * ab.of[lane];
    const float new_d = (ax.of[lane] * bb.of[lane] - bx.of[lane] * ab.of[lane]) / det;
    const float new_dmin = (ax.of[lane] * ab.of[lane] - bx.of[lane] * aa.of[lane]) / det;
    const bool solved = det > 0.0f && new_d > 0.0f && new_dmin >= 0.0f;
    d.of[lane] = solved ? new_d : d.of[lane];
    dmin.of[lane] = solved ? new_dmin : dmin.of[lane];
  }
}

// Panels of one header: halves and integers of 16 rows.
struct SuperScales {
  uint16_t d[kPanelRows], dmin[kPanelRows];
  uint8_t scale[kSuperBlocks][kPanelRows], min[kSuperBlocks][kPanelRows];
};

// x, of unit `size`, as halves and back; a half that is far too small (they are coarse below 6e-5) is made the next one.
BISE_LANES bool as_halves(Lanes& x, const Lanes& size, uint16_t* halves) {
  bool fits = true;
  EACH_LANE {
    const float wanted = x.of[lane] * size.of[lane];
    uint16_t half = float_to_half(wanted);
    if (half_to_float(half) < 0.99f * wanted) ++half;
    fits = fits && finite_half(half);
    halves[lane] = half;
    x.of[lane] = size.of[lane] > kTooSmall ? half_to_float(half) / size.of[lane] : 0.0f;
  }
  return fits;
}

// Quantise x[32 blocks] to codes [32 blocks][16]; false when a value is not finite or too large.
BISE_LANES bool quantize_super_lanes(const Lanes* x, const float* weight, int blocks, uint8_t* codes, SuperScales& out) {
  Lanes z[kSuperCols], size = {}, d = {}, dmin = {};
  int bad = 0;
  for (int j = 0; j < blocks * kBlockCols; ++j) {
    EACH_LANE {
      const float magnitude = std::fabs(x[j].of[lane]);
      bad |= !(magnitude <= kTooLarge);
      size.of[lane] = magnitude > size.of[lane] ? magnitude : size.of[lane];
    }
  }
  if (bad) return false;
  EACH_LANE size.of[lane] = size.of[lane] > kTooSmall ? size.of[lane] : 0.0f;
  const Lanes per_size = inverse_of(size);
  for (int j = 0; j < blocks * kBlockCols; ++j) EACH_LANE z[j].of[lane] = x[j].of[lane] * per_size.of[lane];
  BlockFit wish[kSuperBlocks];
  BlockSteps steps[kSuperBlocks], again[kSuperBlocks];
  for (int b = 0; b < blocks; ++b) {
    fit_block(z + b * kBlockCols, weight + b * kBlockCols, wish[b]);
    EACH_LANE {
      d.of[lane] = wish[b].scale.of[lane] > d.of[lane] ? wish[b].scale.of[lane] : d.of[lane];
      dmin.of[lane] = wish[b].min.of[lane] > dmin.of[lane] ? wish[b].min.of[lane] : dmin.of[lane];
    }
  }
  EACH_LANE d.of[lane] /= kTopStep, dmin.of[lane] /= kTopStep;
  bool fits = as_halves(d, size, out.d) && as_halves(dmin, size, out.dmin);
  const Lanes loss = choose_all(z, weight, wish, blocks, d, dmin, kNear, steps);
  Lanes new_d = d, new_dmin = dmin;
  refit_super(z, weight, wish, blocks, steps, new_d, new_dmin);
  uint16_t halves[2][kPanelRows];
  fits = fits && as_halves(new_d, size, halves[0]) && as_halves(new_dmin, size, halves[1]);
  if (!fits) return false;
  const Lanes new_loss = choose_all(z, weight, wish, blocks, new_d, new_dmin, kAround, again);
  EACH_LANE {
    const bool better = new_loss.of[lane] < loss.of[lane];
    out.d[lane] = better ? halves[0][lane] : out.d[lane];
    out.dmin[lane] = better ? halves[1][lane] : out.dmin[lane];
    for (int b = 0; b < kSuperBlocks; ++b) {
      const BlockSteps& taken = better ? again[b] : steps[b];
      out.scale[b][lane] = b < blocks ? uint8_t(taken.scale.of[lane]) : uint8_t(0);
      out.min[b][lane] = b < blocks ? uint8_t(taken.min.of[lane]) : uint8_t(0);
    }
  }
  for (int b = 0; b < blocks; ++b) {
    Lanes scale, min;
    EACH_LANE {
      scale.of[lane] = half_to_float(out.d[lane]) * float(out.scale[b][lane]);
      min.of[lane] = half_to_float(out.dmin[lane]) * float(out.min[b][lane]);
    }
    const Lanes inverse = inverse_of(scale);
    for (int j = b * kBlockCols; j < (b + 1) * kBlockCols; ++j)
      EACH_LANE codes[j * kPanelRows + lane] = uint8_t(code_of(x[j].of[lane], min.of[lane], inverse.of[lane]));
  }
  return true;
}

BISE_CLONES BISE_FAST bool quantize_super(const Lanes* x, const float* weight, int blocks, uint8_t* codes,
                                          SuperScales& out) {
  return quantize_super_lanes(x, weight, blocks, codes, out);
}

// Header and blocks of up to 256 columns [k0, k0 + count) of `rows` rows of x into `to`.
bool pack_super(const float* x, int rows, int64_t k, int64_t k0, int count, const float* importance, uint8_t* to) {
  const int blocks = (count + kBlockCols - 1) / kBlockCols;
  Lanes values[kSuperCols] = {};
  float weights[kSuperCols] = {};
  for (int lane = 0; lane < rows; ++lane)
    for (int j = 0; j < count; ++j) values[j].of[lane] = x[lane * k + k0 + j];
  for (int j = 0; j < count; ++j) weights[j] = importance ? importance[k0 + j] : 1.0f;
  uint8_t codes[kSuperCols * kPanelRows];
  SuperScales scales;
  if (!quantize_super(values, weights, blocks, codes, scales)) return false;
  const FormatInfo& info = kFormatInfo[kQ4K];
  std::memcpy(to, scales.d, size_t(rows) * 2);
  std::memcpy(to + 2 * kPanelRows, scales.dmin, size_t(rows) * 2);
  for (int lane = 0; lane < rows; ++lane) {
    uint8_t fields[2 * kSuperBlocks];
    for (int b = 0; b < kSuperBlocks; ++b) {
      fields[2 * b] = scales.scale[b][lane];
      fields[2 * b + 1] = scales.min[b][lane];
    }
    put_six_bits(to, lane, fields);
  }
  for (int b = 0; b < blocks; ++b) {
    const int columns = count - b * kBlockCols < kBlockCols ? count - b * kBlockCols : kBlockCols;
    write_codes(kQ4K, codes + b * kBlockCols * kPanelRows, rows, columns, to + info.header_bytes + b * info.block_bytes);
  }
  return true;
}

#undef BISE_LANES
