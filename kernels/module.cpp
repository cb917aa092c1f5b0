// Python bindings of the CPU kernels. Addresses and sizes only: shapes and dtypes are checked in Python.
#include <nanobind/nanobind.h>

#include "consensus/cpu.h"

namespace nb = nanobind;

namespace {

template <typename T>
void consensus(uintptr_t score, uintptr_t reference, uintptr_t cos_limit, uintptr_t tan_limit, uintptr_t filtered,
               uintptr_t kept, int64_t b, int64_t c, int64_t h, int64_t w, int64_t chunk, int mode) {
  nb::gil_scoped_release release;
  counterlens::consensus_filter<T>(
      reinterpret_cast<const T *>(score), reinterpret_cast<const T *>(reference),
      reinterpret_cast<const T *>(cos_limit), reinterpret_cast<const T *>(tan_limit), reinterpret_cast<T *>(filtered),
      reinterpret_cast<uint8_t *>(kept), b, c, h, w, chunk, static_cast<counterlens::FilterMode>(mode));
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("consensus_f32", &consensus<float>);
  m.def("consensus_f64", &consensus<double>);
}
