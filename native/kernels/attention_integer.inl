// Attention over integer KV pages (q8, q16). Included after attention.inl, whose Row and order of splits it shares.
//
// Products are exact in int32, so tiles may be shaped for speed alone. A query is rounded to 16 bits so that its length
// is at most 32767, a q16 key likewise: |q . k| <= 2^30 by Cauchy and Schwarz, partial sums included. Probabilities
// carry the scale of their key's values and are rounded to 16 bits per 128 absolute positions, so that their largest is
// at most 32767 and their sum at most 65000: the sum over values (at most 32767) stays below 2^31. Groups enter the
// float sum of a split in ascending order.
//
// Layout per block and head: K [2][D / 2][16 keys][2], V [16 key pairs][D][2]: both are read as pairs of 16-bit values
// against a broadcast pair.

constexpr int kGroup = 128;  // positions that share a scale of probabilities
constexpr int kGroups = kSplit / kGroup, kGroupBlocks = kGroup / kKvBlock;
constexpr int kTile = R::kRegisters >= 32 ? 12 : 6;  // rows whose sums stay in registers, two vectors each
constexpr int kScoreStride = kSplit + 16, kProbStride = kSplit + 32;
constexpr int kKeysAhead = 3, kValuesAhead = kGroupBlocks;  // blocks fetched ahead of their use when rows are few
constexpr float kLog2e = 1.44269504f;
constexpr float kNone = -__builtin_inff();

// (2^f - 1) / f on [-1/2, 1/2], least largest error
constexpr float kPower[5] = {0.693147f, 0.24022242f, 0.055507336f, 0.009671513f, 0.0013264727f};

// 2^(x scale - shift), at most about 1, relative error < 2e-7; 0 below 2^-125. NaN stays NaN. `weighted` is the same
// times `factor`, and 0 where the power is 0 whatever the factor.
inline F16 exp2_16(const F16& x, const F16& scale, const F16& shift, const F16& factor, F16& weighted) {
  F16 r;
  EACH_PART {
    using Fl = R::F;
    const Fl exponent = R::fma(x.v[i], scale.v[i], shift.v[i]);
    const Fl n = R::round(exponent);  // far below -125 the steps from here on make nothing of use: zero_below
    const Fl f = R::sub(exponent, n);
    Fl p = R::set1(kPower[4]);
    p = R::fma(p, f, R::set1(kPower[3]));
    p = R::fma(p, f, R::set1(kPower[2]));
    p = R::fma(p, f, R::set1(kPower[1]));
    p = R::fma(p, f, R::set1(kPower[0]));
    p = R::scale2(R::fma(p, f, R::set1(1.0f)), n);
    r.v[i] = R::zero_below(exponent, -125.0f, p);
    weighted.v[i] = R::zero_below(exponent, -125.0f, R::mul(p, factor.v[i]));
  }
  return r;
}
inline float exp2_one(float x) {
  float t[16];
  F16 weighted;
  store16(t, exp2_16(set16(x), set16(1.0f), zero16(), set16(1.0f), weighted));
  return t[0];
}

inline int32_t pair_at(const int16_t* p) {
  int32_t both;
  __builtin_memcpy(&both, p, 4);
  return both;
}

inline int64_t byte_distance(const void* from, const void* to) {
  return static_cast<const uint8_t*>(to) - static_cast<const uint8_t*>(from);
}

template <class T>
struct IntegerPages {
  const PageView& p;
  const AttendTask& t;

  int64_t token(int64_t position) const {  // of the block's first position
    return head_start(p, t.table[position / kKvBlock], t.kv_head);
  }
  const T* k(int64_t position) const { return static_cast<const T*>(p.k) + token(position) * p.head_dim; }
  const T* v(int64_t position) const { return static_cast<const T*>(p.v) + token(position) * p.head_dim; }
};

// What the tiles of a thread share, and the room of one tile.
struct IntegerScratch {
  int padded;      // head width in whole groups of 16
  float* k_scale;  // [512] of the split at hand, with the query's log2(e)
  float* v_scale;  // [512]
  float* scores;   // [kTile][kScoreStride]
  int16_t* probs;  // [kTile][kProbStride]
  float* units;    // [kTile][kGroups] value of one code of `probs`
  float* part;     // [kTile][padded] sum over one split
};

// Part `part` of `parts` of the keys up to position `last`.
struct Share {
  int64_t part, parts, last;
};

