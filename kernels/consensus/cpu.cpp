// The consensus filter on the CPU. Follows reference.py line by line; see README.md for the edge cases.
#include "consensus/cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel.h"
#include "vector.h"

namespace counterlens {
namespace {

constexpr int64_t kBlock = 128;  // chunks handled side by side; the innermost loops run over them

// False for NaN: a chunk without an angle is kept.
template <typename T>
inline bool outside(T cosine, T cos_limit) {
  return (cosine < cos_limit) | (cosine <= T(-1));
}

// What the angles of a block need: per vector the powers of two that bring it near 1, and the products at that scale.
template <typename T>
struct Products {
  T s_scale[kBlock], r_scale[kBlock], ss[kBlock], rr[kBlock], sr[kBlock];
};

// The products of p vectors of D components. With so few, everything but the input stays in registers.
template <int D, typename T>
void multiply_few(const T *s, const T *r, int64_t stride, int64_t p, Products<T> &__restrict out) {
  for (int64_t j = 0; j < p; ++j) {
    BitsOf<T> s_largest = 0, r_largest = 0;
    for (int k = 0; k < D; ++k) {
      s_largest = std::max(s_largest, magnitude_bits(s[k * stride + j]));
      r_largest = std::max(r_largest, magnitude_bits(r[k * stride + j]));
    }
    const T s_scale = power_scale<T>(s_largest), r_scale = power_scale<T>(r_largest);
    T ss = 0, rr = 0, sr = 0;
    for (int k = 0; k < D; ++k) {
      const T a = s[k * stride + j] * s_scale, b = r[k * stride + j] * r_scale;
      ss += a * a;
      rr += b * b;
      sr += a * b;
    }
    out.s_scale[j] = s_scale;
    out.r_scale[j] = r_scale;
    out.ss[j] = ss;
    out.rr[j] = rr;
    out.sr[j] = sr;
  }
}

// The same for any number d of components, component by component.
template <typename T>
void multiply_many(const T *s, const T *r, int64_t stride, int64_t d, int64_t p, Products<T> &__restrict out) {
  BitsOf<T> s_largest[kBlock], r_largest[kBlock];
  for (int64_t j = 0; j < p; ++j) s_largest[j] = magnitude_bits(s[j]);
  for (int64_t j = 0; j < p; ++j) r_largest[j] = magnitude_bits(r[j]);
  for (int64_t k = 1; k < d; ++k)
    for (int64_t j = 0; j < p; ++j) {
      s_largest[j] = std::max(s_largest[j], magnitude_bits(s[k * stride + j]));
      r_largest[j] = std::max(r_largest[j], magnitude_bits(r[k * stride + j]));
    }
  for (int64_t j = 0; j < p; ++j) {
    out.s_scale[j] = power_scale<T>(s_largest[j]);
    out.r_scale[j] = power_scale<T>(r_largest[j]);
  }
  for (int64_t k = 0; k < d; ++k)
    for (int64_t j = 0; j < p; ++j) {
      const T a = s[k * stride + j] * out.s_scale[j], b = r[k * stride + j] * out.r_scale[j];
      out.ss[j] = (k ? out.ss[j] : T(0)) + a * a;
      out.rr[j] = (k ? out.rr[j] : T(0)) + b * b;
      out.sr[j] = (k ? out.sr[j] : T(0)) + a * b;
    }
}

// Filter p <= kBlock vectors of d components; component k of vector j lies at v[k * stride + j].
template <typename T>
void filter_block(const T *s, const T *r, int64_t stride, int64_t d, int64_t p, T cos_limit, T tan_limit, bool project,
                  T *__restrict out, uint8_t *__restrict kept) {
  Products<T> products;
  d == 4 ? multiply_few<4>(s, r, stride, p, products) : multiply_many(s, r, stride, d, p, products);
  auto &[s_scale, r_scale, ss, rr, sr] = products;
  T cosine[kBlock];
  for (int64_t j = 0; j < p; ++j) cosine[j] = sr[j] / std::sqrt(ss[j] * rr[j]);
  for (int64_t j = 0; j < p; ++j) kept[j] = uint8_t(!outside(cosine[j], cos_limit));
  if (!project) {
    for (int64_t k = 0; k < d; ++k)
      for (int64_t j = 0; j < p; ++j) {
        const T value = s[k * stride + j];
        out[k * stride + j] = outside(cosine[j], cos_limit) ? T(0) : value;
      }
    return;
  }
  T along[kBlock] = {}, nn[kBlock] = {};
  for (int64_t j = 0; j < p; ++j) ss[j] = std::sqrt(ss[j]);  // norms of the scaled vectors from here on
  for (int64_t j = 0; j < p; ++j) rr[j] = std::sqrt(rr[j]);
  for (int64_t k = 0; k < d; ++k)
    for (int64_t j = 0; j < p; ++j)
      along[j] += r[k * stride + j] * r_scale[j] * (s[k * stride + j] * s_scale[j] / ss[j]);
  for (int64_t k = 0; k < d; ++k)
    for (int64_t j = 0; j < p; ++j) {
      const T n = r[k * stride + j] * r_scale[j] - along[j] * (s[k * stride + j] * s_scale[j] / ss[j]);
      nn[j] += n * n;
    }
  for (int64_t j = 0; j < p; ++j) nn[j] = std::sqrt(nn[j]);
  for (int64_t k = 0; k < d; ++k)
    for (int64_t j = 0; j < p; ++j) {
      const T value = s[k * stride + j], scaled = value * s_scale[j];
      const T n = r[k * stride + j] * r_scale[j] - along[j] * (scaled / ss[j]);
      const T turned = (scaled + ss[j] * tan_limit * n / nn[j]) / s_scale[j];
      // What is left of antiparallel vectors is rounding error, which has no direction.
      const bool turn = outside(cosine[j], cos_limit) & !(nn[j] <= 8 * std::numeric_limits<T>::epsilon() * rr[j]);
      out[k * stride + j] = turn ? turned : value;
    }
}

// The whole sample as one vector of n components, at unit norm; returns whether its angle was within the limit.
template <typename T>
bool filter_whole(const T *score, const T *reference, T cos_limit, T tan_limit, T *__restrict s, int64_t n,
                  std::vector<T> &scratch) {
  scratch.resize(n);
  T *__restrict r = scratch.data();
  const T s_scale = power_scale<T>(largest_magnitude(score, n));
  const T r_scale = power_scale<T>(largest_magnitude(reference, n));
  const T norm = root(scaled_squares(score, n, s_scale)), divisor = norm == 0 ? T(1) : norm;
  for (int64_t i = 0; i < n; ++i) s[i] = score[i] * s_scale / divisor;
  for (int64_t i = 0; i < n; ++i) r[i] = reference[i] * r_scale;
  const T ss = dot(s, s, n), rr = dot(r, r, n), cosine = dot(s, r, n) / std::sqrt(ss * rr);
  if (!outside(cosine, cos_limit)) return true;
  const T s_norm = std::sqrt(ss), along = dot(s, r, n) / s_norm;
  for (int64_t i = 0; i < n; ++i) r[i] -= along * (s[i] / s_norm);
  const T n_norm = std::sqrt(dot(r, r, n));
  if (n_norm <= 8 * std::numeric_limits<T>::epsilon() * std::sqrt(rr)) return false;
  for (int64_t i = 0; i < n; ++i) s[i] += s_norm * tan_limit * r[i] / n_norm;
  return false;
}

// Visit every component of `count` chunks side by side, from row y and column x on: move(address of the first chunk's
// component in the sample, address of it in the columns). Neighbouring chunks lie `chunk` apart in the one, 1 in the other.
template <typename Plane, typename T, typename Move>
void for_components(Plane *sample, T *columns, int64_t c, int64_t h, int64_t w, int64_t chunk, int64_t y, int64_t x,
                    const Move &move) {
  for (int64_t channel = 0; channel < c; ++channel)
    for (int64_t dy = 0; dy < chunk; ++dy)
      for (int64_t dx = 0; dx < chunk; ++dx, columns += kBlock)
        move(sample + (channel * h + y * chunk + dy) * w + x * chunk + dx, columns);
}

}  // namespace

template <typename T>
void filter_sample(const T *score, const T *reference, T cos_limit, T tan_limit, T *filtered, uint8_t *kept, int64_t c,
                   int64_t h, int64_t w, int64_t chunk, FilterMode mode, std::vector<T> &scratch) {
  const int64_t plane = h * w, rows = h / chunk, columns = w / chunk, d = c * chunk * chunk;
  const bool project = mode == FilterMode::project;
  if (mode == FilterMode::off) {
    std::copy(score, score + c * plane, filtered);
    std::fill(kept, kept + rows * columns, uint8_t(1));
  } else if (mode == FilterMode::global) {
    const bool within = filter_whole(score, reference, cos_limit, tan_limit, filtered, c * plane, scratch);
    std::fill(kept, kept + rows * columns, uint8_t(within));
  } else if (chunk == 1) {
    for (int64_t at = 0; at < plane; at += kBlock)
      filter_block(score + at, reference + at, plane, c, std::min(kBlock, plane - at), cos_limit, tan_limit, project,
                   filtered + at, kept + at);
  } else {
    scratch.resize(3 * d * kBlock);
    T *s = scratch.data(), *r = s + d * kBlock, *out = r + d * kBlock;
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t x = 0; x < columns; x += kBlock) {
        const int64_t count = std::min(kBlock, columns - x);
        const auto gather = [=](const T *from, T *to) {
          for (int64_t j = 0; j < count; ++j) to[j] = from[j * chunk];
        };
        const auto scatter = [=](T *to, const T *from) {
          for (int64_t j = 0; j < count; ++j) to[j * chunk] = from[j];
        };
        for_components(score, s, c, h, w, chunk, y, x, gather);
        for_components(reference, r, c, h, w, chunk, y, x, gather);
        filter_block(s, r, kBlock, d, count, cos_limit, tan_limit, project, out, kept + y * columns + x);
        for_components(filtered, out, c, h, w, chunk, y, x, scatter);
      }
  }
}

