// SPDX-License-Identifier: Apache-2.0
// One side's logits and how a row of them becomes a law, in float32:
// softcap(scale * (logits + bias)) / temperature.
#pragma once

#include <limits>

#include "side.h"
#include "vectorized.cuh"

namespace opd {
namespace cuda {

// fn(value of the storage type) of a dtype; `op` and `name` are for the error.
template <class Fn>
void visit_storage(const char* op, const char* name, int32_t dtype, Fn&& fn) {
  switch (dtype) {
    case OPD_FLOAT32:
      return fn(float());
    case OPD_BFLOAT16:
      return fn(BFloat16());
    case OPD_FLOAT16:
      return fn(Float16());
    default:
      throw Error(OPD_UNSUPPORTED,
                  concat(op, ": ", name, " must be float32, bfloat16 or float16 on a GPU, got ",
                         "float64. Convert it, or call the CPU's entry point."));
  }
}

template <class Storage>
__device__ __forceinline__ const Storage* row_of(const Side& side, int64_t row) {
  return static_cast<const Storage*>(side.data) + row * side.row_stride;
}

// bias[0 .. N) added to values.
template <int N>
__device__ __forceinline__ void add_bias(const float* bias, float (&values)[N]) {
  if (N % 4 == 0 && is_aligned_16(bias)) {
    float terms[N];
#pragma unroll
    for (int i = 0; i + 3 < N; i += 4) load_16(bias + i, terms + i);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += terms[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += __ldg(bias + i);
  }
}

// What the law of one row needs. The functions take N values of columns side by side, so that a
// choice that is the same for a whole row is made once for all of them.
class RowLaw {
 public:
  __device__ __forceinline__ RowLaw(const Side& side, int64_t row)
      : bias_(side.bias), scale_(side.scale), softcap_(side.softcap) {
    temperature_ = side.temperatures ? side.temperatures[row] : side.temperature;
    // finite, so that 0 times it stays 0 under the coldest of temperatures
    const float largest = std::numeric_limits<float>::max();
    reciprocal_ = 1.0f / temperature_;
    reciprocal_ = reciprocal_ > largest ? largest : reciprocal_;
  }

  __device__ __forceinline__ bool has_softcap() const { return softcap_ != 0.0f; }
  // d law / d logits, but for the softcap's own slope
  __device__ __forceinline__ float slope() const { return scale_ / temperature_; }

  // scale * (logits + bias), in place; `column` is that of values[0]
  template <int N>
  __device__ __forceinline__ void affine(int64_t column, float (&values)[N]) const {
    if (bias_) add_bias(bias_ + column, values);
    if (scale_ != 1.0f) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] *= scale_;
    }
  }

  // what is left to do after affine()
  template <int N>
  __device__ __forceinline__ void cap_and_cool(float (&values)[N]) const {
    if (has_softcap()) {
      const float twice_inverse = 2.0f / softcap_;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float x = values[i] * twice_inverse;
        const ExpPair<float> pair = exp_pair_nonpositive(x > 0.0f ? -x : x);
        const float size = softcap_ * pair.expm1 / (1.0f + pair.exp);
        values[i] = x > 0.0f ? -size : size;
      }
    }
    if (temperature_ != 1.0f) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = cooled(values[i]);
    }
  }

  template <int N>
  __device__ __forceinline__ void apply(int64_t column, float (&values)[N]) const {
    affine(column, values);
    cap_and_cool(values);
  }

  // 1 - tanh(value / cap)^2 of what affine() returned, in place
  template <int N>
  __device__ __forceinline__ void softcap_slope(float (&values)[N]) const {
    const float twice_inverse = 2.0f / softcap_;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float x = values[i] * twice_inverse;
      const float decay = exp_pair_nonpositive(x > 0.0f ? -x : x).exp;
      values[i] = 4.0f * decay / ((1.0f + decay) * (1.0f + decay));
    }
  }

 private:
  // value / temperature without a division: the product with the reciprocal, put right by its
  // remainder
  __device__ __forceinline__ float cooled(float value) const {
    const float quotient = value * reciprocal_;
    const float exact = fmaf(fmaf(-quotient, temperature_, value), reciprocal_, quotient);
    return exact == exact ? exact : quotient;  // an infinity has no remainder
  }

  const float* bias_;
  float scale_, softcap_, temperature_, reciprocal_;
};

// A row of `width` columns as 16-byte pieces between a head and a tail of less than one each.
template <class Storage>
struct Pieces {
  int64_t width, pieces;
  int head, tail;

  __device__ __forceinline__ Pieces(const Storage* row, int64_t width) : width(width) {
    constexpr int kPer = kPerLoad<Storage>;
    const int past = static_cast<int>((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(Storage));
    head = past == 0 ? 0 : kPer - past;
    if (head > width) head = static_cast<int>(width);
    pieces = (width - head) / kPer;
    tail = static_cast<int>(width - head - pieces * kPer);
  }
  // first column of a piece
  __device__ __forceinline__ int64_t column(int64_t piece) const {
    return head + piece * kPerLoad<Storage>;
  }
  // the column of head or tail that is this thread's; -1 if none is
  __device__ __forceinline__ int64_t loose_column() const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < head) return thread;
    return thread < head + tail ? width - tail + (thread - head) : -1;
  }
};

}  // namespace cuda
}  // namespace opd
