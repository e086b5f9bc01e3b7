// SPDX-License-Identifier: Apache-2.0
// Top-k laws to rows of bytes and back: ids by Elias-Fano, log-probs by a quantiser whose steps are
// small where the probability is. Decoding trusts no byte.
#include "topk_codec_check.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "parallel.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rows are read as little-endian words");

namespace opd {
namespace {

using namespace topk_codec;

// bytes of the longest row, for any vocabulary, and room for a 64-bit access at its end
constexpr int kRowBuffer = kHeaderBytes + 3 * kMaxTopk / 8 + kMaxTopk * (19 + kMaxBits) / 8 + 16;

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

template <class T>
T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <class T>
void store(uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof(value));
}

// At most 32 bits at a bit address.
uint32_t get_bits(const uint8_t* row, int64_t at, int width) {
  return static_cast<uint32_t>(load<uint64_t>(row + at / 8) >> (at % 8) &
                               ((uint64_t(1) << width) - 1));
}

bool is_zero(const uint8_t* row, int64_t begin, int64_t end) {
  for (; begin < end; begin += 32) {
    if (get_bits(row, begin, static_cast<int>(std::min<int64_t>(32, end - begin)))) return false;
  }
  return true;
}

// -- encode ---------------------------------------------------------------------------------------

// Fields of one width side by side, from a byte on.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* to) : to_(to) {}
  void put(uint64_t value, int width) {
    pending_ |= value << num_pending_;
    num_pending_ += width;
    if (num_pending_ < 32) return;
    store(to_, static_cast<uint32_t>(pending_));
    to_ += 4;
    pending_ >>= 32;
    num_pending_ -= 32;
  }
  // After the last one: writes up to 4 bytes, and 0 beyond the fields.
  void finish() {
    for (; num_pending_ > 0; num_pending_ -= 8, pending_ >>= 8) {
      *to_++ = static_cast<uint8_t>(pending_);
    }
  }

 private:
  uint8_t* to_;
  uint64_t pending_ = 0;
  int num_pending_ = 0;
};

// Whether some entry is none, or wrong; what it is, is found out one by one.
OPD_ELEMENTWISE bool is_irregular(const int32_t* __restrict__ ids,
                                  const float* __restrict__ logprobs, int count,
                                  int64_t vocab_size) {
  // ids of a vocabulary of 2^31 are all that an int32 can hold
  const uint32_t largest = static_cast<uint32_t>(vocab_size - 1);
  int irregular = !(logprobs[0] <= kLargestLogprob);
  for (int k = 0; k < count; ++k) irregular |= static_cast<uint32_t>(ids[k]) > largest;
  for (int k = 1; k < count; ++k) irregular |= !(logprobs[k] <= logprobs[k - 1]);
  return irregular != 0;
}

// code_of() of many entries, lane by lane: the guess is at most 1 off.
OPD_ELEMENTWISE void codes_block(const float* __restrict__ logprobs, double top, double scale,
                                 double bend, double last, int count, int32_t* __restrict__ codes) {
  const double inverse = 4.0 / scale;
OPD_IVDEP
  for (int k = 0; k < count; ++k) {
    const double depth = top - static_cast<double>(logprobs[k]);
    double code = static_cast<double>(
        static_cast<int32_t>(0.5 * (std::sqrt(bend * bend + depth * inverse) - bend)));
    code = code > last ? last : code;
    code -= scale * (code * (code + bend)) > depth ? 1.0 : 0.0;
    double next = code + 1.0;
    code = code < last && scale * (next * (next + bend)) <= depth ? next : code;
    next = code + 1.0;
    const double both = scale * (code * (code + bend) + next * (next + bend));
    codes[k] = static_cast<int32_t>(code < last && 2.0 * depth > both ? next : code);
  }
}

// id and position of the entries, ascending by id; `other` is as long.
uint64_t* sort_by_id(uint64_t* keys, uint64_t* other, int count, int64_t vocab_size) {
  for (int shift = 0; (vocab_size - 1) >> shift != 0; shift += 8) {
    uint16_t begins[256] = {};
    const int at = shift + kPositionBits;
    for (int i = 0; i < count; ++i) ++begins[keys[i] >> at & 0xff];
    uint16_t sum = 0;
    for (uint16_t& begin : begins) {
      const uint16_t size = begin;
      begin = sum;
      sum = static_cast<uint16_t>(sum + size);
    }
    for (int i = 0; i < count; ++i) other[begins[keys[i] >> at & 0xff]++] = keys[i];
    std::swap(keys, other);
  }
  return keys;
}

