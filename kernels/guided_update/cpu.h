#pragma once
#include <cstdint>

#include "consensus/filter.h"

namespace counterlens {

// z, eps_uncond, eps_cond, grad_class, grad_distance, z_prev, z0: [b, c, h, w]; kept_fraction: [b].
// scalars: [7, b]: alphas_cumprod_t, alphas_cumprod_prev, guidance, class and distance scale, cos and tan of the limit.
template <typename T>
void guided_update(const T *z, const T *eps_uncond, const T *eps_cond, const T *grad_class, const T *grad_distance,
                   const T *scalars, T *z_prev, T *z0, T *kept_fraction, int64_t b, int64_t c, int64_t h, int64_t w,
                   int64_t chunk, FilterMode mode, int threads);

}  // namespace counterlens