// N rows against the keys of one split that starts at position `base`.
template <class T, int N>
struct IntegerTile {
  static constexpr bool kFew = N <= 4;                                 // bound by memory: fetch the next block
  static constexpr int kWide = N <= 4 && R::kRegisters >= 32 ? 4 : 2;  // vectors of values side by side
  const IntegerPages<T>& pages;
  const Row* rows;
  const int32_t* q;      // [D / 2][N] pairs
  const float* q_scale;  // [N]
  const IntegerScratch& s;
  int64_t base;
  Share later;  // of the next split, which this tile fetches

  // Fetches this tile's share of the block that lies one split behind `key`.
  void fetch_later(int64_t key) const {
    if (key + kSplit > later.last) return;
    const auto* k = reinterpret_cast<const uint8_t*>(pages.k(key + kSplit));
    const auto* v = reinterpret_cast<const uint8_t*>(pages.v(key + kSplit));
    const int64_t lines = int64_t(kKvBlock) * pages.p.head_dim * sizeof(T) / 64;
    for (int64_t i = later.part * lines / later.parts; i < (later.part + 1) * lines / later.parts; ++i) {
      R::prefetch_far(k + 64 * i);
      R::prefetch_far(v + 64 * i);
    }
  }

  // Block number i of what the split reads: its keys from position `begin` to before `to`, its values, the next split's
  // keys; the last block where nothing follows.
  const T* stream(int64_t begin, int64_t to, int64_t i) const {
    const int64_t count = (to - begin + kKvBlock - 1) / kKvBlock;
    if (i < count) return pages.k(begin + i * kKvBlock);
    if (i < 2 * count) return pages.v(begin + (i - count) * kKvBlock);
    const int64_t key = base + kSplit + (i - 2 * count) * kKvBlock;
    return key <= later.last ? pages.k(key) : pages.v(to - 1);
  }

  // Products with the keys [at, at + 2 L) of a block, to place `to` on; fetches the same part of the block `next`.
  void score(const T* block, const T* next, int at, int64_t to) const {
    const int pairs = pages.p.head_dim / 2;
    const T* k[2];
    for (int c = 0; c < 2; ++c) {
      const int key = at + c * R::L;
      k[c] = block + key / 16 * 32 * pairs + key % 16 * 2;
    }
    const int64_t ahead = kFew ? byte_distance(block, next) : 0;
    R::I acc[N][2];
    each<N>([&](auto n) BISE_INLINE { acc[n][0] = acc[n][1] = R::set1i(0); });
    for (int i = 0; i < pairs; ++i) {
      const R::I a = R::load_pairs(k[0] + 32 * i), b = R::load_pairs(k[1] + 32 * i);
      if constexpr (kFew) {
        R::prefetch_far(reinterpret_cast<const uint8_t*>(k[0] + 32 * i) + ahead);
        R::prefetch_far(reinterpret_cast<const uint8_t*>(k[1] + 32 * i) + ahead);
      }
      each<N>([&](auto n) BISE_INLINE {
        const R::I x = R::set1i(q[i * N + n]);
        acc[n][0] = R::dot_pairs(acc[n][0], a, x);
        acc[n][1] = R::dot_pairs(acc[n][1], b, x);
      });
    }
    const R::F first = R::load(s.k_scale + to), second = R::load(s.k_scale + to + R::L);
    float* out = s.scores + to;
    each<N>([&](auto n) BISE_INLINE {
      R::store(out + n * kScoreStride, R::mul(R::from_i(acc[n][0]), first));
      R::store(out + n * kScoreStride + R::L, R::mul(R::from_i(acc[n][1]), second));
    });
  }

  // Row n: scores to codes of probability x value scale, in [first, last) of the split (whole groups of 16).
  void weigh(int n, int64_t first, int64_t last, float& top, float& mass) const {
    float* row = s.scores + n * kScoreStride;
    int16_t* codes = s.probs + n * kProbStride;
    const int64_t low = rows[n].low - base, high = rows[n].high + 1 - base;
    for (int64_t i = first; i < low && i < last; ++i) row[i] = kNone;
    for (int64_t i = high > first ? high : first; i < last; ++i) row[i] = kNone;
    F16 best = set16(kNone);
    for (int64_t i = first; i < last; i += 16) best = max16(best, load16(row + i));
    top = max_lanes(best) * q_scale[n];
    const F16 scale = set16(q_scale[n]), shift = set16(top == kNone ? 0.0f : -top);
    F16 sum = zero16();
    for (int64_t group = first / kGroup * kGroup; group < last; group += kGroup) {
      const int64_t begin = group > first ? group : first, end = group + kGroup < last ? group + kGroup : last;
      F16 largest = zero16(), total = zero16();
      for (int64_t i = begin; i < end; i += 16) {
        F16 weighted;
        sum = add16(sum, exp2_16(load16(row + i), scale, shift, load16(s.v_scale + i), weighted));
        store16(row + i, weighted);
        largest = max16(largest, weighted);
        total = add16(total, weighted);
      }
      s.units[n * kGroups + group / kGroup] =
          code_group(row + group, codes + group, begin - group, end - group, max_lanes(largest), sum_lanes(total));
    }
    mass = sum_lanes(sum);
  }

