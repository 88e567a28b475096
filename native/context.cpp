#include "context.h"

#include <algorithm>
#include <cstring>

#include "pack.h"

namespace bise {

namespace {

// Bytes of weights that a thread keeps in its L2 while it walks over the row tiles.
constexpr int64_t kGroupBytes = 640 * 1024;

// Bytes of activations up to which rows count as few: they stay in the L2 beside two pairs of panels, and every panel
// is read from memory once while all rows multiply the one before it.
constexpr int64_t kFewBytes = 384 * 1024;

// Bytes of weights worth a chunk of their own when rows are few.
constexpr int64_t kStreamBytes = 150 * 1024;

// Tiles of few rows that are worth opening a panel for.
constexpr size_t kOpenTiles = 3;

// Bytes of a panel that many rows multiply.
int64_t open_stride(const Matrix& w) { return panel_bytes(w.format == kZ4 ? kZ4Open : w.format, w.k); }

bool are_few(int64_t rows, int64_t blocks) { return rows * blocks * kTileRowBytes <= kFewBytes; }

}  // namespace

Context::Context(int threads) : ops_(chosen_ops()), pool_(threads) {}

// Rows are cut into tiles of 6, 4, 2 and 1; a tile of 5 or 3 is padded, which costs less than a second pass. Eight rows
// of one panel cost less than six and two, but no less per row than six of two panels.
std::vector<Context::Tile> Context::tiles_of(int64_t rows) const {
  const bool wide = ops_.widest_tile == kMostTileRows;
  std::vector<Tile> tiles;
  int64_t padded = 0;
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row;
    const bool eight = wide && (left == 7 || left == 8 || (left >= 14 && left <= 16));
    const int mt = eight ? kMostTileRows : left > 4 ? kTileRows : left > 2 ? 4 : int(left);
    const int used = int(std::min<int64_t>(left, mt));
    tiles.push_back({row, used, mt, padded});
    row += used;
    padded += mt;
  }
  return tiles;
}

int64_t Context::padded_rows(const std::vector<Tile>& tiles) {
  return tiles.empty() ? 0 : tiles.back().offset + tiles.back().mt;
}

const uint8_t* Context::quantized(const float* x, int64_t rows, int64_t k, const std::vector<Tile>& tiles,
                                  Buffer<uint8_t>& to) {
  (void)rows;
  const int64_t blocks = round_up(k, kBlockCols) / kBlockCols;
  uint8_t* out = to.get(padded_rows(tiles) * blocks * kTileRowBytes);
  const auto one = [&](const Tile& t, int64_t b0, int64_t b1) {
    ops_.quantize(x + t.row * k, k, t.rows, k, b0, b1, t.mt, out + t.offset * blocks * kTileRowBytes);
  };
  if (tiles.size() == 1) {
    pool_.parallel_for(blocks, tiles[0].mt * blocks < 512 ? blocks : (blocks + 7) / 8,
                       [&](int64_t begin, int64_t end, int) { one(tiles[0], begin, end); });
  } else {
    pool_.parallel_for(int64_t(tiles.size()), 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) one(tiles[size_t(t)], 0, blocks);
    });
  }
  return out;
}

// Panels [p0, p1) of w times one tile into columns of out [rows, n]; more rows than one fetch `next_bytes` at `next`.
void Context::multiply(const Matrix& w, int64_t p0, int64_t p1, const Tile& t, const uint8_t* acts, const float* x,
                       float* out, const uint8_t* next, int64_t next_bytes) {
  const int64_t blocks = w.blocks();
  const uint8_t* tile = acts + t.offset * blocks * kTileRowBytes;
  const auto run = [&](int64_t p, int panels, float* to, int64_t ldo) {
    if (is_float(w.format)) ops_.matmul_float(w.format, w.panel(p), x + t.row * w.k, w.k, w.k, t.rows, to, ldo);
    else ops_.matmul(w.format, w.panel(p), panels, tile, blocks, t.mt, to, ldo, next, next_bytes);
  };
  alignas(64) float local[kMostTileRows * 2 * kPanelRows];
  const int64_t step = is_float(w.format) ? 1 : 2;
  for (int64_t p = p0; p < p1; p += step) {
    const int panels = int(std::min(step, p1 - p));
    float* to = out + t.row * w.n + p * kPanelRows;
    const int64_t columns = std::min<int64_t>(panels * kPanelRows, w.n - p * kPanelRows);
    if (t.rows == t.mt && columns == panels * kPanelRows) {
      run(p, panels, to, w.n);
      continue;
    }
    run(p, panels, local, 2 * kPanelRows);  // padded rows or columns: keep what is real
    for (int m = 0; m < t.rows; ++m)
      std::memcpy(to + m * w.n, local + m * 2 * kPanelRows, size_t(columns) * sizeof(float));
  }
}

