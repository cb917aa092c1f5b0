// Perturbed images on the CPU. Follows reference.py; see README.md for bytes moved and edge cases.
#include "perturb/cpu.h"

#include <algorithm>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "half.h"
#include "parallel.h"
#include "vector.h"

namespace counterlens {
namespace {

constexpr int64_t kTileBytes = int64_t(16) << 10;   // what a tile's inputs may take: they stay in the first-level cache
constexpr int64_t kStreamBytes = int64_t(16) << 20;  // output beyond this will not be read from a cache: write past it

// Visit n pixels from `first` on, a run of neighbours at a time: visit(offset, run length, pixels before it).
template <typename Visit>
void for_runs(int64_t stride_h, int64_t stride_w, int64_t w, int64_t first, int64_t n, const Visit &visit) {
  if (stride_h == w * stride_w) return visit(first * stride_w, n, int64_t(0));
  for (int64_t done = 0; done < n;) {
    const int64_t y = (first + done) / w, x = (first + done) % w, run = std::min(w - x, n - done);
    visit(y * stride_h + x * stride_w, run, done);
    done += run;
  }
}

template <typename T>
bool any_nan(const T *v, int64_t stride, int64_t n) {
  uint32_t found = 0;
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) found |= v[i] != v[i];
  else
    for (int64_t i = 0; i < n; ++i) found |= v[i * stride] != v[i * stride];
  return found != 0;
}

// Read n values `stride` apart, normalise and round them: the arithmetic of one input plane, done once.
template <typename In, typename Out>
void load_run(const void *data, int64_t offset, int64_t stride, int64_t n, const double *mean, const double *std,
              void *to, int64_t at) {
  using Compute = decltype(widen(In{}));
  const In *in = static_cast<const In *>(data) + offset;
  Out *out = static_cast<Out *>(to) + at;
  if (mean == nullptr) {
    for (int64_t i = 0; i < n; ++i) narrow(widen(in[i * stride]), out[i]);
    return;
  }
  const Compute shift = Compute(*mean), scale = Compute(*std);
  for (int64_t i = 0; i < n; ++i) narrow((widen(in[i * stride]) - shift) / scale, out[i]);
}

using LoadRun = void (*)(const void *, int64_t, int64_t, int64_t, const double *, const double *, void *, int64_t);

template <typename In>
LoadRun loader_to(Scalar out) {
  switch (out) {
    case Scalar::f16: return load_run<In, Half>;
    case Scalar::bf16: return load_run<In, BFloat>;
    case Scalar::f32: return load_run<In, float>;
    default: return load_run<In, double>;
  }
}

LoadRun loader(Scalar in, Scalar out) {
  switch (in) {
    case Scalar::f16: return loader_to<Half>(out);
    case Scalar::bf16: return loader_to<BFloat>(out);
    case Scalar::f32: return loader_to<float>(out);
    default: return loader_to<double>(out);
  }
}

// out = base ^ (difference & mask), byte by byte: base, or the other image where the mask is set.
void blend(const uint8_t *base, const uint8_t *difference, const uint8_t *mask, uint8_t *__restrict out,
           int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) out[i] = base[i] ^ (difference[i] & mask[i]);
}

#if defined(__AVX512F__)
using Vector = __m512i;
inline Vector load(const uint8_t *at) { return _mm512_loadu_si512(at); }
inline void stream(uint8_t *to, Vector v) { _mm512_stream_si512(reinterpret_cast<Vector *>(to), v); }
inline Vector mixed(Vector base, Vector difference, Vector mask) {
  return _mm512_xor_si512(base, _mm512_and_si512(difference, mask));
}
#elif defined(__AVX2__)
using Vector = __m256i;
inline Vector load(const uint8_t *at) { return _mm256_loadu_si256(reinterpret_cast<const Vector *>(at)); }
inline void stream(uint8_t *to, Vector v) { _mm256_stream_si256(reinterpret_cast<Vector *>(to), v); }
inline Vector mixed(Vector base, Vector difference, Vector mask) {
  return _mm256_xor_si256(base, _mm256_and_si256(difference, mask));
}
#elif defined(__SSE2__)
using Vector = __m128i;
inline Vector load(const uint8_t *at) { return _mm_loadu_si128(reinterpret_cast<const Vector *>(at)); }
inline void stream(uint8_t *to, Vector v) { _mm_stream_si128(reinterpret_cast<Vector *>(to), v); }
inline Vector mixed(Vector base, Vector difference, Vector mask) {
  return _mm_xor_si128(base, _mm_and_si128(difference, mask));
}
#endif

