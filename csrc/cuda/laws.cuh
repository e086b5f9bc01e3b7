// SPDX-License-Identifier: Apache-2.0
// Rows of logits on a GPU, four columns of a thread at a time: bits, logits of a law, entries.
#pragma once

#include "divergence_call.h"
#include "divergence_state.h"
#include "half.h"
#include "reduce.cuh"

namespace opd {
namespace cuda {

constexpr int kVector = 4;  // columns: 16 bytes of float32, 8 of 16-bit values
constexpr float kInfinity = std::numeric_limits<float>::infinity();

__device__ __forceinline__ float low_half(uint32_t word, int32_t dtype) {
  if (dtype == OPD_BFLOAT16) return to_real(BFloat16{static_cast<uint16_t>(word)});
  return to_real(Float16{static_cast<uint16_t>(word)});
}

// Four stored values as they lie in memory; of 16-bit ones the first two words.
__device__ __forceinline__ void widen(uint4 bits, int32_t dtype, float (&z)[kVector]) {
  if (dtype == OPD_FLOAT32) {
    z[0] = detail::bits_to_float(static_cast<int32_t>(bits.x));
    z[1] = detail::bits_to_float(static_cast<int32_t>(bits.y));
    z[2] = detail::bits_to_float(static_cast<int32_t>(bits.z));
    z[3] = detail::bits_to_float(static_cast<int32_t>(bits.w));
    return;
  }
  z[0] = low_half(bits.x & 0xffffu, dtype), z[1] = low_half(bits.x >> 16, dtype);
  z[2] = low_half(bits.y & 0xffffu, dtype), z[3] = low_half(bits.y >> 16, dtype);
}

template <class Storage>
__device__ __forceinline__ uint32_t bits_of(float value) {
  Storage stored;
  from_real(value, &stored);
  return stored.bits;
}

__device__ __forceinline__ uint4 narrow(const float (&z)[kVector], int32_t dtype) {
  uint4 bits{};
  if (dtype == OPD_FLOAT32) {
    bits.x = static_cast<uint32_t>(detail::float_to_bits(z[0]));
    bits.y = static_cast<uint32_t>(detail::float_to_bits(z[1]));
    bits.z = static_cast<uint32_t>(detail::float_to_bits(z[2]));
    bits.w = static_cast<uint32_t>(detail::float_to_bits(z[3]));
  } else if (dtype == OPD_BFLOAT16) {
    bits.x = bits_of<BFloat16>(z[0]) | bits_of<BFloat16>(z[1]) << 16;
    bits.y = bits_of<BFloat16>(z[2]) | bits_of<BFloat16>(z[3]) << 16;
  } else {
    bits.x = bits_of<Float16>(z[0]) | bits_of<Float16>(z[1]) << 16;
    bits.y = bits_of<Float16>(z[2]) | bits_of<Float16>(z[3]) << 16;
  }
  return bits;
}

// The row may be overwritten by this very kernel, so none of this is a load that may be cached as
// constant. Values past `count` are -inf.
__device__ __forceinline__ uint4 load_bits(const void* row, int32_t dtype, bool aligned, int column,
                                           int count) {
  uint4 bits{};
  if (dtype == OPD_FLOAT32) {
    const uint32_t* const from = static_cast<const uint32_t*>(row) + column;
    if (aligned & (count >= kVector)) return *reinterpret_cast<const uint4*>(from);
    constexpr uint32_t lowest = 0xff800000u;
    bits.x = count > 0 ? from[0] : lowest, bits.y = count > 1 ? from[1] : lowest;
    bits.z = count > 2 ? from[2] : lowest, bits.w = count > 3 ? from[3] : lowest;
    return bits;
  }
  const uint16_t* const from = static_cast<const uint16_t*>(row) + column;
  if (aligned & (count >= kVector)) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    bits.x = words.x, bits.y = words.y;
    return bits;
  }
  const uint32_t lowest = dtype == OPD_BFLOAT16 ? 0xff80u : 0xfc00u;
  bits.x = (count > 0 ? from[0] : lowest) | (count > 1 ? from[1] : lowest) << 16;
  bits.y = (count > 2 ? from[2] : lowest) | (count > 3 ? from[3] : lowest) << 16;
  return bits;
}

__device__ __forceinline__ void store_bits(void* row, int32_t dtype, bool aligned, int column,
                                           int count, uint4 bits) {
  if (dtype == OPD_FLOAT32) {
    uint32_t* const to = static_cast<uint32_t*>(row) + column;
    if (aligned & (count >= kVector)) {
      *reinterpret_cast<uint4*>(to) = bits;
      return;
    }
    if (count > 0) to[0] = bits.x;
    if (count > 1) to[1] = bits.y;
    if (count > 2) to[2] = bits.z;
    if (count > 3) to[3] = bits.w;
    return;
  }
  uint16_t* const to = static_cast<uint16_t*>(row) + column;
  if (aligned & (count >= kVector)) {
    uint2 words;
    words.x = bits.x, words.y = bits.y;
    *reinterpret_cast<uint2*>(to) = words;
    return;
  }
  if (count > 0) to[0] = static_cast<uint16_t>(bits.x);
  if (count > 1) to[1] = static_cast<uint16_t>(bits.x >> 16);
  if (count > 2) to[2] = static_cast<uint16_t>(bits.y);
  if (count > 3) to[3] = static_cast<uint16_t>(bits.y >> 16);
}

__device__ __forceinline__ int64_t size_of(int32_t dtype) { return dtype == OPD_FLOAT32 ? 4 : 2; }

__device__ __forceinline__ bool is_aligned(const void* row, int32_t dtype) {
  const uintptr_t bytes = static_cast<uintptr_t>(kVector * size_of(dtype));
  return reinterpret_cast<uintptr_t>(row) % bytes == 0;
}

// One row of a side. kGeneral: with bias, scale and softcap; else the call has none.
template <bool kGeneral>
struct SideRow {
  __device__ SideRow(const Side& side, int64_t row)
      : side(side),
        data(static_cast<const char*>(side.data) + row * side.row_stride * size_of(side.dtype)),
        temperature(side.temperatures ? side.temperatures[row] : side.temperature),
        aligned(is_aligned(data, side.dtype)) {}