// Makes room for what a thread opens: `panels` of the widest of the weights.
void Context::reserve_open(const std::vector<Matrix>& weights, int64_t panels) {
  int64_t bytes = 0;
  for (const Matrix& w : weights)
    if (w.format == kZ4) bytes = std::max(bytes, panel_bytes(kZ4Open, w.k));
  open_share_ = bytes * panels;
  open_.get(open_share_ * threads());
}

// Panels [p0, p1) of a kZ4 matrix with their scales as products read them, in the memory of a thread; others as they are.
Matrix Context::opened(const Matrix& w, int64_t p0, int64_t p1, uint8_t* to) {
  if (w.format != kZ4) return w;
  Matrix open = {kZ4Open, w.n, w.k, nullptr};
  for (int64_t p = p0; p < p1; ++p) ops_.open_panel(w.panel(p), w.blocks(), to + (p - p0) * open.stride());
  open.data = to;
  open.first = p0;
  return open;
}

// All tiles multiply a pair of panels while the next pair arrives in the L2.
void Context::stream(const Matrix& w, int64_t p0, int64_t p1, const std::vector<Tile>& tiles, const uint8_t* acts,
                     float* out, int thread) {
  const size_t count = tiles.size();
  for (int64_t p = p0; p < p1; p += 2) {
    const int64_t stop = std::min(p + 2, p1), share = (stop - p) * w.stride() / int64_t(count);
    const uint8_t* next = w.panel(stop);
    const Matrix pair = count < kOpenTiles ? w : opened(w, p, stop, room(thread));
    for (const Tile& t : tiles) {
      multiply(pair, p, stop, t, acts, nullptr, out, next, share);
      next += share;
    }
  }
}

void Context::linear_panels(const Matrix& w, int64_t p0, int64_t p1, const std::vector<Tile>& tiles, bool few,
                            const uint8_t* acts, const float* x, float* out, int thread) {
  if (few && !is_float(w.format)) return stream(w, p0, p1, tiles, acts, out, thread);
  const Matrix group = opened(w, p0, p1, room(thread));
  for (const Tile& t : tiles) {
    const bool first = t.row == 0 && group.format == w.format && !is_float(w.format);
    for (int64_t p = p0; p < p1; p += 2) {  // the first tile brings the panels into the L2, or opening them did
      const int64_t stop = std::min(p + 2, p1);
      multiply(group, p, stop, t, acts, x, out, w.panel(stop), first ? (stop - p) * w.stride() : 0);
    }
  }
}

// Panels per chunk: few rows want many chunks of contiguous weights, many rows want a group that stays in L2.
int64_t Context::grain(int64_t panels, int64_t bytes, int64_t rows) const {
  const int64_t fit = std::max<int64_t>(1, kGroupBytes / std::max<int64_t>(1, bytes));
  const int64_t fair = std::max<int64_t>(1, panels / (int64_t(threads()) * (rows > kTileRows ? 4 : 8)));
  const int64_t worth = std::max<int64_t>(1, 12 * 1024 / std::max<int64_t>(1, bytes * std::min<int64_t>(rows, kTileRows)));
  return round_up(std::max(std::min(fit, fair), std::min(worth, panels)), 2);  // kernels take panels in pairs
}

// fn(begin, end, thread) for chunks of adjacent panels.
template <class Fn>
void Context::over_panels(int64_t panels, int64_t bytes, int64_t rows, bool few, Fn&& fn) {
  const int64_t chunk = grain(panels, bytes, rows);
  const int64_t least = round_up(std::max<int64_t>(1, kStreamBytes / bytes), 2);
  if (few) pool_.parallel_shrinking(panels, std::min(chunk, least), fn);
  else pool_.parallel_for(panels, chunk, fn);
}

