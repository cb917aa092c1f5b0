// The CPU kernels on buffers of exactly the size they need, for AddressSanitizer and UBSan; built without Python.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "consensus/cpu.h"
#include "curve/cpu.h"
#include "guided_update/cpu.h"
#include "half.h"
#include "perturb/cpu.h"
#include "vector.h"

using namespace counterlens;

namespace {

int failures = 0;

void check(bool holds, const char *what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  ++failures;
}

// On the heap, without the spare capacity of a vector: the next byte belongs to nobody.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> data;
  int64_t size;
  explicit Buffer(int64_t n, T value = T{}) : data(new T[n]), size(n) {
    for (int64_t i = 0; i < n; ++i) data[i] = value;
  }
  T *get() const { return data.get(); }
  T &operator[](int64_t i) const { return data[i]; }
};

template <typename T>
Buffer<T> noise(int64_t n, unsigned seed) {
  Buffer<T> b(n);
  for (int64_t i = 0; i < n; ++i) {
    seed = seed * 1664525u + 1013904223u;
    b[i] = T(seed >> 8) / T(1 << 24) - T(0.5);
  }
  return b;
}

const int64_t kShapes[][4] = {{1, 3, 64, 64}, {5, 4, 33, 31}, {2, 16, 8, 8}, {3, 1, 1, 1}, {9, 4, 96, 96}, {0, 4, 8, 8}};

template <typename T>
void test_filter_and_update() {
  for (const auto &[b, c, h, w] : kShapes)
    for (int mode = 0; mode < 4; ++mode)
      for (int64_t chunk : {1, 2, 3}) {
        if (h % chunk || w % chunk) continue;
        const int64_t n = b * c * h * w, grid = b * (h / chunk) * (w / chunk);
        const auto score = noise<T>(n, 1), reference = noise<T>(n, 2), z = noise<T>(n, 3), uncond = noise<T>(n, 4),
                   distance = noise<T>(n, 5);
        const Buffer<T> cos(b, T(0.5)), tan(b, T(1.7)), filtered(n), z_prev(n), z0(n), fraction(b);
        const Buffer<uint8_t> kept(grid);
        consensus_filter(score.get(), reference.get(), cos.get(), tan.get(), filtered.get(), kept.get(), b, c, h, w,
                         chunk, FilterMode(mode), 3);
        if (mode == 3)
          for (int64_t i = 0; i < n; ++i) check(filtered[i] == score[i], "off is the identity");
        if (mode == 0 && chunk == 1)
          for (int64_t i = 0; i < n; ++i) {
            const int64_t sample = i / (c * h * w), pixel = i % (h * w);
            check(filtered[i] == (kept[sample * h * w + pixel] ? score[i] : T(0)), "zero keeps or removes");
          }
        const Column<T> each{cos.get(), 1, T(0)}, shared{nullptr, 0, T(0.5)};
        guided_update<T>({z.get(), uncond.get(), reference.get(), score.get(), distance.get(), each, shared, each, shared,
                          each, shared, each, z_prev.get(), z0.get(), fraction.get(), b, c, h, w, chunk,
                          FilterMode(mode)}, 3);
        for (int64_t i = 0; i < n; ++i) check(std::isfinite(z_prev[i]) && std::isfinite(z0[i]), "the update is finite");
      }
}

template <typename Image, typename Out, typename Key>
void test_perturb(Scalar image_type, Scalar out_type, Scalar key_type) {
  for (const auto &[n, c, h, w] : kShapes) {
    const int64_t k = 3, plane = h * w;
    const Buffer<Image> image(n * c * plane, Image{}), baseline(1, Image{});
    Buffer<Key> key(n * plane), limits(n * k);
    for (int64_t i = 0; i < key.size; ++i) key[i] = Key(i % 7);
    for (int64_t i = 0; i < limits.size; ++i) limits[i] = Key(2 * (i % k));
    const Buffer<Out> out(n * 2 * k * c * plane);
    const Buffer<double> mean(c, 0.5), std(c, 0.25);
    const Perturbation p{{image.get(), image_type, {c * plane, plane, w, 1}},
                         {baseline.get(), image_type, {0, 0, 0, 0}},
                         {key.get(), key_type, {plane, w, 1}},
                         limits.get(), mean.get(), std.get(), out.get(), out_type,
                         {2 * k * c * plane, k * c * plane, c * plane, plane}, true, true, n, k, c, h, w};
    perturb(p, 3);
  }
}

