// SPDX-License-Identifier: Apache-2.0
// Which columns of a gradient [T, V] some token needs, these columns packed side by side, what each
// row sums to in the others, and rows added where the columns belong. A NaN or an infinity is always
// needed: dropping it would hide it.
#include "parallel.h"
#include "rows.h"
#include "sparse_gradient_check.h"

namespace opd {
namespace {

// columns that one thread marks: its marks stay in L1, and a row's part of them is a long read
constexpr int64_t kTileColumns = 4096;

// as wide as the values, so that a comparison fills marks lane by lane
template <class T>
using Mark = std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t>;

template <class T>
OPD_ELEMENTWISE void mark_block(const T* __restrict__ values, T threshold, int64_t count,
                                Mark<T>* __restrict__ marks) {
OPD_IVDEP
  for (int64_t i = 0; i < count; ++i) {
    const T size = values[i] < T(0) ? -values[i] : values[i];
    // not `size > threshold`, which a NaN is not
    marks[i] |= size <= threshold ? Mark<T>(0) : Mark<T>(1);
  }
}

template <class T>
OPD_ELEMENTWISE void dropped_block(const T* __restrict__ values, const uint8_t* __restrict__ kept,
                                   int64_t count, T* __restrict__ out) {
OPD_IVDEP
  for (int64_t i = 0; i < count; ++i) {
    const T size = values[i] < T(0) ? -values[i] : values[i];
    out[i] = kept[i] != 0 ? T(0) : size;
  }
}

template <class T>
OPD_ELEMENTWISE void add_to_lanes(const T* __restrict__ values, int padded,
                                  double* __restrict__ lanes) {
  for (int i = 0; i < padded; i += kLanes) {
OPD_IVDEP
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(values[i + lane]);
  }
}

template <class T>
const T* row_of(const opd_sparse_gradient_args_t& args, int64_t row) {
  return static_cast<const T*>(args.grad_logits.data) + row * args.grad_logits.row_stride;
}

// |token_weights[row]|
template <class T>
T weight_of(const opd_sparse_gradient_args_t& args, int64_t row) {
  return args.token_weights ? std::fabs(static_cast<const T*>(args.token_weights)[row]) : T(1);
}

template <class T>
void mark(const opd_sparse_gradient_args_t& args) {
  const int64_t num_tiles = (args.vocab_size + kTileColumns - 1) / kTileColumns;
  parallel_rows(args.parallel_for, num_tiles, [&](int64_t tile) {
    const int64_t begin = tile * kTileColumns;
    const int64_t count = std::min(kTileColumns, args.vocab_size - begin);
    alignas(64) Mark<T> marks[kTileColumns] = {};
    for (int64_t row = 0; row < args.num_tokens; ++row) {
      const T weight = weight_of<T>(args, row);
      if (weight == T(0)) continue;
      // finite, so that an infinite weight does not drop infinities; a NaN stays one
      const T threshold = std::min(static_cast<T>(args.tolerance) * weight,
                                   std::numeric_limits<T>::max());
      mark_block(row_of<T>(args, row) + begin, threshold, count, marks);
    }
    for (int64_t i = 0; i < count; ++i) args.kept[begin + i] = static_cast<uint8_t>(marks[i]);
  });
}

template <class T>
void pack(const opd_sparse_gradient_args_t& args) {
  parallel_rows(args.parallel_for, args.num_tokens, [&](int64_t row) {
    T* const packed = static_cast<T*>(args.packed.data) + row * args.packed.row_stride;
    T* const dropped = static_cast<T*>(args.dropped) + row;
    const T weight = weight_of<T>(args, row);
    if (weight == T(0)) {
      std::fill(packed, packed + args.num_columns, T(0));
      *dropped = T(0);
      return;
    }
    const T* const values = row_of<T>(args, row);
    Block<T> sizes;
    double lanes[kLanes] = {};
    for_each_block(args.vocab_size, [&](int64_t begin, int count) {
      const int padded = round_up_to_lanes(count);
      dropped_block(values + begin, args.kept + begin, count, sizes.values);
      std::fill(sizes.values + count, sizes.values + padded, T(0));
      add_to_lanes(sizes.values, padded, lanes);
    });
    double sum = 0.0;
    for (const double lane : lanes) sum += lane;
    *dropped = static_cast<T>(sum / static_cast<double>(weight));
    for (int64_t k = 0; k < args.num_columns; ++k) packed[k] = values[args.columns[k]];
  });
}

template <class T>
OPD_ELEMENTWISE void add_row(const T* __restrict__ values, int64_t count, T* __restrict__ out) {
OPD_IVDEP
  for (int64_t i = 0; i < count; ++i) out[i] += values[i];
}

// No column repeats, so that no two threads have the same row of the target.
template <class T>
void add_rows(const opd_sparse_gradient_add_args_t& args) {
  parallel_rows(args.parallel_for, args.num_columns, [&](int64_t k) {
    add_row(static_cast<const T*>(args.rows.data) + k * args.rows.row_stride, args.width,
            static_cast<T*>(args.target.data) + args.columns[k] * args.target.row_stride);
  });
}

void check_ascending(const int64_t* columns, int64_t num_columns, int64_t vocab_size) {
  int64_t last = -1;
  for (int64_t k = 0; k < num_columns; ++k) {
    OPD_CHECK(columns[k] > last && columns[k] < vocab_size, sparse_gradient::kOp,
              ": columns must ascend in [0, ", vocab_size, "), got ", columns[k], " at position ",
              k);
    last = columns[k];
  }
}

}  // namespace
}  // namespace opd

opd_status_t opd_sparse_gradient_mark_cpu(const opd_sparse_gradient_args_t* args) {
  return opd::guarded([&] {
    opd::sparse_gradient::check_mark(args);
    args->grad_logits.dtype == OPD_FLOAT64 ? opd::mark<double>(*args) : opd::mark<float>(*args);
  });
}

opd_status_t opd_sparse_gradient_pack_cpu(const opd_sparse_gradient_args_t* args) {
  return opd::guarded([&] {
    opd::sparse_gradient::check_pack(args);
    opd::check_ascending(args->columns, args->num_columns, args->vocab_size);
    args->grad_logits.dtype == OPD_FLOAT64 ? opd::pack<double>(*args) : opd::pack<float>(*args);
  });
}

opd_status_t opd_sparse_gradient_add_cpu(const opd_sparse_gradient_add_args_t* args) {
  return opd::guarded([&] {
    opd::sparse_gradient::check_add(args);
    opd::check_ascending(args->columns, args->num_columns, args->vocab_size);
    args->target.dtype == OPD_FLOAT64 ? opd::add_rows<double>(*args) : opd::add_rows<float>(*args);
  });
}