  __device__ __forceinline__ uint4 load(int column, int count) const {
    return load_bits(data, side.dtype, aligned, column, count);
  }

  // The logits that the law is the softmax of, -inf past `count`; uncapped: before softcap and
  // temperature.
  __device__ __forceinline__ void widen(uint4 bits, int column, int count, float (&z)[kVector],
                        float (&uncapped)[kVector]) const {
    opd::cuda::widen(bits, side.dtype, z);
    if constexpr (kGeneral) {
      if (side.bias) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) z[i] += i < count ? side.bias[column + i] : 0.0f;
      }
      if (side.scale != 1.0f) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) z[i] *= side.scale;
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) uncapped[i] = z[i];
      if (side.softcap != 0.0f) {
        const float twice_inverse = 2.0f / side.softcap;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float x = z[i] * twice_inverse;
          const ExpPair<float> pair = exp_pair_nonpositive(x > 0.0f ? -x : x);
          const float size = side.softcap * pair.expm1 / (1.0f + pair.exp);
          z[i] = x > 0.0f ? -size : size;
        }
      }
    }
    if (temperature != 1.0f) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) z[i] = z[i] / temperature;
    }
    if constexpr (kGeneral) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) z[i] = i < count ? z[i] : -kInfinity;
    }
  }

  // d softcap(z) / dz at an uncapped logit
  __device__ __forceinline__ float softcap_slope(float uncapped) const {
    const float x = uncapped * (2.0f / side.softcap);
    const float decay = exp_pair_nonpositive(x > 0.0f ? -x : x).exp;
    return 4.0f * decay / ((1.0f + decay) * (1.0f + decay));
  }
  // d (logits of the law) / d logits, but for the softcap
  __device__ __forceinline__ float slope() const { return side.scale / temperature; }

  const Side& side;
  const void* data;
  float temperature;
  bool aligned;
};

struct LawBits {
  uint4 student, teacher;
};

// Four columns as both laws have them.
struct LawValues {
  float student[kVector], target[kVector], uncapped[kVector];
};

// Student and target rows of one token; the target is the teacher or a geometric mean.
template <bool kGeneral>
struct Laws {
  __device__ Laws(const Call& call, int64_t row)
      : call(call), row(row), student(call.student, row), teacher(call.teacher, row) {}

  __device__ __forceinline__ LawBits load(int column, int count) const {
    return {student.load(column, count), teacher.load(column, count)};
  }

  __device__ __forceinline__ LawValues widen(const LawBits& bits, int column, int count) const {
    LawValues out;
    float unused[kVector];
    student.widen(bits.student, column, count, out.student, out.uncapped);
    teacher.widen(bits.teacher, column, count, out.target, unused);
    if constexpr (kGeneral) {
      if (call.target == OPD_TARGET_GEOMETRIC) make_geometric(column, count, out);
    }
    return out;
  }

  __device__ __forceinline__ LawValues at(int column, int count) const {
    return widen(load(column, count), column, count);
  }

