// The only file that knows Python: argument checks, GIL, ownership.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>

#include <functional>
#include <optional>
#include <string>

#include "context.h"
#include "pack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bise {

void bind_limits(nb::module_& m);

namespace {

template <class T, size_t N>
using Array = nb::ndarray<T, nb::numpy, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Floats1 = Array<const float, 1>;
using Floats2 = Array<const float, 2>;
using Out2 = Array<float, 2>;
using Ints1 = Array<const int32_t, 1>;
using Ints2 = Array<const int32_t, 2>;
using Bytes = Array<uint8_t, 1>;

void require(bool fine, const char* what) {
  if (!fine) throw nb::value_error(what);
}

// A packed matrix; keeps the array that holds its bytes alive.
struct Packed {
  Matrix matrix;
  nb::object owner;
};

Packed make_packed(int format, int64_t n, int64_t k, Bytes bytes) {
  require(format >= 0 && format < kFormats, "unknown packed format");
  require(n > 0 && k > 0, "a matrix needs rows and columns");
  const bool any_width = kFormatInfo[format].header_bytes == 0 || format == kZ4;
  require(any_width || k % 256 == 0, "this format needs columns in multiples of 256");
  require(int64_t(bytes.shape(0)) >= packed_bytes(format, n, k), "too few bytes for this matrix");
  return {{format, n, k, bytes.data()}, nb::cast(bytes)};
}

// Anonymous memory in 2 MiB pages where the system grants them: decode is 16 % faster with them.
Bytes arena(int64_t size) {
  require(size > 0, "an arena needs a positive size");
  constexpr int64_t kHuge = 2 << 20;
  const size_t bytes = size_t(round_up(size, kHuge) + kHuge);
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  auto* start = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<int64_t>(base), kHuge));
#ifdef MADV_HUGEPAGE
  madvise(start, size_t(round_up(size, kHuge)), MADV_HUGEPAGE);
#endif
  struct Region {
    void* base;
    size_t bytes;
  };
  nb::capsule owner(new Region{base, bytes}, [](void* p) noexcept {
    auto* region = static_cast<Region*>(p);
    munmap(region->base, region->bytes);
    delete region;
  });
  return Bytes(start, {size_t(size)}, owner);
}

class Experts {
 public:
  explicit Experts(const nb::list& items) {
    for (nb::handle item : items) {
      nb::tuple three = nb::cast<nb::tuple>(item);
      require(three.size() == 3, "an expert is (gate, up, down)");
      Expert e;
      Matrix* parts[3] = {&e.gate, &e.up, &e.down};
      for (size_t i = 0; i < 3; ++i) {
        *parts[i] = nb::cast<const Packed&>(three[i]).matrix;
        owners.append(three[i]);
      }
      require(e.gate.n == e.up.n && e.gate.k == e.up.k && e.down.k == e.gate.n, "gate, up and down do not fit");
      all.push_back(e);
    }
    require(!all.empty(), "no experts");
    for (const Expert& e : all)
      require(e.gate.k == all[0].gate.k && e.down.n == all[0].down.n, "experts differ in shape");
  }
  std::vector<Expert> all;
  nb::list owners;
};

// K and V pages of one layer over four numpy arrays (scales empty unless integers).
struct Pages {
  PageView view;
  int64_t slots;
  nb::object owners[4];
};

Pages make_pages(int kind, int kv_heads, int head_dim, Bytes k, Bytes v, Array<float, 1> k_scale,
                 Array<float, 1> v_scale) {
  require(kind >= 0 && kind <= 4, "unknown KV format");
  require(kv_heads > 0 && head_dim > 0 && head_dim % 2 == 0, "bad head shape");
  const int64_t width = kind == 0 ? 4 : kind == 3 ? 1 : 2;
  const int64_t slots = int64_t(k.shape(0)) / (width * kv_heads * head_dim);
  require(slots % kKvBlock == 0 && k.shape(0) == v.shape(0), "pages must hold whole blocks");
  require(int64_t(k.shape(0)) == slots * width * kv_heads * head_dim, "pages must hold whole blocks");
  const int64_t scales = kind >= 3 ? slots * kv_heads : 0;
  require(int64_t(k_scale.shape(0)) == scales && int64_t(v_scale.shape(0)) == scales, "wrong number of scales");
  Pages p;
  p.view = {k.data(), v.data(), k_scale.data(), v_scale.data(), kv_heads, head_dim, kind};
  p.slots = slots;
  p.owners[0] = nb::cast(k);
  p.owners[1] = nb::cast(v);
  p.owners[2] = nb::cast(k_scale);
  p.owners[3] = nb::cast(v_scale);
  return p;
}

struct Locked {
  explicit Locked(Context& c) : lock(c.mutex()) {}
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock;
};

