// Python bindings of the CPU kernels. Addresses and sizes only: shapes and dtypes are checked in Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <string>
#include <vector>

#include "consensus/cpu.h"
#include "curve/cpu.h"
#include "guided_update/cpu.h"
#include "perturb/cpu.h"

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

// Latents and outputs by address. Scalars in the order of GuidedUpdate: an address with a step, or 0 and a number.
template <typename T>
void guided_update(std::array<Address, 5> latents, std::array<Address, 7> columns, std::array<int64_t, 7> steps,
                   std::array<double, 7> numbers, std::array<Address, 3> results, int64_t b, int64_t c, int64_t h,
                   int64_t w, int64_t chunk, int mode, int threads) {
  const auto column = [&](int i) { return counterlens::Column<T>{in<T>(columns[i]), steps[i], T(numbers[i])}; };
  const counterlens::GuidedUpdate<T> p{in<T>(latents[0]),
                                       in<T>(latents[1]),
                                       in<T>(latents[2]),
                                       in<T>(latents[3]),
                                       in<T>(latents[4]),
                                       column(0),
                                       column(1),
                                       column(2),
                                       column(3),
                                       column(4),
                                       column(5),
                                       column(6),
                                       out<T>(results[0]),
                                       out<T>(results[1]),
                                       out<T>(results[2]),
                                       b,
                                       c,
                                       h,
                                       w,
                                       chunk,
                                       static_cast<counterlens::FilterMode>(mode)};
  nb::gil_scoped_release release;
  counterlens::guided_update<T>(p, threads);
}

template <typename T>
void curve_scores(Address logits, Address targets, Address thresholds, Address probability, Address insertion,
                  Address deletion, int64_t n, int64_t k, int64_t classes, int threads) {
  nb::gil_scoped_release release;
  counterlens::curve_scores<T>(in<T>(logits), in<int64_t>(targets), in<T>(thresholds), out<T>(probability),
                               out<T>(insertion), out<T>(deletion), n, k, classes, threads);
}

using Strides = std::array<int64_t, 4>;

// False where the key holds NaN.
bool perturb(Address image, int image_type, Strides image_stride, Address baseline, Strides baseline_stride, Address key,
             int key_type, std::array<int64_t, 3> key_stride, Address limits, Address mean, Address std, Address target,
             int out_type, Strides out_stride, bool above, bool below, int64_t n, int64_t k, int64_t c, int64_t h,
             int64_t w, int threads) {
  using counterlens::Scalar;
  const auto type = static_cast<Scalar>(image_type);
  const counterlens::Perturbation p{{in<void>(image), type, image_stride},
                                    {in<void>(baseline), type, baseline_stride},
                                    {in<void>(key), static_cast<Scalar>(key_type), key_stride},
                                    in<void>(limits),
                                    in<double>(mean),
                                    in<double>(std),
                                    out<void>(target),
                                    static_cast<Scalar>(out_type),
                                    out_stride,
                                    above,
                                    below,
                                    n,
                                    k,
                                    c,
                                    h,
                                    w};
  nb::gil_scoped_release release;
  return counterlens::perturb(p, threads);
}

template <typename T>
counterlens::SoftPerturbation<T> soft(Address image, Strides image_stride, Address baseline, Strides baseline_stride,
                                      Address saliency, Address thresholds, Address mean, Address std,
                                      double temperature, int64_t n, int64_t k, int64_t c, int64_t h, int64_t w) {
  return {in<T>(image),   in<T>(baseline),   image_stride,     baseline_stride, in<T>(saliency), in<T>(thresholds),
          in<double>(mean), in<double>(std), T(temperature), n,               k,               c,
          h,              w};
}

template <typename T>
bool soft_perturb(Address image, Strides image_stride, Address baseline, Strides baseline_stride, Address saliency,
                  Address thresholds, Address mean, Address std, double temperature, int64_t n, int64_t k, int64_t c,
                  int64_t h, int64_t w, Address target, int threads) {
  const auto p = soft<T>(image, image_stride, baseline, baseline_stride, saliency, thresholds, mean, std, temperature,
                         n, k, c, h, w);
  nb::gil_scoped_release release;
  return counterlens::soft_perturb<T>(p, out<T>(target), threads);
}

template <typename T>
void soft_perturb_backward(Address image, Strides image_stride, Address baseline, Strides baseline_stride,
                           Address saliency, Address thresholds, Address mean, Address std, double temperature,
                           int64_t n, int64_t k, int64_t c, int64_t h, int64_t w, Address grad, Address grad_saliency,
                           Address grad_image, int threads) {
  const auto p = soft<T>(image, image_stride, baseline, baseline_stride, saliency, thresholds, mean, std, temperature,
                         n, k, c, h, w);
  nb::gil_scoped_release release;
  counterlens::soft_perturb_backward<T>(p, in<T>(grad), out<T>(grad_saliency), out<T>(grad_image), threads);
}

// The twins of this module that the processor can run, the fastest first.
std::vector<std::string> twins() {
  std::vector<std::string> names;
#if defined(COUNTERLENS_X86_TWINS)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    names.push_back("_cpu_avx512");
  if (__builtin_cpu_supports("avx2")) names.push_back("_cpu_avx2");
#endif
  return names;
}

}  // namespace

NB_MODULE(COUNTERLENS_MODULE, m) {
  m.def("twins", &twins);
  m.def("consensus_f32", &consensus<float>);
  m.def("consensus_f64", &consensus<double>);
  m.def("curve_scores_f32", &curve_scores<float>);
  m.def("curve_scores_f64", &curve_scores<double>);
  m.def("guided_update_f32", &guided_update<float>);
  m.def("guided_update_f64", &guided_update<double>);
  m.def("perturb", &perturb);
  m.def("soft_perturb_f32", &soft_perturb<float>);
  m.def("soft_perturb_f64", &soft_perturb<double>);
  m.def("soft_perturb_backward_f32", &soft_perturb_backward<float>);
  m.def("soft_perturb_backward_f64", &soft_perturb_backward<double>);
}