  __device__ __forceinline__ void make_geometric(int column, int count, LawValues& values) const {
    const float from_teacher = call.target_teacher;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float z = values.target[i];
      const float scaled = z == -kInfinity ? z : from_teacher * z;
      values.target[i] = from_teacher == 0.0f ? 0.0f : scaled;
    }
    if (call.target_student != 0.0f) {
      add_scaled(call.target_student, values.student, values.target);
    }
    if (call.target_reference != 0.0f) {
      const SideRow<true> reference(call.reference, row);
      float z[kVector], unused[kVector];
      reference.widen(reference.load(column, count), column, count, z, unused);
      add_scaled(call.target_reference, z, values.target);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values.target[i] = i < count ? values.target[i] : -kInfinity;
    }
  }

  __device__ __forceinline__ static void add_scaled(float factor, const float (&z)[kVector],
                                    float (&out)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      // a token that one of the laws rules out stays out, whatever the sign of the others
      const bool is_out = (out[i] == -kInfinity) | (z[i] == -kInfinity);
      out[i] = is_out ? -kInfinity : out[i] + factor * z[i];
    }
  }

  const Call& call;
  int64_t row;
  SideRow<kGeneral> student, teacher;
};

// The teacher's row alone, for for_each_vector().
template <bool kGeneral>
struct TeacherLaw {
  __device__ __forceinline__ uint4 load(int column, int count) const {
    return row.load(column, count);
  }
  const SideRow<kGeneral>& row;
};

// The teacher's side becomes weight * teacher + rest * student, both weights in (0, 1); `through`
// is d log(mixture) / d log q.
__device__ __forceinline__ Entry<float> mixed_entry(const Entry<float>& e, float weight, float rest,
                                                    float* through) {
  const Mixture<float> mix = mixture(e, weight, rest);
  const float log_m = e.teacher_larger() ? e.lp + mix.lm_lp : e.lq + mix.lm_lq;
  const bool absent = e.absent();
  *through = absent ? 0.0f : rest * mix.q_over_m;
  return {absent ? e.lp : log_m, e.lq, absent ? e.p : mix.m, e.q, absent ? e.gap : -mix.lm_lq,
          0.0f, e.lq_low};
}

// fn(column, count, bits) for the columns of this thread, all threads' in tiles of the row. With
// `barrier` no thread gets to fn before all have read the tile.
template <int kVectors, class Laws, class Fn>
__device__ __forceinline__ void for_each_vector(const Laws& laws, int vocab_size, bool descending,
                                                bool barrier, Fn&& fn) {
  const int step = kVector * static_cast<int>(blockDim.x);
  const int tile = kVectors * step;
  const int num_tiles = (vocab_size + tile - 1) / tile;
  for (int k = 0; k < num_tiles; ++k) {
    const int begin = (descending ? num_tiles - 1 - k : k) * tile;
    const int first = begin + kVector * static_cast<int>(threadIdx.x);
    decltype(laws.load(0, 0)) bits[kVectors] = {};
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int count = vocab_size - (first + u * step);
      if (count > 0) bits[u] = laws.load(first + u * step, count);
    }
    if (barrier) __syncthreads();
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int count = vocab_size - (first + u * step);
      if (count > 0) fn(first + u * step, count, bits[u]);
    }
  }
}

// -- log-sum-exps ---------------------------------------------------------------------------------

// The largest logit that a thread has seen, its first column, and the sum relative to it.
struct RunningLargest {
  float largest = -kInfinity, sum = 0.0f;
  int column = std::numeric_limits<int>::max();

  // columns ascend from call to call
  template <bool kWithColumn>
  __device__ __forceinline__ void add(const float (&z)[kVector], int at) {
    float most = largest;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (kWithColumn) column = z[i] > most ? at + i : column;
      most = z[i] > most ? z[i] : most;
    }
    // of nothing but -inf it adds zero, and a NaN still shows
    const float shift = most == -kInfinity ? 0.0f : most;
    sum *= exp(largest - shift);
    float more = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) more += exp(z[i] - shift);
    sum += more;
    largest = most;
  }
};

// Adds what the block has seen of a side to its part of the state: the largest logit, its column
// and the sum. The caller's barrier comes before anybody reads them.
__device__ inline void merge_largest(const RunningLargest& mine, bool with_column,
                                     int64_t first_column, double* scratch, double* largest,
                                     double* argmax, double* sum) {
  const float most = reduce_block(mine.largest, reinterpret_cast<float*>(scratch), -kInfinity,
                                  Max());
  const double before = *largest;
  const double here = static_cast<double>(most);
  const double now = here > before ? here : before;
  // e^-inf of a finite distance from -inf, 1 of no distance
  const double own = static_cast<double>(mine.largest);
  const double total =
      reduce_block(static_cast<double>(mine.sum) * (own == now ? 1.0 : ::exp(own - now)), scratch,
                   0.0, Sum());
  int at = 0;
  if (with_column) {
    constexpr int none = std::numeric_limits<int>::max();
    const bool is_mine = mine.largest == most && most > -kInfinity;
    at = reduce_block(is_mine ? mine.column : none, reinterpret_cast<int*>(scratch), none, Min());
  }
  if (threadIdx.x != 0) return;
  if (here > before) {
    *sum *= before == now ? 1.0 : ::exp(before - now);
    *largest = now;
    if (with_column) *argmax = static_cast<double>(first_column + at);
  }
  *sum += total;
}

}  // namespace cuda
}  // namespace opd
