// SPDX-License-Identifier: Apache-2.0
// What every row kernel of the core does: walk a row in blocks that stay in L1, widened to the
// compute type and divided by the temperature, and sum in lanes that do not depend on compiler
// flags or threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <type_traits>

#include "check.h"
#include "half.h"
#include "opd/math.h"
#include "opd/opd.h"

namespace opd {

// no iteration of the loop below depends on another
#if defined(__clang__)
#define OPD_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define OPD_IVDEP _Pragma("GCC ivdep")
#else
#define OPD_IVDEP
#endif

// columns in a block: a few float arrays of this length fit in L1
constexpr int kBlock = 512;
// partial sums kept side by side; float32 sums over 152k columns need at least 8
constexpr int kLanes = 16;

template <class T>
struct alignas(64) Block {
  T values[kBlock];
};

template <class T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

inline int round_up_to_lanes(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

// The elementwise loops are functions of their own, never inlined: inside the row walkers the
// compiler does not prove the buffers distinct and leaves the loops scalar.
#define OPD_ELEMENTWISE __attribute__((noinline))

// A register of T: compilers leave a loop of comparisons and choices scalar that they would have to
// put together from kLanes of them.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
template <class T>
struct Register;
template <>
struct Register<float> {
  typedef float Type __attribute__((vector_size(kRegisterBytes)));
};
template <>
struct Register<double> {
  typedef double Type __attribute__((vector_size(kRegisterBytes)));
};

// Sum of the first `count` values, a multiple of kLanes: each lane's own, then of the lanes in order.
template <class T>
OPD_ELEMENTWISE double lane_sum(const T* values, int count) {
  using Vector = typename Register<T>::Type;
  constexpr int kSize = kRegisterBytes / static_cast<int>(sizeof(T));
  constexpr int kRegisters = kLanes / kSize;
  Vector lanes[kRegisters] = {};
  for (int i = 0; i < count; i += kLanes) {
    for (int r = 0; r < kRegisters; ++r) {
      Vector value;
      std::memcpy(&value, values + i + r * kSize, sizeof(value));
      lanes[r] += value;
    }
  }
  double sum = 0.0;
  for (const Vector& part : lanes) {
    for (int lane = 0; lane < kSize; ++lane) sum += static_cast<double>(part[lane]);
  }
  return sum;
}

// The largest of `count` values, a multiple of kLanes; a NaN counts as none.
template <class T>
OPD_ELEMENTWISE T lane_max(const T* values, int count) {
  using Vector = typename Register<T>::Type;
  constexpr int kSize = kRegisterBytes / static_cast<int>(sizeof(T));
  constexpr int kRegisters = kLanes / kSize;
  Vector largest[kRegisters];
  for (Vector& part : largest) part = Vector{} - std::numeric_limits<T>::infinity();
  for (int i = 0; i < count; i += kLanes) {
    for (int r = 0; r < kRegisters; ++r) {
      Vector value;
      std::memcpy(&value, values + i + r * kSize, sizeof(value));
      largest[r] = value > largest[r] ? value : largest[r];
    }
  }
  T result = -std::numeric_limits<T>::infinity();
  for (const Vector& part : largest) {
    for (int lane = 0; lane < kSize; ++lane) result = part[lane] > result ? part[lane] : result;
  }
  return result;
}

// cap * tanh(value / cap) in place.
template <class T>
OPD_ELEMENTWISE void softcap_block(T cap, int count, T* __restrict__ values) {
  const T twice_inverse = T(2) / cap;
OPD_IVDEP
  for (int i = 0; i < count; ++i) {
    const T x = values[i] * twice_inverse;
    const ExpPair<T> pair = exp_pair_nonpositive(x > T(0) ? -x : x);
    const T size = cap * pair.expm1 / (T(1) + pair.exp);
    values[i] = x > T(0) ? -size : size;
  }
}

// 1 - tanh(value / cap)^2 in place.
template <class T>
OPD_ELEMENTWISE void softcap_slope_block(T cap, int count, T* __restrict__ values) {
  const T twice_inverse = T(2) / cap;
OPD_IVDEP
  for (int i = 0; i < count; ++i) {
    const T x = values[i] * twice_inverse;
    const T decay = exp_pair_nonpositive(x > T(0) ? -x : x).exp;
    values[i] = T(4) * decay / ((T(1) + decay) * (T(1) + decay));
  }
}

template <class T>
OPD_ELEMENTWISE void affine_block(const T* __restrict__ bias, T scale, int count,
                                  T* __restrict__ values) {
  if (bias) {
OPD_IVDEP
    for (int i = 0; i < count; ++i) values[i] = scale * (values[i] + bias[i]);
  } else {
OPD_IVDEP
    for (int i = 0; i < count; ++i) values[i] = scale * values[i];
  }
}

template <class T>
OPD_ELEMENTWISE void divide_block(T divisor, int count, T* __restrict__ values) {
OPD_IVDEP
  for (int i = 0; i < count; ++i) values[i] = values[i] / divisor;
}

// One row of a side's logits, read block by block as T = float or double:
// softcap(scale * (logits + bias)) / temperature.
template <class T>
class LogitsRow {
 public:
  LogitsRow(const opd_logits_t& logits, int64_t row, int64_t vocab_size)
      : matrix_(logits.matrix),
        offset_(row * logits.matrix.row_stride),
        vocab_size_(vocab_size),
        bias_(static_cast<const T*>(logits.bias)),
        scale_(static_cast<T>(logits.scale)),
        softcap_(static_cast<T>(logits.softcap)),
        temperature_(logits.temperatures ? static_cast<const T*>(logits.temperatures)[row]
                                         : static_cast<T>(logits.temperature)) {}

  int64_t vocab_size() const { return vocab_size_; }
  T temperature() const { return temperature_; }
  bool has_softcap() const { return softcap_ != T(0); }

  // Pointer to `count` = min(kBlock, vocab_size - begin) values, padded with -inf to a multiple of
  // kLanes: the matrix itself where it will do, else `scratch`.
  const T* block(int64_t begin, int count, T* scratch) const {
    const T* unchanged = widen(begin, count, scratch);
    if (unchanged) return unchanged;
    if (is_affine()) affine_block(bias_at(begin), scale_, count, scratch);
    if (has_softcap()) softcap_block(softcap_, count, scratch);
    if (temperature_ != T(1)) divide_block(temperature_, count, scratch);
    std::fill(scratch + count, scratch + round_up_to_lanes(count),
              -std::numeric_limits<T>::infinity());
    return scratch;
  }

  // d block / d logits, where there is a softcap; else it is slope() everywhere.
  void slope_block(int64_t begin, int count, T* out) const {
    const T* unchanged = widen(begin, count, out);
    if (unchanged) std::copy(unchanged, unchanged + count, out);
    if (is_affine()) affine_block(bias_at(begin), scale_, count, out);
    softcap_slope_block(softcap_, count, out);
  }
  T slope() const { return scale_ / temperature_; }
  // The softcap's own slope times `gradient`, in place, where there is one; `scratch` has its room.
  void times_softcap_slope(int64_t begin, int count, T* gradient, T* scratch) const {
    if (!has_softcap()) return;
    slope_block(begin, count, scratch);
OPD_IVDEP
    for (int i = 0; i < count; ++i) gradient[i] *= scratch[i];
  }

 private:
  bool is_affine() const { return bias_ != nullptr || scale_ != T(1); }
  const T* bias_at(int64_t begin) const { return bias_ ? bias_ + begin : nullptr; }

  // The matrix itself if nothing has to be done to this block, else nullptr and a copy in `scratch`.
  const T* widen(int64_t begin, int count, T* scratch) const {
    switch (matrix_.dtype) {
      case OPD_FLOAT32:
        return stage<float>(begin, count, scratch);
      case OPD_FLOAT64:
        return stage<double>(begin, count, scratch);
      case OPD_BFLOAT16:
        return stage<BFloat16>(begin, count, scratch);
      default:
        return stage<Float16>(begin, count, scratch);
    }
  }

  template <class Stored>
  const T* stage(int64_t begin, int count, T* scratch) const {
    const Stored* source = static_cast<const Stored*>(matrix_.data) + offset_ + begin;
    if constexpr (std::is_same_v<Stored, T>) {
      const bool unchanged = temperature_ == T(1) && !is_affine() && !has_softcap();
      if (unchanged && count % kLanes == 0) return source;
    }
OPD_IVDEP
    for (int i = 0; i < count; ++i) scratch[i] = static_cast<T>(to_real(source[i]));
    return nullptr;
  }

  opd_const_matrix_t matrix_;
  int64_t offset_;
  int64_t vocab_size_;
  const T* bias_;
  T scale_, softcap_, temperature_;
};

inline int64_t num_blocks(int64_t vocab_size) { return (vocab_size + kBlock - 1) / kBlock; }

// fn(a value of the compute type of these logits).
template <class Fn>
void visit_real(const opd_logits_t& logits, Fn&& fn) {
  logits.matrix.dtype == OPD_FLOAT64 ? fn(double{}) : fn(float{});
}

// fn(begin, count) over the blocks of a row.
template <class Fn>
void for_each_block(int64_t vocab_size, Fn&& fn) {
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    fn(begin, static_cast<int>(std::min<int64_t>(kBlock, vocab_size - begin)));
  }
}

// A log-sum-exp as two values of T: z - lse is done in two steps, so that the rounding of a large
// lse to float32 does not scale a whole row of probabilities.
template <class T>
struct Shift {
  // lost: what lse is short of, see RunningLse
  OPD_HD explicit Shift(double lse, double lost = 0.0)
      : high(static_cast<T>(lse)), low(static_cast<T>(lse - static_cast<double>(high) + lost)) {
    // inf - inf would hide that the row has no finite logit
    constexpr T infinity = std::numeric_limits<T>::infinity();
    if (high == infinity || high == -infinity) low = T(0);
  }
  T high, low;
};

template <class T>
OPD_ELEMENTWISE void exp_block(const T* __restrict__ block, T shift, int padded,
                               T* __restrict__ out) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) out[i] = exp_nonpositive(block[i] - shift);
}

