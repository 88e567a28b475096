// Python's view of limits.h; called from bind.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "limits.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bise {

using Memory = nb::ndarray<uint8_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void bind_limits(nb::module_& m) {
  const auto check = [](bool fine, const char* what) {
    if (!fine) throw nb::value_error(what);
  };
  m.def("read_rate", [check](Memory data, int threads) {
          check(threads >= 1 && threads <= 1024, "threads must be from 1 to 1024");
          check(data.shape(0) >= (1 << 20), "a read rate needs at least 1 MiB");
          nb::gil_scoped_release release;
          return read_rate(data.data(), int64_t(data.shape(0)), threads);
        }, nb::arg("data").noconvert(), "threads"_a);
  m.def("arithmetic_rate", [check](bool floats, int threads, double seconds) {
          check(threads >= 1 && threads <= 1024, "threads must be from 1 to 1024");
          check(seconds > 0 && seconds <= 60, "seconds must be above 0 and at most 60");
          nb::gil_scoped_release release;
          return arithmetic_rate(floats ? Arithmetic::kFloat : Arithmetic::kInt8, threads, seconds);
        }, "floats"_a, "threads"_a, "seconds"_a);
}

}  // namespace bise