// Operations that were told once, to be done again over the same arrays without Python between them. It holds the
// arrays; weights, banks and pages must live as long.
struct Program {
  std::vector<std::function<void(Context&)>> steps;

  void run(Context& c) const {
    Locked locked(c);
    for (const auto& step : steps) step(c);
  }
};

// Every operation below goes to one of two: a context does it at once, a program keeps it.
template <class Fn>
void give(Context& c, const Fn& fn) {
  Locked locked(c);
  fn(c);
}
template <class Fn>
void give(Program& p, Fn&& fn) {
  p.steps.emplace_back(std::forward<Fn>(fn));
}

template <class To>
void linear(To& to, Floats2 x, const nb::list& weights, const nb::list& outs) {
  std::vector<Matrix> matrices;
  std::vector<Out2> held;
  std::vector<float*> pointers;
  require(weights.size() == outs.size() && weights.size() > 0, "one output per weight");
  const size_t rows = x.shape(0);
  for (size_t i = 0; i < weights.size(); ++i) {
    matrices.push_back(nb::cast<const Packed&>(weights[i]).matrix);
    Out2 out = nb::cast<Out2>(outs[i], false);
    require(int64_t(x.shape(1)) == matrices.back().k, "x and weight differ in columns");
    require(out.shape(0) == rows && int64_t(out.shape(1)) == matrices.back().n, "output has the wrong shape");
    pointers.push_back(out.data());
    held.push_back(std::move(out));
  }
  if (rows == 0) return;
  give(to, [=](Context& c) {
    (void)held;
    c.linear(x.data(), int64_t(rows), matrices, pointers);
  });
}

void check_rows(const Floats2& x, const Out2& out, int64_t in, int64_t width) {
  require(int64_t(x.shape(1)) == in, "x and weight differ in columns");
  require(out.shape(0) == x.shape(0) && int64_t(out.shape(1)) == width, "output has the wrong shape");
}

template <class To>
void mlp(To& to, Floats2 x, const Experts& e, Out2 out) {
  check_rows(x, out, e.all[0].gate.k, e.all[0].down.n);
  if (x.shape(0) == 0) return;
  const Expert& only = e.all[0];
  give(to, [=](Context& c) { c.mlp(x.data(), int64_t(x.shape(0)), only, out.data()); });
}

template <class To>
void moe(To& to, Floats2 x, const Packed& router, const Experts& e, int top_k, Out2 out) {
  check_rows(x, out, e.all[0].gate.k, e.all[0].down.n);
  require(router.matrix.n == int64_t(e.all.size()) && router.matrix.k == e.all[0].gate.k, "router does not fit");
  require(top_k >= 1 && top_k <= router.matrix.n && top_k <= 64, "bad top_k");
  if (x.shape(0) == 0) return;
  const Matrix& scores = router.matrix;
  const std::vector<Expert>& all = e.all;
  give(to, [=](Context& c) { c.moe(x.data(), int64_t(x.shape(0)), scores, all, top_k, out.data()); });
}

template <class To>
void norm(To& to, Out2 x, std::optional<Floats2> add, Floats1 weight, float eps, Out2 y) {
  const size_t rows = x.shape(0), k = x.shape(1);
  require(weight.shape(0) == k && y.shape(0) == rows && y.shape(1) == k, "norm shapes differ");
  if (add) require(add->shape(0) == rows && add->shape(1) == k, "norm shapes differ");
  if (rows == 0) return;
  give(to, [=](Context& c) {
    const float* extra = add ? add->data() : nullptr;
    c.norm(x.data(), extra, weight.data(), eps, int64_t(rows), int64_t(k), y.data());
  });
}

// The parts of `attend` that change from step to step.
void check_places(const Attention& a, int64_t rows, const Pages& pages) {
  require(a.q_start[0] == 0 && a.q_start[a.sequences] == rows, "q_start must run from 0 to the number of rows");
  const int64_t blocks = pages.slots / kKvBlock;
  for (int64_t i = 0; i < rows; ++i) require(a.slots[i] >= 0 && a.slots[i] < pages.slots, "slot out of range");
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t count = a.q_start[s + 1] - a.q_start[s], first = a.q_pos[s];
    require(count >= 0 && first >= 0, "bad sequence bounds");
    if (count == 0) continue;
    const int64_t low = std::max<int64_t>(0, first - a.window + 1), high = first + count - 1;
    require(high / kKvBlock < a.table_width, "block table too short");
    for (int64_t b = low / kKvBlock; b <= high / kKvBlock; ++b) {
      const int32_t block = a.table[s * a.table_width + b];
      require(block >= 0 && block < blocks, "block table entry out of range");
    }
  }
}