void test_streaming_at_every_alignment() {
  const int64_t k = 64, h = 251, w = 263, plane = h * w;  // beyond what a cache keeps; odd planes
  const auto image = noise<float>(plane, 1), key = noise<float>(plane, 2);
  const Buffer<float> baseline(1, 9.0f), limits(k, 0.1f), out(2 * k * plane, -1.0f);
  perturb({{image.get(), Scalar::f32, {plane, plane, w, 1}}, {baseline.get(), Scalar::f32, {0, 0, 0, 0}},
           {key.get(), Scalar::f32, {plane, w, 1}}, limits.get(), nullptr, nullptr, out.get(), Scalar::f32,
           {2 * k * plane, k * plane, plane, plane}, true, true, 1, k, 1, h, w}, 3);
  for (int64_t i = 0; i < k * plane; ++i) {
    const bool shown = key[i % plane] >= 0.1f;
    check(out[i] == (shown ? image[i % plane] : 9.0f), "keep");
    check(out[k * plane + i] == (shown ? 9.0f : image[i % plane]), "remove");
  }
}

template <typename T>
void test_soft() {
  for (const auto &[n, c, h, w] : kShapes) {
    const int64_t k = 2, plane = h * w;
    const auto image = noise<T>(n * c * plane, 1), saliency = noise<T>(n * plane, 2), baseline = noise<T>(1, 3),
               grad = noise<T>(n * 2 * k * c * plane, 4);
    const Buffer<T> thresholds(n * k, T(0.1)), out(n * 2 * k * c * plane), to_saliency(n * plane),
        to_image(n * c * plane);
    const SoftPerturbation<T> p{image.get(), baseline.get(), {c * plane, plane, w, 1}, {0, 0, 0, 0}, saliency.get(),
                                thresholds.get(), nullptr, nullptr, T(0.01), n, k, c, h, w};
    soft_perturb(p, out.get(), 3);
    soft_perturb_backward(p, grad.get(), to_saliency.get(), to_image.get(), 3);
    soft_perturb_backward<T>(p, grad.get(), to_saliency.get(), nullptr, 3);
    for (int64_t i = 0; i < out.size; ++i) check(std::isfinite(out[i]), "the soft mixture is finite");
  }
}

template <typename T>
void test_curve() {
  const int64_t n = 3, k = 5, classes = 7;
  const auto logits = noise<T>(n * 2 * k * classes, 1);
  logits[0] = std::numeric_limits<T>::infinity();
  logits[classes] = std::numeric_limits<T>::quiet_NaN();
  Buffer<T> thresholds(n * k), probability(n * 2 * k), insertion(n), deletion(n);
  for (int64_t i = 0; i < n * k; ++i) thresholds[i] = T(i % k) / T(k);
  const Buffer<int64_t> targets(n, 6);
  curve_scores(logits.get(), targets.get(), thresholds.get(), probability.get(), insertion.get(), deletion.get(), n, k,
               classes, 3);
  check(probability[0] == 0, "an infinite logit takes all");
  check(std::isnan(probability[1]) && std::isnan(insertion[0]) && !std::isnan(deletion[0]), "NaN stays in its curve");
}

template <typename T>
void test_exponential(T lowest, T highest) {
  const T inf = std::numeric_limits<T>::infinity(), epsilon = std::numeric_limits<T>::epsilon();
  for (int i = 0; i <= 100000; ++i) {
    const T x = lowest + (highest - lowest) * T(i) / T(100000), expected = std::exp(x);
    const T unit = std::max(expected * epsilon, std::numeric_limits<T>::denorm_min());
    check(std::fabs(exponential(x) - expected) <= 3 * unit, "exponential agrees with std::exp, subnormal results too");
  }
  check(exponential(T(0)) == 1 && exponential(-inf) == 0 && exponential(inf) == inf, "exponential at 0 and at infinity");
  check(exponential(2 * lowest) == 0 && exponential(2 * highest) == inf, "exponential out of range");
  check(std::isnan(exponential(std::numeric_limits<T>::quiet_NaN())), "exponential of NaN");
}

void test_half() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    Half half;
    narrow(widen(Half{uint16_t(bits)}), half);
    BFloat bfloat;
    narrow(widen(BFloat{uint16_t(bits)}), bfloat);
    check(half.bits == bits || (bits & 0x7fff) > 0x7c00, "half round trip");
    check(bfloat.bits == bits || (bits & 0x7fff) > 0x7f80, "bfloat16 round trip");
  }
}

}  // namespace

int main() {
  test_filter_and_update<float>();
  test_filter_and_update<double>();
  test_perturb<float, float, float>(Scalar::f32, Scalar::f32, Scalar::f32);
  test_perturb<double, Half, double>(Scalar::f64, Scalar::f16, Scalar::f64);
  test_perturb<Half, BFloat, int32_t>(Scalar::f16, Scalar::bf16, Scalar::i32);
  test_perturb<BFloat, double, float>(Scalar::bf16, Scalar::f64, Scalar::f32);
  test_streaming_at_every_alignment();
  test_soft<float>();
  test_soft<double>();
  test_curve<float>();
  test_curve<double>();
  test_exponential<float>(-104, 88);
  test_exponential<double>(-745, 709);
  test_half();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
