// SPDX-License-Identifier: Apache-2.0
// Sums over the segments of packed tokens: discounted scans, reductions, their transposes, and the
// statistics of groups. All sums are float64, and their order follows from the segment alone, so
// that neither the threads nor the other segments of the pack change a bit.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "parallel.h"
#include "rows.h"
#include "segment_scan_check.h"

namespace opd {
namespace {

using segment_scan::is_float64;

// partial sums side by side, so that a long segment does not wait for one addition after another
constexpr int kSums = 8;

void check_offsets(const char* op, const opd_segments_t& segments) {
  const int64_t* offsets = segments.offsets;
  OPD_CHECK(offsets[0] == 0, op, ": offsets must start at 0, got ", offsets[0]);
  for (int64_t s = 0; s < segments.num_segments; ++s) {
    OPD_CHECK(offsets[s] <= offsets[s + 1], op, ": offsets must not decrease, got ", offsets[s + 1],
              " after ", offsets[s], " at position ", s + 1);
  }
  OPD_CHECK(offsets[segments.num_segments] == segments.num_tokens, op, ": offsets must end at ",
            segments.num_tokens, ", the number of tokens, got ", offsets[segments.num_segments]);
}

template <class Fn>
void for_each_segment(const opd_segments_t& segments, Fn&& fn) {
  parallel_rows(segments.parallel_for, segments.num_segments, [&](int64_t segment) {
    fn(segment, segments.offsets[segment], segments.offsets[segment + 1]);
  });
}

// factor * x, where a factor that has underflowed does not turn an infinity into NaN
inline double scaled(double factor, double x) {
  return factor == 0.0 && std::isinf(x) ? x : factor * x;
}

// The tokens that one sum runs over, in the direction away from where it starts: element m is
// values[m * step], m < count.
template <class T>
struct Line {
  const T* values;
  int64_t step;
  int64_t count;
  double operator[](int64_t m) const { return static_cast<double>(values[m * step]); }
};

// emit(m, sum_k discount^k line[m - k], 0 <= k <= m), for each m
template <class T, class Emit>
void scan_whole(Line<T> line, double discount, Emit&& emit) {
  double sum = 0.0;
  if (discount == 1.0) {
    for (int64_t m = 0; m < line.count; ++m) emit(m, sum += line[m]);
  } else {
    for (int64_t m = 0; m < line.count; ++m) emit(m, sum = line[m] + discount * sum);
  }
}

// The same with k < window < line.count, in time that does not depend on the window and without a
// subtraction, so that what has left the window (an infinity, a NaN) is gone. The line is cut into
// blocks of `window`; a window is a tail of one block, summed backwards into `tails`, and a head of
// the next, summed on the way.
template <class T, class Emit>
void scan_window(Line<T> line, double discount, int64_t window, double* tails, Emit&& emit) {
  scan_whole(Line<T>{line.values, line.step, window}, discount, emit);
  for (int64_t block = window; block < line.count; block += window) {
    double tail = 0.0, factor = 1.0;
    for (int64_t j = window - 1; j > 0; --j) {
      tail += scaled(factor, line[block - window + j]);
      tails[j] = tail;
      factor *= discount;
    }
    double head = 0.0;
    factor = discount;
    for (int64_t m = block; m < std::min(block + window, line.count); ++m) {
      head = line[m] + discount * head;
      const int64_t j = m - block + 1;
      emit(m, j < window ? head + scaled(factor, tails[j]) : head);
      factor *= discount;
    }
  }
}

// Multiples of stride in [0, length). Without the shortcut, many short segments would spend their
// time in this division.
int64_t count_of(int64_t length, int64_t stride) {
  return stride == 1 ? length : (length + stride - 1) / stride;
}

template <class T>
void scan(const opd_segment_scan_args_t& args) {
  const T* values = static_cast<const T*>(args.values);
  T* out = static_cast<T*>(args.out);
  const double factor = std::pow(args.discount, static_cast<double>(args.first_step));
  const int64_t window = args.discount == 0.0 ? 1 : args.num_steps;
  for_each_segment(args.segments, [&](int64_t, int64_t begin, int64_t end) {
    const int64_t length = end - begin;
    // a prefix sum counts positions from the beginning and a suffix sum from the end; from there on
    // they are the same
    const int64_t direction = args.prefix ? 1 : -1;
    const int64_t start = args.prefix ? begin : end - 1;
    // beyond the segment there is nothing, however far a step leads
    const int64_t stride = std::min(args.stride, std::max<int64_t>(length, 1));
    const int64_t steps_inside = count_of(length, stride);
    const bool none =
        args.first_step >= steps_inside || (args.discount == 0.0 && args.first_step > 0);
    const int64_t shift = none ? length : args.first_step * stride;
    for (int64_t m = 0; m < std::min(shift, length); ++m) out[start + direction * m] = T(0);
    if (none) return;
    for (int64_t residue = 0; residue < stride; ++residue) {
      const int64_t count = count_of(length - residue, stride);
      const int64_t first = start + direction * residue;
      const auto emit = [&](int64_t m, double sum) {
        const int64_t position = residue + m * stride + shift;
        if (position >= length) return;
        out[start + direction * position] = static_cast<T>(scaled(factor, sum));
      };
      const Line<T> line{values + first, direction * stride, count};
      if (window == 1) {
        for (int64_t m = 0; m < count; ++m) emit(m, line[m]);
      } else if (window >= count) {
        scan_whole(line, args.discount, emit);
      } else {
        scan_window(line, args.discount, window, args.scratch + begin, emit);
      }
    }
  });
}

struct WeightedSum {
  double values, weights;
};

// sum_i w_i x_i and sum_i w_i over [begin, end)
template <class T>
WeightedSum weighted_sum(const T* values, const T* weights, int64_t begin, int64_t end) {
  double sums[kSums] = {}, totals[kSums] = {};
  int64_t i = begin;
  const auto add = [&](int lane, int64_t token) {
    const double x = static_cast<double>(values[token]);
    if (weights == nullptr) {
      sums[lane] += x;
    } else {
      const double w = static_cast<double>(weights[token]);
      sums[lane] += w == 0.0 ? 0.0 : w * x;
      totals[lane] += w;
    }
  };
  for (; i + kSums <= end; i += kSums) {
    for (int lane = 0; lane < kSums; ++lane) add(lane, i + lane);
  }
  for (; i < end; ++i) add(0, i);
  WeightedSum result{0.0, 0.0};
  for (int lane = 0; lane < kSums; ++lane) {
    result.values += sums[lane];
    result.weights += totals[lane];
  }
  if (weights == nullptr) result.weights = static_cast<double>(end - begin);
  return result;
}

// The first token that attains the largest value times `sign`, or the first NaN; -1 if none counts.
template <class T>
int64_t extreme(const T* values, const T* weights, int64_t begin, int64_t end, T sign) {
  int64_t best = -1;
  for (int64_t i = begin; i < end; ++i) {
    if (weights != nullptr && weights[i] == T(0)) continue;
    if (values[i] != values[i]) return i;
    if (best < 0 || sign * values[i] > sign * values[best]) best = i;
  }
  return best;
}

template <class T>
void reduce(const opd_segment_reduce_args_t& args) {
  const T* values = static_cast<const T*>(args.values);
  const T* weights = static_cast<const T*>(args.weights);
  T* out = static_cast<T*>(args.out);
  for_each_segment(args.segments, [&](int64_t segment, int64_t begin, int64_t end) {
    if (args.reduction == OPD_MAX || args.reduction == OPD_MIN) {
      const T sign = args.reduction == OPD_MAX ? T(1) : T(-1);
      const int64_t best = extreme(values, weights, begin, end, sign);
      out[segment] = best < 0 ? -sign * std::numeric_limits<T>::infinity() : values[best];
      if (args.index != nullptr) args.index[segment] = best;
      return;
    }
    const WeightedSum sum = weighted_sum(values, weights, begin, end);
    const bool is_mean = args.reduction == OPD_MEAN;
    const double mean = sum.weights == 0.0 ? 0.0 : sum.values / sum.weights;
    out[segment] = static_cast<T>(is_mean ? mean : sum.values);
  });
}

template <class T>
void broadcast(const opd_segment_broadcast_args_t& args) {
  const T* segment_values = static_cast<const T*>(args.segment_values);
  const T* weights = static_cast<const T*>(args.weights);
  T* out = static_cast<T*>(args.out);
  for_each_segment(args.segments, [&](int64_t segment, int64_t begin, int64_t end) {
    const T value = segment_values[segment];
    if (weights == nullptr) {
      std::fill(out + begin, out + end, value);
    } else {
      for (int64_t i = begin; i < end; ++i) {
        out[i] = weights[i] == T(0) ? T(0) : weights[i] * value;
      }
    }
  });
}

template <class T>
void group_statistics(const opd_group_statistics_args_t& args) {
  const T* values = static_cast<const T*>(args.values);
  for_each_segment(args.segments, [&](int64_t group, int64_t begin, int64_t end) {
    const auto counts = [&](int64_t i) { return args.mask == nullptr || args.mask[i] != 0; };
    // sums are of differences to one member: then equal members have exactly their value for a mean
    // and exactly 0 for a std, in float64 too
    double origin = 0.0;
    for (int64_t i = begin; i < end; ++i) {
      if (counts(i) && std::isfinite(values[i])) {
        origin = static_cast<double>(values[i]);
        break;
      }
    }
    int64_t count = 0, num_finite = 0;
    double sum = 0.0, finite_sum = 0.0;
    for (int64_t i = begin; i < end; ++i) {
      if (!counts(i)) continue;
      const double x = static_cast<double>(values[i]) - origin;
      ++count;
      sum += x;
      if (std::isfinite(x)) {
        ++num_finite;
        finite_sum += x;
      }
    }
    const double centre = count == 0 ? 0.0 : sum / static_cast<double>(count);
    double squares = 0.0;
    for (int64_t i = begin; i < end; ++i) {
      if (!counts(i)) continue;
      const double deviation = (static_cast<double>(values[i]) - origin) - centre;
      squares += deviation * deviation;
    }
    const double degrees = static_cast<double>(count - args.correction);
    args.count[group] = count;
    static_cast<T*>(args.mean)[group] = static_cast<T>(origin + centre);
    static_cast<T*>(args.std)[group] =
        static_cast<T>(degrees > 0.0 ? std::sqrt(squares / degrees) : 0.0);
    for (int64_t i = begin; i < end; ++i) {
      const bool is_member = counts(i);
      const int64_t others = count - is_member;
      double mean = origin + centre;
      if (others == 0) {
        mean = 0.0;
      } else if (is_member) {
        const double x = static_cast<double>(values[i]) - origin;
        if (num_finite == count) {
          mean = origin + (centre + (centre - x) / static_cast<double>(others));
        } else if (num_finite == others && !std::isfinite(x)) {
          // leaving out the one member that is not finite leaves a finite mean
          mean = origin + finite_sum / static_cast<double>(others);
        }
      }
      static_cast<T*>(args.leave_one_out_mean)[i] = static_cast<T>(mean);
    }
  });
}

}  // namespace
}  // namespace opd