template <class To>
void attend(To& to, Out2 q, Out2 k, Floats2 v, Floats2 cos, Floats2 sin, const Pages& pages, Ints1 q_start,
            Ints1 q_pos, Ints2 table, Ints1 slots, int64_t window, Out2 out) {
  const int64_t rows = int64_t(q.shape(0)), d = pages.view.head_dim, sequences = int64_t(q_pos.shape(0));
  require(q.shape(1) % size_t(d * pages.view.kv_heads) == 0, "query heads must be a multiple of kv heads");
  require(int64_t(k.shape(0)) == rows && int64_t(k.shape(1)) == d * pages.view.kv_heads, "k has the wrong shape");
  require(v.shape(0) == k.shape(0) && v.shape(1) == k.shape(1), "v has the wrong shape");
  require(int64_t(cos.shape(0)) == rows && int64_t(cos.shape(1)) == d / 2, "cos has the wrong shape");
  require(int64_t(sin.shape(0)) == rows && int64_t(sin.shape(1)) == d / 2, "sin has the wrong shape");
  require(out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1), "output has the wrong shape");
  require(int64_t(q_start.shape(0)) == sequences + 1 && int64_t(table.shape(0)) == sequences, "sequences differ");
  require(int64_t(slots.shape(0)) == rows, "one slot per row");
  require(window >= 1, "a window is at least one token");
  if (rows == 0) return;
  give(to, [=, place = &pages](Context& c) {
    const Attention a = {q_start.data(), q_pos.data(), table.data(), slots.data(), sequences,
                         int64_t(table.shape(1)), int(q.shape(1)) / int(d), window};
    check_places(a, rows, *place);
    c.attend(q.data(), k.data(), v.data(), cos.data(), sin.data(), rows, a, place->view, out.data());
  });
}

template <class To>
void embed(To& to, const Packed& table, Ints1 ids, Out2 out) {
  require(out.shape(0) == ids.shape(0) && int64_t(out.shape(1)) == table.matrix.k, "output has the wrong shape");
  give(to, [=, rows = table.matrix](Context& c) {
    for (size_t i = 0; i < ids.shape(0); ++i)
      require(ids.data()[i] >= 0 && ids.data()[i] < rows.n, "token id out of range");
    c.embed(rows, ids.data(), int64_t(ids.shape(0)), out.data());
  });
}

// The operations as Python sees them, of a context or of a program.
template <class To>
void bind_operations(nb::class_<To>& to) {
  to.def("linear", &linear<To>, nb::arg("x").noconvert(), "weights"_a, "outs"_a)
      .def("mlp", &mlp<To>, nb::arg("x").noconvert(), "expert"_a, nb::arg("out").noconvert())
      .def("moe", &moe<To>, nb::arg("x").noconvert(), "router"_a, "experts"_a, "top_k"_a, nb::arg("out").noconvert())
      .def("norm", &norm<To>, nb::arg("x").noconvert(), nb::arg("add").noconvert().none(),
           nb::arg("weight").noconvert(), "eps"_a, nb::arg("y").noconvert())
      .def("attend", &attend<To>, nb::arg("q").noconvert(), nb::arg("k").noconvert(), nb::arg("v").noconvert(),
           nb::arg("cos").noconvert(), nb::arg("sin").noconvert(), "pages"_a, nb::arg("q_start").noconvert(),
           nb::arg("q_pos").noconvert(), nb::arg("table").noconvert(), nb::arg("slots").noconvert(), "window"_a,
           nb::arg("out").noconvert())
      .def("embed", &embed<To>, "table"_a, nb::arg("ids").noconvert(), nb::arg("out").noconvert());
}

// Chooses tokens: draws [R, 5], what is known of each [2, R], the tokens and how sure they are.
void sample(Context& c, Floats2 logits, Array<const double, 2> draws, Array<int32_t, 2> out) {
  const size_t rows = logits.shape(0);
  require(logits.shape(1) > 0 && draws.shape(0) == rows && draws.shape(1) == 5, "five numbers for each row of logits");
  require(out.shape(0) == 2 && out.shape(1) == rows, "output has the wrong shape");
  std::vector<Draw> wanted(rows);
  for (size_t r = 0; r < rows; ++r) {
    const double* d = draws.data() + 5 * r;
    wanted[r] = {d[0], d[1], d[2], d[3], d[4]};
    require(d[0] >= 0 && d[2] > 0 && d[3] >= 0 && d[4] >= 0 && d[4] < 1, "bad temperature, top_p, min_p or number");
  }
  Locked locked(c);
  c.sample(logits.data(), int64_t(rows), int64_t(logits.shape(1)), wanted.data(), out.data(), out.data() + rows);
}