// Running log-sum-exp over blocks: the largest logit so far and the sum relative to it.
template <class T>
class RunningLse {
 public:
  RunningLse() = default;
  // goes on from what largest() and sum() were
  RunningLse(T largest, double sum) : largest_(largest), sum_(sum) {}

  // `padded` is a multiple of kLanes; `scratch` holds as many values.
  void add(const T* block, int padded, T* scratch) {
    const T largest = std::max(largest_, lane_max(block, padded));
    if (largest > largest_) {
      sum_ *= std::exp(static_cast<double>(largest_) - static_cast<double>(largest));
      largest_ = largest;
    }
    // a block of nothing but -inf adds zero, and a NaN in it still shows
    const T reference = largest_ == -std::numeric_limits<T>::infinity() ? T(0) : largest_;
    exp_block(block, reference, padded, scratch);
    sum_ += lane_sum(scratch, padded);
  }

  T largest() const { return largest_; }
  double sum() const { return sum_; }
  double lse() const { return static_cast<double>(largest_) + std::log(sum_); }
  // What lse() had to round away: beside a logit of 1e17 a double has no room for log V.
  double lost() const {
    const double largest = static_cast<double>(largest_), log_sum = std::log(sum_);
    const double added = lse() - largest;
    return (largest - (lse() - added)) + (log_sum - added);
  }

