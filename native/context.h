// The operations of a network over packed weights: one instruction set, one pool, reused scratch memory.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "choose.h"
#include "formats.h"
#include "ops.h"
#include "threads.h"

namespace bise {

struct Matrix {
  int format;
  int64_t n, k;
  const uint8_t* data;
  int64_t first = 0;  // the panel that `data` begins with

  int64_t panels() const { return round_up(n, kPanelRows) / kPanelRows; }
  int64_t stride() const { return panel_bytes(format, k); }
  int64_t blocks() const { return round_up(k, kBlockCols) / kBlockCols; }
  const uint8_t* panel(int64_t p) const { return data + (p - first) * stride(); }
};

struct Expert {
  Matrix gate, up, down;
};

struct Attention {
  const int32_t* q_start;  // [S + 1]
  const int32_t* q_pos;    // [S]
  const int32_t* table;    // [S, table_width]
  const int32_t* slots;    // [T]
  int64_t sequences, table_width;
  int heads;
  int64_t window;
};

class Context {
 public:
  explicit Context(int threads);

  const char* isa() const { return ops_.name; }
  int threads() const { return pool_.size(); }

  // out_i[T, n_i] = x[T, k] times each weight transposed.
  void linear(const float* x, int64_t rows, const std::vector<Matrix>& weights, const std::vector<float*>& outs);
  void mlp(const float* x, int64_t rows, const Expert& e, float* out);
  void moe(const float* x, int64_t rows, const Matrix& router, const std::vector<Expert>& experts, int top_k,
           float* out);
  // y = norm(x), or x += add and y = norm(x) when `add` is not null.
  void norm(float* x, const float* add, const float* weight, float eps, int64_t rows, int64_t k, float* y);
  // Rotates q and k in place, stores k and v, writes attention to out.
  void attend(float* q, float* k, const float* v, const float* cos, const float* sin, int64_t rows,
              const Attention& a, const PageView& pages, float* out);
  // One token for each row of logits [rows, n], and how sure each is; see choose.h.
  void sample(const float* logits, int64_t rows, int64_t n, const Draw* draws, int32_t* tokens, int32_t* status);
  void embed(const Matrix& table, const int32_t* ids, int64_t rows, float* out);
  // Packs rows into panels starting at `panels`; false when a value is not finite or does not fit.
  bool pack_blocks(int ggml, const uint8_t* raw, int64_t rows, int64_t k, uint8_t* panels);
  bool pack_floats(int format, const float* x, int64_t rows, int64_t k, uint8_t* panels,
                   const float* importance = nullptr);
  void unpack(const Matrix& m, float* out);

  std::mutex& mutex() { return mutex_; }

 private:
  struct Tile {
    int64_t row;
    int rows, mt;
    int64_t offset;  // rows of the padded tiles before this one
  };
  template <class T>
  class Buffer {
   public:
    T* get(int64_t count) {
      if (count > size_) {
        data_.reset(new T[size_t(count)]);
        size_ = count;
      }
      return data_.get();
    }

   private:
    std::unique_ptr<T[]> data_;
    int64_t size_ = 0;
  };

  std::vector<DrawScratch> draw_scratch_;  // one for each thread
  std::vector<Tile> tiles_of(int64_t rows) const;
  static int64_t padded_rows(const std::vector<Tile>& tiles);
  const uint8_t* quantized(const float* x, int64_t rows, int64_t k, const std::vector<Tile>& tiles, Buffer<uint8_t>& to);
  void multiply(const Matrix& w, int64_t p0, int64_t p1, const Tile& tile, const uint8_t* acts, const float* x,
                float* out, const uint8_t* next = nullptr, int64_t next_bytes = 0);
  void reserve_open(const std::vector<Matrix>& weights, int64_t panels);
  uint8_t* room(int thread) { return open_.get(0) + thread * open_share_; }
  Matrix opened(const Matrix& w, int64_t p0, int64_t p1, uint8_t* to);
  void stream(const Matrix& w, int64_t p0, int64_t p1, const std::vector<Tile>& tiles, const uint8_t* acts, float* out,
              int thread);
  void linear_panels(const Matrix& w, int64_t p0, int64_t p1, const std::vector<Tile>& tiles, bool few,
                     const uint8_t* acts, const float* x, float* out, int thread);
  template <class Fn>
  void over_panels(int64_t panels, int64_t panel_bytes, int64_t rows, bool few, Fn&& fn);
  int64_t grain(int64_t panels, int64_t panel_bytes, int64_t rows) const;
  void gate_up_few(const Expert& e, const std::vector<Tile>& tiles, const uint8_t* acts, uint8_t* hidden);
  void gate_up(const Expert& e, const std::vector<Tile>& tiles, const uint8_t* acts, uint8_t* hidden);

  const Ops& ops_;
  Pool pool_;
  std::mutex mutex_;
  Buffer<uint8_t> acts_, hidden_, open_;
  int64_t open_share_ = 0;  // bytes of it per thread
  Buffer<float> wide_, gathered_, expert_out_, parts_, scores_, attend_;
};

}  // namespace bise
