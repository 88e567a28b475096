// Paged, windowed, grouped-query attention over float pages. Included after fused.inl.
//
// A row is one (query, query head). Scores: one lane per key, head width summed in ascending order with fused
// multiply-add. Softmax and the sum over values run inside splits of 512 absolute positions, keys ascending; splits
// are merged in ascending order. Rows computed together share loads, not sums: a row's result does not depend on its
// companions, on how the prompt was chunked, or on blocks that a window has already dropped.

struct Row {
  const float* q;
  float* out;
  int64_t low, high;  // first and last visible position
};

template <class Kv>
inline const typename Kv::T* k_block(const PageView& p, const AttendTask& t, int64_t position) {
  const int64_t head = head_start(p, t.table[position / kKvBlock], t.kv_head);
  return static_cast<const typename Kv::T*>(p.k) + head * p.head_dim + position % kKvBlock / 16 * 16 * p.head_dim;
}
template <class Kv>
inline const typename Kv::T* v_row(const PageView& p, const AttendTask& t, int64_t position) {
  const int64_t head = head_start(p, t.table[position / kKvBlock], t.kv_head);
  return static_cast<const typename Kv::T*>(p.v) + (head + position % kKvBlock) * p.head_dim;
}

// Scores of N rows against the 16 keys from `position` (a multiple of 16).
template <class Kv, int N>
inline void score_group(const PageView& p, const AttendTask& t, const Row* rows, int64_t position, float* scores) {
  const typename Kv::T* k = k_block<Kv>(p, t, position);
  F16 acc[N];
  for (int n = 0; n < N; ++n) acc[n] = zero16();
  for (int i = 0; i < p.head_dim; ++i) {
    const F16 column = Kv::load(k + int64_t(i) * 16);
BISE_UNROLL(8)
    for (int n = 0; n < N; ++n) acc[n] = fma16(column, set16(rows[n].q[i]), acc[n]);
  }
  for (int n = 0; n < N; ++n) store16(scores + n * kSplit, acc[n]);
}

// out[n][d0 .. d0 + 16 C) of N rows over the keys [from, to): sum of probability x value, keys ascending.
template <class Kv, int N, int C>
inline void mix_values(const PageView& p, const AttendTask& t, const float* probs, int64_t base, int64_t from,
                       int64_t to, int d0, float* out) {
  F16 acc[N][C];
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < C; ++c) acc[n][c] = zero16();
  for (int64_t key = from; key < to;) {
    const int64_t end = (key / kKvBlock + 1) * kKvBlock < to ? (key / kKvBlock + 1) * kKvBlock : to;
    const typename Kv::T* v = v_row<Kv>(p, t, key) + d0;
    for (; key < end; ++key, v += p.head_dim) {
      F16 value[C];
      for (int c = 0; c < C; ++c) value[c] = Kv::load(v + 16 * c);
BISE_UNROLL(8)
      for (int n = 0; n < N; ++n) {
        const F16 weight = set16(probs[n * kSplit + (key - base)]);
BISE_UNROLL(8)
        for (int c = 0; c < C; ++c) acc[n][c] = fma16(weight, value[c], acc[n][c]);
      }
    }
  }
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < C; ++c) store16(out + n * p.head_dim + d0 + 16 * c, acc[n][c]);
}

// The last head_dim % 16 columns, one by one in the same order.
template <class Kv, int N>
inline void mix_tail(const PageView& p, const AttendTask& t, const float* probs, int64_t base, int64_t from, int64_t to,
                     int d0, float* out) {
  for (int n = 0; n < N; ++n)
    for (int d = d0; d < p.head_dim; ++d) {
      float total = 0.0f;
      for (int64_t key = from; key < to; ++key) {
        float padded[16] = {};
        typename Kv::T one[16] = {};
        one[0] = v_row<Kv>(p, t, key)[d];
        store16(padded, Kv::load(one));
        total = __builtin_fmaf(probs[n * kSplit + (key - base)], padded[0], total);
      }
      out[n * p.head_dim + d] = total;
    }
}

template <class Kv, int N>
inline void mix_split(const PageView& p, const AttendTask& t, const float* probs, int64_t base, int64_t from, int64_t to,
                      float* out) {
  constexpr int kWide = N >= 8 ? 2 : 4;
  int d = 0;
  for (; d + 16 * kWide <= p.head_dim; d += 16 * kWide) mix_values<Kv, N, kWide>(p, t, probs, base, from, to, d, out);
  for (; d + 16 <= p.head_dim; d += 16) mix_values<Kv, N, 1>(p, t, probs, base, from, to, d, out);
  if (d < p.head_dim) mix_tail<Kv, N>(p, t, probs, base, from, to, d, out);
}

