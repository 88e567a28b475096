// Norm, gate, softmax, rotation and KV storage: one row or one head at a time. Included after wide.inl.

// Partial last group of 16: missing lanes read as zero.
inline F16 load_part(const float* p, int64_t left) {
  float t[16];
  for (int j = 0; j < 16; ++j) t[j] = j < left ? p[j] : 0.0f;
  return load16(t);
}
inline void store_part(float* p, const F16& a, int64_t left) {
  float t[16];
  store16(t, a);
  for (int j = 0; j < left; ++j) p[j] = t[j];
}

void norm(float* x, const float* add, const float* weight, float eps, int64_t k, float* y) {
  const int64_t whole = k / 16 * 16;
  F16 total = zero16();
  for (int64_t i = 0; i < k; i += 16) {
    F16 v = i < whole ? load16(x + i) : load_part(x + i, k - i);
    if (add) {
      v = add16(v, i < whole ? load16(add + i) : load_part(add + i, k - i));
      if (i < whole) store16(x + i, v);
      else store_part(x + i, v, k - i);
    }
    total = fma16(v, v, total);
  }
  const float scale = 1.0f / __builtin_sqrtf(sum_lanes(total) / float(k) + eps);
  const F16 factor = set16(scale);
  for (int64_t i = 0; i < k; i += 16) {
    if (i < whole) store16(y + i, mul16(mul16(load16(x + i), factor), load16(weight + i)));
    else store_part(y + i, mul16(mul16(load_part(x + i, k - i), factor), load_part(weight + i, k - i)), k - i);
  }
}

inline F16 silu16(const F16& x) {
  const F16 one = set16(1.0f);
  return div16(x, add16(one, exp16(sub16(zero16(), x))));
}

void silu_mul(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    if (n - i >= 16) {
      store16(gate + i, mul16(silu16(load16(gate + i)), load16(up + i)));
    } else {
      store_part(gate + i, mul16(silu16(load_part(gate + i, n - i)), load_part(up + i, n - i)), n - i);
    }
  }
}

void softmax(float* x, int n) {
  float top = x[0];
  for (int i = 1; i < n; ++i) top = x[i] > top ? x[i] : top;
  float total = 0.0f;
  for (int i = 0; i < n; ++i) {
    x[i] = exp_one(x[i] - top);
    total += x[i];
  }
  for (int i = 0; i < n; ++i) x[i] = x[i] / total;
}

void rotate(float* x, const float* cos, const float* sin, int d, float factor) {
  const int half = d / 2;
  const F16 scale = set16(factor);
  for (int i = 0; i < half; i += 16) {
    const int left = half - i;
    const bool whole = left >= 16;
    const F16 a = whole ? load16(x + i) : load_part(x + i, left);
    const F16 b = whole ? load16(x + half + i) : load_part(x + half + i, left);
    const F16 c = whole ? load16(cos + i) : load_part(cos + i, left);
    const F16 s = whole ? load16(sin + i) : load_part(sin + i, left);
    const F16 first = mul16(sub16(mul16(a, c), mul16(b, s)), scale);
    const F16 second = mul16(add16(mul16(b, c), mul16(a, s)), scale);
    if (whole) {
      store16(x + i, first);
      store16(x + half + i, second);
    } else {
      store_part(x + i, first, left);
      store_part(x + half + i, second, left);
    }
  }
}

