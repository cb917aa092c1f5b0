#pragma once
#include <array>
#include <cstdint>

#include "consensus/filter.h"

namespace counterlens {

// One scalar per sample: at data + i * step, or the same number for all where data is null.
template <typename T>
struct Column {
  const T *data;
  int64_t step;
  T number;
  T operator[](int64_t i) const { return data ? data[i * step] : number; }
};

// z, eps_uncond, eps_cond, grad_class, grad_distance, z_prev, z0: [b, c, h, w]; kept_fraction: [b].
template <typename T>
struct GuidedUpdate {
  const T *z, *eps_uncond, *eps_cond, *grad_class, *grad_distance;
  Column<T> abar, abar_prev, guidance, class_scale, distance_scale, cos_limit, tan_limit;
  T *z_prev, *z0, *kept_fraction;
  int64_t b, c, h, w, chunk;
  FilterMode mode;
};

template <typename T>
void guided_update(const GuidedUpdate<T> &p, int threads);

}  // namespace counterlens