  // Values [begin, end) of a group to codes, zero elsewhere; returns the value of one code.
  static float code_group(const float* x, int16_t* codes, int64_t begin, int64_t end, float largest, float total) {
    const float by_top = largest * (1.0f / 32767.0f), by_sum = total * (1.0f / 65000.0f);
    float unit = by_top > by_sum ? by_top : by_sum, inverse = 1.0f / unit;
    if (!(total > 1e-30f && total < 1e36f)) {  // nothing here, or NaN or infinite: no code may come of that
      unit = total <= 1e-30f ? 0.0f : __builtin_nanf("");
      begin = end = 0;
    }
    if (begin > 0 || end < kGroup) __builtin_memset(codes, 0, kGroup * sizeof(int16_t));
    const F16 factor = set16(inverse);
    for (int64_t i = begin; i < end; i += 16) store_codes(codes + i, mul16(load16(x + i), factor));
    return unit;
  }

  // part[n][d0 .. d0 + L C) += unit x (codes . values) over the blocks of one group; `stride` values per key pair.
  template <int C>
  void mix(const T* const* blocks, const T* const* next, int count, int64_t stride, int from, int d0,
           const int16_t* codes, const float* units) const {
    R::I acc[N][C];
    each<N>([&](auto n) BISE_INLINE { each<C>([&](auto c) BISE_INLINE { acc[n][c] = R::set1i(0); }); });
    for (int b = 0; b < count; ++b, codes += kKvBlock) {
      const T* v = blocks[b] + 2 * from;
      const int64_t ahead = kFew ? byte_distance(blocks[b], next[b]) : 0;
      for (int i = 0; i < kKvBlock / 2; ++i, v += stride) {
        R::I value[C];
        each<C>([&](auto c) BISE_INLINE {
          value[c] = R::load_pairs(v + 2 * c * R::L);
          if constexpr (kFew) R::prefetch_far(reinterpret_cast<const uint8_t*>(v + 2 * c * R::L) + ahead);
        });
        each<N>([&](auto n) BISE_INLINE {
          const R::I x = R::set1i(pair_at(codes + n * kProbStride + 2 * i));
          each<C>([&](auto c) BISE_INLINE { acc[n][c] = R::dot_pairs(acc[n][c], value[c], x); });
        });
      }
    }
    const int64_t width = s.padded;
    float* out = s.part + d0;
    each<N>([&](auto n) BISE_INLINE {
      const R::F unit = R::set1(units[n * kGroups]);
      each<C>([&](auto c) BISE_INLINE {
        R::store(out + c * R::L, R::fma(R::from_i(acc[n][c]), unit, R::load(out + c * R::L)));
      });
      out += width;
    });
  }

  // The group's blocks from position `begin` to before `end`; fetches `next`, as many.
  void mix_group(int64_t begin, int64_t end, const T* const* next) const {
    const T* blocks[kGroupBlocks];
    int count = 0;
    for (int64_t key = begin; key < end; key += kKvBlock) blocks[count++] = pages.v(key);
    const int d = pages.p.head_dim;
    const int16_t* codes = s.probs + (begin - base);
    const float* units = s.units + (begin - base) / kGroup;
    int at = 0;
    for (; at + kWide * R::L <= d / 16 * 16; at += kWide * R::L)
      mix<kWide>(blocks, next, count, 2 * d, at, at, codes, units);
    for (; at < d / 16 * 16; at += R::L) mix<1>(blocks, next, count, 2 * d, at, at, codes, units);
    if (at == d) return;
    T tail[kGroupBlocks][kKvBlock / 2][32] = {};  // the last d % 16 columns
    for (int b = 0; b < count; ++b) {
      for (int i = 0; i < kKvBlock / 2; ++i)
        for (int j = 0; j < 2 * (d - at); ++j) tail[b][i][j] = blocks[b][2 * (i * d + at) + j];
      blocks[b] = tail[b][0];
    }
    for (int from = 0; from < 16; from += R::L) mix<1>(blocks, blocks, count, 32, from, at + from, codes, units);
  }