template <class Kv, int N>
void attend_rows(const PageView& p, const AttendTask& t, const Row* rows, float* scratch) {
  const int d = p.head_dim;
  float* probs = scratch;                   // [N][512]
  float* part = probs + N * kSplit;         // [N][d] sum over one split
  float* total = part + N * int64_t(d);     // [N][d] merged
  float top[N], mass[N];
  int64_t low = rows[0].low, high = rows[0].high;
  for (int n = 0; n < N; ++n) {
    top[n] = -__builtin_inff();
    mass[n] = 0.0f;
    low = rows[n].low < low ? rows[n].low : low;
    high = rows[n].high > high ? rows[n].high : high;
    for (int i = 0; i < d; ++i) total[n * d + i] = 0.0f;
  }
  for (int64_t base = low / kSplit * kSplit; base <= high; base += kSplit) {
    const int64_t from = low > base ? low : base;
    const int64_t to = high + 1 < base + kSplit ? high + 1 : base + kSplit;
    const int64_t first = from / 16 * 16, last = (to + 15) / 16 * 16;
    for (int64_t key = first; key < last; key += 16) score_group<Kv, N>(p, t, rows, key, probs + (key - base));
    float split_top[N], split_mass[N];
    for (int n = 0; n < N; ++n) {
      float* row = probs + n * kSplit;
      for (int64_t key = first; key < rows[n].low && key < last; ++key) row[key - base] = -__builtin_inff();
      for (int64_t key = rows[n].high + 1 > first ? rows[n].high + 1 : first; key < last; ++key)
        row[key - base] = -__builtin_inff();
      F16 best = set16(-__builtin_inff());
      for (int64_t key = first; key < last; key += 16) best = max16(best, load16(row + (key - base)));
      split_top[n] = max_lanes(best);
      F16 sum = zero16();
      if (split_top[n] != -__builtin_inff()) {
        const F16 shift = set16(split_top[n]);
        for (int64_t key = first; key < last; key += 16) {
          const F16 e = exp16(sub16(load16(row + (key - base)), shift));
          store16(row + (key - base), e);
          sum = add16(sum, e);
        }
      } else {
        for (int64_t key = first; key < last; ++key) row[key - base] = 0.0f;
      }
      split_mass[n] = sum_lanes(sum);
    }
    mix_split<Kv, N>(p, t, probs, base, from, to, part);
    for (int n = 0; n < N; ++n) {
      if (!(split_mass[n] > 0.0f) && split_top[n] == -__builtin_inff()) continue;  // nothing visible here
      const float merged = split_top[n] > top[n] ? split_top[n] : top[n];
      const float keep = top[n] == -__builtin_inff() ? 0.0f : exp_one(top[n] - merged);
      const float gain = exp_one(split_top[n] - merged);
      mass[n] = __builtin_fmaf(mass[n], keep, split_mass[n] * gain);
      for (int i = 0; i < d; ++i) total[n * d + i] = __builtin_fmaf(total[n * d + i], keep, part[n * d + i] * gain);
      top[n] = merged;
    }
  }
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < d; ++i) rows[n].out[i] = total[n * d + i] / mass[n];
}

template <class Kv>
void attend_kind(const PageView& p, const AttendTask& t, float* scratch) {
  const int share = t.heads / p.kv_heads;
  const int64_t width = int64_t(t.heads) * p.head_dim;
  Row rows[kAttendRows];
  int count = 0;
  const auto flush = [&] {
    int done = 0;
    while (done < count) {
      const int left = count - done;
      const int n = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      if (n == 8) attend_rows<Kv, 8>(p, t, rows + done, scratch);
      else if (n == 4) attend_rows<Kv, 4>(p, t, rows + done, scratch);
      else if (n == 2) attend_rows<Kv, 2>(p, t, rows + done, scratch);
      else attend_rows<Kv, 1>(p, t, rows + done, scratch);
      done += n;
    }
    count = 0;
  };
  for (int r = t.row_begin; r < t.row_end; ++r) {
    const int64_t position = t.first_pos + r;
    const int64_t low = position - t.window + 1;
    for (int j = 0; j < share; ++j) {
      const int64_t at = r * width + int64_t(t.kv_head * share + j) * p.head_dim;
      rows[count++] = {t.q + at, t.out + at, low > 0 ? low : 0, position};
      if (count == kAttendRows) flush();
    }
  }
  flush();
}
