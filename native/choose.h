// One token of a row of logits: temperature, top_k, top_p, min_p and a draw.
#pragma once
#include <cstdint>
#include <vector>

#include "ops.h"

namespace bise {

struct Draw {
  double temperature;  // 0: the best token
  double top_k;        // 0: off
  double top_p, min_p;
  double number;  // in [0, 1)
};

enum Chosen : int32_t { kSure = 0, kUnsure = 1, kBroken = 2 };

// Memory of one thread, kept from row to row.
struct DrawScratch {
  struct Item {
    int32_t id;
    float score;
    double weight;
  };
  std::vector<float> tops, some_tops;
  std::vector<double> weights, sums;
  std::vector<Item> items;
};

// Sets `token` to what engine/sampling.py chooses for the same logits [n] and number. Its sums and powers may differ
// in the last bits, so what lies within 1e-9 of turning out otherwise is kUnsure; kBroken: a logit is not finite.
Chosen choose(const Ops& ops, const float* logits, int64_t n, const Draw& draw, DrawScratch& scratch, int32_t& token);

}  // namespace bise