 private:
  T largest_ = -std::numeric_limits<T>::infinity();
  double sum_ = 0.0;
};

template <class T, class Row>
RunningLse<T> running_lse(const Row& row) {
  Block<T> staged, scratch;
  RunningLse<T> running;
  for_each_block(row.vocab_size(), [&](int64_t begin, int count) {
    const T* block = row.block(begin, count, staged.values);
    running.add(block, round_up_to_lanes(count), scratch.values);
  });
  return running;
}

template <class Row, class T>
double row_lse(const Row& row, T* largest) {
  const RunningLse<T> running = running_lse<T>(row);
  *largest = running.largest();
  return running.lse();
}

// Writes `count` values of T as the matrix's dtype.
template <class T>
void store_block(opd_matrix_t matrix, int64_t row, int64_t begin, int count, const T* values) {
  const int64_t offset = row * matrix.row_stride + begin;
  const auto write = [&](auto* out) {
    out += offset;
OPD_IVDEP
    for (int i = 0; i < count; ++i) {
      if constexpr (std::is_same_v<decltype(out), double*>) {
        out[i] = static_cast<double>(values[i]);
      } else {
        from_real(static_cast<float>(values[i]), out + i);
      }
    }
  };
  switch (matrix.dtype) {
    case OPD_FLOAT32:
      return write(static_cast<float*>(matrix.data));
    case OPD_FLOAT64:
      return write(static_cast<double*>(matrix.data));
    case OPD_BFLOAT16:
      return write(static_cast<BFloat16*>(matrix.data));
    default:
      return write(static_cast<Float16*>(matrix.data));
  }
}

