// The consensus filter on the CPU. Follows reference.py line by line; see README.md for the edge cases.
#include "consensus/cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace counterlens {
namespace {

// Largest magnitude; NaN wins over everything, as in torch.amax.
template <typename T>
T largest_magnitude(const T *v, int64_t n) {
  T largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T a = std::fabs(v[i]);
    if (std::isnan(a)) return a;
    largest = std::max(largest, a);
  }
  return largest;
}

template <typename T>
T dot(const T *a, const T *b, int64_t n) {
  T sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// out = v / largest magnitude (a zero vector stays zero); returns that magnitude.
template <typename T>
T unit_scale(const T *v, T *out, int64_t n) {
  const T largest = largest_magnitude(v, n);
  const T divisor = largest == 0 ? T(1) : largest;
  for (int64_t i = 0; i < n; ++i) out[i] = v[i] / divisor;
  return largest;
}

// Whether the angle between s and r exceeds the limit; both already scaled. False for NaN.
template <typename T>
bool outside(const T *s, const T *r, int64_t n, T cos_limit) {
  const T cosine = dot(s, r, n) / (std::sqrt(dot(s, s, n)) * std::sqrt(dot(r, r, n)));
  return cosine < cos_limit || cosine <= T(-1);
}

// out = largest * (s + |s| tan(limit) n); `original` where r has no part orthogonal to s. s and r already scaled.
template <typename T>
void rotate(const T *original, const T *s, const T *r, T largest, T tan_limit, T *out, int64_t n) {
  const T s_norm = std::sqrt(dot(s, s, n)), r_norm = std::sqrt(dot(r, r, n));
  T along = 0;
  for (int64_t i = 0; i < n; ++i) along += r[i] * (s[i] / s_norm);
  T square = 0;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = r[i] - along * (s[i] / s_norm);
    square += out[i] * out[i];
  }
  const T n_norm = std::sqrt(square);
  if (n_norm <= 8 * std::numeric_limits<T>::epsilon() * r_norm) {
    std::copy(original, original + n, out);
    return;
  }
  for (int64_t i = 0; i < n; ++i) out[i] = (s[i] + s_norm * tan_limit * out[i] / n_norm) * largest;
}

}  // namespace

template <typename T>
void consensus_filter(const T *score, const T *reference, const T *cos_limit, const T *tan_limit, T *filtered,
                      uint8_t *kept, int64_t b, int64_t c, int64_t h, int64_t w, int64_t chunk, FilterMode mode) {
  const int64_t plane = h * w, sample = c * plane, rows = h / chunk, columns = w / chunk;
  if (mode == FilterMode::off) {
    std::copy(score, score + b * sample, filtered);
    std::fill(kept, kept + b * rows * columns, uint8_t(1));
    return;
  }
  const int64_t n = mode == FilterMode::global ? sample : c * chunk * chunk;
  std::vector<T> buffer(5 * n);
  T *s = buffer.data(), *r = s + n, *s_scaled = r + n, *r_scaled = s_scaled + n, *out = r_scaled + n;
  for (int64_t i = 0; i < b; ++i) {
    const T *s_in = score + i * sample, *r_in = reference + i * sample;
    T *target = filtered + i * sample;
    if (mode == FilterMode::global) {
      unit_scale(s_in, s, n);
      const T norm = std::sqrt(dot(s, s, n)), divisor = norm == 0 ? T(1) : norm;
      for (int64_t j = 0; j < n; ++j) s[j] /= divisor;
      const T largest = unit_scale(s, s_scaled, n);
      unit_scale(r_in, r_scaled, n);
      const bool drop = outside(s_scaled, r_scaled, n, cos_limit[i]);
      if (drop)
        rotate(s, s_scaled, r_scaled, largest, tan_limit[i], target, n);
      else
        std::copy(s, s + n, target);
      std::fill(kept + i * rows * columns, kept + (i + 1) * rows * columns, uint8_t(!drop));
      continue;
    }
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t x = 0; x < columns; ++x) {
        const int64_t corner = y * chunk * w + x * chunk;
        int64_t k = 0;
        for (int64_t channel = 0; channel < c; ++channel)
          for (int64_t dy = 0; dy < chunk; ++dy)
            for (int64_t dx = 0; dx < chunk; ++dx, ++k) {
              const int64_t at = channel * plane + corner + dy * w + dx;
              s[k] = s_in[at];
              r[k] = r_in[at];
            }
        const T largest = unit_scale(s, s_scaled, n);
        unit_scale(r, r_scaled, n);
        const bool drop = outside(s_scaled, r_scaled, n, cos_limit[i]);
        const T *result = s;
        if (drop && mode == FilterMode::project) {
          rotate(s, s_scaled, r_scaled, largest, tan_limit[i], out, n);
          result = out;
        } else if (drop) {
          std::fill(out, out + n, T(0));
          result = out;
        }
        k = 0;
        for (int64_t channel = 0; channel < c; ++channel)
          for (int64_t dy = 0; dy < chunk; ++dy)
            for (int64_t dx = 0; dx < chunk; ++dx, ++k) target[channel * plane + corner + dy * w + dx] = result[k];
        kept[(i * rows + y) * columns + x] = uint8_t(!drop);
      }
  }
}

template void consensus_filter<float>(const float *, const float *, const float *, const float *, float *, uint8_t *,
                                      int64_t, int64_t, int64_t, int64_t, int64_t, FilterMode);
template void consensus_filter<double>(const double *, const double *, const double *, const double *, double *,
                                       uint8_t *, int64_t, int64_t, int64_t, int64_t, int64_t, FilterMode);

}  // namespace counterlens
