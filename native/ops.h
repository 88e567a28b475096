// The whole native API of one instruction set: one function pointer per operation, raw pointers and sizes.
//
// Every instruction set computes the same float operations in the same order (fused multiply-add where written),
// so results are equal bit for bit; integer dot products are exact. See docs/numerics.md.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bise {

// K and V of one layer. K block: [G][2][D][16] (16 keys side by side), V block: [G][32][D]; integer kinds:
// kernels/attention_integer.inl.
struct PageView {
  void* k;
  void* v;
  float* k_scale;  // integer kinds only: [block][G][32]
  float* v_scale;
  int kv_heads;
  int head_dim;
  int kind;  // 0 f32, 1 f16, 2 bf16, 3 q8, 4 q16
};

constexpr int kKvBlock = 32;
constexpr int64_t kPeakBlock = 64;

// Tokens in the pages before the part of head g in a block.
inline int64_t head_start(const PageView& p, int64_t block, int64_t g) { return (block * p.kv_heads + g) * kKvBlock; }

struct AttendTask {
  const float* q;  // rotated and scaled queries [T][H * D]
  float* out;      // [T][H * D]
  const int32_t* table;
  int64_t first_pos;  // position of row 0
  int row_begin, row_end;
  int heads;
  int kv_head;
  int64_t window;  // keys visible to a query; a very large number for all
};

struct Ops {
  const char* name;
  int widest_tile;  // rows: 6 or 8

  // Quantise `rows` <= mt rows of x (row stride ldx floats, k columns) into blocks [b0, b1) of one tile; missing rows
  // become zeros. Columns beyond k count as zeros.
  void (*quantize)(const float* x, int64_t ldx, int rows, int64_t k, int64_t b0, int64_t b1, int mt, uint8_t* tile);

  // out[m][16 p + lane] = tile row m . panel row, for `panels` adjacent quantised panels of `blocks` 32-column blocks;
  // mt is 1, 2, 4, 6 or 8 and at most widest_tile. More than one row fetches the `bytes` at `next` meanwhile; one row
  // fetches what lies behind the panel.
  void (*matmul)(int format, const uint8_t* panel, int panels, const uint8_t* tile, int64_t blocks, int mt, float* out,
                 int64_t ldo, const uint8_t* next, int64_t bytes);

  // Writes a kZ4 panel of `blocks` blocks as a kZ4Open one, for this instruction set.
  void (*open_panel)(const uint8_t* panel, int64_t blocks, uint8_t* to);

  // `matmul` for a float panel and float rows.
  void (*matmul_float)(int format, const uint8_t* panel, const float* x, int64_t ldx, int64_t k, int rows, float* out,
                       int64_t ldo);

  // y = x / sqrt(mean(x^2) + eps) * weight; when `add` is not null x += add first (in place).
  void (*norm)(float* x, const float* add, const float* weight, float eps, int64_t k, float* y);

  // gate[i] = silu(gate[i]) * up[i]
  void (*silu_mul)(float* gate, const float* up, int64_t n);

  // Softmax over n <= 64 values in place.
  void (*softmax)(float* x, int n);

  // Rotate one head of width d (pairs i, i + d/2) and multiply by `factor`.
  void (*rotate)(float* x, const float* cos, const float* sin, int d, float factor);

  // Store rotated keys and values of one token, all heads, into slot (block * 32 + offset).
  void (*store_kv)(const PageView& pages, int64_t slot, const float* k, const float* v);

  // Attention of the task's rows and the query heads of its kv head. `scratch` holds attend_scratch floats.
  void (*attend)(const PageView& pages, const AttendTask& task, float* scratch);

  // The peaks of blocks of kPeakBlock logits; returns the highest one, or what is not finite if a logit is not.
  float (*peaks)(const float* x, int64_t n, float* tops);
  // weights = e^((x - top) * factor), and their sums by block.
  void (*weigh)(const float* x, int64_t n, float top, double factor, double* weights, double* sums);

  // Reads whole lines of 256 bytes; the result only keeps the reads alive.
  int64_t (*read_all)(const uint8_t* data, int64_t bytes);

  // A few microseconds of 8-bit dot products or float multiply-adds; return the operations done, two per multiply-add.
  int64_t (*dot_steps)();
  int64_t (*float_steps)();
};

constexpr int kSplit = 512;
constexpr int kAttendRows = 8;  // (query, head) rows computed together over float pages
constexpr int kBatchRows = 96;  // rows that visit a split of integer pages one after the other
inline int64_t attend_scratch(int head_dim) {
  return 12 * (kSplit + kSplit / 2 + 64) + 2 * kSplit + (12 + 2 * kBatchRows) * int64_t(head_dim + 16);
}

extern const Ops ops_scalar;
#if defined(__x86_64__)
extern const Ops ops_avx2;
extern const Ops ops_avx512;
#endif

const char* detected_isas();  // names the processor can run, best first, separated by spaces
const Ops& chosen_ops();      // honours BISE_ISA; throws std::runtime_error when it cannot

}  // namespace bise
