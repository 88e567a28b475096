// Packing: every format is reduced to `Row` (codes and scales of one row) and written to or read from a panel.
#include "pack.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "half.h"

namespace bise {

namespace {

// One row in pieces. Indices: scale and min per 32 columns (flat formats) or per 256 (K formats), sub values per
// 32 or 16 columns.
struct Row {
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scale, min;
  std::vector<uint8_t> sub, sub_min;

  void reset(int64_t k) {
    codes.assign(size_t(k), 0);
    scale.assign(size_t(k / 32 + 1), 0);
    min.assign(size_t(k / 32 + 1), 0);
    sub.assign(size_t(k / 16 + 2), 0);
    sub_min.assign(size_t(k / 16 + 2), 0);
  }
};

uint16_t read16(const uint8_t* p) {
  uint16_t x;
  std::memcpy(&x, p, 2);
  return x;
}
uint32_t read32(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}
bool finite_half(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

bool has_min(int format) {
  return format == kQ41 || format == kQ51 || format == kQ4K || format == kQ5K || format == kQ2K;
}
// Scales and mins of 6 bits, all in the header.
bool has_six_bits(int format) { return format == kQ4K || format == kQ5K; }
int sub_cols(int format) { return format == kQ6K || format == kQ3K || format == kQ2K ? 16 : 32; }
int zero_point(int format) {
  switch (format) {
    case kQ8: case kN4: case kN4K: return 128;
    case kQ4: return 8;
    case kQ5: return 16;
    case kQ6K: return 32;
    case kQ3K: return 4;
    default: return 0;
  }
}

// ---- GGUF blocks to Row; layouts as documented by the GGUF format --------------------------------------------

void nibble_block(const uint8_t* qs, uint8_t* codes) {
  for (int j = 0; j < 16; ++j) {
    codes[j] = qs[j] & 15;
    codes[j + 16] = qs[j] >> 4;
  }
}

void fifth_bit(uint32_t high, uint8_t* codes) {
  for (int j = 0; j < 32; ++j) codes[j] = uint8_t(codes[j] | ((high >> j) & 1) << 4);
}

void k4_scales(const uint8_t* packed, uint8_t* scale, uint8_t* min) {
  for (int j = 0; j < 8; ++j) {
    if (j < 4) {
      scale[j] = packed[j] & 63;
      min[j] = packed[j + 4] & 63;
    } else {
      scale[j] = uint8_t((packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4);
      min[j] = uint8_t((packed[j + 4] >> 4) | (packed[j] >> 6) << 4);
    }
  }
}

void read_flat(int ggml, const uint8_t* raw, int64_t b, Row& row) {
  uint8_t* codes = row.codes.data() + b * 32;
  row.scale[size_t(b)] = read16(raw);
  switch (ggml) {
    case kGgmlQ4_0: case kGgmlIQ4_NL: nibble_block(raw + 2, codes); break;
    case kGgmlQ4_1:
      row.min[size_t(b)] = read16(raw + 2);
      nibble_block(raw + 4, codes);
      break;
    case kGgmlQ5_0:
      nibble_block(raw + 6, codes);
      fifth_bit(read32(raw + 2), codes);
      break;
    case kGgmlQ5_1:
      row.min[size_t(b)] = read16(raw + 2);
      nibble_block(raw + 8, codes);
      fifth_bit(read32(raw + 4), codes);
      break;
    default:  // Q8_0
      for (int j = 0; j < 32; ++j) codes[j] = uint8_t(raw[2 + j] + 128);
  }
}

void read_super(int ggml, const uint8_t* raw, int64_t s, Row& row) {
  uint8_t* codes = row.codes.data() + s * 256;
  uint8_t* sub32 = row.sub.data() + s * 8;
  uint8_t* sub16 = row.sub.data() + s * 16;
  switch (ggml) {
    case kGgmlQ2_K:
      row.scale[size_t(s)] = read16(raw + 80);
      row.min[size_t(s)] = read16(raw + 82);
      for (int i = 0; i < 16; ++i) {
        sub16[i] = raw[i] & 15;
        row.sub_min[size_t(s * 16 + i)] = raw[i] >> 4;
      }
      for (int i = 0; i < 256; ++i) codes[i] = (raw[16 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
      break;
    case kGgmlQ3_K:
      row.scale[size_t(s)] = read16(raw + 108);
      for (int i = 0; i < 16; ++i) {
        const int low = i < 8 ? raw[96 + i] & 15 : raw[96 + i - 8] >> 4;
        const int high = (raw[104 + i % 4] >> (i / 4 * 2)) & 3;
        sub16[i] = uint8_t((low | high << 4) - 32);
      }
      for (int i = 0; i < 256; ++i) {
        const int low = (raw[32 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
        codes[i] = uint8_t(low | ((raw[i % 32] >> (i / 32)) & 1) << 2);
      }
      break;
    case kGgmlQ4_K:
    case kGgmlQ5_K: {
      row.scale[size_t(s)] = read16(raw);
      row.min[size_t(s)] = read16(raw + 2);
      k4_scales(raw + 4, sub32, row.sub_min.data() + s * 8);
      const uint8_t* qs = raw + (ggml == kGgmlQ4_K ? 16 : 48);
      for (int i = 0; i < 256; ++i) codes[i] = (qs[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4)) & 15;
      if (ggml == kGgmlQ5_K)
        for (int i = 0; i < 256; ++i) codes[i] = uint8_t(codes[i] | ((raw[16 + i % 32] >> (i / 32)) & 1) << 4);
      break;
    }
    case kGgmlQ6_K:
      row.scale[size_t(s)] = read16(raw + 208);
      for (int i = 0; i < 16; ++i) sub16[i] = raw[192 + i];
      for (int i = 0; i < 256; ++i) {
        const int half = i / 128, part = i % 128 / 32, l = i % 32;
        const int low = (raw[half * 64 + part % 2 * 32 + l] >> (part / 2 * 4)) & 15;
        const int high = (raw[128 + half * 32 + l] >> (part * 2)) & 3;
        codes[i] = uint8_t(low | high << 4);
      }
      break;
    default: {  // IQ4_XS
      row.scale[size_t(s)] = read16(raw);
      const int high = read16(raw + 2);
      for (int b = 0; b < 8; ++b) {
        const int low = (raw[4 + b / 2] >> (b % 2 * 4)) & 15;
        sub32[b] = uint8_t((low | ((high >> (2 * b)) & 3) << 4) - 32);
        nibble_block(raw + 8 + 16 * b, codes + 32 * b);
      }
    }
  }
}

// ---- codes of a block into and out of a panel ------------------------------------------------------------------

struct Planes {
  int low;   // bits in the first plane: 8, 4 or 2
  int high;  // bits in the second: 0, 1 or 2
};
Planes planes_of(int format) {
  switch (format) {
    case kQ8: return {8, 0};
    case kQ5: case kQ51: case kQ5K: return {4, 1};
    case kQ6K: return {4, 2};
    case kQ3K: return {2, 1};
    case kQ2K: return {2, 0};
    default: return {4, 0};
  }
}
int plane_bytes(int bits) { return 64 * bits; }

void put_bits(uint8_t* plane, int bits, int lane, int column, int value) {
  const int g = column / 4, c = column % 4, at = lane * 4 + c;
  if (bits == 8) plane[64 * g + at] = uint8_t(value);
  else if (bits == 4) plane[64 * (g % 4) + at] = uint8_t(plane[64 * (g % 4) + at] | value << (g / 4 * 4));
  else if (bits == 2) plane[64 * (g / 4) + at] = uint8_t(plane[64 * (g / 4) + at] | value << (g % 4 * 2));
  else plane[at] = uint8_t(plane[at] | value << g);
}
int get_bits(const uint8_t* plane, int bits, int lane, int column) {
  const int g = column / 4, c = column % 4, at = lane * 4 + c;
  if (bits == 8) return plane[64 * g + at];
  if (bits == 4) return (plane[64 * (g % 4) + at] >> (g / 4 * 4)) & 15;
  if (bits == 2) return (plane[64 * (g / 4) + at] >> (g % 4 * 2)) & 3;
  return (plane[at] >> g) & 1;
}

// Field f of a lane in the words of a header of 6-bit scales and mins (formats.h).
uint32_t word_at(const uint8_t* header, int lane, int word) { return read32(header + 64 + 64 * word + 4 * lane); }
int get_six_bits(const uint8_t* header, int lane, int f) {
  if (f < 15) return int(word_at(header, lane, f / 5) >> (6 * (f % 5)) & 63);
  int value = 0;
  for (int word = 0; word < 3; ++word) value |= int(word_at(header, lane, word) >> 30) << (2 * word);
  return value;
}
// `fields` holds 16 values below 64.
void put_six_bits(uint8_t* header, int lane, const uint8_t* fields) {
  for (int word = 0; word < 3; ++word) {
    uint32_t bits = uint32_t(fields[15] >> (2 * word) & 3) << 30;
    for (int i = 0; i < 5; ++i) bits |= uint32_t(fields[5 * word + i]) << (6 * i);
    std::memcpy(header + 64 + 64 * word + 4 * lane, &bits, 4);
  }
}

// The half and the 7-bit fields (scale and zero point by turns) in the header of kZ4.
uint16_t get_half(const uint8_t* header, int lane) {
  uint32_t half = 0;
  for (int word = 0; word < 4; ++word) half |= read32(header + 64 * word + 4 * lane) >> 28 << (4 * word);
  return uint16_t(half);
}
int get_seven_bits(const uint8_t* header, int lane, int f) {
  return int(read32(header + 64 * (f / 4) + 4 * lane) >> (7 * (f % 4)) & 127);
}
void put_header(uint8_t* header, int lane, uint16_t half, const uint8_t* fields) {
  for (int word = 0; word < 4; ++word) {
    uint32_t bits = uint32_t(half >> (4 * word) & 15) << 28;
    for (int i = 0; i < 4; ++i) bits |= uint32_t(fields[4 * word + i]) << (7 * i);
    std::memcpy(header + 64 * word + 4 * lane, &bits, 4);
  }
}

void write_lane(int format, const Row& row, int lane, int64_t k, uint8_t* panel) {
  const FormatInfo& info = kFormatInfo[format];
  const Planes planes = planes_of(format);
  const bool super = info.header_bytes != 0;
  const int low_mask = (1 << planes.low) - 1;
  uint8_t* w = panel;
  for (int64_t b = 0; b < round_up(k, 32) / 32; ++b) {
    if (super && b % kSuperBlocks == 0) {
      std::memcpy(w + 2 * lane, &row.scale[size_t(b / 8)], 2);
      if (has_min(format)) std::memcpy(w + 32 + 2 * lane, &row.min[size_t(b / 8)], 2);
      if (has_six_bits(format)) {
        uint8_t fields[2 * kSuperBlocks];
        for (size_t i = 0; i < kSuperBlocks; ++i) {
          fields[2 * i] = row.sub[size_t(b) + i];
          fields[2 * i + 1] = row.sub_min[size_t(b) + i];
        }
        put_six_bits(w, lane, fields);
      }
      w += info.header_bytes;
    }
    for (int j = 0; j < 32; ++j) {
      const int64_t column = b * 32 + j;
      const int code = column < k ? row.codes[size_t(column)] : 0;
      put_bits(w, planes.low, lane, j, code & low_mask);
      if (planes.high) put_bits(w + plane_bytes(planes.low), planes.high, lane, j, code >> planes.low);
    }
    uint8_t* tail = w + plane_bytes(planes.low) + plane_bytes(planes.high);
    if (!super) {
      std::memcpy(tail + 2 * lane, &row.scale[size_t(b)], 2);
      if (has_min(format)) std::memcpy(tail + 32 + 2 * lane, &row.min[size_t(b)], 2);
    } else if (format == kQ2K) {
      for (int h = 0; h < 2; ++h)
        tail[16 * h + lane] = uint8_t(row.sub[size_t(2 * b + h)] | row.sub_min[size_t(2 * b + h)] << 4);
    } else if (sub_cols(format) == 16) {
      for (int h = 0; h < 2; ++h) tail[16 * h + lane] = row.sub[size_t(2 * b + h)];
    } else if (!has_six_bits(format)) {
      tail[lane] = row.sub[size_t(b)];
    }
    w += info.block_bytes;
  }
}

// ---- quantising floats -------------------------------------------------------------------------------------------

#include "quantize.inl"

bool pack_float_columns(int format, const float* x, int rows, int64_t k, uint8_t* panel) {
  bool fits = true;
  for (int64_t i = 0; i < k; ++i) {
    for (int lane = 0; lane < kPanelRows; ++lane) {
      const float value = lane < rows ? x[lane * k + i] : 0.0f;
      fits = fits && std::isfinite(value);
      if (format == kF32) {
        std::memcpy(panel + i * 64 + lane * 4, &value, 4);
        continue;
      }
      uint16_t bits;
      if (format == kF16) {
        bits = float_to_half(value);
        fits = fits && finite_half(bits);
      } else {
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        bits = uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
        fits = fits && (bits & 0x7f80) != 0x7f80;
      }
      std::memcpy(panel + i * 32 + lane * 2, &bits, 2);
    }
  }
  return fits;
}

}  // namespace

int format_of(int ggml) {
  switch (ggml) {
    case kGgmlQ4_0: return kQ4;
    case kGgmlQ4_1: return kQ41;
    case kGgmlQ5_0: return kQ5;
    case kGgmlQ5_1: return kQ51;
    case kGgmlQ8_0: return kQ8;
    case kGgmlQ2_K: return kQ2K;
    case kGgmlQ3_K: return kQ3K;
    case kGgmlQ4_K: return kQ4K;
    case kGgmlQ5_K: return kQ5K;
    case kGgmlQ6_K: return kQ6K;
    case kGgmlIQ4_NL: return kN4;
    case kGgmlIQ4_XS: return kN4K;
    default: return -1;
  }
}

int64_t row_bytes(int ggml, int64_t k) {
  int cols = 32, bytes = 0;
  switch (ggml) {
    case kGgmlQ4_0: case kGgmlIQ4_NL: bytes = 18; break;
    case kGgmlQ4_1: bytes = 20; break;
    case kGgmlQ5_0: bytes = 22; break;
    case kGgmlQ5_1: bytes = 24; break;
    case kGgmlQ8_0: bytes = 34; break;
    case kGgmlQ2_K: cols = 256, bytes = 84; break;
    case kGgmlQ3_K: cols = 256, bytes = 110; break;
    case kGgmlQ4_K: cols = 256, bytes = 144; break;
    case kGgmlQ5_K: cols = 256, bytes = 176; break;
    case kGgmlQ6_K: cols = 256, bytes = 210; break;
    case kGgmlIQ4_XS: cols = 256, bytes = 136; break;
    default: return -1;
  }
  return k % cols ? -1 : k / cols * bytes;
}

bool pack_blocks(int ggml, const uint8_t* raw, int rows, int64_t k, uint8_t* panel) {
  const int format = format_of(ggml);
  const bool super = kFormatInfo[format].header_bytes != 0;
  const int64_t cols = super ? 256 : 32, stride = row_bytes(ggml, k), block = row_bytes(ggml, cols);
  std::memset(panel, 0, size_t(panel_bytes(format, k)));
  bool finite = true;
  Row row;
  for (int lane = 0; lane < rows; ++lane) {
    row.reset(k);
    for (int64_t b = 0; b < k / cols; ++b) {
      const uint8_t* from = raw + lane * stride + b * block;
      if (super) read_super(ggml, from, b, row);
      else read_flat(ggml, from, b, row);
      finite = finite && finite_half(row.scale[size_t(b)]) && finite_half(row.min[size_t(b)]);
    }
    // GGUF's flat formats add their min, the panels subtract it
    if (ggml == kGgmlQ4_1 || ggml == kGgmlQ5_1)
      for (uint16_t& m : row.min) m ^= 0x8000;
    write_lane(format, row, lane, k, panel);
  }
  return finite;
}

bool pack_floats(int format, const float* x, int rows, int64_t k, const float* importance, uint8_t* panel) {
  if (is_float(format)) return pack_float_columns(format, x, rows, k, panel);
  std::memset(panel, 0, size_t(panel_bytes(format, k)));
  return pack_quantized(format, x, rows, k, importance, panel);
}

void unpack_row(int format, const uint8_t* panel, int lane, int64_t k, float* out) {
  if (is_float(format)) {
    for (int64_t i = 0; i < k; ++i) {
      if (format == kF32) {
        std::memcpy(out + i, panel + i * 64 + lane * 4, 4);
        continue;
      }
      const uint16_t bits = read16(panel + i * 32 + lane * 2);
      const uint32_t wide = uint32_t(bits) << 16;
      if (format == kF16) out[i] = half_to_float(bits);
      else std::memcpy(out + i, &wide, 4);
    }
    return;
  }
  const FormatInfo& info = kFormatInfo[format];
  const Planes planes = planes_of(format);
  const bool super = info.header_bytes != 0, codebook = format == kN4 || format == kN4K;
  const uint8_t *w = panel, *header = panel;
  float super_scale = 0, super_min = 0;
  for (int64_t b = 0; b * 32 < k; ++b) {
    if (super && b % kSuperBlocks == 0) {
      super_scale = format == kZ4 ? kZ4Unit * half_to_float(get_half(w, lane)) : half_to_float(read16(w + 2 * lane));
      super_min = has_min(format) ? half_to_float(read16(w + 32 + 2 * lane)) : 0.0f;
      header = w;
      w += info.header_bytes;
    }
    const uint8_t* tail = w + plane_bytes(planes.low) + plane_bytes(planes.high);
    for (int j = 0; j < 32 && b * 32 + j < k; ++j) {
      int code = get_bits(w, planes.low, lane, j);
      if (planes.high) code |= get_bits(w + plane_bytes(planes.low), planes.high, lane, j) << planes.low;
      if (codebook) code = kCodebook[code] + 128;
      float scale, min = 0;
      if (!super) {
        scale = half_to_float(read16(tail + 2 * lane));
        if (has_min(format)) min = half_to_float(read16(tail + 32 + 2 * lane));
      } else if (format == kQ2K) {
        scale = super_scale * float(tail[16 * (j / 16) + lane] & 15);
        min = super_min * float(tail[16 * (j / 16) + lane] >> 4);
      } else if (sub_cols(format) == 16) {
        scale = super_scale * float(int8_t(tail[16 * (j / 16) + lane]));
      } else if (format == kZ4) {
        const int field = int(b % kSuperBlocks) * 2;
        const float unit = super_scale * float(get_seven_bits(header, lane, field));
        scale = 8.0f * unit;
        min = unit * float(128 - get_seven_bits(header, lane, field + 1));
      } else if (has_six_bits(format)) {
        const int field = int(b % kSuperBlocks) * 2;
        scale = super_scale * float(get_six_bits(header, lane, field));
        min = super_min * float(get_six_bits(header, lane, field + 1));
      } else {
        scale = super_scale * float(int8_t(tail[lane]));
      }
      const float value = scale * float(code - zero_point(format));
      out[b * 32 + j] = has_min(format) || format == kZ4 ? value - min : value;
    }
    w += info.block_bytes;
  }
}

}  // namespace bise
