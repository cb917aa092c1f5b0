#pragma once
#include <array>
#include <cstdint>

namespace counterlens {

enum class Scalar : int { f16 = 0, bf16 = 1, f32 = 2, f64 = 3, i32 = 4 };

// A tensor of another library: where it starts, what it holds, strides in elements.
template <int dimensions>
struct View {
  const void *data;
  Scalar type;
  std::array<int64_t, dimensions> stride;
};

struct Perturbation {
  View<4> image, baseline;     // [n, c, h, w], floating
  View<3> key;                 // [n, h, w], f32, f64 or i32
  const void *limits;          // [n, k] of the key's type: key >= limit shows the image
  const double *mean, *std;    // [c], or null
  void *out;                   // [n, sides, k, c, h, w]; every [h, w] contiguous
  Scalar out_type;
  std::array<int64_t, 4> out_stride;  // n, side, k, c
  bool above, below;           // which sides to write: the image where shown, the image where not
  int64_t n, k, c, h, w;
};

// False, and nothing written, where the key holds NaN.
bool perturb(const Perturbation &p, int threads);

// image, baseline: [n, c, h, w] with strides; saliency [n, h, w], thresholds [n, k], mean, std [c] (or null), all of T
// and contiguous; out, grad: [n, 2, k, c, h, w], contiguous.
template <typename T>
struct SoftPerturbation {
  const T *image, *baseline;
  std::array<int64_t, 4> image_stride, baseline_stride;
  const T *saliency, *thresholds;
  const double *mean, *std;
  T temperature;
  int64_t n, k, c, h, w;
};

// False, and nothing written, where the saliency holds NaN.
template <typename T>
bool soft_perturb(const SoftPerturbation<T> &p, T *out, int threads);

// grad_saliency: [n, h, w]; grad_image: [n, c, h, w], or null where it is not asked for.
template <typename T>
void soft_perturb_backward(const SoftPerturbation<T> &p, const T *grad, T *grad_saliency, T *grad_image, int threads);

}  // namespace counterlens