// The same past the caches, a whole line at a time: a plain store would first read the line that it overwrites.
void blend_streaming(const uint8_t *base, const uint8_t *difference, const uint8_t *mask, uint8_t *out,
                     int64_t bytes) {
#if defined(__SSE2__)
  constexpr int64_t line = 64;
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(out) % line);
  blend(base, difference, mask, out, head);
  int64_t i = head;
  for (; i + line <= bytes; i += line)
    for (int64_t j = i; j < i + line; j += int64_t(sizeof(Vector)))
      stream(out + j, mixed(load(base + j), load(difference + j), load(mask + j)));
  blend(base + i, difference + i, mask + i, out + i, bytes - i);
#else
  blend(base, difference, mask, out, bytes);
#endif
}

void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Word: an unsigned integer of the output's size; only bits are moved once the inputs are loaded.
template <typename Key, typename Word>
void perturb_tiles(const Perturbation &p, int64_t tile, int64_t tiles, bool streaming, int64_t begin, int64_t end) {
  const int64_t plane = p.h * p.w;
  const LoadRun load_image = loader(p.image.type, p.out_type), load_baseline = loader(p.baseline.type, p.out_type);
  std::vector<Key> key(tile);
  std::vector<Word> words((3 * p.c + 1) * tile);
  Word *image = words.data(), *baseline = image + p.c * tile, *difference = baseline + p.c * tile;
  Word *mask = difference + p.c * tile;
  const auto bytes = [](const Word *w) { return reinterpret_cast<const uint8_t *>(w); };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / tiles, first = item % tiles * tile, n = std::min(tile, plane - first);
    const Key *keys = static_cast<const Key *>(p.key.data) + sample * p.key.stride[0];
    for_runs(p.key.stride[1], p.key.stride[2], p.w, first, n, [&](int64_t offset, int64_t run, int64_t at) {
      for (int64_t i = 0; i < run; ++i) key[at + i] = keys[offset + i * p.key.stride[2]];
    });
    for (int64_t c = 0; c < p.c; ++c) {
      const double *mean = p.mean ? p.mean + c : nullptr, *std = p.std ? p.std + c : nullptr;
      const auto load = [&](const View<4> &v, LoadRun run_loader, Word *to) {
        const int64_t start = sample * v.stride[0] + c * v.stride[1];
        for_runs(v.stride[2], v.stride[3], p.w, first, n, [&](int64_t offset, int64_t run, int64_t at) {
          run_loader(v.data, start + offset, v.stride[3], run, mean, std, to, at);
        });
      };
      load(p.image, load_image, image + c * tile);
      load(p.baseline, load_baseline, baseline + c * tile);
      for (int64_t i = 0; i < n; ++i) difference[c * tile + i] = image[c * tile + i] ^ baseline[c * tile + i];
    }
    for (int64_t k = 0; k < p.k; ++k) {
      const Key limit = static_cast<const Key *>(p.limits)[sample * p.k + k];
      for (int64_t i = 0; i < n; ++i) mask[i] = key[i] >= limit ? Word(-1) : Word(0);
      for (int64_t c = 0; c < p.c; ++c) {
        Word *out = static_cast<Word *>(p.out) + sample * p.out_stride[0] + k * p.out_stride[2] +
                    c * p.out_stride[3] + first;
        const auto write = [&](const Word *base, Word *to) {
          (streaming ? blend_streaming : blend)(bytes(base + c * tile), bytes(difference + c * tile), bytes(mask),
                                                reinterpret_cast<uint8_t *>(to), n * int64_t(sizeof(Word)));
        };
        if (p.above) write(baseline, out);
        if (p.below) write(image, out + (p.above ? p.out_stride[1] : 0));
      }
    }
  }
  if (streaming) finish_streaming();
}

