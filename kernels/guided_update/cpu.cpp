// One guided denoising step on the CPU. Follows reference.py line by line; see README.md for the edge cases.
#include "guided_update/cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace counterlens {
namespace {

constexpr int64_t kTile = 256;  // pixels at a time where pixels are filtered one by one: their vectors stay in the first cache

// What R needs of a vector v that comes in parts: the power of two that brings it near 1, and its squares there.
template <typename T>
struct Length {
  T scale = power_scale<T>(0), squares = 0;

  void add(const T *v, int64_t n) {
    const T own = power_scale<T>(largest_magnitude(v, n)), both = std::min(scale, own);
    const T before = both / scale, now = both / own;  // exact
    squares = squares * before * before + scaled_squares(v, n, own) * now * now;
    scale = both;
  }

  // (v * scale) * factor(length) has the norm `length`; a zero vector stays zero.
  T factor(T length) const { return squares == 0 ? T(0) : length / root(squares); }
};

// Memory of one thread, used again for each of its samples.
template <typename T>
struct Work {
  Aligned<T> score, direction;  // of a tile
  Aligned<T> filtered;          // of a sample, tile by tile
  std::vector<uint8_t> kept;
  std::vector<T> scratch;
};

// Pointers that do not overlap: the compiler gives up on a loop that would need more than ten checks of one array against
// another. Loads before stores, see Aligned.
template <typename T>
void make_vectors(const T *__restrict grad_class, const T *__restrict eps_uncond, const T *__restrict eps_cond,
                  T noise_level, T *__restrict score, T *__restrict direction, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T scaled = -noise_level * grad_class[i], difference = eps_cond[i] - eps_uncond[i];
    score[i] = scaled;
    direction[i] = difference;
  }
}

// Each factor with its scale apart: their product could overflow.
template <typename T>
struct Step {
  T noise_level, signal, noise_level_prev, signal_prev, score_scale, score_factor, distance_scale, distance_factor;
};

template <typename T>
void make_step(const T *__restrict z, const T *__restrict eps_uncond, const T *__restrict score,
               const T *__restrict grad_distance, const Step<T> &s, T *__restrict z_prev, T *__restrict z0, int64_t n) {
  const T inverse = 1 / s.signal;
  for (int64_t i = 0; i < n; ++i) {
    const T towards_class = score[i] * s.score_scale * s.score_factor;
    const T towards_image = grad_distance[i] * s.distance_scale * s.distance_factor;
    const T eps = eps_uncond[i] + (towards_class + towards_image);
    const T clean = (z[i] - s.noise_level * eps) * inverse;
    z0[i] = clean;
    z_prev[i] = s.signal_prev * clean + s.noise_level_prev * eps;
  }
}

template <typename T>
void update_sample(const GuidedUpdate<T> &p, int64_t i, int64_t tile, Work<T> &work) {
  const int64_t plane = p.h * p.w, n = p.c * plane, start = i * n, grid = int64_t(work.kept.size());
  const T abar = p.abar[i], abar_prev = p.abar_prev[i], noise_level = std::sqrt(1 - abar);
  Length<T> to_class, to_image, like;
  for (int64_t at = 0; at < plane; at += tile) {
    const int64_t pixels = std::min(tile, plane - at), size = p.c * pixels;
    T *score = work.score.data(), *direction = work.direction.data(), *filtered = work.filtered.data() + p.c * at;
    for (int64_t c = 0; c < p.c; ++c) {
      const int64_t from = start + c * plane + at, to = c * pixels;
      make_vectors(p.grad_class + from, p.eps_uncond + from, p.eps_cond + from, noise_level, score + to, direction + to,
                   pixels);
    }
    const bool whole = pixels == plane;  // else a tile is one long row
    filter_sample(score, direction, p.cos_limit[i], p.tan_limit[i], filtered, work.kept.data() + at, p.c,
                  whole ? p.h : 1, whole ? p.w : pixels, p.chunk, p.mode, work.scratch);
    to_class.add(filtered, size);
    like.add(direction, size);
  }
  to_image.add(p.grad_distance + start, n);
  int64_t count = 0;
  for (int64_t j = 0; j < grid; ++j) count += work.kept[j];
  p.kept_fraction[i] = T(count) / T(grid);

  // R does not depend on a vector's length: the distance gradient needs no noise level, except that none leaves nothing.
  const T length = p.guidance[i] * (root(like.squares) / like.scale);
  const T image_factor = noise_level == 0 ? T(0) : p.distance_scale[i] * to_image.factor(length);
  const Step<T> step{noise_level,    std::sqrt(abar), std::sqrt(1 - abar_prev),
                     std::sqrt(abar_prev), to_class.scale,  p.class_scale[i] * to_class.factor(length),
                     to_image.scale, image_factor};
  for (int64_t at = 0; at < plane; at += tile)
    for (int64_t c = 0; c < p.c; ++c) {
      const int64_t pixels = std::min(tile, plane - at), from = start + c * plane + at;
      make_step(p.z + from, p.eps_uncond + from, work.filtered.data() + p.c * at + c * pixels, p.grad_distance + from,
                step, p.z_prev + from, p.z0 + from, pixels);
    }
}

}  // namespace

template <typename T>
void guided_update(const GuidedUpdate<T> &p, int threads) {
  const int64_t plane = p.h * p.w, n = p.c * plane;
  const bool pixel_by_pixel = p.chunk == 1 && p.mode != FilterMode::global;
  const int64_t tile = pixel_by_pixel ? std::min(kTile, plane) : plane, grid = (p.h / p.chunk) * (p.w / p.chunk);
  parallel_for(p.b, 2 * p.b * n * int64_t(sizeof(T)), threads, [=, &p](int64_t begin, int64_t end) {
    Work<T> work{Aligned<T>(p.c * tile), Aligned<T>(p.c * tile), Aligned<T>(n), std::vector<uint8_t>(grid), {}};
    for (int64_t i = begin; i < end; ++i) update_sample(p, i, tile, work);
  });
}

template void guided_update<float>(const GuidedUpdate<float> &, int);
template void guided_update<double>(const GuidedUpdate<double> &, int);

}  // namespace counterlens