void Context::linear(const float* x, int64_t rows, const std::vector<Matrix>& weights,
                     const std::vector<float*>& outs) {
  const std::vector<Tile> tiles = tiles_of(rows);
  const uint8_t* acts = nullptr;
  for (const Matrix& w : weights)
    if (!is_float(w.format) && !acts) acts = quantized(x, rows, w.k, tiles, acts_);
  int64_t total = 0, bytes = 0;
  const bool few = are_few(rows, weights[0].blocks());
  for (const Matrix& w : weights) {
    total += w.panels();
    bytes = std::max(bytes, few ? w.stride() : open_stride(w));
  }
  reserve_open(weights, few ? 2 : grain(total, bytes, rows));
  over_panels(total, bytes, rows, few, [&](int64_t begin, int64_t end, int thread) {
    size_t which = 0;
    int64_t base = 0;
    while (begin >= base + weights[which].panels()) base += weights[which++].panels();
    while (begin < end) {
      const Matrix& w = weights[which];
      const int64_t stop = std::min(end, base + w.panels());
      linear_panels(w, begin - base, stop - base, tiles, few, acts, x, outs[which], thread);
      base += w.panels();
      ++which;
      begin = stop;
    }
  });
}

// hidden = quantised silu(gate) * up, 32 columns at a time: the float hidden layer never reaches memory.
void Context::gate_up(const Expert& e, const std::vector<Tile>& tiles, const uint8_t* acts, uint8_t* hidden) {
  const int64_t blocks = round_up(e.gate.n, kBlockCols) / kBlockCols;
  const int64_t stride = 2 * (open_stride(e.gate) + open_stride(e.up));
  const int64_t chunk = grain(blocks, stride, tiles.back().row + 1);
  reserve_open({e.gate, e.up}, 4 * chunk);
  pool_.parallel_for(blocks, chunk, [&](int64_t begin, int64_t end, int thread) {
    const int64_t p0 = 2 * begin, p1 = std::min(2 * end, e.gate.panels());
    const Matrix gates = opened(e.gate, p0, p1, room(thread));
    const Matrix ups = opened(e.up, p0, p1, room(thread) + (p1 - p0) * panel_bytes(kZ4Open, e.up.k));
    alignas(64) float gate[kMostTileRows * kBlockCols], up[kMostTileRows * kBlockCols];
    for (const Tile& t : tiles) {
      const uint8_t* a = acts + t.offset * e.gate.blocks() * kTileRowBytes;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t valid = std::min<int64_t>(kBlockCols, e.gate.n - b * kBlockCols);
        const int panels = valid > kPanelRows ? 2 : 1;
        const auto product = [&](const Matrix& w, float* to) {
          // the first tile brings the panels into the L2, or opening them did
          const int64_t fetched = t.row || w.format == kZ4Open ? 0 : 2 * w.stride();
          const uint8_t* next = w.panel(2 * b + 2);
          ops_.matmul(w.format, w.panel(2 * b), panels, a, w.blocks(), t.mt, to, kBlockCols, next, fetched);
        };
        product(gates, gate);
        product(ups, up);
        const int64_t columns = round_up(valid, kPanelRows);
        for (int m = 0; m < t.rows; ++m) ops_.silu_mul(gate + m * kBlockCols, up + m * kBlockCols, columns);
        ops_.quantize(gate - b * kBlockCols, kBlockCols, t.rows, b * kBlockCols + valid, b, b + 1, t.mt,
                      hidden + t.offset * blocks * kTileRowBytes);
      }
    }
  });
}

// The same for few rows: first the gate of a chunk, then its up, so that each is one stream of memory.
void Context::gate_up_few(const Expert& e, const std::vector<Tile>& tiles, const uint8_t* acts, uint8_t* hidden) {
  const int64_t width = e.gate.n, blocks = round_up(width, kBlockCols) / kBlockCols;
  const int64_t rows = tiles.back().row + tiles.back().rows;
  float* gate = wide_.get(2 * rows * width);
  float* up = gate + rows * width;
  reserve_open({e.gate, e.up}, 2);
  over_panels(blocks, 2 * (e.gate.stride() + e.up.stride()), rows, true, [&](int64_t begin, int64_t end, int thread) {
    stream(e.gate, 2 * begin, std::min(2 * end, e.gate.panels()), tiles, acts, gate, thread);
    stream(e.up, 2 * begin, std::min(2 * end, e.up.panels()), tiles, acts, up, thread);
    const int64_t first = begin * kBlockCols, last = std::min(end * kBlockCols, width);
    for (const Tile& t : tiles) {
      for (int64_t r = t.row; r < t.row + t.rows; ++r)
        ops_.silu_mul(gate + r * width + first, up + r * width + first, last - first);
      ops_.quantize(gate + t.row * width, width, t.rows, width, begin, end, t.mt,
                    hidden + t.offset * blocks * kTileRowBytes);
    }
  });
}