template <typename Key, typename Word>
void perturb_words(const Perturbation &p, int threads) {
  const int64_t plane = p.h * p.w, word = int64_t(sizeof(Word));
  const int64_t fitting = kTileBytes / (word * (3 * p.c + 1) + int64_t(sizeof(Key)));
  const int64_t tile = std::min(plane, std::max<int64_t>(256, fitting / 64 * 64)), tiles = (plane + tile - 1) / tile;
  const int64_t output = p.n * (int64_t(p.above) + int64_t(p.below)) * p.k * p.c * plane * word;
  const bool streaming = output > kStreamBytes;
  parallel_for(p.n * tiles, output, threads, [=, &p](int64_t begin, int64_t end) {
    perturb_tiles<Key, Word>(p, tile, tiles, streaming, begin, end);
  });
}

template <typename Key>
bool perturb_keys(const Perturbation &p, int threads) {
  bool nan = false;
  for (int64_t sample = 0; sample < p.n; ++sample) {
    const Key *keys = static_cast<const Key *>(p.key.data) + sample * p.key.stride[0];
    for_runs(p.key.stride[1], p.key.stride[2], p.w, 0, p.h * p.w, [&](int64_t offset, int64_t run, int64_t) {
      nan |= any_nan(keys + offset, p.key.stride[2], run);
    });
  }
  if (nan) return false;
  switch (p.out_type) {
    case Scalar::f16:
    case Scalar::bf16: perturb_words<Key, uint16_t>(p, threads); break;
    case Scalar::f32: perturb_words<Key, uint32_t>(p, threads); break;
    default: perturb_words<Key, uint64_t>(p, threads);
  }
  return true;
}

// One tile of the soft version: normalised inputs of all channels, and the mask of one threshold at a time.
template <typename T>
struct SoftTile {
  const SoftPerturbation<T> &p;
  int64_t size;
  std::vector<T> values;
  T *mask, *image, *baseline;

  SoftTile(const SoftPerturbation<T> &parameters, int64_t pixels)
      : p(parameters), size(pixels), values((2 * p.c + 1) * size), mask(values.data()), image(mask + size),
        baseline(image + p.c * size) {}

  void load(int64_t sample, int64_t first, int64_t n) {
    for (int64_t c = 0; c < p.c; ++c) {
      const double *mean = p.mean ? p.mean + c : nullptr, *std = p.std ? p.std + c : nullptr;
      const auto read = [&](const T *data, const std::array<int64_t, 4> &stride, T *to) {
        const int64_t start = sample * stride[0] + c * stride[1];
        for_runs(stride[2], stride[3], p.w, first, n, [&](int64_t offset, int64_t run, int64_t at) {
          load_run<T, T>(data, start + offset, stride[3], run, mean, std, to, at);
        });
      };
      read(p.image, p.image_stride, image + c * size);
      read(p.baseline, p.baseline_stride, baseline + c * size);
    }
  }

  void make_mask(int64_t sample, int64_t k, int64_t first, int64_t n) {
    const T threshold = p.thresholds[sample * p.k + k];
    const T *saliency = p.saliency + sample * p.h * p.w + first;
    const T temperature = p.temperature;
    T *__restrict to = mask;
    for (int64_t i = 0; i < n; ++i) to[i] = T(1) / (T(1) + exponential((threshold - saliency[i]) / temperature));
  }
};

