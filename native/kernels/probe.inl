// What the processor can do at most: loops of nothing but one operation. Included after wide.inl.

constexpr int kChains = 12;  // independent sums: enough to hide the latency of a fused multiply-add on two ports
constexpr int64_t kProbeSteps = 4096;

// Sum of whole 256-byte lines, so that every byte is read.
int64_t read_all(const uint8_t* p, int64_t bytes) {
  constexpr int kBytes = sizeof(R::I);
  R::I sums[4];
  each<4>([&](auto c) BISE_INLINE { sums[c] = R::set1i(0); });
  for (int64_t i = 0; i + 4 * kBytes <= bytes; i += 4 * kBytes)
    each<4>([&](auto c) BISE_INLINE { sums[c] = R::addi(sums[c], R::loadi(p + i + c * kBytes)); });
  const R::I all = R::addi(R::addi(sums[0], sums[1]), R::addi(sums[2], sums[3]));
  int32_t first;
  __builtin_memcpy(&first, &all, 4);
  return first;
}

// Operations done, two per multiply-add. `opaque` hides from the compiler that all sums are the same.
int64_t dot_steps() {
  R::I sums[kChains], a = R::set1i(0x01010101), b = a;
  R::opaque(b);
  each<kChains>([&](auto c) BISE_INLINE { sums[c] = R::set1i(0); });
  for (int64_t i = 0; i < kProbeSteps; ++i)
    each<kChains>([&](auto c) BISE_INLINE {
      R::opaque(a);  // else the half of a dot product that does not touch the sum is done once
      sums[c] = R::dot(sums[c], a, b);
      R::opaque(sums[c]);
    });
  return kProbeSteps * kChains * 8 * R::L;
}

int64_t float_steps() {
  R::F sums[kChains], a = R::set1(1.0f), b = a;
  R::opaque(a);
  R::opaque(b);
  each<kChains>([&](auto c) BISE_INLINE { sums[c] = R::set1(0.0f); });
  for (int64_t i = 0; i < kProbeSteps; ++i)
    each<kChains>([&](auto c) BISE_INLINE {
      sums[c] = R::fma(a, b, sums[c]);
      R::opaque(sums[c]);
    });
  return kProbeSteps * kChains * 2 * R::L;
}