template <typename T>
void consensus_filter(const T *score, const T *reference, const T *cos_limit, const T *tan_limit, T *filtered,
                      uint8_t *kept, int64_t b, int64_t c, int64_t h, int64_t w, int64_t chunk, FilterMode mode,
                      int threads) {
  const int64_t sample = c * h * w, grid = (h / chunk) * (w / chunk);
  parallel_for(b, b * sample * int64_t(sizeof(T)), threads, [=](int64_t begin, int64_t end) {
    std::vector<T> scratch;
    for (int64_t i = begin; i < end; ++i)
      filter_sample(score + i * sample, reference + i * sample, cos_limit[i], tan_limit[i], filtered + i * sample,
                    kept + i * grid, c, h, w, chunk, mode, scratch);
  });
}

template void filter_sample<float>(const float *, const float *, float, float, float *, uint8_t *, int64_t, int64_t,
                                   int64_t, int64_t, FilterMode, std::vector<float> &);
template void filter_sample<double>(const double *, const double *, double, double, double *, uint8_t *, int64_t,
                                    int64_t, int64_t, int64_t, FilterMode, std::vector<double> &);
template void consensus_filter<float>(const float *, const float *, const float *, const float *, float *, uint8_t *,
                                      int64_t, int64_t, int64_t, int64_t, int64_t, FilterMode, int);
template void consensus_filter<double>(const double *, const double *, const double *, const double *, double *,
                                       uint8_t *, int64_t, int64_t, int64_t, int64_t, int64_t, FilterMode, int);

}  // namespace counterlens