template <typename T, typename Visit>
void for_soft_tiles(const SoftPerturbation<T> &p, int threads, const Visit &visit) {
  const int64_t plane = p.h * p.w, fitting = kTileBytes / (int64_t(sizeof(T)) * (2 * p.c + 1));
  const int64_t tile = std::min(plane, std::max<int64_t>(256, fitting / 64 * 64)), tiles = (plane + tile - 1) / tile;
  const int64_t bytes = p.n * 2 * p.k * p.c * plane * int64_t(sizeof(T));
  parallel_for(p.n * tiles, bytes, threads, [=, &p, &visit](int64_t begin, int64_t end) {
    SoftTile<T> inputs(p, tile);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / tiles, first = item % tiles * tile, n = std::min(tile, plane - first);
      inputs.load(sample, first, n);
      visit(inputs, sample, first, n);
    }
  });
}

}  // namespace

bool perturb(const Perturbation &p, int threads) {
  switch (p.key.type) {
    case Scalar::i32: return perturb_keys<int32_t>(p, threads);
    case Scalar::f32: return perturb_keys<float>(p, threads);
    default: return perturb_keys<double>(p, threads);
  }
}

template <typename T>
bool soft_perturb(const SoftPerturbation<T> &p, T *out, int threads) {
  const int64_t plane = p.h * p.w;
  if (any_nan(p.saliency, 1, p.n * plane)) return false;
  for_soft_tiles(p, threads, [=, &p](SoftTile<T> &tile, int64_t sample, int64_t first, int64_t n) {
    for (int64_t k = 0; k < p.k; ++k) {
      tile.make_mask(sample, k, first, n);
      for (int64_t c = 0; c < p.c; ++c) {
        const T *image = tile.image + c * tile.size, *baseline = tile.baseline + c * tile.size, *mask = tile.mask;
        T *__restrict keep = out + ((sample * 2 * p.k + k) * p.c + c) * plane + first;
        T *__restrict remove = keep + p.k * p.c * plane;
        for (int64_t i = 0; i < n; ++i) {
          keep[i] = mask[i] * image[i] + (1 - mask[i]) * baseline[i];
          remove[i] = (1 - mask[i]) * image[i] + mask[i] * baseline[i];
        }
      }
    }
  });
  return true;
}

template <typename T>
void soft_perturb_backward(const SoftPerturbation<T> &p, const T *grad, T *grad_saliency, T *grad_image, int threads) {
  const int64_t plane = p.h * p.w;
  for_soft_tiles(p, threads, [=, &p](SoftTile<T> &tile, int64_t sample, int64_t first, int64_t n) {
    std::vector<T> slope(n);  // gradient with respect to the mask of one threshold
    T *to_saliency = grad_saliency + sample * plane + first;
    std::fill(to_saliency, to_saliency + n, T(0));
    for (int64_t k = 0; k < p.k; ++k) {
      tile.make_mask(sample, k, first, n);
      std::fill(slope.begin(), slope.end(), T(0));
      for (int64_t c = 0; c < p.c; ++c) {
        const T *image = tile.image + c * tile.size, *baseline = tile.baseline + c * tile.size, *mask = tile.mask;
        const T *keep = grad + ((sample * 2 * p.k + k) * p.c + c) * plane + first, *remove = keep + p.k * p.c * plane;
        for (int64_t i = 0; i < n; ++i) slope[i] += (keep[i] - remove[i]) * (image[i] - baseline[i]);
        if (grad_image == nullptr) continue;
        T *to_image = grad_image + (sample * p.c + c) * plane + first;
        const T scale = p.std ? T(p.std[c]) : T(1);
        for (int64_t i = 0; i < n; ++i)
          to_image[i] = (k ? to_image[i] : T(0)) + (keep[i] * mask[i] + remove[i] * (1 - mask[i])) / scale;
      }
      for (int64_t i = 0; i < n; ++i) to_saliency[i] += slope[i] * (tile.mask[i] * (1 - tile.mask[i])) / p.temperature;
    }
  });
}

template bool soft_perturb<float>(const SoftPerturbation<float> &, float *, int);
template bool soft_perturb<double>(const SoftPerturbation<double> &, double *, int);
template void soft_perturb_backward<float>(const SoftPerturbation<float> &, const float *, float *, float *, int);
template void soft_perturb_backward<double>(const SoftPerturbation<double> &, const double *, double *, double *, int);

}  // namespace counterlens
