// SPDX-License-Identifier: Apache-2.0
// One side's logits as the kernels take them.
#pragma once

#include <cstdint>

#include "opd/opd.h"

namespace opd {
namespace cuda {

struct Side {
  const void* data;
  int64_t row_stride;
  const float* bias;
  const float* temperatures;
  float scale, softcap, temperature;
  int32_t dtype;
};

inline Side side_of(const opd_logits_t& logits) {
  return {logits.matrix.data,
          logits.matrix.row_stride,
          static_cast<const float*>(logits.bias),
          static_cast<const float*>(logits.temperatures),
          static_cast<float>(logits.scale),
          static_cast<float>(logits.softcap),
          static_cast<float>(logits.temperature),
          logits.matrix.dtype};
}

}  // namespace cuda
}  // namespace opd
