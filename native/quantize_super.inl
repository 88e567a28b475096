// Floats to z4: value = d s (8 q + z - 128) with codes q of 4 bits, s and z of 7 bits per block of 32 columns, a half d per
// eight blocks. Least squares throughout, 16 rows (lanes) at a time. Included by quantize.inl.

#define BISE_LANES inline __attribute__((always_inline))

constexpr int kSuperCols = kSuperBlocks * kBlockCols;
constexpr float kTopField = 127.0f;
constexpr float kUnits = 8.0f;  // of a zero point in a step between codes

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

// s and 128 - z.
struct BlockSteps {
  Lanes scale, zero, loss;
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

// The integers of a block under d: scales around the wished one, each with the wished min and with its own best.
BISE_LANES void choose_steps(const Lanes* x, const float* weight, const BlockFit& wish, const Lanes& d, int reach,
                             BlockSteps& best) {
  const Lanes per_d = inverse_of(d);
  best = {};
  for (int around = -reach; around <= reach; ++around) {
    Lanes steps, unit, scale, zero, min = wish.min;
    EACH_LANE {
      const float wished = wish.scale.of[lane] * (1.0f / kUnits) * per_d.of[lane] + float(around);
      steps.of[lane] = nearest_integer(wished, 0.0f, kTopField);
      unit.of[lane] = steps.of[lane] * d.of[lane];
      scale.of[lane] = kUnits * unit.of[lane];
    }
    const Lanes per_unit = inverse_of(unit);
    for (int pass = 0; pass < 2; ++pass) {
      CodeSums sums;
      EACH_LANE {
        zero.of[lane] = nearest_integer(min.of[lane] * per_unit.of[lane], 1.0f, kTopField + 1.0f);
        min.of[lane] = zero.of[lane] * unit.of[lane];
      }
      sum_codes(x, weight, scale, min, sums);
      EACH_LANE {
        const float loss = loss_of(scale.of[lane], min.of[lane], sums, wish, lane);
        const bool better = loss < best.loss.of[lane];
        best.scale.of[lane] = better ? steps.of[lane] : best.scale.of[lane];
        best.zero.of[lane] = better ? zero.of[lane] : best.zero.of[lane];
        best.loss.of[lane] = better ? loss : best.loss.of[lane];
        min.of[lane] = (scale.of[lane] * sums.q.of[lane] - wish.sum_x.of[lane]) / wish.sum_w;
      }
    }
  }
}

// Integers of all blocks; returns the sum of their losses.
BISE_LANES Lanes choose_all(const Lanes* x, const float* weight, const BlockFit* wish, int blocks, const Lanes& d,
                            int reach, BlockSteps* steps) {
  Lanes loss = {};
  for (int b = 0; b < blocks; ++b) {
    choose_steps(x + b * kBlockCols, weight + b * kBlockCols, wish[b], d, reach, steps[b]);
    EACH_LANE loss.of[lane] += steps[b].loss.of[lane];
  }
  return loss;
}

// The d that is best for the integers and codes as they are.
BISE_LANES void refit_super(const Lanes* x, const float* weight, const BlockFit* wish, int blocks,
                            const BlockSteps* steps, Lanes& d) {
  Lanes aa = {}, ax = {};  // a = s (8 q - zero)
  for (int i = 0; i < blocks; ++i) {
    Lanes scale, min;
    CodeSums sums;
    EACH_LANE {
      const float unit = d.of[lane] * steps[i].scale.of[lane];
      scale.of[lane] = kUnits * unit;
      min.of[lane] = unit * steps[i].zero.of[lane];
    }
    sum_codes(x + i * kBlockCols, weight + i * kBlockCols, scale, min, sums);
    EACH_LANE {
      const float s = steps[i].scale.of[lane], zero = steps[i].zero.of[lane];
      const float squares = kUnits * (kUnits * sums.qq.of[lane] - 2.0f * zero * sums.q.of[lane]);
      aa.of[lane] += s * s * (squares + zero * zero * wish[i].sum_w);
      ax.of[lane] += s * (kUnits * sums.xq.of[lane] - zero * wish[i].sum_x.of[lane]);
    }
  }
  EACH_LANE {
    const float best = ax.of[lane] / aa.of[lane];
    d.of[lane] = best > 0.0f ? best : d.of[lane];
  }
}

// Panels of one header: halves and integers of 16 rows.
struct SuperScales {
  uint16_t d[kPanelRows];
  uint8_t scale[kSuperBlocks][kPanelRows], zero[kSuperBlocks][kPanelRows];  // s and z
};

// x, in `size`, as halves of kZ4Unit and back; a half that is far too small (they are coarse below 6e-5) is made the next one.
BISE_LANES bool as_halves(Lanes& x, const Lanes& size, uint16_t* halves) {
  bool fits = true;
  EACH_LANE {
    const float wanted = x.of[lane] * size.of[lane] * (1.0f / kZ4Unit);
    uint16_t half = float_to_half(wanted);
    if (half_to_float(half) < 0.99f * wanted) ++half;
    fits = fits && finite_half(half);
    halves[lane] = half;
    x.of[lane] = size.of[lane] > kTooSmall ? kZ4Unit * half_to_float(half) / size.of[lane] : 0.0f;
  }
  return fits;
}

// Quantise x[32 blocks] to codes [32 blocks][16]; false when a value is not finite or too large.
BISE_LANES bool quantize_super_lanes(const Lanes* x, const float* weight, int blocks, uint8_t* codes, SuperScales& out) {
  Lanes z[kSuperCols], size = {}, d = {};
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
    EACH_LANE d.of[lane] = wish[b].scale.of[lane] > d.of[lane] ? wish[b].scale.of[lane] : d.of[lane];
  }
  EACH_LANE d.of[lane] /= kUnits * kTopField;
  if (!as_halves(d, size, out.d)) return false;
  const Lanes loss = choose_all(z, weight, wish, blocks, d, kNear, steps);
  Lanes refitted = d;
  uint16_t halves[kPanelRows];
  refit_super(z, weight, wish, blocks, steps, refitted);
  if (!as_halves(refitted, size, halves)) return false;
  const Lanes new_loss = choose_all(z, weight, wish, blocks, refitted, kAround, again);
  EACH_LANE {
    const bool better = new_loss.of[lane] < loss.of[lane];
    out.d[lane] = better ? halves[lane] : out.d[lane];
    for (int b = 0; b < kSuperBlocks; ++b) {
      const BlockSteps& taken = better ? again[b] : steps[b];
      const bool used = b < blocks && taken.scale.of[lane] > 0.0f;
      out.scale[b][lane] = used ? uint8_t(taken.scale.of[lane]) : uint8_t(0);
      out.zero[b][lane] = used ? uint8_t(kTopField + 1.0f - taken.zero.of[lane]) : uint8_t(0);
    }
  }
  for (int b = 0; b < blocks; ++b) {
    Lanes scale, min;
    EACH_LANE {
      const float unit = kZ4Unit * half_to_float(out.d[lane]) * float(out.scale[b][lane]);
      scale.of[lane] = kUnits * unit;
      min.of[lane] = unit * float(128 - out.zero[b][lane]);
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
  const FormatInfo& info = kFormatInfo[kZ4];
  for (int lane = 0; lane < rows; ++lane) {
    uint8_t fields[2 * kSuperBlocks];
    for (int b = 0; b < kSuperBlocks; ++b) {
      fields[2 * b] = scales.scale[b][lane];
      fields[2 * b + 1] = scales.zero[b][lane];
    }
    put_header(to, lane, scales.d[lane], fields);
  }
  for (int b = 0; b < blocks; ++b) {
    const int columns = count - b * kBlockCols < kBlockCols ? count - b * kBlockCols : kBlockCols;
    write_codes(kZ4, codes + b * kBlockCols * kPanelRows, rows, columns, to + info.header_bytes + b * info.block_bytes);
  }
  return true;
}

#undef BISE_LANES