int32_t encode_row(const Layout& at, const int32_t* ids, const float* logprobs, float tail,
                   uint8_t* out) {
  uint32_t faults = value_faults(tail);
  int count = at.num_topk;
  if (is_irregular(ids, logprobs, at.num_topk, at.vocab_size)) {
    for (int k = count = 0; k < at.num_topk; ++k) {
      faults |= entry_faults(ids, logprobs, k, at.vocab_size);
      count += ids[k] >= 0;
    }
  }
  uint8_t row[kRowBuffer];
  std::memset(row, 0, static_cast<size_t>(at.row_bytes));
  uint64_t buffers[2][kMaxTopk];
  uint64_t* by_id = buffers[0];
  if (faults == 0) {
    for (int k = 0; k < count; ++k) {
      by_id[k] = static_cast<uint64_t>(ids[k]) << kPositionBits | static_cast<uint64_t>(k);
    }
    by_id = sort_by_id(by_id, buffers[1], count, at.vocab_size);
    bool repeats = false;
    for (int i = 1; i < count; ++i) {
      repeats |= by_id[i] >> kPositionBits == by_id[i - 1] >> kPositionBits;
    }
    if (repeats) faults |= fault(OPD_CODEC_DUPLICATE);
  }
  if (faults != 0) {
    store(row, static_cast<uint16_t>(kRefused));
    std::memcpy(out, row, static_cast<size_t>(at.row_bytes));
    return status_of(faults);
  }
  // those of probability 0 are the last ones
  int num_finite = count;
  while (num_finite > 0 && logprobs[num_finite - 1] == kNegativeInfinity) --num_finite;
  const float top = count > 0 ? logprobs[0] : kNegativeInfinity;
  const double range =
      num_finite > 0 ? static_cast<double>(top) - static_cast<double>(logprobs[num_finite - 1]) : 0.0;
  const uint32_t scale_bits = scale_bits_of(at, range);
  store(row, static_cast<uint16_t>(count));
  store(row + 2, static_cast<uint16_t>(scale_bits));
  store(row + 4, top);
  store(row + 8, tail);
  int32_t codes[kMaxTopk];
  std::fill(codes + num_finite, codes + count, at.absent_code);
  if (scale_bits == 0) {
    std::fill(codes, codes + num_finite, 0);
  } else {
    codes_block(logprobs, top, scale_value(scale_bits), at.bend, at.last_code, num_finite, codes);
  }
  const uint64_t low_mask = (uint64_t(1) << at.low_bits) - 1;
  BitWriter low(row + at.low_begin / 8), code(row + at.codes_begin / 8);
  for (int i = 0; i < count; ++i) {
    const uint64_t id = by_id[i] >> kPositionBits;
    const uint64_t bit = (id >> at.low_bits) + static_cast<uint64_t>(i);
    row[kHeaderBytes + bit / 8] |= static_cast<uint8_t>(1u << bit % 8);
    low.put(id & low_mask, at.low_bits);
    code.put(static_cast<uint64_t>(codes[by_id[i] & (kMaxTopk - 1)]), at.bits);
  }
  low.finish();
  code.finish();
  std::memcpy(out, row, static_cast<size_t>(at.row_bytes));
  return OPD_CODEC_OK;
}

// -- decode ---------------------------------------------------------------------------------------

uint32_t read_ids(const Layout& at, const uint8_t* row, int count, int32_t* ids) {
  int found = 0;
  int64_t last = -1;
  for (int word_at = 0; word_at < at.high_bits; word_at += 64) {
    uint64_t word = load<uint64_t>(row + (at.high_begin + word_at) / 8);
    const int left = at.high_bits - word_at;
    if (left < 64) word &= (uint64_t(1) << left) - 1;
    for (; word != 0; word &= word - 1, ++found) {
      if (found == count) return fault(OPD_CODEC_ROW_IDS);
      const int64_t high = word_at + __builtin_ctzll(word) - found;
      const int64_t low =
          get_bits(row, at.low_begin + static_cast<int64_t>(found) * at.low_bits, at.low_bits);
      const int64_t id = high << at.low_bits | low;
      if (id <= last || id >= at.vocab_size) return fault(OPD_CODEC_ROW_IDS);
      ids[found] = static_cast<int32_t>(last = id);
    }
  }
  return found == count ? 0 : fault(OPD_CODEC_ROW_IDS);
}

// One pass of a stable counting sort, by the digit of `width` bits at `shift`. counts: of each digit.
void sort_by_digit(const uint32_t* from, int count, int shift, int width, uint16_t* counts,
                   uint32_t* to) {
  const uint32_t mask = (1u << width) - 1;
  uint16_t sum = 0;
  for (uint32_t digit = 0; digit <= mask; ++digit) {
    const uint16_t size = counts[digit];
    counts[digit] = sum;
    sum = static_cast<uint16_t>(sum + size);
  }
  for (int i = 0; i < count; ++i) to[counts[from[i] >> shift & mask]++] = from[i];
}

