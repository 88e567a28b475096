// Sixteen floats at once, over whatever registers R offers (R::L lanes each): the unit of every order of summation.
// Included inside an anonymous namespace after the register trait R.

// Calls fn(0) to fn(N - 1) with constants, so that arrays indexed by them live in registers: the compiler keeps dead
// stores to the stack of arrays that it unrolls later, and a stored vector costs as much as two dot products.
#define BISE_INLINE __attribute__((always_inline))
#ifdef BISE_SANITIZED  // unrolled kernels take minutes to instrument
template <int N, class Fn>
inline void each(const Fn& fn) {
  for (int i = 0; i < N; ++i) fn(i);
}
#else
template <int I>
struct Constant {
  constexpr operator int() const { return I; }
};
template <int N, int I = 0, class Fn>
BISE_INLINE inline void each(const Fn& fn) {
  if constexpr (I < N) {
    fn(Constant<I>{});
    each<N, I + 1>(fn);
  }
}
#endif

struct F16 {
  R::F v[16 / R::L];
};

constexpr int kParts = 16 / R::L;

#define EACH_PART for (int i = 0; i < kParts; ++i)

inline F16 zero16() {
  F16 r;
  EACH_PART r.v[i] = R::set1(0.0f);
  return r;
}
inline F16 set16(float x) {
  F16 r;
  EACH_PART r.v[i] = R::set1(x);
  return r;
}
inline F16 load16(const float* p) {
  F16 r;
  EACH_PART r.v[i] = R::load(p + i * R::L);
  return r;
}
inline void store16(float* p, const F16& a) { EACH_PART R::store(p + i * R::L, a.v[i]); }
inline F16 fma16(const F16& a, const F16& b, const F16& c) {
  F16 r;
  EACH_PART r.v[i] = R::fma(a.v[i], b.v[i], c.v[i]);
  return r;
}
inline F16 mul16(const F16& a, const F16& b) {
  F16 r;
  EACH_PART r.v[i] = R::mul(a.v[i], b.v[i]);
  return r;
}
inline F16 add16(const F16& a, const F16& b) {
  F16 r;
  EACH_PART r.v[i] = R::add(a.v[i], b.v[i]);
  return r;
}
inline F16 sub16(const F16& a, const F16& b) {
  F16 r;
  EACH_PART r.v[i] = R::sub(a.v[i], b.v[i]);
  return r;
}
inline F16 div16(const F16& a, const F16& b) {
  F16 r;
  EACH_PART r.v[i] = R::div(a.v[i], b.v[i]);
  return r;
}
inline F16 max16(const F16& a, const F16& b) {
  F16 r;
  EACH_PART r.v[i] = R::max(a.v[i], b.v[i]);
  return r;
}

// Sum of 16 lanes in one fixed tree: lane j with j + 8, then 4, 2, 1.
inline float sum_lanes(const F16& a) {
  if constexpr (kParts == 2) return R::sum(R::add(a.v[0], a.v[1]));
  else return R::sum(a.v[0]);
}
inline float max_lanes(const F16& a) {
  R::F m = a.v[0];
  for (int i = 1; i < kParts; ++i) m = R::max(m, a.v[i]);
  return R::top(m);
}
inline bool has_nan16(const F16& a) {
  bool found = false;
  EACH_PART found = found || R::has_nan(a.v[i]);
  return found;
}

// exp(x) by Cody-Waite reduction and a degree-6 polynomial (Taylor coefficients of exp on [-ln2/2, ln2/2], relative
// error < 3e-7); 0 below -87, so that exp(-inf) is 0; 88 and more saturate. NaN stays NaN: min and max return their
// second operand when either is NaN, on every instruction set.
inline F16 exp16(const F16& x) {
  F16 r;
  EACH_PART {
    using Fl = R::F;
    const Fl clamped = R::min(R::set1(88.0f), R::max(R::set1(-87.0f), x.v[i]));
    const Fl n = R::round(R::mul(clamped, R::set1(1.44269504f)));
    Fl f = R::fma(n, R::set1(-0.693359375f), clamped);
    f = R::fma(n, R::set1(2.12194440e-4f), f);
    Fl p = R::set1(1.0f / 720);
    p = R::fma(p, f, R::set1(1.0f / 120));
    p = R::fma(p, f, R::set1(1.0f / 24));
    p = R::fma(p, f, R::set1(1.0f / 6));
    p = R::fma(p, f, R::set1(0.5f));
    p = R::fma(p, f, R::set1(1.0f));
    p = R::fma(p, f, R::set1(1.0f));
    r.v[i] = R::zero_below(x.v[i], -87.0f, R::scale2(p, n));
  }
  return r;
}
inline float exp_one(float x) {
  float t[16];
  store16(t, exp16(set16(x)));
  return t[0];
}
