// Native tests without Python, so that they can run under sanitizers: odd sizes, every format, every ISA that the
// processor has, compared bit for bit with the scalar one. Prints one line per failure and a count at the end.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../context.h"
#include "../pack.h"

using namespace bise;

namespace {

int passed = 0, failed = 0;

void check(bool fine, const std::string& what) {
  if (fine) {
    ++passed;
  } else {
    ++failed;
    std::printf("FAILED %s (isa %s)\n", what.c_str(), chosen_ops().name);
  }
}

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return uint32_t(state >> 33);
  }
  float value() { return float(next() % 20001) / 10000.0f - 1.0f; }
  std::vector<float> values(int64_t n) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v) x = value();
    return v;
  }
};

// Exactly as many bytes as the layout says, on the heap: an overrun is a sanitizer report.
struct Owned {
  std::vector<uint8_t> bytes;
  Matrix matrix;
};

Owned packed(Context& c, int format, int64_t n, int64_t k, Random& r) {
  Owned o;
  o.bytes.resize(size_t(packed_bytes(format, n, k)));
  const std::vector<float> x = r.values(n * k);
  check(c.pack_floats(format, x.data(), n, k, o.bytes.data()), "pack");
  o.matrix = {format, n, k, o.bytes.data()};
  return o;
}

Owned blocks(Context& c, int ggml, int64_t n, int64_t k, Random& r) {
  Owned o;
  const int format = format_of(ggml);
  o.bytes.resize(size_t(packed_bytes(format, n, k)));
  std::vector<uint8_t> raw(size_t(n * row_bytes(ggml, k)));
  for (uint8_t& b : raw) b = uint8_t(r.next());
  const bool finite = c.pack_blocks(ggml, raw.data(), n, k, o.bytes.data());
  (void)finite;  // random bytes hold infinite scales now and then
  o.matrix = {format, n, k, o.bytes.data()};
  return o;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;  // signs of NaN are nobody's promise
    if (std::memcmp(&a[i], &b[i], 4)) return false;
  }
  return a.size() == b.size();
}

using Results = std::vector<std::vector<float>>;

void linear_cases(Context& c, Results& out) {
  const int64_t sizes[][3] = {{1, 1, 1}, {2, 16, 32}, {3, 17, 31}, {5, 15, 33}, {17, 33, 96}, {31, 40, 257}};
  for (const auto& s : sizes)
    for (int format : {kF32, kF16, kBF16, kQ8, kQ4, kN4, kZ4}) {
      Random r{uint64_t(s[0] * 1000 + s[1] * 10 + format)};
      const Owned w = packed(c, format, s[1], s[2], r), w2 = packed(c, format, s[1] + 3, s[2], r);
      const std::vector<float> x = r.values(s[0] * s[2]);
      std::vector<float> y(size_t(s[0] * s[1])), y2(size_t(s[0] * (s[1] + 3)));
      c.linear(x.data(), s[0], {w.matrix, w2.matrix}, {y.data(), y2.data()});
      for (int64_t row = 0; row < s[0]; ++row) {
        std::vector<float> one(static_cast<size_t>(s[1]));
        c.linear(x.data() + row * s[2], 1, {w.matrix}, {one.data()});
        check(!std::memcmp(one.data(), y.data() + row * s[1], size_t(s[1]) * 4), "row alone = row in batch");
      }
      out.push_back(y);
      out.push_back(y2);
    }
  for (int64_t rows : {13, 70}) {  // opened panels, in pairs and in groups; more panels than a group holds
    Random r{uint64_t(rows)};
    const Owned w = packed(c, kZ4, 650, 4100, r);
    const std::vector<float> x = r.values(rows * 4100);
    std::vector<float> y(size_t(rows * 650)), one(650);
    c.linear(x.data(), rows, {w.matrix}, {y.data()});
    c.linear(x.data() + (rows - 1) * 4100, 1, {w.matrix}, {one.data()});
    check(!std::memcmp(one.data(), y.data() + (rows - 1) * 650, one.size() * 4), "last row alone");
    out.push_back(y);
  }
  for (int ggml : {2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23}) {
    Random r{uint64_t(ggml)};
    const Owned w = blocks(c, ggml, 19, 512, r);
    const std::vector<float> x = r.values(7 * 512);
    std::vector<float> y(7 * 19), all(19 * 512);
    c.linear(x.data(), 7, {w.matrix}, {y.data()});
    c.unpack(w.matrix, all.data());
    out.push_back(y);
    out.push_back(all);
  }
}

void feed_forward_cases(Context& c, Results& out) {
  for (int format : {kF32, kQ8, kQ4, kZ4})
    for (int64_t rows : {1, 6, 35}) {
      Random r{uint64_t(format * 100 + rows)};
      std::vector<Owned> parts;
      std::vector<Expert> experts;
      for (int e = 0; e < 4; ++e) {
        parts.push_back(packed(c, format, 47, 65, r));
        parts.push_back(packed(c, format, 47, 65, r));
        parts.push_back(packed(c, format, 33, 47, r));
      }
      for (size_t e = 0; e < 4; ++e)
        experts.push_back({parts[3 * e].matrix, parts[3 * e + 1].matrix, parts[3 * e + 2].matrix});
      const Owned router = packed(c, kF32, 4, 65, r);
      const std::vector<float> x = r.values(rows * 65);
      std::vector<float> y(size_t(rows * 33)), z(size_t(rows * 33));
      c.mlp(x.data(), rows, experts[0], y.data());
      c.moe(x.data(), rows, router.matrix, experts, 2, z.data());
      out.push_back(y);
      out.push_back(z);
    }
}

