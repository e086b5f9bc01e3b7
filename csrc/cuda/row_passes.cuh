// SPDX-License-Identifier: Apache-2.0
// A block's passes over one row in 16-byte pieces: one that reads, one that makes each logit its
// gradient, one that writes zeros.
#pragma once

#include "logits_row.cuh"

namespace opd {
namespace cuda {

// threads of a block, and 16-byte reads that each has in flight
constexpr int kThreads = 512;
constexpr int kReads = 2;

// fn(first column, values) of the pieces [begin, end) of a row.
template <class Storage, class Fn>
__device__ __forceinline__ void read_pieces(const Storage* logits, const Pieces<Storage>& pieces,
                                            int64_t begin, int64_t end, Fn&& fn) {
  for (int64_t first = begin + threadIdx.x; first < end; first += kReads * kThreads) {
    float values[kReads][kPerLoad<Storage>];
#pragma unroll
    for (int k = 0; k < kReads; ++k) {
      const int64_t piece = first + k * kThreads;
      if (piece < end) load_16(logits + pieces.column(piece), values[k]);
    }
#pragma unroll
    for (int k = 0; k < kReads; ++k) {
      const int64_t piece = first + k * kThreads;
      if (piece >= end) break;
      fn(pieces.column(piece), values[k]);
    }
  }
}

// values[0 .. N) to N columns; in stores of up to 16 bytes where the first of them is so aligned.
template <int N, class Storage>
__device__ __forceinline__ void store(const float (&values)[N], bool is_aligned, Storage* to) {
  constexpr int kPer = kPerLoad<Storage>;
  if (is_aligned && N % kPer == 0) {
#pragma unroll
    for (int i = 0; i + kPer <= N; i += kPer) store_16(values + i, to + i);
  } else if (is_aligned && N * sizeof(Storage) == 8) {
    union {
      uint2 bits;
      Storage items[8 / sizeof(Storage)];
    } chunk;
#pragma unroll
    for (int i = 0; i < N; ++i) from_real(values[i], &chunk.items[i % (8 / sizeof(Storage))]);
    expect_aligned(to, 8);
    *reinterpret_cast<uint2*>(to) = chunk.bits;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) from_real(values[i], to + i);
  }
}

// Columns [begin, end) of a row become zero.
template <class Storage>
__device__ __forceinline__ void zero(Storage* row, int64_t begin, int64_t end) {
  const Pieces<Storage> pieces(row + begin, end - begin);
  const float zeros[kPerLoad<Storage>] = {};
  const int64_t loose = pieces.loose_column();
  if (loose >= 0) from_real(0.0f, row + begin + loose);
  for (int64_t piece = threadIdx.x; piece < pieces.pieces; piece += kThreads) {
    store_16(zeros, row + begin + pieces.column(piece));
  }
}

// out[column] of a row of logits that fn(first column, values) has turned into their gradient.
// `overlaps`: 16-bit rows of it lie in the float32 rows of the logits, where a column has the bytes
// of a logit further left, so the block reads all of a tile before it writes any of it.
template <class Storage, class Gradient, class Fn>
__device__ __forceinline__ void rewrite_row(const Storage* logits, int64_t vocab_size,
                                            bool overlaps, Gradient* out, Fn&& fn) {
  constexpr int kPer = kPerLoad<Storage>;
  const Pieces<Storage> pieces(logits, vocab_size);
  constexpr int kStoreBytes = kPer * sizeof(Gradient) < 16 ? 8 : 16;
  const bool is_aligned =
      (reinterpret_cast<uintptr_t>(out + pieces.head) & (kStoreBytes - 1)) == 0;
  const auto settle = [&] {
    if (overlaps) __syncthreads();
  };
  // one column for each of the first `count` threads
  const auto loose_columns = [&](int64_t first, int count) {
    const int64_t column = first + threadIdx.x;
    const bool is_mine = static_cast<int>(threadIdx.x) < count;
    float value[1] = {is_mine ? to_real(logits[column]) : 0.0f};
    settle();
    if (!is_mine) return;
    fn(column, value);
    from_real(value[0], out + column);
  };
  loose_columns(0, pieces.head);
  for (int64_t tile = 0; tile < pieces.pieces; tile += kReads * kThreads) {
    float values[kReads][kPer];
#pragma unroll
    for (int k = 0; k < kReads; ++k) {
      const int64_t piece = tile + k * kThreads + threadIdx.x;
      if (piece < pieces.pieces) load_16(logits + pieces.column(piece), values[k]);
    }
    settle();
#pragma unroll
    for (int k = 0; k < kReads; ++k) {
      const int64_t piece = tile + k * kThreads + threadIdx.x;
      if (piece >= pieces.pieces) break;
      const int64_t column = pieces.column(piece);
      fn(column, values[k]);
      store(values[k], is_aligned, out + column);
    }
  }
  loose_columns(vocab_size - pieces.tail, pieces.tail);
}

// Whether a gradient lies in the place of logits of another dtype; refuses rows that do not fit.
inline bool overlaps_logits(const char* op, opd_const_matrix_t logits, opd_matrix_t grad_logits,
                            int64_t num_tokens) {
  const bool overlaps = logits.data == grad_logits.data && logits.dtype != grad_logits.dtype;
  const bool fits = logits.dtype == OPD_FLOAT32 &&
                    (num_tokens == 1 || grad_logits.row_stride == 2 * logits.row_stride);
  OPD_CHECK(!overlaps || fits, op,
            ": grad_logits in the place of logits of another dtype must be 16-bit in that of ",
            "float32, with twice the row_stride ", logits.row_stride, ", got ",
            grad_logits.row_stride);
  return overlaps;
}

}  // namespace cuda
}  // namespace opd