// logprob_of() of many codes, lane by lane.
OPD_ELEMENTWISE void logprobs_block(const uint32_t* __restrict__ keys, double top, double scale,
                                    double bend, uint32_t absent, int count,
                                    float* __restrict__ logprobs) {
  const double smallest = -static_cast<double>(std::numeric_limits<float>::max());
OPD_IVDEP
  for (int k = 0; k < count; ++k) {
    const uint32_t key = keys[k] >> kPositionBits;
    const double code = static_cast<double>(static_cast<int32_t>(key));
    const double value = top - scale * (code * (code + bend));
    const float logprob = static_cast<float>(value < smallest ? smallest : value);
    logprobs[k] = key == absent ? kNegativeInfinity : logprob;
  }
}

int32_t decode_row(const Layout& at, const uint8_t* bytes, int32_t* ids, float* logprobs,
                   float* tail) {
  uint8_t row[kRowBuffer];
  std::memcpy(row, bytes, static_cast<size_t>(at.row_bytes));
  std::memset(row + at.row_bytes, 0, 8);
  const Header header = header_of(at, load<uint16_t>(row), load<uint16_t>(row + 2),
                                  load<float>(row + 4), load<float>(row + 8));
  uint32_t faults = header.faults;
  const int count = header.count;
  int32_t by_id[kMaxTopk];
  uint32_t keys[2][kMaxTopk];
  // of the two digits that a code is sorted by
  const int low_width = at.bits / 2, high_width = at.bits - low_width;
  uint16_t low_counts[256] = {}, high_counts[256] = {};
  if (faults == 0) faults |= read_ids(at, row, count, by_id);
  if (faults == 0) {
    const uint32_t low_mask = (1u << low_width) - 1;
    bool has_top = false, is_wrong = false;
    for (int i = 0; i < count; ++i) {
      const uint32_t code =
          get_bits(row, at.codes_begin + static_cast<int64_t>(i) * at.bits, at.bits);
      has_top |= code == 0;
      is_wrong |= !is_code(at, header, code);
      ++low_counts[code & low_mask];
      ++high_counts[code >> low_width];
      keys[0][i] = code << kPositionBits | static_cast<uint32_t>(i);
    }
    if (is_wrong || header.has_top != has_top) faults |= fault(OPD_CODEC_ROW_CODES);
    if (!is_zero(row, at.high_begin + at.high_bits, at.low_begin) ||
        !is_zero(row, at.low_begin + static_cast<int64_t>(count) * at.low_bits, at.codes_begin) ||
        !is_zero(row, at.codes_begin + static_cast<int64_t>(count) * at.bits,
                 8 * static_cast<int64_t>(at.row_bytes))) {
      faults |= fault(OPD_CODEC_ROW_PADDING);
    }
  }
  if (faults != 0) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::fill(ids, ids + at.num_topk, -1);
    std::fill(logprobs, logprobs + at.num_topk, nan);
    *tail = nan;
    return status_of(faults);
  }
  sort_by_digit(keys[0], count, kPositionBits, low_width, low_counts, keys[1]);
  sort_by_digit(keys[1], count, kPositionBits + low_width, high_width, high_counts, keys[0]);
  for (int k = 0; k < count; ++k) ids[k] = by_id[keys[0][k] & (kMaxTopk - 1)];
  logprobs_block(keys[0], header.top, scale_value(header.scale_bits), at.bend,
                 static_cast<uint32_t>(at.absent_code), count, logprobs);
  std::fill(ids + count, ids + at.num_topk, -1);
  std::fill(logprobs + count, logprobs + at.num_topk, kNegativeInfinity);
  *tail = header.tail;
  return OPD_CODEC_OK;
}

}  // namespace
}  // namespace opd

opd_status_t opd_topk_codec_encode_cpu(const opd_topk_codec_args_t* args) {
  return opd::guarded([&] {
    opd::topk_codec::check_args(args);
    const auto at = opd::topk_codec::layout_of(args->num_topk, args->vocab_size, args->bits);
    opd::parallel_rows(args->parallel_for, args->num_tokens, [&](int64_t row) {
      args->status[row] = opd::encode_row(at, args->ids + row * at.num_topk,
                                          args->logprobs + row * at.num_topk,
                                          args->tail_logprob[row], args->codes + row * at.row_bytes);
    });
  });
}

opd_status_t opd_topk_codec_decode_cpu(const opd_topk_codec_args_t* args) {
  return opd::guarded([&] {
    opd::topk_codec::check_args(args);
    const auto at = opd::topk_codec::layout_of(args->num_topk, args->vocab_size, args->bits);
    opd::parallel_rows(args->parallel_for, args->num_tokens, [&](int64_t row) {
      args->status[row] = opd::decode_row(at, args->codes + row * at.row_bytes,
                                          args->ids + row * at.num_topk,
                                          args->logprobs + row * at.num_topk,
                                          args->tail_logprob + row);
    });
  });
}