// Storage types of the KV cache.
struct KvF32 {
  using T = float;
  static F16 load(const T* p) { return load16(p); }
  static T narrow(float x) { return x; }
};
struct KvF16 {
  using T = uint16_t;
  static F16 load(const T* p) {
    F16 r;
    EACH_PART r.v[i] = R::loadh(reinterpret_cast<const uint8_t*>(p + i * R::L));
    return r;
  }
  static T narrow(float x) { return R::to_half(x); }
};
struct KvBF16 {
  using T = uint16_t;
  static F16 load(const T* p) {
    F16 r;
    EACH_PART r.v[i] = R::loadbf(reinterpret_cast<const uint8_t*>(p + i * R::L));
    return r;
  }
  static T narrow(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};
template <class Kv>
inline void store_head(const PageView& pages, int64_t slot, int g, const float* k, const float* v) {
  const int64_t block = slot / kKvBlock, offset = slot % kKvBlock;
  const int d = pages.head_dim;
  const int64_t head = head_start(pages, block, g);
  typename Kv::T* kp = static_cast<typename Kv::T*>(pages.k) + head * d + offset / 16 * 16 * d + offset % 16;
  typename Kv::T* vp = static_cast<typename Kv::T*>(pages.v) + (head + offset) * d;
  for (int i = 0; i < d; ++i) kp[int64_t(i) * 16] = Kv::narrow(k[i]);
  for (int i = 0; i < d; ++i) vp[i] = Kv::narrow(v[i]);
}

inline void store_codes(int8_t* p, const F16& x) { EACH_PART R::store_s8(p + i * R::L, x.v[i]); }
inline void store_codes(int16_t* p, const F16& x) { EACH_PART R::store_s16(p + i * R::L, x.v[i]); }

// Codes of d values of which `size` (their largest, or their length) becomes `limit`, code i to
// out[i / 2 * step + i % 2 * inner]; returns the value of one code, NaN when a value is not finite.
template <class T>
inline float store_coded(const float* x, int d, float size, float limit, T* out, int step, int inner) {
  const bool usable = size > 1e-36f && size <= 3.4e38f;
  const F16 inverse = set16(usable ? limit / size : 0.0f);
  for (int i = 0; i < d; i += 16) {
    T codes[16] = {};
    const int left = d - i < 16 ? d - i : 16;
    if (usable) store_codes(codes, mul16(left == 16 ? load16(x + i) : load_part(x + i, left), inverse));
    for (int j = 0; j < left; ++j) out[(i + j) / 2 * step + j % 2 * inner] = codes[j];
  }
  return usable ? size / limit : size <= 1e-36f ? 0.0f : __builtin_nanf("");
}

// Largest magnitude and length of d values; infinite when a value or the length is not finite.
inline void sizes_of(const float* x, int d, float& largest, float& length) {
  F16 squares = zero16(), top = zero16();
  for (int i = 0; i < d; i += 16) {
    const F16 part = d - i >= 16 ? load16(x + i) : load_part(x + i, d - i);
    squares = fma16(part, part, squares);
    top = max16(top, max16(part, sub16(zero16(), part)));
  }
  length = __builtin_sqrtf(sum_lanes(squares));
  if (!(length <= 3.4e38f)) length = __builtin_inff();
  largest = length <= 3.4e38f ? max_lanes(top) : length;
}

// Layout and bounds: attention_integer.inl.
template <class T>
inline void store_integers(const PageView& pages, int64_t slot, int g, const float* k, const float* v) {
  const int64_t offset = slot % kKvBlock, head = head_start(pages, slot / kKvBlock, g);
  const int d = pages.head_dim;
  T* kp = static_cast<T*>(pages.k) + head * d + offset / 16 * 16 * d + offset % 16 * 2;
  T* vp = static_cast<T*>(pages.v) + head * d + offset / 2 * 2 * d + offset % 2;
  constexpr bool kByte = sizeof(T) == 1;
  constexpr float kLimit = kByte ? 127.0f : 32767.0f;
  float largest, length;
  sizes_of(k, d, largest, length);
  pages.k_scale[head + offset] = store_coded(k, d, kByte ? largest : length, kLimit, kp, 32, 1);
  sizes_of(v, d, largest, length);
  pages.v_scale[head + offset] = store_coded(v, d, largest, kLimit, vp, 4, 2);
}

void store_kv(const PageView& pages, int64_t slot, const float* k, const float* v) {
  for (int g = 0; g < pages.kv_heads; ++g) {
    const float* kg = k + int64_t(g) * pages.head_dim;
    const float* vg = v + int64_t(g) * pages.head_dim;
    switch (pages.kind) {
      case 0: store_head<KvF32>(pages, slot, g, kg, vg); break;
      case 1: store_head<KvF16>(pages, slot, g, kg, vg); break;
      case 2: store_head<KvBF16>(pages, slot, g, kg, vg); break;
      case 3: store_integers<int8_t>(pages, slot, g, kg, vg); break;
      default: store_integers<int16_t>(pages, slot, g, kg, vg); break;
    }
  }
}
