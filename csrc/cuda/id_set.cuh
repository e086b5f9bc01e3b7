// SPDX-License-Identifier: Apache-2.0
// A set of columns of one row, as bits in shared memory, which a block looks up while it reads the
// row. Duplicates count once, and nothing depends on the order in which threads add.
#pragma once

#include "logits_row.cuh"

namespace opd {
namespace cuda {

// Bits of one window of a row: 2^19 columns, so 64 KiB. A wider row takes several.
constexpr int64_t kWindow = int64_t(1) << 19;

// Shared memory of the set of a row of this length.
inline int64_t id_set_bytes(int64_t vocab_size) {
  // the columns before the first piece take as many bits as a piece
  const int64_t bits = vocab_size + 8 < kWindow ? vocab_size + 8 : kWindow;
  return (bits + 127) / 128 * 16;
}

// The N columns of a piece are N neighbouring bits, the first of them a multiple of N: `shift` is
// what to add to a column for that.
class IdSet {
 public:
  __device__ __forceinline__ IdSet(unsigned char* shared, int64_t vocab_size, int shift)
      : words_(reinterpret_cast<unsigned*>(shared)), vocab_size_(vocab_size), shift_(shift) {}

  // The columns of one window; the whole block calls it, and may look columns up when it returns.
  __device__ __forceinline__ void fill(const int64_t* ids, int64_t num_ids, int64_t window) {
    begin_ = window * kWindow;
    const int64_t left = vocab_size_ + shift_ - begin_;
    size_ = left < kWindow ? left : kWindow;
    __syncthreads();  // of the window before, which others may still look up
    const uint4 none = {0, 0, 0, 0};
    for (int64_t i = threadIdx.x; i < (size_ + 127) / 128; i += blockDim.x) {
      reinterpret_cast<uint4*>(words_)[i] = none;
    }
    __syncthreads();
    for (int64_t k = threadIdx.x; k < num_ids; k += blockDim.x) {
      const int64_t id = ids[k];
      if (id < 0 || id >= vocab_size_) continue;
      if (covers(id)) atomicOr(words_ + word_of(id), 1u << bit_of(id));
    }
    __syncthreads();
  }

  __device__ __forceinline__ bool covers(int64_t column) const {
    const int64_t position = column + shift_ - begin_;
    return position >= 0 && position < size_;
  }

  // Bit i: whether column + i is one of them. N is 1, or as many as a piece has; the window covers
  // them.
  template <int N>
  __device__ __forceinline__ unsigned bits(int64_t column) const {
    return (words_[word_of(column)] >> bit_of(column)) & ((1u << N) - 1);
  }

 private:
  __device__ __forceinline__ unsigned word_of(int64_t column) const {
    return static_cast<unsigned>(column + shift_ - begin_) / 32;
  }
  __device__ __forceinline__ unsigned bit_of(int64_t column) const {
    return static_cast<unsigned>(column + shift_ - begin_) % 32;
  }

  unsigned* words_;
  int64_t vocab_size_, begin_ = 0, size_ = 0;
  int shift_;
};

}  // namespace cuda
}  // namespace opd