void Context::mlp(const float* x, int64_t rows, const Expert& e, float* out) {
  const std::vector<Tile> tiles = tiles_of(rows);
  const bool fused = !is_float(e.gate.format) && !is_float(e.up.format) && !is_float(e.down.format);
  if (!fused) {
    float* wide = wide_.get(2 * rows * e.gate.n);
    float* up = wide + rows * e.gate.n;
    linear(x, rows, {e.gate, e.up}, {wide, up});
    pool_.parallel_for(rows, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) ops_.silu_mul(wide + r * e.gate.n, up + r * e.gate.n, e.gate.n);
    });
    linear(wide, rows, {e.down}, {out});
    return;
  }
  const uint8_t* acts = quantized(x, rows, e.gate.k, tiles, acts_);
  uint8_t* hidden = hidden_.get(padded_rows(tiles) * e.down.blocks() * kTileRowBytes);
  if (are_few(rows, e.gate.blocks())) gate_up_few(e, tiles, acts, hidden);
  else gate_up(e, tiles, acts, hidden);
  const Matrix& w = e.down;
  const bool few = are_few(rows, w.blocks());
  const int64_t bytes = few ? w.stride() : open_stride(w);
  reserve_open({w}, few ? 2 : grain(w.panels(), bytes, rows));
  over_panels(w.panels(), bytes, rows, few, [&](int64_t begin, int64_t end, int thread) {
    linear_panels(w, begin, end, tiles, few, hidden, nullptr, out, thread);
  });
}

void Context::moe(const float* x, int64_t rows, const Matrix& router, const std::vector<Expert>& experts, int top_k,
                  float* out) {
  const int64_t count = int64_t(experts.size()), dim = router.k, width = experts[0].down.n;
  float* scores = scores_.get(rows * count);
  linear(x, rows, {router}, {scores});
  std::vector<int> chosen(size_t(rows * top_k));
  std::vector<float> share(size_t(rows * top_k));
  std::vector<std::vector<int64_t>> users(static_cast<size_t>(count));  // row * top_k + rank
  std::vector<int> order(static_cast<size_t>(count));
  for (int64_t r = 0; r < rows; ++r) {
    const float* s = scores + r * count;
    for (int i = 0; i < int(count); ++i) order[size_t(i)] = i;
    std::partial_sort(order.begin(), order.begin() + top_k, order.end(),
                      [&](int a, int b) { return s[a] > s[b] || (!(s[b] > s[a]) && a < b); });
    for (int rank = 0; rank < top_k; ++rank) {
      const size_t at = size_t(r * top_k + rank);
      chosen[at] = order[size_t(rank)];
      share[at] = s[order[size_t(rank)]];
      users[size_t(chosen[at])].push_back(int64_t(at));
    }
    ops_.softmax(share.data() + r * top_k, top_k);
  }
  float* parts = parts_.get(rows * top_k * width);
  for (int64_t e = 0; e < count; ++e) {
    const std::vector<int64_t>& mine = users[size_t(e)];
    if (mine.empty()) continue;
    const int64_t n = int64_t(mine.size());
    float* in = gathered_.get(n * dim);
    float* result = expert_out_.get(n * width);
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(in + i * dim, x + mine[size_t(i)] / top_k * dim, size_t(dim) * sizeof(float));
    mlp(in, n, experts[size_t(e)], result);
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(parts + mine[size_t(i)] * width, result + i * width, size_t(width) * sizeof(float));
  }
  pool_.parallel_for(rows, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t i = 0; i < width; ++i) {
        float total = 0;
        for (int rank = 0; rank < top_k; ++rank)  // rank order, whatever the batch
          total = total + share[size_t(r * top_k + rank)] * parts[(r * top_k + rank) * width + i];
        out[r * width + i] = total;
      }
  });
}

void Context::sample(const float* logits, int64_t rows, int64_t n, const Draw* draws, int32_t* tokens,
                     int32_t* status) {
  if (draw_scratch_.empty()) draw_scratch_.resize(size_t(threads()));
  pool_.parallel_for(rows, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t r = begin; r < end; ++r)
      status[r] = choose(ops_, logits + r * n, n, draws[r], draw_scratch_[size_t(thread)], tokens[r]);
  });
}