  // Adds the split to the rows' running totals [N][padded]. [from, to): positions that some row sees.
  void run(int64_t from, int64_t to, float* top, float* mass, float* total) const {
    const int64_t begin = from / kKvBlock * kKvBlock;
    int64_t number = 0;  // of the block at hand, in the order of `stream`
    for (int64_t key = begin; key < to; key += kKvBlock, ++number) {
      const T* next = kFew ? stream(begin, to, number + kKeysAhead) : nullptr;
      if (!kFew) fetch_later(key);
      for (int at = 0; at < kKvBlock; at += 2 * R::L) score(pages.k(key), next, at, key - base + at);
    }
    float split_top[N], split_mass[N];
    for (int n = 0; n < N; ++n)
      weigh(n, from / 16 * 16 - base, (to + 15) / 16 * 16 - base, split_top[n], split_mass[n]);
    for (int i = 0; i < N * s.padded; ++i) s.part[i] = 0.0f;
    for (int64_t key = begin; key < to;) {
      const int64_t group = (key / kGroup + 1) * kGroup;
      const T* next[kGroupBlocks] = {};
      for (int b = 0; kFew && b < kGroupBlocks; ++b) next[b] = stream(begin, to, number + b + kValuesAhead);
      mix_group(key, group < to ? group : to, next);
      number += (group - key + kKvBlock - 1) / kKvBlock;
      key = group;
    }
    for (int n = 0; n < N; ++n) {
      if (split_top[n] == kNone) continue;  // nothing visible here
      const float merged = split_top[n] > top[n] ? split_top[n] : top[n];
      const float keep = top[n] == kNone ? 0.0f : exp2_one(top[n] - merged), gain = exp2_one(split_top[n] - merged);
      mass[n] = __builtin_fmaf(mass[n], keep, split_mass[n] * gain);
      const F16 old = set16(keep), fresh = set16(gain);
      for (int i = n * s.padded; i < (n + 1) * s.padded; i += 16)
        store16(total + i, fma16(load16(total + i), old, mul16(load16(s.part + i), fresh)));
      top[n] = merged;
    }
  }
};

// Rounds N queries to pairs [D / 2][N] and their scales, which include log2(e): scores are exponents of 2.
inline void code_queries(const Row* rows, int count, int d, int32_t* pairs, float* scales) {
  for (int n = 0; n < count; ++n) {
    F16 squares = zero16();
    for (int i = 0; i < d; i += 16) {
      const F16 x = d - i >= 16 ? load16(rows[n].q + i) : load_part(rows[n].q + i, d - i);
      squares = fma16(x, x, squares);
    }
    const float length = __builtin_sqrtf(sum_lanes(squares));
    const bool usable = length > 1e-18f && length < 1e18f;
    const F16 inverse = set16(usable ? 32767.0f / length : 0.0f);
    scales[n] = usable ? length / 32767.0f * kLog2e : length <= 1e-18f ? 1e-30f : __builtin_nanf("");  // not 0: -inf x 0
    for (int i = 0; i < d; i += 16) {
      const F16 x = d - i >= 16 ? load16(rows[n].q + i) : load_part(rows[n].q + i, d - i);
      int16_t codes[16] = {};
      if (usable) {
        store_codes(codes, mul16(x, inverse));
      }
      for (int j = 0; j < 16 && i + j < d; j += 2) pairs[(i + j) / 2 * count + n] = pair_at(codes + j);
    }
  }
}

