// What this machine can do at most: memory read rate and arithmetic rate of an instruction set. For roofs, not results.
#pragma once
#include <cstdint>

namespace bise {

// Bytes per second at which `threads` threads together read `data` once. `data` must have been written before, and be
// much larger than the caches.
double read_rate(const uint8_t* data, int64_t bytes, int threads);

enum class Arithmetic : int { kInt8 = 0, kFloat = 1 };

// Operations per second (two per multiply-add) of `threads` threads that do nothing else for `seconds`, with the
// instructions that the kernels of the chosen instruction set use; 0 where there is no such loop.
double arithmetic_rate(Arithmetic kind, int threads, double seconds);

}  // namespace bise
