// SPDX-License-Identifier: Apache-2.0
// Top-k laws to rows of bytes and back, a block per row: the row is an image in shared memory, its
// entries are sorted there. The bytes and the numbers are those of csrc/core/topk_codec.cpp.
#include "bits.cuh"
#include "reduce.cuh"
#include "sort.cuh"
#include "topk_codec_check.h"

namespace opd {
namespace cuda {
namespace {

using namespace topk_codec;

constexpr int kMostThreads = 256;

struct Parameters {
  Layout at;
  int32_t num_sorted;  // the power of two that num_topk is padded to
  int32_t* ids;
  float* logprobs;
  float* tail_logprob;
  uint8_t* codes;
  int32_t* status;
};

// Bits and where they are in the words of a row; a field of up to 31 bits may lie in two words.
__device__ __forceinline__ uint32_t get_bits(const uint32_t* words, int64_t at, int width) {
  const uint64_t both = static_cast<uint64_t>(words[at / 32 + 1]) << 32 | words[at / 32];
  return static_cast<uint32_t>(both >> (at % 32) & ((uint64_t(1) << width) - 1));
}

// The bits there are 0, so that adding is setting, also when other threads set their neighbours.
__device__ __forceinline__ void put_bits(uint32_t* words, int64_t at, uint32_t value) {
  const uint64_t both = static_cast<uint64_t>(value) << (at % 32);
  const uint32_t low = static_cast<uint32_t>(both), high = static_cast<uint32_t>(both >> 32);
  if (low != 0) atomicAdd(words + at / 32, low);
  if (high != 0) atomicAdd(words + at / 32 + 1, high);
}

// -- encode ---------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kMostThreads)
    topk_codec_encode(const __grid_constant__ Parameters p) {
  const Layout& at = p.at;
  const int64_t row = blockIdx.x;
  const int32_t* const ids = p.ids + row * at.num_topk;
  const float* const logprobs = p.logprobs + row * at.num_topk;
  uint64_t* const keys = reinterpret_cast<uint64_t*>(shared_memory());
  uint32_t* const scratch = reinterpret_cast<uint32_t*>(keys + p.num_sorted);
  uint32_t* const words = scratch + kWarp;
  const int num_words = at.row_bytes / 4;

  const float tail = p.tail_logprob[row];
  uint32_t faults = value_faults(tail);
  uint32_t counts = 0;  // of entries, and 2^16 times that of finite ones
  for (int k = threadIdx.x; k < p.num_sorted; k += blockDim.x) {
    keys[k] = ~uint64_t(0);
    if (k >= at.num_topk) continue;
    faults |= entry_faults(ids, logprobs, k, at.vocab_size);
    const int64_t id = ids[k];
    if (id < 0) continue;
    keys[k] = static_cast<uint64_t>(id) << kPositionBits | static_cast<uint64_t>(k);
    counts += logprobs[k] >= -std::numeric_limits<float>::max() ? 0x10001u : 1u;
  }
  for (int w = threadIdx.x; w <= num_words; w += blockDim.x) words[w] = 0;
  faults = reduce_block(faults, scratch, 0u, BitOr());
  counts = reduce_block(counts, scratch, 0u, Sum());
  const int count = static_cast<int>(counts & 0xffffu), num_finite = static_cast<int>(counts >> 16);
  if (faults == 0) {
    sort_block(keys, p.num_sorted, blockDim.x, Smaller());
    for (int i = threadIdx.x + 1; i < count; i += blockDim.x) {
      if (keys[i] >> kPositionBits == keys[i - 1] >> kPositionBits) {
        faults |= fault(OPD_CODEC_DUPLICATE);
      }
    }
    faults = reduce_block(faults, scratch, 0u, BitOr());
  }
  if (faults == 0) {
    const float top = count > 0 ? logprobs[0] : kMinusInfinity;
    const double range =
        num_finite > 0 ? static_cast<double>(top) - static_cast<double>(logprobs[num_finite - 1])
                       : 0.0;
    const uint32_t scale_bits = scale_bits_of(at, range);
    const double scale = scale_value(scale_bits);
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      const int64_t id = static_cast<int64_t>(keys[i] >> kPositionBits);
      const int k = static_cast<int>(keys[i] & (kMaxTopk - 1));
      const int32_t code =
          k < num_finite
              ? code_of(at, scale, static_cast<double>(top) - static_cast<double>(logprobs[k]))
              : at.absent_code;
      put_bits(words, at.high_begin + (id >> at.low_bits) + i, 1);
      put_bits(words, at.low_begin + i * at.low_bits,
               static_cast<uint32_t>(id & ((int64_t(1) << at.low_bits) - 1)));
      put_bits(words, at.codes_begin + i * at.bits, static_cast<uint32_t>(code));
    }
    if (threadIdx.x == 0) {
      words[0] = static_cast<uint32_t>(count) | scale_bits << 16;
      words[1] = static_cast<uint32_t>(detail::float_to_bits(top));
      words[2] = static_cast<uint32_t>(detail::float_to_bits(tail));
    }
  } else if (threadIdx.x == 0) {
    words[0] = kRefused;
  }
  __syncthreads();
  // rows have a multiple of 4 bytes and torch's memory begins at one; a caller's may not
  uint8_t* const out = p.codes + row * at.row_bytes;
  if (reinterpret_cast<uintptr_t>(out) % 4 == 0) {
    for (int w = threadIdx.x; w < num_words; w += blockDim.x) {
      reinterpret_cast<uint32_t*>(out)[w] = words[w];
    }
  } else {
    for (int b = threadIdx.x; b < at.row_bytes; b += blockDim.x) {
      out[b] = static_cast<uint8_t>(words[b / 4] >> (8 * (b % 4)));
    }
  }
  if (threadIdx.x == 0) p.status[row] = status_of(faults);
}

// -- decode ---------------------------------------------------------------------------------------

// How many bits of the high parts are set before each word; the last is of all of them. One warp.
__device__ __forceinline__ void count_before(const uint32_t* high, int num_high, uint32_t* before) {
  if (threadIdx.x >= kWarp) return;
  const int lane = threadIdx.x;
  uint32_t sum = 0;
  for (int begin = 0; begin < num_high; begin += kWarp) {
    const int w = begin + lane;
    const uint32_t own = w < num_high ? static_cast<uint32_t>(count_bits(high[w])) : 0;
    const uint32_t inclusive = sum_to_lane(own);
    if (w < num_high) before[w] = sum + inclusive - own;
    sum += __shfl_sync(kAllLanes, inclusive, kWarp - 1);
  }
  if (lane == 0) before[num_high] = sum;
}

__device__ __forceinline__ bool is_zero(const uint32_t* words, int64_t begin, int64_t end) {
  bool zero = true;
  for (begin += 31 * threadIdx.x; begin < end; begin += 31 * blockDim.x) {
    const int64_t left = end - begin;
    zero &= get_bits(words, begin, left < 31 ? static_cast<int>(left) : 31) == 0;
  }
  return zero;
}

__global__ void __launch_bounds__(kMostThreads)
    topk_codec_decode(const __grid_constant__ Parameters p) {
  // in the bits of the faults
  constexpr uint32_t kSawTop = 1u << 31;
  const Layout& at = p.at;
  const int64_t row = blockIdx.x;
  const int num_words = at.row_bytes / 4, num_high = (at.high_bits + 31) / 32;
  uint32_t* const scratch = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* const keys = scratch + kWarp;
  int32_t* const entry_ids = reinterpret_cast<int32_t*>(keys + p.num_sorted);
  uint32_t* const words = reinterpret_cast<uint32_t*>(entry_ids + p.num_sorted);
  uint32_t* const high = words + num_words + 1;
  uint32_t* const before = high + num_high;

  const uint8_t* const bytes = p.codes + row * at.row_bytes;
  const bool is_aligned = reinterpret_cast<uintptr_t>(bytes) % 4 == 0;
  for (int w = threadIdx.x; w <= num_words; w += blockDim.x) {
    uint32_t word = 0;
    if (w < num_words && is_aligned) {
      word = reinterpret_cast<const uint32_t*>(bytes)[w];
    } else if (w < num_words) {
      for (int b = 0; b < 4; ++b) word |= static_cast<uint32_t>(bytes[4 * w + b]) << (8 * b);
    }
    words[w] = word;
  }
  __syncthreads();
  const Header header = header_of(at, words[0] & 0xffffu, words[0] >> 16,
                                  detail::bits_to_float(static_cast<int32_t>(words[1])),
                                  detail::bits_to_float(static_cast<int32_t>(words[2])));
  const int count = header.faults ? 0 : header.count;
  // the high parts begin at a word: 12 bytes come before them
  for (int w = threadIdx.x; w < num_high; w += blockDim.x) {
    const int left = at.high_bits - 32 * w;
    high[w] = words[kHeaderBytes / 4 + w] & (left < 32 ? (1u << left) - 1 : ~0u);
  }
  __syncthreads();
  count_before(high, num_high, before);
  __syncthreads();
  uint32_t faults = header.faults;
  if (!header.faults && before[num_high] != static_cast<uint32_t>(count)) {
    faults |= fault(OPD_CODEC_ROW_IDS);
  }
  if (faults == 0) {
    for (int w = threadIdx.x; w < num_high; w += blockDim.x) {
      int64_t i = before[w];
      for (uint32_t bits = high[w]; bits != 0; bits &= bits - 1, ++i) {
        const int64_t part = 32 * w + lowest_bit(bits) - i;
        const int64_t id = part << at.low_bits |
                           get_bits(words, at.low_begin + i * at.low_bits, at.low_bits);
        if (id >= at.vocab_size) faults |= fault(OPD_CODEC_ROW_IDS);
        entry_ids[i] = static_cast<int32_t>(id);
      }
    }
    // not before every thread has asked for it above
    __syncthreads();
    for (int64_t i = threadIdx.x; i < p.num_sorted; i += blockDim.x) {
      keys[i] = ~0u;
      if (i >= count) continue;
      if (i > 0 && entry_ids[i] <= entry_ids[i - 1]) faults |= fault(OPD_CODEC_ROW_IDS);
      const uint32_t code = get_bits(words, at.codes_begin + i * at.bits, at.bits);
      if (!is_code(at, header, code)) faults |= fault(OPD_CODEC_ROW_CODES);
      if (code == 0) faults |= kSawTop;
      keys[i] = code << kPositionBits | static_cast<uint32_t>(i);
    }
    const int64_t ids_end = at.low_begin + static_cast<int64_t>(count) * at.low_bits;
    const int64_t codes_end = at.codes_begin + static_cast<int64_t>(count) * at.bits;
    if (!is_zero(words, at.high_begin + at.high_bits, at.low_begin) ||
        !is_zero(words, ids_end, at.codes_begin) ||
        !is_zero(words, codes_end, 8 * static_cast<int64_t>(at.row_bytes))) {
      faults |= fault(OPD_CODEC_ROW_PADDING);
    }
    faults = reduce_block(faults, scratch, 0u, BitOr());
    const bool saw_top = (faults & kSawTop) != 0;
    faults &= ~kSawTop;
    // the CPU looks at codes only where the ids are right
    if (!(faults & fault(OPD_CODEC_ROW_IDS)) && saw_top != header.has_top) {
      faults |= fault(OPD_CODEC_ROW_CODES);
    }
  }
  int32_t* const ids = p.ids + row * at.num_topk;
  float* const logprobs = p.logprobs + row * at.num_topk;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (faults == 0) sort_block(keys, p.num_sorted, blockDim.x, Smaller());
  const double scale = scale_value(header.scale_bits);
  for (int k = threadIdx.x; k < at.num_topk; k += blockDim.x) {
    int32_t id = -1;
    float logprob = faults ? nan : kMinusInfinity;
    if (faults == 0 && k < count) {
      const int32_t code = static_cast<int32_t>(keys[k] >> kPositionBits);
      id = entry_ids[keys[k] & (kMaxTopk - 1)];
      if (code != at.absent_code) logprob = logprob_of(at, header.top, scale, code);
    }
    ids[k] = id;
    logprobs[k] = logprob;
  }
  if (threadIdx.x == 0) {
    p.tail_logprob[row] = faults ? nan : header.tail;
    p.status[row] = status_of(faults);
  }
}

void run(const opd_topk_codec_args_t& args, void* stream, bool encodes) {
  const Layout at = layout_of(args.num_topk, args.vocab_size, args.bits);
  Parameters p{at, 1, args.ids, args.logprobs, args.tail_logprob, args.codes, args.status};
  while (p.num_sorted < at.num_topk) p.num_sorted *= 2;
  int threads = kWarp;
  while (threads < kMostThreads && threads < at.num_topk) threads *= 2;
  const int64_t num_words = at.row_bytes / 4 + 1, num_high = (at.high_bits + 31) / 32;
  const int64_t bytes = encodes ? 8 * p.num_sorted + 4 * (kWarp + num_words)
                                : 4 * (kWarp + 2 * p.num_sorted + num_words + 2 * num_high + 1);
  launch({args.num_tokens, threads, bytes}, stream,
         encodes ? &topk_codec_encode : &topk_codec_decode, p);
}

}  // namespace
}  // namespace cuda
}  // namespace opd

opd_status_t opd_topk_codec_encode_cuda(const opd_topk_codec_args_t* args, void* stream) {
  return opd::guarded([&] {
    opd::topk_codec::check_args(args);
    if (args->num_tokens > 0) opd::cuda::run(*args, stream, true);
  });
}

opd_status_t opd_topk_codec_decode_cuda(const opd_topk_codec_args_t* args, void* stream) {
  return opd::guarded([&] {
    opd::topk_codec::check_args(args);
    if (args->num_tokens > 0) opd::cuda::run(*args, stream, false);
  });
}
