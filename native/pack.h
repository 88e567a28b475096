// Weights into panels and back: from floats (with quantisation) or, without loss, from GGUF blocks.
#pragma once
#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace bise {

// ggml type numbers of the blocks that `pack_blocks` reads.
enum Ggml : int {
  kGgmlQ4_0 = 2,
  kGgmlQ4_1 = 3,
  kGgmlQ5_0 = 6,
  kGgmlQ5_1 = 7,
  kGgmlQ8_0 = 8,
  kGgmlQ2_K = 10,
  kGgmlQ3_K = 11,
  kGgmlQ4_K = 12,
  kGgmlQ5_K = 13,
  kGgmlQ6_K = 14,
  kGgmlIQ4_NL = 20,
  kGgmlIQ4_XS = 23,
};

int format_of(int ggml);            // packed format that holds a ggml type without loss, -1 for unknown types
int64_t row_bytes(int ggml, int64_t k);  // bytes of a row of k columns, -1 when k does not divide

// Pack up to 16 rows of ggml blocks into one panel; false when a scale is not finite.
bool pack_blocks(int ggml, const uint8_t* raw, int rows, int64_t k, uint8_t* panel);

// Pack up to 16 rows of floats, quantising where the format asks for it (f32 f16 bf16 q8 q4 n4 z4); false when a value
// is not finite or does not fit the format. `importance` holds k positive weights of the columns' squared errors, used by
// q4, n4 and z4; null weighs all columns alike.
bool pack_floats(int format, const float* x, int rows, int64_t k, const float* importance, uint8_t* panel);

// Values of one row of a panel, dequantised: scale * (code - zero) or scale * code - min.
void unpack_row(int format, const uint8_t* panel, int lane, int64_t k, float* out);

}  // namespace bise
