// Byte layout of packed weights; src/bise/kernels/panels.py tells devices the same, docs/formats.md people.
//
// A weight [N, K] is stored as panels of 16 rows. Quantised panels are a sequence of 32-column blocks (for K-type
// formats up to eight blocks follow a header of per-256 scales). Inside a block the codes of one 4-column group lie as
// 16 rows x 4 columns = 64 bytes, the operand order of a four-way int8 dot product with one row per lane:
//
//   low nibbles   4 x 64 B: byte [g][row][c] holds column 4g + c in its low and column 16 + 4g + c in its high half
//   2-bit plane   2 x 64 B: byte [h][row][c] holds columns 16h + 4g + c at bits 2g, g = 0..3
//   1-bit plane   1 x 64 B: byte [row][c] holds column 4g + c at bit g, g = 0..7
//   bytes         8 x 64 B: byte [g][row][c] is column 4g + c
//
// The header of kQ4K and kQ5K holds all their scales, so that blocks are whole cache lines: half scale [16 rows], half
// min [16], then three 32-bit words [word][16]. Of the sixteen 6-bit fields of a row, field 2b is the scale and 2b + 1
// the min of block b; field f < 15 lies in word f / 5 at bit 6 (f % 5), field 15 in bits 30 and 31 of the three words.
//
// The header of kZ4 is four 32-bit words [word][16]: bits 0, 7, 14 and 21 of word i begin the scale and zero point of block
// 2i and those of block 2i + 1, 7 bits each; bits 28 to 31 of the words, lowest first, are the half scale of all blocks, in
// units of 1 / 1024 (kZ4Unit), so that usual scales are no denormal halves.
//
// Rows are padded to 16 and columns to 32 with zero values.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bise {

constexpr int kPanelRows = 16;
constexpr int kBlockCols = 32;
constexpr int kSuperBlocks = 8;  // 32-column blocks under one header

enum Format : int {
  kF32 = 0,   // [K][16] float
  kF16 = 1,   // [K][16] half
  kBF16 = 2,  // [K][16] bfloat16
  kQ8 = 3,    // bytes (code - 128), half scale per 32: 8.5 bits; holds Q8_0 and our own 8-bit
  kQ4 = 4,    // nibbles (code - 8), half scale per 32: 4.5 bits; holds Q4_0
  kQ41 = 5,   // nibbles, half scale and half min per 32: 5.0 bits; holds Q4_1
  kQ5 = 6,    // nibbles + 1 bit (code - 16), half scale: 5.5 bits; holds Q5_0
  kQ51 = 7,   // nibbles + 1 bit, half scale and min: 6.0 bits; holds Q5_1
  kN4 = 8,    // nibbles through the IQ4 codebook, half scale per 32: 4.5 bits; holds IQ4_NL
  kN4K = 9,   // as kN4 with half scale per 256 x int8 per 32: 4.31 bits; holds IQ4_XS
  kQ4K = 10,  // nibbles, (half scale, half min) per 256 x (6 bits, 6 bits) per 32: 4.5 bits; holds Q4_K
  kQ5K = 11,  // as kQ4K + 1 bit: 5.5 bits; holds Q5_K
  kQ6K = 12,  // nibbles + 2 bits (code - 32), half scale per 256 x int8 per 16: 6.56 bits; holds Q6_K
  kQ3K = 13,  // 2 bits + 1 bit (code - 4), half scale per 256 x int8 per 16: 3.56 bits; holds Q3_K
  kQ2K = 14,  // 2 bits, (half, half) per 256 x (4 bit scale, 4 bit min) per 16: 2.63 bits; holds Q2_K
  kZ4 = 15,    // nibbles, half scale per 256 x (7 bits, 7-bit zero point) per 32: 4.5 bits; our own 4-bit:
              // value = d s (8 code + z - 128), an integer times a scale
  kFormats = 16,
  kZ4Open = 16,  // as kZ4 with its scales and zero points as products read them: float scale per 32, and zero points
                 // as `zero` of kernels/layouts.inl has them. For panels that many rows multiply; never stored.
};

// The 16 values of the IQ4 codebook (ggml's kvalues_iq4nl), a published table of the format.
constexpr int8_t kCodebook[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

constexpr float kZ4Unit = 1.0f / 1024;

struct FormatInfo {
  const char* name;
  int header_bytes;  // per panel and 256 columns; 0 when the format has no header
  int block_bytes;   // per panel and 32 columns (per panel and column for float formats)
};

constexpr FormatInfo kFormatInfo[kFormats + 1] = {
    {"f32", 0, 64},    {"f16", 0, 32},    {"bf16", 0, 32},   {"q8", 0, 544},    {"q4", 0, 288},
    {"q4_1", 0, 320},  {"q5", 0, 352},    {"q5_1", 0, 384},  {"n4", 0, 288},    {"n4k", 32, 272},
    {"q4k", 256, 256}, {"q5k", 256, 320},  {"q6k", 32, 416},  {"q3k", 32, 224},  {"q2k", 64, 160},
    {"z4", 256, 256}, {"", 0, 384},
};

inline bool is_float(int format) { return format <= kBF16; }
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Bytes of one 16-row panel of K columns.
inline int64_t panel_bytes(int format, int64_t k) {
  const FormatInfo& info = kFormatInfo[format];
  if (is_float(format)) return k * info.block_bytes;
  const int64_t blocks = round_up(k, kBlockCols) / kBlockCols;
  return blocks * info.block_bytes + round_up(blocks, kSuperBlocks) / kSuperBlocks * info.header_bytes;
}

inline int64_t packed_bytes(int format, int64_t n, int64_t k) {
  return round_up(n, kPanelRows) / kPanelRows * panel_bytes(format, k);
}

// Quantised activations: tiles of MT rows; per 32-column block [MT][32] int8, then MT values of each of
//   n8     int32  -8 x sum of the codes
//   scale  float
//   sums   int32  low half: -8 x sum of the first 16 codes, high half: -sum of all
//   ssum   float  scale x sum of the codes
//   n128   int32  -128 x sum of the codes
constexpr int kTileRowBytes = 52;  // per row and block
constexpr int kTileRows = 6;       // rows of a tile when there are many
constexpr int kMostTileRows = 8;   // of any tile

}  // namespace bise