// Zeros columns [begin, end) of a row. Every supported dtype spells zero as zero bytes.
inline void zero_columns(opd_matrix_t matrix, int64_t row, int64_t begin, int64_t end) {
  const int64_t size = matrix.dtype == OPD_FLOAT64 ? 8 : matrix.dtype == OPD_FLOAT32 ? 4 : 2;
  char* start = static_cast<char*>(matrix.data) + (row * matrix.row_stride + begin) * size;
  std::fill(start, start + std::max<int64_t>(0, end - begin) * size, char{0});
}

inline void check_dtype(const char* op, const char* name, int32_t dtype) {
  OPD_CHECK(dtype >= OPD_FLOAT32 && dtype <= OPD_FLOAT16, op, ": ", name,
            " dtype must be an opd_dtype_t, got ", dtype);
}

inline void check_temperature(const char* op, const char* name, double temperature) {
  OPD_CHECK(temperature > 0.0 && std::isfinite(temperature), op, ": ", name,
            " must be positive and finite, got ", temperature);
}

inline void check_struct_size(const char* op, uint32_t got, size_t expected) {
  OPD_CHECK(got == expected, op, ": struct_size must be ", expected, ", got ", got,
            ". The caller was compiled against another opd.h.");
}

inline void check_gradient(const char* op, opd_matrix_t matrix, int64_t num_tokens,
                           int64_t grad_width, int64_t vocab_size) {
  OPD_CHECK(num_tokens <= 1 || matrix.row_stride >= grad_width, op,
            ": rows of the gradient must not overlap, got row_stride ", matrix.row_stride,
            " for width ", grad_width);
  OPD_CHECK(grad_width >= vocab_size, op, ": grad_width must be at least vocab_size ", vocab_size,
            ", got ", grad_width);
}

inline void check_pointer(const char* op, const char* name, const void* pointer) {
  OPD_CHECK(pointer != nullptr, op, ": ", name, " must not be NULL");
}

inline void check_pointers(const char* op, const char* which,
                           std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) check_pointer(op, which, pointer);
}

inline void check_logits(const char* op, const char* name, opd_const_matrix_t matrix,
                         int64_t num_tokens) {
  OPD_CHECK(num_tokens == 0 || matrix.data != nullptr, op, ": ", name, " must not be NULL");
  // rows may repeat (stride 0) but not run backwards; an output's rows may not overlap
  OPD_CHECK(num_tokens <= 1 || matrix.row_stride >= 0, op, ": ", name,
            " row_stride must be >= 0, got ", matrix.row_stride);
}

inline void check_side(const char* op, const char* name, const opd_logits_t& side,
                       int64_t num_tokens) {
  check_dtype(op, name, side.matrix.dtype);
  check_logits(op, name, side.matrix, num_tokens);
  const std::string temperature = std::string("temperature of ") + name;
  if (!side.temperatures) check_temperature(op, temperature.c_str(), side.temperature);
  OPD_CHECK(std::isfinite(side.scale) && side.scale != 0.0, op, ": ", name,
            " scale must be finite and not 0, got ", side.scale);
  OPD_CHECK(std::isfinite(side.softcap) && side.softcap >= 0.0, op, ": ", name,
            " softcap must be >= 0 (0: none), got ", side.softcap);
}

inline void check_sizes(const char* op, int64_t num_tokens, int64_t vocab_size) {
  OPD_CHECK(num_tokens >= 0, op, ": num_tokens must be >= 0, got ", num_tokens);
  OPD_CHECK(vocab_size > 0, op, ": vocab_size must be > 0, got ", vocab_size);
}

inline void check_sizes_of_ids(const char* op, int64_t num_tokens, int64_t vocab_size) {
  check_sizes(op, num_tokens, vocab_size);
  OPD_CHECK(vocab_size <= std::numeric_limits<int32_t>::max(), op,
            ": vocab_size must be below 2^31, since ids are int32, got ", vocab_size);
}

}  // namespace opd
