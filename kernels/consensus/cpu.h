#pragma once
#include <cstdint>

#include "consensus/filter.h"

namespace counterlens {

// score, reference, filtered: [b, c, h, w]; cos_limit, tan_limit: [b]; kept: [b, h/chunk, w/chunk]; all contiguous.
template <typename T>
void consensus_filter(const T *score, const T *reference, const T *cos_limit, const T *tan_limit, T *filtered,
                      uint8_t *kept, int64_t b, int64_t c, int64_t h, int64_t w, int64_t chunk, FilterMode mode,
                      int threads);

}  // namespace counterlens
