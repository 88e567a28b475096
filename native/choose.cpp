#include "choose.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace bise {

namespace {

using Item = DrawScratch::Item;

constexpr double kMargin = 1e-9;  // of the sum of all weights; 2^18 of them in any order differ by less than 1e-10
constexpr size_t kMostItems = 1 << 14;  // more are not worth sorting: whoever leaves so many is rare

// Best first, ties by lower id.
bool stands_before(const Item& a, const Item& b) { return a.score > b.score || (a.score == b.score && a.id < b.id); }

bool has_lower_id(const Item& a, const Item& b) { return a.id < b.id; }

int32_t first_of(const float* x, int64_t n, float top, const std::vector<float>& tops) {
  const int64_t block = std::find(tops.begin(), tops.end(), top) - tops.begin();
  return int32_t(std::find(x + block * kPeakBlock, x + n, top) - x);
}

// Appends the tokens of at least `least`, ascending.
void collect(const float* x, int64_t n, float least, DrawScratch& s) {
  s.items.clear();
  for (size_t block = 0; block < s.tops.size(); ++block) {
    if (!(s.tops[block] >= least)) continue;
    const int64_t first = int64_t(block) * kPeakBlock, last = std::min(n, first + kPeakBlock);
    for (int64_t i = first; i < last; ++i)
      if (x[i] >= least) s.items.push_back({int32_t(i), x[i], 0.0});
  }
}

// Leaves the `count` best tokens, best first.
void keep_best(const float* x, int64_t n, size_t count, DrawScratch& s) {
  float least = -std::numeric_limits<float>::infinity();
  if (s.tops.size() > count) {  // as many tokens as blocks reach the count-th of the blocks' peaks
    s.some_tops = s.tops;
    std::nth_element(s.some_tops.begin(), s.some_tops.begin() + (count - 1), s.some_tops.end(), std::greater<>());
    least = s.some_tops[count - 1];
  }
  collect(x, n, least, s);
  if (s.items.size() > count) {
    std::nth_element(s.items.begin(), s.items.begin() + (count - 1), s.items.end(), stands_before);
    s.items.resize(count);
  }
  std::sort(s.items.begin(), s.items.end(), stands_before);
}

// Of items best first keeps the fewest whose weights reach `goal`; false where rounding might keep another number.
bool cut_top_p(std::vector<Item>& items, double goal, double margin) {
  double running = 0.0;
  for (size_t i = 0; i < items.size(); ++i) {
    const double before = running;
    running += items[i].weight;
    if (running < goal + margin) {
      if (running > goal - margin) return false;
      continue;
    }
    items.resize(i + 1);
    return i == 0 || before <= goal - margin;
  }
  return false;
}

bool cut_min_p(std::vector<Item>& items, double min_p) {
  bool sure = true;
  const auto is_less = [&](const Item& item) {
    sure &= std::fabs(item.weight - min_p) > kMargin * min_p;
    return item.weight < min_p;
  };
  items.erase(std::remove_if(items.begin(), items.end(), is_less), items.end());
  return sure;
}

// Walks to where the running sum first exceeds `goal`.
struct Walk {
  double goal, margin;
  double running = 0.0;

  // True when the sum with `weight` exceeds the goal, surely or (then `sure` is false) perhaps.
  bool passes(double weight, bool& sure) {
    const double before = running;
    running += weight;
    if (running <= goal - margin || weight == 0.0) return false;
    sure = running >= goal + margin && (before == 0.0 || before <= goal - margin);
    return true;
  }
};

Chosen draw_of_all(double number, DrawScratch& s, int64_t n, double total, int32_t& token) {
  Walk walk{number * total, kMargin * total};
  bool sure = false;
  for (size_t block = 0; block < s.sums.size(); ++block) {
    if (walk.running + s.sums[block] <= walk.goal - 2 * walk.margin) {
      walk.running += s.sums[block];
      continue;
    }
    const int64_t first = int64_t(block) * kPeakBlock, last = std::min(n, first + kPeakBlock);
    for (int64_t i = first; i < last; ++i) {
      if (!walk.passes(s.weights[i], sure)) continue;
      token = int32_t(i);
      return sure ? kSure : kUnsure;
    }
  }
  return kUnsure;
}

Chosen draw_of_items(double number, const std::vector<Item>& items, int32_t& token) {
  double total = 0.0;
  for (const Item& item : items) total += item.weight;
  Walk walk{number * total, kMargin * total};
  bool sure = false;
  for (const Item& item : items) {
    if (!walk.passes(item.weight, sure)) continue;
    token = item.id;
    return sure ? kSure : kUnsure;
  }
  return kUnsure;
}

}  // namespace

Chosen choose(const Ops& ops, const float* x, int64_t n, const Draw& draw, DrawScratch& s, int32_t& token) {
  const size_t blocks = size_t((n + kPeakBlock - 1) / kPeakBlock);
  s.tops.resize(blocks);
  const float top = ops.peaks(x, n, s.tops.data());
  if (!std::isfinite(top)) return kBroken;
  if (draw.temperature == 0.0) {
    token = first_of(x, n, top, s.tops);
    return kSure;
  }
  const double factor = 1.0 / draw.temperature;
  const bool is_by_score = draw.top_k > 0 && draw.top_k < double(n);
  double total = 0.0;
  if (!is_by_score && (draw.top_p < 1.0 || draw.min_p <= 0.0)) {
    s.weights.resize(size_t(n));
    s.sums.resize(blocks);
    ops.weigh(x, n, top, factor, s.weights.data(), s.sums.data());
    for (const double sum : s.sums) total += sum;
    if (draw.top_p >= 1.0) return draw_of_all(draw.number, s, n, total, token);
  }
  if (is_by_score) {
    keep_best(x, n, size_t(draw.top_k), s);
  } else {
    // What top_p keeps weighs at least (1 - top_p) of all by n: if the last one that it keeps weighed less, so would all
    // those it leaves out, n together less than 1 - top_p. A little less, for rounding.
    const double least = draw.top_p < 1.0 ? (1.0 - draw.top_p) * total / double(n) : draw.min_p;
    const double bound = double(top) + std::log(least) / factor;
    collect(x, n, float(bound - 1e-5 * (1.0 + std::fabs(bound) + std::fabs(double(top)))), s);
    if (s.items.size() > kMostItems) return kUnsure;
    if (draw.top_p < 1.0) std::sort(s.items.begin(), s.items.end(), stands_before);
  }
  for (Item& item : s.items) item.weight = std::exp((double(item.score) - double(top)) * factor);
  if (draw.top_p < 1.0) {
    if (is_by_score)
      for (const Item& item : s.items) total += item.weight;
    if (!cut_top_p(s.items, draw.top_p * total, kMargin * total)) return kUnsure;
  }
  if (draw.min_p > 0.0 && !cut_min_p(s.items, draw.min_p)) return kUnsure;
  if (!is_by_score) std::sort(s.items.begin(), s.items.end(), has_lower_id);
  return draw_of_items(draw.number, s.items, token);
}

}  // namespace bise