bool pack_block_rows(Context& c, int ggml, Array<const uint8_t, 2> raw, int64_t k, Bytes out) {
  const int format = format_of(ggml);
  require(format >= 0, "unknown block type");
  require(row_bytes(ggml, k) == int64_t(raw.shape(1)), "rows have the wrong number of bytes");
  require(int64_t(out.shape(0)) >= packed_bytes(format, int64_t(raw.shape(0)), k), "output too small");
  Locked locked(c);
  return c.pack_blocks(ggml, raw.data(), int64_t(raw.shape(0)), k, out.data());
}

bool pack_float_rows(Context& c, int format, Floats2 x, Bytes out, std::optional<Floats1> importance) {
  require((format >= kF32 && format <= kQ4) || format == kN4 || format == kZ4,
          "floats pack to f32, f16, bf16, q8, q4, n4 or z4");
  const int64_t n = int64_t(x.shape(0)), k = int64_t(x.shape(1));
  require(int64_t(out.shape(0)) >= packed_bytes(format, n, k), "output too small");
  if (importance) {
    require(int64_t(importance->shape(0)) == k, "one importance per column");
    for (int64_t i = 0; i < k; ++i)
      require(importance->data()[i] > 0 && importance->data()[i] <= 1e15f, "importance must be positive");
  }
  const float* weights = importance ? importance->data() : nullptr;
  Locked locked(c);
  return c.pack_floats(format, x.data(), n, k, out.data(), weights);
}

void unpack(Context& c, const Packed& m, Out2 out) {
  require(int64_t(out.shape(0)) == m.matrix.n && int64_t(out.shape(1)) == m.matrix.k, "output has the wrong shape");
  Locked locked(c);
  c.unpack(m.matrix, out.data());
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of bise; see bise.kernels.cpu for the contracts.";
  // A program may end without closing its engine, whose thread then holds what it computes with: no leak to tell of.
  nb::set_leak_warnings(false);
  m.attr("formats") = [] {
    nb::list names;
    for (int format = 0; format < kFormats; ++format) names.append(kFormatInfo[format].name);
    return names;
  }();
  bind_limits(m);
  m.def("detected_isas", [] { return std::string(detected_isas()); });
  m.def("packed_bytes", &packed_bytes, "format"_a, "n"_a, "k"_a);
  m.def("format_of", &format_of, "ggml"_a);
  m.def("arena", &arena, "size"_a);

  nb::class_<Packed>(m, "Packed")
      .def("__init__", [](Packed* self, int format, int64_t n, int64_t k, Bytes bytes) {
             new (self) Packed(make_packed(format, n, k, bytes));
           }, "format"_a, "n"_a, "k"_a, nb::arg("data").noconvert())
      .def_prop_ro("format", [](const Packed& p) { return p.matrix.format; })
      .def_prop_ro("shape", [](const Packed& p) { return std::pair(p.matrix.n, p.matrix.k); })
      .def_prop_ro("size_bytes", [](const Packed& p) { return packed_bytes(p.matrix.format, p.matrix.n, p.matrix.k); });
  nb::class_<Experts>(m, "Experts").def(nb::init<const nb::list&>(), "experts"_a);
  nb::class_<Pages>(m, "Pages")
      .def("__init__", [](Pages* self, int kind, int kv_heads, int head_dim, Bytes k, Bytes v, Array<float, 1> ks,
                          Array<float, 1> vs) { new (self) Pages(make_pages(kind, kv_heads, head_dim, k, v, ks, vs)); },
           "kind"_a, "kv_heads"_a, "head_dim"_a, nb::arg("k").noconvert(), nb::arg("v").noconvert(),
           nb::arg("k_scale").noconvert(), nb::arg("v_scale").noconvert())
      .def_prop_ro("head_dim", [](const Pages& p) { return p.view.head_dim; });
  nb::class_<Context> context(m, "Context");
  bind_operations(context);
  context.def("__init__", [](Context* self, int threads) {
             require(threads >= 1 && threads <= 1024, "threads must be from 1 to 1024");
             new (self) Context(threads);
           }, "threads"_a)
      .def_prop_ro("isa", [](const Context& c) { return std::string(c.isa()); })
      .def_prop_ro("threads", &Context::threads)
      .def("sample", &sample, nb::arg("logits").noconvert(), nb::arg("draws").noconvert(), nb::arg("out").noconvert())
      .def("pack_blocks", &pack_block_rows, "ggml"_a, nb::arg("raw").noconvert(), "k"_a, nb::arg("out").noconvert())
      .def("pack_floats", &pack_float_rows, "format"_a, nb::arg("x").noconvert(), nb::arg("out").noconvert(),
           nb::arg("importance").noconvert().none() = nb::none())
      .def("unpack", &unpack, "matrix"_a, nb::arg("out").noconvert());
  nb::class_<Program> program(m, "Program");
  bind_operations(program);
  program.def(nb::init<>()).def("run", &Program::run, "context"_a);
}

}  // namespace bise
