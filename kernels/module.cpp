// Python bindings of the CPU kernels. Addresses and sizes only: shapes and dtypes are checked in Python.
#include <nanobind/nanobind.h>

#include "consensus/cpu.h"
#include "guided_update/cpu.h"

namespace nb = nanobind;

namespace {

using Address = uintptr_t;

template <typename T>
const T *in(Address address) {
  return reinterpret_cast<const T *>(address);
}

template <typename T>
T *out(Address address) {
  return reinterpret_cast<T *>(address);
}

template <typename T>
void consensus(Address score, Address reference, Address cos_limit, Address tan_limit, Address filtered, Address kept,
               int64_t b, int64_t c, int64_t h, int64_t w, int64_t chunk, int mode, int threads) {
  nb::gil_scoped_release release;
  counterlens::consensus_filter<T>(in<T>(score), in<T>(reference), in<T>(cos_limit), in<T>(tan_limit),
                                   out<T>(filtered), out<uint8_t>(kept), b, c, h, w, chunk,
                                   static_cast<counterlens::FilterMode>(mode), threads);
}

template <typename T>
void guided_update(Address z, Address eps_uncond, Address eps_cond, Address grad_class, Address grad_distance,
                   Address scalars, Address z_prev, Address z0, Address kept_fraction, int64_t b, int64_t c, int64_t h,
                   int64_t w, int64_t chunk, int mode, int threads) {
  nb::gil_scoped_release release;
  counterlens::guided_update<T>(in<T>(z), in<T>(eps_uncond), in<T>(eps_cond), in<T>(grad_class), in<T>(grad_distance),
                                in<T>(scalars), out<T>(z_prev), out<T>(z0), out<T>(kept_fraction), b, c, h, w, chunk,
                                static_cast<counterlens::FilterMode>(mode), threads);
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("consensus_f32", &consensus<float>);
  m.def("consensus_f64", &consensus<double>);
  m.def("guided_update_f32", &guided_update<float>);
  m.def("guided_update_f64", &guided_update<double>);
}
