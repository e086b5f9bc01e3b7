// SPDX-License-Identifier: Apache-2.0
// What is refused of the arguments of the segment_scan family, in words. Nothing that a pointer in
// them points to is read here, so that it may be memory of a GPU.
#pragma once

#include "check.h"
#include "rows.h"

namespace opd {
namespace segment_scan {

inline constexpr char kScan[] = "segment_scan";
inline constexpr char kReduce[] = "segment_reduce";
inline constexpr char kBroadcast[] = "segment_broadcast";
inline constexpr char kGroup[] = "group_statistics";

inline bool is_float64(const opd_segments_t& segments) { return segments.dtype == OPD_FLOAT64; }

template <class Args>
void check_common(const char* op, const Args* args) {
  check_pointer(op, "args", args);
  check_struct_size(op, args->struct_size, sizeof(*args));
  const opd_segments_t& segments = args->segments;
  OPD_CHECK(segments.num_segments >= 0, op, ": num_segments must be >= 0, got ",
            segments.num_segments);
  OPD_CHECK(segments.num_tokens >= 0, op, ": num_tokens must be >= 0, got ", segments.num_tokens);
  OPD_CHECK(segments.dtype == OPD_FLOAT32 || segments.dtype == OPD_FLOAT64, op,
            ": dtype must be OPD_FLOAT32 or OPD_FLOAT64, got ", segments.dtype);
  check_pointer(op, "offsets", segments.offsets);
}

inline void check_args(const opd_segment_scan_args_t* args) {
  check_common(kScan, args);
  OPD_CHECK(args->discount >= 0.0 && args->discount <= 1.0, kScan,
            ": discount must be in [0, 1], got ", args->discount);
  OPD_CHECK(args->first_step >= 0, kScan, ": first_step must be >= 0, got ", args->first_step);
  OPD_CHECK(args->num_steps >= 1, kScan, ": num_steps must be >= 1, got ", args->num_steps);
  OPD_CHECK(args->stride >= 1, kScan, ": stride must be >= 1, got ", args->stride);
  if (args->segments.num_tokens == 0) return;
  check_pointers(kScan, "values and out", {args->values, args->out});
  OPD_CHECK(args->scratch != nullptr || args->num_steps == 1 ||
                args->num_steps >= args->segments.num_tokens,
            kScan, ": scratch must not be NULL for num_steps ", args->num_steps, " of ",
            args->segments.num_tokens, " tokens");
}

inline void check_args(const opd_segment_reduce_args_t* args) {
  check_common(kReduce, args);
  OPD_CHECK(args->reduction >= OPD_SUM && args->reduction <= OPD_MIN, kReduce,
            ": reduction must be an opd_reduction_t, got ", args->reduction);
  if (args->segments.num_segments == 0) return;
  check_pointer(kReduce, "out", args->out);
  if (args->segments.num_tokens > 0) check_pointer(kReduce, "values", args->values);
}

inline void check_args(const opd_segment_broadcast_args_t* args) {
  check_common(kBroadcast, args);
  if (args->segments.num_tokens == 0) return;
  check_pointers(kBroadcast, "segment_values and out", {args->segment_values, args->out});
}

inline void check_args(const opd_group_statistics_args_t* args) {
  check_common(kGroup, args);
  OPD_CHECK(args->correction == 0 || args->correction == 1, kGroup,
            ": correction must be 0 or 1, got ", args->correction);
  if (args->segments.num_segments == 0) return;
  check_pointers(kGroup, "every output of a group", {args->count, args->mean, args->std});
  if (args->segments.num_tokens > 0) {
    check_pointers(kGroup, "values and leave_one_out_mean",
                   {args->values, args->leave_one_out_mean});
  }
}

}  // namespace segment_scan
}  // namespace opd