inline int tile_rows(int left) {
  if (left >= kTile) return kTile;
  return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

template <class T, int N>
void integer_tile(const IntegerPages<T>& pages, const Row* rows, const int32_t* q, const float* q_scale,
                  const IntegerScratch& s, int64_t base, const Share& later, float* top, float* mass, float* total) {
  int64_t low = rows[0].low, high = rows[0].high;
  for (int n = 1; n < N; ++n) {
    low = rows[n].low < low ? rows[n].low : low;
    high = rows[n].high > high ? rows[n].high : high;
  }
  const int64_t from = low > base ? low : base, to = high + 1 < base + kSplit ? high + 1 : base + kSplit;
  if (from < to) IntegerTile<T, N>{pages, rows, q, q_scale, s, base, later}.run(from, to, top, mass, total);
}

// Rows that share the keys of one split while these are in the cache, split after split.
template <class T>
void attend_batch(const IntegerPages<T>& pages, const Row* rows, int count, float* memory) {
  const int d = pages.p.head_dim, padded = (d + 15) / 16 * 16;
  const auto take = [&](int64_t floats) {
    float* at = memory;
    memory += floats;
    return at;
  };
  const IntegerScratch s = {padded,
                            take(kSplit),
                            take(kSplit),
                            take(kTile * kScoreStride),
                            reinterpret_cast<int16_t*>(take(kTile * kProbStride / 2)),
                            take(kTile * kGroups),
                            take(int64_t(kTile) * padded)};
  float* top = take(count);
  float* mass = take(count);
  float* q_scale = take(count);
  float* total = take(int64_t(count) * padded);
  int32_t* q = reinterpret_cast<int32_t*>(take(int64_t(count) * d / 2));
  int64_t low = rows[0].low, high = rows[0].high;
  for (int n = 0; n < count; ++n) {
    top[n] = kNone;
    mass[n] = 0.0f;
    low = rows[n].low < low ? rows[n].low : low;
    high = rows[n].high > high ? rows[n].high : high;
  }
  for (int64_t i = 0; i < int64_t(count) * padded; ++i) total[i] = 0.0f;
  for (int at = 0; at < count; at += tile_rows(count - at))
    code_queries(rows + at, tile_rows(count - at), d, q + int64_t(at) * d / 2, q_scale + at);
  for (int64_t base = low / kSplit * kSplit; base <= high; base += kSplit) {
    const int64_t from = low > base ? low : base, to = high + 1 < base + kSplit ? high + 1 : base + kSplit;
    for (int64_t key = from / kKvBlock * kKvBlock; key < to; key += kKvBlock) {
      __builtin_memcpy(s.k_scale + (key - base), pages.p.k_scale + pages.token(key), kKvBlock * sizeof(float));
      __builtin_memcpy(s.v_scale + (key - base), pages.p.v_scale + pages.token(key), kKvBlock * sizeof(float));
    }
    for (int at = 0; at < count;) {
      const int n = tile_rows(count - at);
      const Share later = {at / kTile, (count + kTile - 1) / kTile, high};
      const auto run = [&](auto tile) {
        tile(pages, rows + at, q + int64_t(at) * d / 2, q_scale + at, s, base, later, top + at, mass + at,
             total + int64_t(at) * padded);
      };
      if (n == kTile) run(integer_tile<T, kTile>);
      else if (n == 8) run(integer_tile<T, 8>);
      else if (n == 4) run(integer_tile<T, 4>);
      else if (n == 2) run(integer_tile<T, 2>);
      else run(integer_tile<T, 1>);
      at += n;
    }
  }
  for (int n = 0; n < count; ++n)
    for (int i = 0; i < d; ++i) rows[n].out[i] = total[int64_t(n) * padded + i] / mass[n];
}

template <class T>
void attend_integers(const PageView& p, const AttendTask& t, float* scratch) {
  const int share = t.heads / p.kv_heads;
  const int64_t width = int64_t(t.heads) * p.head_dim;
  const IntegerPages<T> pages = {p, t};
  Row rows[kBatchRows];
  int count = 0;
  for (int r = t.row_begin; r < t.row_end; ++r) {
    const int64_t position = t.first_pos + r, low = position - t.window + 1;
    for (int j = 0; j < share; ++j) {
      const int64_t at = r * width + int64_t(t.kv_head * share + j) * p.head_dim;
      rows[count++] = {t.q + at, t.out + at, low > 0 ? low : 0, position};
      if (count < kBatchRows) continue;
      attend_batch(pages, rows, count, scratch);
      count = 0;
    }
  }
  if (count) attend_batch(pages, rows, count, scratch);
}

void attend(const PageView& pages, const AttendTask& task, float* scratch) {
  switch (pages.kind) {
    case 0: return attend_kind<KvF32>(pages, task, scratch);
    case 1: return attend_kind<KvF16>(pages, task, scratch);
    case 2: return attend_kind<KvBF16>(pages, task, scratch);
    case 3: return attend_integers<int8_t>(pages, task, scratch);
    default: return attend_integers<int16_t>(pages, task, scratch);
  }
}