opd_status_t opd_segment_scan_cpu(const opd_segment_scan_args_t* args) {
  return opd::guarded([&] {
    opd::segment_scan::check_args(args);
    opd::check_offsets(opd::segment_scan::kScan, args->segments);
    if (args->segments.num_tokens == 0) return;
    opd::is_float64(args->segments) ? opd::scan<double>(*args) : opd::scan<float>(*args);
  });
}

opd_status_t opd_segment_reduce_cpu(const opd_segment_reduce_args_t* args) {
  return opd::guarded([&] {
    opd::segment_scan::check_args(args);
    opd::check_offsets(opd::segment_scan::kReduce, args->segments);
    opd::is_float64(args->segments) ? opd::reduce<double>(*args) : opd::reduce<float>(*args);
  });
}

opd_status_t opd_segment_broadcast_cpu(const opd_segment_broadcast_args_t* args) {
  return opd::guarded([&] {
    opd::segment_scan::check_args(args);
    opd::check_offsets(opd::segment_scan::kBroadcast, args->segments);
    if (args->segments.num_tokens == 0) return;
    opd::is_float64(args->segments) ? opd::broadcast<double>(*args) : opd::broadcast<float>(*args);
  });
}

opd_status_t opd_group_statistics_cpu(const opd_group_statistics_args_t* args) {
  return opd::guarded([&] {
    opd::segment_scan::check_args(args);
    opd::check_offsets(opd::segment_scan::kGroup, args->segments);
    opd::is_float64(args->segments) ? opd::group_statistics<double>(*args)
                                    : opd::group_statistics<float>(*args);
  });
}