void attention_cases(Context& c, Results& out) {
  const int shapes[][3] = {{4, 2, 16}, {3, 1, 2}, {6, 3, 20}, {8, 8, 34}};  // heads, kv heads, width
  for (const auto& s : shapes)
    for (int kind = 0; kind < 5; ++kind)
      for (int64_t window : {int64_t(1) << 40, int64_t(1), int64_t(50)}) {
        const int64_t rows = 600, d = s[2], width = kind == 0 ? 4 : kind == 3 ? 1 : 2;
        Random r{uint64_t(kind * 7 + s[0])};
        const int64_t count = rows / 32 + 1, slots = count * 32;
        std::vector<uint8_t> k_pages(size_t(slots * s[1] * d * width)), v_pages(k_pages.size());
        std::vector<float> k_scale(size_t(kind >= 3 ? slots * s[1] : 0)), v_scale(k_scale.size());
        const PageView pages = {k_pages.data(), v_pages.data(), k_scale.data(), v_scale.data(), s[1], int(d), kind};
        std::vector<int32_t> table(static_cast<size_t>(count)), slot(static_cast<size_t>(rows));
        for (int64_t b = 0; b < count; ++b) table[size_t(b)] = int32_t(count - 1 - b);
        for (int64_t i = 0; i < rows; ++i) slot[size_t(i)] = int32_t(table[size_t(i / 32)] * 32 + i % 32);
        std::vector<float> q = r.values(rows * s[0] * d), k = r.values(rows * s[1] * d), v = r.values(rows * s[1] * d);
        std::vector<float> cos = r.values(rows * d / 2), sin = r.values(rows * d / 2), y(q.size());
        const int32_t starts[] = {0, int32_t(rows)}, first[] = {0};
        const Attention a = {starts, first, table.data(), slot.data(), 1, count, s[0], window};
        c.attend(q.data(), k.data(), v.data(), cos.data(), sin.data(), rows, a, pages, y.data());
        out.push_back(y);
      }
}

void row_cases(Context& c, Results& out) {
  for (int64_t k : {1, 15, 16, 33, 256}) {
    Random r{uint64_t(k)};
    std::vector<float> x = r.values(5 * k), add = r.values(5 * k), w = r.values(k), y(size_t(5 * k));
    c.norm(x.data(), add.data(), w.data(), 1e-5f, 5, k, y.data());
    out.push_back(x);
    out.push_back(y);
    const Owned table = packed(c, kQ4, 37, k, r);
    const int32_t ids[] = {36, 0, 15, 16};
    std::vector<float> rows(size_t(4 * k));
    c.embed(table.matrix, ids, 4, rows.data());
    out.push_back(rows);
  }
}

// Tokens as floats: every instruction set and number of threads chooses the same ones.
void sample_cases(Context& c, Results& out) {
  Random r(17);
  for (const int64_t n : {1, 63, 64, 65, 1000}) {
    std::vector<Draw> draws;
    for (const double top_k : {0.0, 1.0, 40.0})
      for (const double top_p : {1.0, 0.7})
        for (const double min_p : {0.0, 0.1}) draws.push_back({0.8, top_k, top_p, min_p, 0.37});
    draws.push_back({0.0, 0.0, 1.0, 0.0, 0.0});
    const int64_t rows = int64_t(draws.size());
    std::vector<float> logits = r.values(rows * n), found;
    std::vector<int32_t> tokens(draws.size()), status(draws.size());
    c.sample(logits.data(), rows, n, draws.data(), tokens.data(), status.data());
    for (int64_t i = 0; i < rows; ++i) {
      check(status[i] == kSure && tokens[i] >= 0 && tokens[i] < n, "a token of the row");
      found.push_back(float(tokens[i]));
    }
    out.push_back(found);
    logits[size_t(n - 1)] = __builtin_nanf("");
    c.sample(logits.data(), rows, n, draws.data(), tokens.data(), status.data());
    check(status[0] == kBroken && status[size_t(rows - 1)] == kSure, "one broken row");
  }
}

Results run(int threads) {
  Context c(threads);
  Results out;
  linear_cases(c, out);
  feed_forward_cases(c, out);
  attention_cases(c, out);
  row_cases(c, out);
  sample_cases(c, out);
  return out;
}

}  // namespace

int main() {
  const std::string all = detected_isas();
  Results first;
  for (size_t at = 0; at < all.size();) {
    const size_t end = std::min(all.find(' ', at), all.size());
    setenv("BISE_ISA", all.substr(at, end - at).c_str(), 1);
    for (int threads : {1, 3}) {
      const Results results = run(threads);
      if (first.empty()) first = results;
      for (size_t i = 0; i < results.size(); ++i) check(same(results[i], first[i]), "case " + std::to_string(i));
    }
    at = end + 1;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
