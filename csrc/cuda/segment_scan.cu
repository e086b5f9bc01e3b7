// SPDX-License-Identifier: Apache-2.0
// Sums over the segments of packed tokens, one block per segment: discounted scans, reductions,
// their transposes, and the statistics of groups. All sums are float64. A block has always as many
// threads, so that the order of a segment's sums follows from the segment alone. Offsets are
// clamped to [0, num_tokens]: wrong ones give wrong values but touch no memory outside.
#include <cmath>
#include <limits>

#include "reduce.cuh"
#include "scan.cuh"
#include "segment_scan_check.h"

namespace opd {
namespace cuda {
namespace {

constexpr int kThreads = kScanThreads;
constexpr int64_t kSharedBytes = kWarp * sizeof(double);

struct Ends {
  int64_t begin, end;
};

__device__ __forceinline__ Ends ends_of(const int64_t* offsets, int64_t num_tokens) {
  const auto bound = [&](int64_t low, int64_t value) {
    return value < low ? low : value > num_tokens ? num_tokens : value;
  };
  const int64_t begin = bound(0, offsets[blockIdx.x]);
  return {begin, bound(begin, offsets[blockIdx.x + 1])};
}

// -- scans ----------------------------------------------------------------------------------------

// a sum of no more terms than these is added up for each token anew
constexpr int64_t kFewTerms = 64;

template <class Real>
struct ScanParameters {
  const int64_t* offsets;
  int64_t num_tokens;
  const Real* values;
  Real* out;
  double* scratch;
  double powers[kPowers];
  double factor;  // discount^first_step
  int64_t first_step, window, stride;
  bool prefix;
  bool is_zero;  // no term has a factor other than 0
};

template <class Real>
__global__ void __launch_bounds__(kThreads)
    segment_scan(const __grid_constant__ ScanParameters<Real> p) {
  const Ends ends = ends_of(p.offsets, p.num_tokens);
  const int64_t length = ends.end - ends.begin;
  if (length == 0) return;
  // a prefix sum counts positions from the beginning and a suffix sum from the end; from there on
  // they are the same
  const int64_t direction = p.prefix ? 1 : -1, start = p.prefix ? ends.begin : ends.end - 1;
  // beyond the segment there is nothing, however far a step leads
  const int64_t stride = p.stride < length ? p.stride : length;
  const int64_t steps_inside = (length + stride - 1) / stride;
  const bool none = p.is_zero || p.first_step >= steps_inside;
  const int64_t shift = none ? length : p.first_step * stride;
  for (int64_t m = threadIdx.x; m < shift; m += kThreads) p.out[start + direction * m] = Real(0);
  if (none) return;
  const auto value = [&](int64_t position) {
    return static_cast<double>(p.values[start + direction * position]);
  };
  const auto put = [&](int64_t position, double sum) {
    p.out[start + direction * position] = static_cast<Real>(scaled(p.factor, sum));
  };
  const int64_t terms = p.window < steps_inside ? p.window : steps_inside;
  // so is that of a line of few elements, of which there are then at least as many as threads
  if (terms <= kFewTerms || stride >= kThreads) {
    for (int64_t position = shift + threadIdx.x; position < length; position += kThreads) {
      double sum = 0.0, factor = 1.0;
      int64_t source = position - shift;
      for (int64_t k = 0; k < terms && source >= 0; ++k, source -= stride) {
        sum += scaled(factor, value(source));
        factor *= p.powers[0];
      }
      put(position, sum);
    }
    return;
  }
  for (int64_t residue = 0; residue < stride; ++residue) {
    const int64_t count = (length - residue + stride - 1) / stride;
    const auto load = [&](int64_t m) { return value(residue + m * stride); };
    const auto emit = [&](int64_t m, double sum) {
      const int64_t position = residue + m * stride + shift;
      if (position < length) put(position, sum);
    };
    if (p.window < count) {
      scan_window(count, p.window, p.powers, p.scratch + ends.begin, load, emit);
    } else {
      scan_line<true>(
          count, p.powers, [&](int64_t m, double) { return load(m); },
          [&](int64_t m, double sum, double) { emit(m, sum); });
    }
  }
}

// -- reductions and their transpose ---------------------------------------------------------------

template <class Real>
struct ReduceParameters {
  const int64_t* offsets;
  int64_t num_tokens;
  const Real* values;
  const Real* weights;
  Real* out;
  int64_t* index;
  bool is_mean;
  Real sign;  // of an extreme: 1 for the largest, -1 for the smallest
};

template <class Real>
__global__ void __launch_bounds__(kThreads) segment_sum(ReduceParameters<Real> p) {
  const Ends ends = ends_of(p.offsets, p.num_tokens);
  double sum = 0.0, total = 0.0;
#pragma unroll 4
  for (int64_t i = ends.begin + threadIdx.x; i < ends.end; i += kThreads) {
    const double weight = p.weights ? static_cast<double>(p.weights[i]) : 1.0;
    sum += weight == 0.0 ? 0.0 : weight * static_cast<double>(p.values[i]);
    total += weight;
  }
  sum = reduce_block(sum, shared_doubles(), 0.0, Sum());
  total = reduce_block(total, shared_doubles(), 0.0, Sum());
  if (threadIdx.x != 0) return;
  const double mean = total == 0.0 ? 0.0 : sum / total;
  p.out[blockIdx.x] = static_cast<Real>(p.is_mean ? mean : sum);
}

struct Earlier {
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const {
    return a < b ? a : b;
  }
};

constexpr int64_t kNoToken = std::numeric_limits<int64_t>::max();

__device__ __forceinline__ int64_t first_token(int64_t token) {
  return reduce_block(token, reinterpret_cast<int64_t*>(shared_memory()), kNoToken, Earlier());
}

// The first token that attains the largest value times `sign`, or the first NaN.
template <class Real>
__global__ void __launch_bounds__(kThreads) segment_extreme(ReduceParameters<Real> p) {
  constexpr Real kNone = kMinusInfinity;
  const Ends ends = ends_of(p.offsets, p.num_tokens);
  Real best = kNone;
  int64_t where_best = kNoToken, where_nan = kNoToken;
  for (int64_t i = ends.begin + threadIdx.x; i < ends.end; i += kThreads) {
    if (p.weights && p.weights[i] == Real(0)) continue;
    const Real value = p.sign * p.values[i];
    if (value != value) {
      where_nan = where_nan < i ? where_nan : i;
    } else if (where_best == kNoToken || value > best) {
      best = value;
      where_best = i;
    }
  }
  const Real largest = reduce_block(best, reinterpret_cast<Real*>(shared_memory()), kNone, Max());
  where_best = first_token(best == largest ? where_best : kNoToken);
  where_nan = first_token(where_nan);
  if (threadIdx.x != 0) return;
  const int64_t where = where_nan != kNoToken ? where_nan : where_best;
  p.out[blockIdx.x] = where == kNoToken ? p.sign * kNone : p.values[where];
  if (p.index) p.index[blockIdx.x] = where == kNoToken ? -1 : where;
}

template <class Real>
struct BroadcastParameters {
  const int64_t* offsets;
  int64_t num_tokens;
  const Real* segment_values;
  const Real* weights;
  Real* out;
};

template <class Real>
__global__ void __launch_bounds__(kThreads) segment_broadcast(BroadcastParameters<Real> p) {
  const Ends ends = ends_of(p.offsets, p.num_tokens);
  if (ends.begin == ends.end) return;
  const Real value = p.segment_values[blockIdx.x];
#pragma unroll 4
  for (int64_t i = ends.begin + threadIdx.x; i < ends.end; i += kThreads) {
    const Real weight = p.weights ? p.weights[i] : Real(1);
    p.out[i] = weight == Real(0) ? Real(0) : weight * value;
  }
}

// -- groups ---------------------------------------------------------------------------------------

template <class Real>
struct GroupParameters {
  const int64_t* offsets;
  int64_t num_tokens;
  const Real* values;
  const uint8_t* mask;
  int64_t* count;
  Real* mean;
  Real* std;
  Real* leave_one_out_mean;
  int32_t correction;
};

__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }

template <class Real>
__global__ void __launch_bounds__(kThreads) group_statistics(GroupParameters<Real> p) {
  const Ends ends = ends_of(p.offsets, p.num_tokens);
  const auto counts = [&](int64_t i) { return p.mask == nullptr || p.mask[i] != 0; };
  const auto value = [&](int64_t i) { return static_cast<double>(p.values[i]); };
  const auto sum_over_block = [](auto x) {
    return reduce_block(x, reinterpret_cast<decltype(x)*>(shared_memory()), decltype(x)(0), Sum());
  };
  // sums are of differences to one member: then equal members have exactly their value for a mean
  // and exactly 0 for a std, in float64 too
  int64_t chosen = kNoToken;
  for (int64_t i = ends.begin + threadIdx.x; i < ends.end && chosen == kNoToken; i += kThreads) {
    if (counts(i) && is_finite(value(i))) chosen = i;
  }
  chosen = first_token(chosen);
  const double origin = chosen == kNoToken ? 0.0 : value(chosen);
  int64_t count = 0, num_finite = 0;
  double sum = 0.0, finite_sum = 0.0;
  for (int64_t i = ends.begin + threadIdx.x; i < ends.end; i += kThreads) {
    if (!counts(i)) continue;
    const double x = value(i) - origin;
    ++count;
    sum += x;
    if (is_finite(x)) {
      ++num_finite;
      finite_sum += x;
    }
  }
  count = sum_over_block(count);
  num_finite = sum_over_block(num_finite);
  sum = sum_over_block(sum);
  finite_sum = sum_over_block(finite_sum);
  const double centre = count == 0 ? 0.0 : sum / static_cast<double>(count);
  double squares = 0.0;
  for (int64_t i = ends.begin + threadIdx.x; i < ends.end; i += kThreads) {
    if (!counts(i)) continue;
    const double deviation = (value(i) - origin) - centre;
    squares += deviation * deviation;
  }
  squares = sum_over_block(squares);
  if (threadIdx.x == 0) {
    const double degrees = static_cast<double>(count - p.correction);
    p.count[blockIdx.x] = count;
    p.mean[blockIdx.x] = static_cast<Real>(origin + centre);
    p.std[blockIdx.x] = static_cast<Real>(degrees > 0.0 ? ::sqrt(squares / degrees) : 0.0);
  }
  for (int64_t i = ends.begin + threadIdx.x; i < ends.end; i += kThreads) {
    const bool is_member = counts(i);
    const int64_t others = count - is_member;
    double mean = origin + centre;
    if (others == 0) {
      mean = 0.0;
    } else if (is_member) {
      const double x = value(i) - origin;
      if (num_finite == count) {
        mean = origin + (centre + (centre - x) / static_cast<double>(others));
      } else if (num_finite == others && !is_finite(x)) {
        // leaving out the one member that is not finite leaves a finite mean
        mean = origin + finite_sum / static_cast<double>(others);
      }
    }
    p.leave_one_out_mean[i] = static_cast<Real>(mean);
  }
}

// -- launches -------------------------------------------------------------------------------------

template <class Kernel, class Parameters>
void launch_per_segment(const opd_segments_t& segments, void* stream, Kernel kernel,
                        const Parameters& parameters) {
  launch({segments.num_segments, kThreads, kSharedBytes}, stream, kernel, parameters);
}

template <class Real>
void scan(const opd_segment_scan_args_t& args, void* stream) {
  ScanParameters<Real> parameters{args.segments.offsets,
                                  args.segments.num_tokens,
                                  static_cast<const Real*>(args.values),
                                  static_cast<Real*>(args.out),
                                  args.scratch,
                                  {},
                                  std::pow(args.discount, static_cast<double>(args.first_step)),
                                  args.first_step,
                                  args.discount == 0.0 ? 1 : args.num_steps,
                                  args.stride,
                                  args.prefix != 0,
                                  args.discount == 0.0 && args.first_step > 0};
  for (int j = 0; j < kPowers; ++j) parameters.powers[j] = std::pow(args.discount, double(1 << j));
  launch_per_segment(args.segments, stream, &segment_scan<Real>, parameters);
}

template <class Real>
void reduce(const opd_segment_reduce_args_t& args, void* stream) {
  const bool is_extreme = args.reduction == OPD_MAX || args.reduction == OPD_MIN;
  const ReduceParameters<Real> parameters{args.segments.offsets,
                                          args.segments.num_tokens,
                                          static_cast<const Real*>(args.values),
                                          static_cast<const Real*>(args.weights),
                                          static_cast<Real*>(args.out),
                                          args.index,
                                          args.reduction == OPD_MEAN,
                                          args.reduction == OPD_MIN ? Real(-1) : Real(1)};
  launch_per_segment(args.segments, stream,
                     is_extreme ? &segment_extreme<Real> : &segment_sum<Real>, parameters);
}

template <class Real>
void broadcast(const opd_segment_broadcast_args_t& args, void* stream) {
  const BroadcastParameters<Real> parameters{
      args.segments.offsets, args.segments.num_tokens,
      static_cast<const Real*>(args.segment_values), static_cast<const Real*>(args.weights),
      static_cast<Real*>(args.out)};
  launch_per_segment(args.segments, stream, &segment_broadcast<Real>, parameters);
}

template <class Real>
void statistics(const opd_group_statistics_args_t& args, void* stream) {
  const GroupParameters<Real> parameters{args.segments.offsets,
                                         args.segments.num_tokens,
                                         static_cast<const Real*>(args.values),
                                         args.mask,
                                         args.count,
                                         static_cast<Real*>(args.mean),
                                         static_cast<Real*>(args.std),
                                         static_cast<Real*>(args.leave_one_out_mean),
                                         args.correction};
  launch_per_segment(args.segments, stream, &group_statistics<Real>, parameters);
}

}  // namespace
}  // namespace cuda
}  // namespace opd

#define OPD_SEGMENTS(NAME, ARGS, FUNCTION)                                    \
  opd_status_t NAME(const ARGS* args, void* stream) {                         \
    return opd::guarded([&] {                                                 \
      opd::segment_scan::check_args(args);                                    \
      const bool is_float64 = opd::segment_scan::is_float64(args->segments);  \
      is_float64 ? opd::cuda::FUNCTION<double>(*args, stream)                 \
                 : opd::cuda::FUNCTION<float>(*args, stream);                 \
    });                                                                       \
  }

OPD_SEGMENTS(opd_segment_scan_cuda, opd_segment_scan_args_t, scan)
OPD_SEGMENTS(opd_segment_reduce_cuda, opd_segment_reduce_args_t, reduce)
OPD_SEGMENTS(opd_segment_broadcast_cuda, opd_segment_broadcast_args_t, broadcast)
OPD_SEGMENTS(opd_group_statistics_cuda, opd_group_statistics_args_t, statistics)
