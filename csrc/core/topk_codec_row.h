// SPDX-License-Identifier: Apache-2.0
// A top-k law as a row of bytes: where its fields are, and the quantiser. The same for CPU and CUDA,
// bit for bit: integers, and products in float64 that are exact, so that a fused multiply-add has
// nothing to round differently. docs/topk_codec.md has the row byte by byte.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "opd/math.h"
#include "opd/opd.h"

namespace opd {
namespace topk_codec {

constexpr int64_t kMaxVocab = int64_t(1) << 31;
constexpr int kMaxTopk = 4096, kMinBits = 4, kMaxBits = 16;
// of a position in a row of kMaxTopk entries
constexpr int kPositionBits = 12;
constexpr int kHeaderBytes = 12;
// the count of a row that encode has refused
constexpr uint32_t kRefused = 0xffff;
// a log-probability beyond this is none; below it, it is rounding of somebody's log-softmax
constexpr float kLargestLogprob = 0x1p-10f;
// the smallest normal bfloat16: a GPU that flushes subnormals reads the same scale
constexpr uint32_t kSmallestScale = 0x0080;

// Bit i of a row is bit i % 8 of byte i / 8. Fields, from the first bit of each:
//   0 count (16), 16 scale (16, bfloat16), 32 largest log-prob (32), 64 tail (32),
//   high_begin: the ids' high parts, unary (high_bits), low_begin: their low parts (low_bits each),
//   codes_begin: codes (bits each). Entries ascend by id. Fields begin at bytes, the row has a
//   multiple of 4, and what is not used is 0.
struct Layout {
  int32_t num_topk, bits;
  int64_t vocab_size;
  int32_t low_bits, high_bits;
  int32_t high_begin, low_begin, codes_begin;  // bits
  int32_t row_bytes;
  // codes: 0 .. last_code are finite, absent_code is a log-prob of -inf
  int32_t last_code, absent_code;
  int32_t bend;
};

OPD_HD int32_t bytes_of(int64_t bits) { return static_cast<int32_t>((bits + 7) / 8); }

// Of arguments that check_layout() has passed.
OPD_HD Layout layout_of(int64_t num_topk, int64_t vocab_size, int32_t bits) {
  Layout at{};
  at.num_topk = static_cast<int32_t>(num_topk);
  at.bits = bits;
  at.vocab_size = vocab_size;
  // floor(log2(V / K)), with which Elias-Fano needs at most 2 + low_bits bits per id
  while ((num_topk << (at.low_bits + 1)) <= vocab_size) ++at.low_bits;
  at.high_bits = static_cast<int32_t>(num_topk + ((vocab_size - 1) >> at.low_bits));
  at.high_begin = 8 * kHeaderBytes;
  at.low_begin = at.high_begin + 8 * bytes_of(at.high_bits);
  at.codes_begin = at.low_begin + 8 * bytes_of(num_topk * at.low_bits);
  at.row_bytes = (at.codes_begin / 8 + bytes_of(num_topk * bits) + 3) / 4 * 4;
  at.absent_code = (1 << bits) - 1;
  at.last_code = at.absent_code - 1;
  at.bend = 1 << (bits - 2);
  return at;
}

// Depth below the largest log-prob in units of the scale: c (c + bend). Steps grow from bend + 1 at
// the top to about 9 bend at the bottom: precision where the probability is. Below 2^33.
OPD_HD int64_t units_of(const Layout& at, int64_t code) { return code * (code + at.bend); }

OPD_HD double scale_value(uint32_t scale_bits) {
  return static_cast<double>(detail::bits_to_float(static_cast<int32_t>(scale_bits << 16)));
}

// 8 significant bits by at most 33: exact.
OPD_HD double depth_of(double scale, int64_t units) { return scale * static_cast<double>(units); }

// The smallest normal bfloat16 with scale * units_of(last_code) >= range; 0 for a range of 0.
OPD_HD uint32_t scale_bits_of(const Layout& at, double range) {
  if (!(range > 0.0)) return 0;
  const int64_t units = units_of(at, at.last_code);
  const float guess = static_cast<float>(range / static_cast<double>(units));
  uint32_t bits = static_cast<uint32_t>(detail::float_to_bits(guess)) >> 16;
  bits = bits > kSmallestScale ? bits - 1 : kSmallestScale;
  while (depth_of(scale_value(bits), units) < range) ++bits;
  return bits;
}

// The code whose depth is nearest; of two, the shallower one. The square root only guesses.
OPD_HD int32_t code_of(const Layout& at, double scale, double depth) {
  if (scale == 0.0) return 0;
  const double bend = static_cast<double>(at.bend);
  const double guess = 0.5 * (sqrt(bend * bend + 4.0 * (depth / scale)) - bend);
  int64_t code = guess > 0.0 ? static_cast<int64_t>(guess) : 0;
  if (code > at.last_code) code = at.last_code;
  while (code > 0 && depth_of(scale, units_of(at, code)) > depth) --code;
  while (code < at.last_code && depth_of(scale, units_of(at, code + 1)) <= depth) ++code;
  if (code < at.last_code &&
      2.0 * depth > depth_of(scale, units_of(at, code) + units_of(at, code + 1))) {
    ++code;
  }
  return static_cast<int32_t>(code);
}

OPD_HD float logprob_of(const Layout& at, float top, double scale, int64_t code) {
  // the scale is rounded up: a log-prob near the smallest float32 must not become -inf
  const double smallest = -static_cast<double>(std::numeric_limits<float>::max());
  const double value = static_cast<double>(top) - depth_of(scale, units_of(at, code));
  return static_cast<float>(value < smallest ? smallest : value);
}

OPD_HD bool is_nan(float value) { return value != value; }

// What is wrong with one entry, and with the tail: bit s - 1 of status s.
OPD_HD uint32_t fault(int32_t status) { return 1u << (status - 1); }

OPD_HD uint32_t value_faults(float value) {
  if (is_nan(value)) return fault(OPD_CODEC_NAN);
  return value > kLargestLogprob ? fault(OPD_CODEC_POSITIVE) : 0;
}

OPD_HD uint32_t entry_faults(const int32_t* ids, const float* logprobs, int64_t k,
                             int64_t vocab_size) {
  const int64_t id = ids[k];
  const float logprob = logprobs[k];
  uint32_t faults = value_faults(logprob);
  if (id < -1 || id >= vocab_size) faults |= fault(OPD_CODEC_ID);
  if (id == -1 && logprob >= -std::numeric_limits<float>::max()) {
    faults |= fault(OPD_CODEC_PADDING);
  }
  if (k > 0 && id != -1 && ids[k - 1] == -1) faults |= fault(OPD_CODEC_PADDING);
  if (k > 0 && logprob > logprobs[k - 1]) faults |= fault(OPD_CODEC_ORDER);
  return faults;
}

// Of several faults, the one with the smallest number.
OPD_HD int32_t status_of(uint32_t faults) {
  for (int32_t status = 1; faults != 0; ++status, faults >>= 1) {
    if (faults & 1u) return status;
  }
  return OPD_CODEC_OK;
}

struct Header {
  int32_t count;
  uint32_t scale_bits;
  float top, tail;
  bool has_top;  // some entry is finite
  uint32_t faults;
};

// The first 12 bytes of a row, which may hold anything.
OPD_HD Header header_of(const Layout& at, uint32_t count, uint32_t scale_bits, float top,
                        float tail) {
  Header header{static_cast<int32_t>(count), scale_bits, top, tail, false, 0};
  if (count == kRefused) {
    header.faults = fault(OPD_CODEC_ROW_REFUSED);
    return header;
  }
  const bool is_empty = top < -std::numeric_limits<float>::max();
  header.has_top = !is_empty;
  const bool is_scale = scale_bits == 0 || (scale_bits >= kSmallestScale && scale_bits <= 0x7f7f);
  if (count > static_cast<uint32_t>(at.num_topk) || value_faults(top) || value_faults(tail) ||
      !is_scale || (is_empty && scale_bits != 0) || (count == 0 && !is_empty)) {
    header.faults = fault(OPD_CODEC_ROW_HEADER);
  }
  return header;
}

// Whether a row with this header may have this code, out of 0 .. absent_code.
OPD_HD bool is_code(const Layout& at, const Header& header, uint32_t code) {
  return static_cast<int32_t>(code) == at.absent_code ||
         (header.has_top && (header.scale_bits != 0 || code == 0));
}

}  // namespace topk_codec
}  // namespace opd
