// What choosing a token needs of a whole row of logits: peaks, and weights in float64, in plain loops over eight lanes
// for the compiler to make vectors of. Their last bits differ between instruction sets; choose.cpp leaves alone what
// they could decide.

inline double mul_add(double a, double b, double c) {
#ifdef __FMA__
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x for x <= 0, to a few units in the last place; 0 below -700.
inline double exp_below(double x) {
  constexpr double kShift = 0x1.8p52;  // adding it leaves the whole part in the low bits
  const double a = x < -700.0 ? -700.0 : x;
  const double shifted = mul_add(a, 1.4426950408889634, kShift);
  const double n = shifted - kShift;
  double r = mul_add(n, -0x1.62e42fefa0000p-1, a);  // ln 2 in two parts, the first one exact when multiplied by n
  r = mul_add(n, -0x1.cf79abc9e3b3ap-40, r);
  double p = 1.0 / 39916800.0;  // Taylor's series to the 11th power: |r| <= 0.35, the rest is below 1e-14
  p = mul_add(p, r, 1.0 / 3628800.0);
  p = mul_add(p, r, 1.0 / 362880.0);
  p = mul_add(p, r, 1.0 / 40320.0);
  p = mul_add(p, r, 1.0 / 5040.0);
  p = mul_add(p, r, 1.0 / 720.0);
  p = mul_add(p, r, 1.0 / 120.0);
  p = mul_add(p, r, 1.0 / 24.0);
  p = mul_add(p, r, 1.0 / 6.0);
  p = mul_add(p, r, 0.5);
  p = mul_add(p, r, 1.0);
  p = mul_add(p, r, 1.0);
  const uint64_t power = __builtin_bit_cast(uint64_t, shifted) << 52;
  const double e = __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, p) + power);
  return x < -700.0 ? 0.0 : e;
}

float peaks(const float* x, int64_t n, float* tops) {
  using F = R::F;
  F odd = R::set1(0.0f);  // v - v is 0 for a number and NaN for everything else
  float odd_end = 0.0f, best = x[0];
  for (int64_t first = 0; first < n; first += kPeakBlock) {
    const float* row = x + first;
    float top = row[0];
    if (n - first >= kPeakBlock) {
      F most = R::load(row);
      for (int64_t i = 0; i < kPeakBlock; i += R::L) {
        const F v = R::load(row + i);
        most = R::max(v, most);
        odd = R::add(odd, R::sub(v, v));
      }
      top = R::top(most);
    } else {
      for (int64_t i = 0; i < n - first; ++i) {
        top = row[i] > top ? row[i] : top;
        odd_end += row[i] - row[i];
      }
    }
    tops[first / kPeakBlock] = top;
    best = top > best ? top : best;
  }
  return best + (R::sum(odd) + odd_end);
}

void weigh(const float* x, int64_t n, float top, double factor, double* weights, double* sums) {
  constexpr int L = 8;
  const double highest = top;
  for (int64_t first = 0; first < n; first += kPeakBlock) {
    const int64_t count = n - first < kPeakBlock ? n - first : kPeakBlock;
    double total = 0.0;
    if (count == kPeakBlock) {
      double lanes[L] = {};
      for (int64_t i = first; i < first + kPeakBlock; i += L) {
        for (int l = 0; l < L; ++l) {
          const double w = exp_below((double(x[i + l]) - highest) * factor);
          weights[i + l] = w;
          lanes[l] += w;
        }
      }
      for (int l = 0; l < L; ++l) total += lanes[l];
    } else {
      for (int64_t i = first; i < first + count; ++i) {
        weights[i] = exp_below((double(x[i]) - highest) * factor);
        total += weights[i];
      }
    }
    sums[first / kPeakBlock] = total;
  }
}
