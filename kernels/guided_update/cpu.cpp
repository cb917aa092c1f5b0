// One guided denoising step on the CPU. Follows reference.py line by line; see README.md for the edge cases.
#include "guided_update/cpu.h"

#include <cmath>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace counterlens {
namespace {

// What R needs of a vector v: the power of two that brings it near 1, and the norm it has there.
template <typename T>
struct Length {
  T scale, norm;
  Length(const T *v, int64_t n) : scale(power_scale(largest_magnitude(v, n))), norm(scaled_norm(v, n, scale)) {}

  // (v * scale) * factor(length) has the norm `length`; a zero vector stays zero.
  T factor(T length) const { return norm == 0 ? T(0) : length / norm; }
};

template <typename T>
void update_sample(const T *z, const T *eps_uncond, const T *eps_cond, const T *grad_class, const T *grad_distance,
                   const T *scalars, int64_t b, T *z_prev, T *z0, T *kept_fraction, int64_t c, int64_t h, int64_t w,
                   int64_t chunk, FilterMode mode, std::vector<T> &work, std::vector<uint8_t> &kept,
                   std::vector<T> &scratch) {
  const int64_t n = c * h * w, grid = (h / chunk) * (w / chunk);
  const T abar = scalars[0], abar_prev = scalars[b], guidance = scalars[2 * b], class_scale = scalars[3 * b],
          distance_scale = scalars[4 * b], cos_limit = scalars[5 * b], tan_limit = scalars[6 * b];
  const T noise_level = std::sqrt(1 - abar), signal = std::sqrt(abar);
  const T noise_level_prev = std::sqrt(1 - abar_prev), signal_prev = std::sqrt(abar_prev);
  work.resize(3 * n);
  kept.resize(grid);
  T *score = work.data(), *direction = score + n, *distance = direction + n;
  for (int64_t i = 0; i < n; ++i) {
    score[i] = -noise_level * grad_class[i];
    direction[i] = eps_cond[i] - eps_uncond[i];
    distance[i] = noise_level * grad_distance[i];
  }
  filter_sample(score, direction, cos_limit, tan_limit, score, kept.data(), c, h, w, chunk, mode, scratch);
  int64_t count = 0;
  for (int64_t i = 0; i < grid; ++i) count += kept[i];
  *kept_fraction = T(count) / T(grid);

  const Length<T> to_class(score, n), to_image(distance, n), like(direction, n);
  const T length = like.norm / like.scale;
  const T class_factor = to_class.factor(length), image_factor = to_image.factor(length);
  for (int64_t i = 0; i < n; ++i) {
    const T towards_class = class_scale * (score[i] * to_class.scale * class_factor);
    const T towards_image = distance_scale * (distance[i] * to_image.scale * image_factor);
    const T eps = eps_uncond[i] + guidance * (towards_class + towards_image);
    const T clean = (z[i] - noise_level * eps) / signal;
    z0[i] = clean;
    z_prev[i] = signal_prev * clean + noise_level_prev * eps;
  }
}

}  // namespace

template <typename T>
void guided_update(const T *z, const T *eps_uncond, const T *eps_cond, const T *grad_class, const T *grad_distance,
                   const T *scalars, T *z_prev, T *z0, T *kept_fraction, int64_t b, int64_t c, int64_t h, int64_t w,
                   int64_t chunk, FilterMode mode, int threads) {
  const int64_t n = c * h * w;
  parallel_for(b, 2 * b * n * int64_t(sizeof(T)), threads, [=](int64_t begin, int64_t end) {
    std::vector<T> work, scratch;
    std::vector<uint8_t> kept;
    for (int64_t i = begin; i < end; ++i)
      update_sample(z + i * n, eps_uncond + i * n, eps_cond + i * n, grad_class + i * n, grad_distance + i * n,
                    scalars + i, b, z_prev + i * n, z0 + i * n, kept_fraction + i, c, h, w, chunk, mode, work, kept,
                    scratch);
  });
}

template void guided_update<float>(const float *, const float *, const float *, const float *, const float *,
                                   const float *, float *, float *, float *, int64_t, int64_t, int64_t, int64_t,
                                   int64_t, FilterMode, int);
template void guided_update<double>(const double *, const double *, const double *, const double *, const double *,
                                    const double *, double *, double *, double *, int64_t, int64_t, int64_t, int64_t,
                                    int64_t, FilterMode, int);

}  // namespace counterlens