void Context::norm(float* x, const float* add, const float* weight, float eps, int64_t rows, int64_t k, float* y) {
  pool_.parallel_for(rows, std::max<int64_t>(1, 16384 / k), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) ops_.norm(x + r * k, add ? add + r * k : nullptr, weight, eps, k, y + r * k);
  });
}

void Context::attend(float* q, float* k, const float* v, const float* cos, const float* sin, int64_t rows,
                     const Attention& a, const PageView& pages, float* out) {
  const int d = pages.head_dim;
  const int64_t q_width = int64_t(a.heads) * d, kv_width = int64_t(pages.kv_heads) * d;
  const float factor = 1.0f / __builtin_sqrtf(float(d));
  pool_.parallel_for(rows, std::max<int64_t>(1, 8192 / (q_width + kv_width)), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float* c = cos + r * (d / 2);
      const float* s = sin + r * (d / 2);
      for (int h = 0; h < a.heads; ++h) ops_.rotate(q + r * q_width + h * d, c, s, d, factor);
      for (int g = 0; g < pages.kv_heads; ++g) ops_.rotate(k + r * kv_width + g * d, c, s, d, 1.0f);
      ops_.store_kv(pages, a.slots[r], k + r * kv_width, v + r * kv_width);
    }
  });
  // Items: (sequence, kv head, run of rows); runs are short so that prompts spread over the threads.
  struct Item {
    int64_t sequence, begin, end;
  };
  std::vector<Item> runs;
  int64_t work = 0;
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t count = a.q_start[s + 1] - a.q_start[s];
    const int64_t share = a.heads / pages.kv_heads, spread = count * pages.kv_heads / (4 * threads());
    const int64_t step = std::max<int64_t>(1, std::min<int64_t>(kBatchRows / share, std::max<int64_t>(spread, 4)));
    for (int64_t r = 0; r < count; r += step) runs.push_back({s, r, std::min(count, r + step)});
    work += count * std::min<int64_t>(a.window, a.q_pos[s] + count) * q_width;
  }
  const int64_t items = int64_t(runs.size()) * pages.kv_heads;
  const int64_t scratch = attend_scratch(d);
  float* memory = attend_.get(scratch * threads());
  pool_.parallel_for(items, work < 65536 ? items : 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      const Item& run = runs[size_t(i / pages.kv_heads)];
      const int64_t first = a.q_start[run.sequence];
      const AttendTask task = {q + first * q_width,
                               out + first * q_width,
                               a.table + run.sequence * a.table_width,
                               a.q_pos[run.sequence],
                               int(run.begin),
                               int(run.end),
                               a.heads,
                               int(i % pages.kv_heads),
                               a.window};
      ops_.attend(pages, task, memory + thread * scratch);
    }
  });
}

void Context::embed(const Matrix& table, const int32_t* ids, int64_t rows, float* out) {
  pool_.parallel_for(rows, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      unpack_row(table.format, table.panel(ids[r] / kPanelRows), ids[r] % kPanelRows, table.k, out + r * table.k);
  });
}

bool Context::pack_blocks(int ggml, const uint8_t* raw, int64_t rows, int64_t k, uint8_t* panels) {
  const int64_t bytes = panel_bytes(format_of(ggml), k), stride = row_bytes(ggml, k);
  std::atomic<bool> finite{true};
  pool_.parallel_for(round_up(rows, 16) / 16, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const int count = int(std::min<int64_t>(16, rows - 16 * p));
      if (!bise::pack_blocks(ggml, raw + 16 * p * stride, count, k, panels + p * bytes)) finite = false;
    }
  });
  return finite;
}

bool Context::pack_floats(int format, const float* x, int64_t rows, int64_t k, uint8_t* panels,
                          const float* importance) {
  const int64_t bytes = panel_bytes(format, k);
  std::atomic<bool> fits{true};
  pool_.parallel_for(round_up(rows, 16) / 16, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const int count = int(std::min<int64_t>(16, rows - 16 * p));
      if (!bise::pack_floats(format, x + 16 * p * k, count, k, importance, panels + p * bytes)) fits = false;
    }
  });
  return fits;
}

void Context::unpack(const Matrix& m, float* out) {
  pool_.parallel_for(m.n, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) unpack_row(m.format, m.panel(r / 16), int(r % 16), m.k, out + r * m.k);
  });
}

}  // namespace bise
