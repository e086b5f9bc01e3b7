// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "expect.h"
#include "opd/opd.h"
#include "topk_codec_cases.h"
#include "topk_codec_row.h"

namespace {

using namespace codec_cases;

bool refused(opd_status_t status, const char* words) {
  return status == OPD_INVALID_ARGUMENT && std::strstr(opd_last_error(), words) != nullptr;
}

// Half of the step at a depth, and the rounding of float32.
double allowed(const opd::topk_codec::Layout& at, double scale, double depth, double value) {
  const double slope = at.bend * scale;
  return 0.5 * (std::sqrt(slope * slope + 4 * depth * scale) + scale) * (1 + 1e-12) +
         std::ldexp(std::fabs(value) + depth, -24);
}

void round_trip(const Shape& shape, std::mt19937& random) {
  Laws laws = laws_of(shape, random), back = empty(shape);
  // bytes of a sentinel behind the last row: nothing may be written there
  std::vector<uint8_t> codes(num_bytes(shape) + 8, 0xa5);
  opd_topk_codec_args_t args = arguments(shape, laws, codes.data());
  expect::that(opd_topk_codec_encode_cpu(&args) == OPD_OK, opd_last_error());
  for (size_t i = num_bytes(shape); i < codes.size(); ++i) {
    expect::that(codes[i] == 0xa5, "encode stays inside its rows");
  }
  const std::vector<uint8_t> exact(codes.begin(), codes.end() - 8);
  std::vector<uint8_t> copy = exact;
  args = arguments(shape, back, copy.data());
  expect::that(opd_topk_codec_decode_cpu(&args) == OPD_OK, opd_last_error());
  const auto at = opd::topk_codec::layout_of(shape.num_topk, shape.vocab_size, shape.bits);
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    expect::that(laws.status[t] == 0 && back.status[t] == 0, "a law is whole");
    expect::that(laws.tail[t] == back.tail[t], "the tail is exact");
    const int32_t* const ids = &laws.ids[t * shape.num_topk];
    const float* const logprobs = &laws.logprobs[t * shape.num_topk];
    const int32_t* const ids_back = &back.ids[t * shape.num_topk];
    const float* const logprobs_back = &back.logprobs[t * shape.num_topk];
    expect::that(logprobs_back[0] == logprobs[0], "the largest log-prob is exact");
    double range = 0;
    for (int64_t k = 0; k < shape.num_topk; ++k) {
      if (logprobs[k] > -kInf) range = (double)logprobs[0] - (double)logprobs[k];
    }
    const double scale = opd::topk_codec::scale_value(opd::topk_codec::scale_bits_of(at, range));
    for (int64_t k = 0; k < shape.num_topk; ++k) {
      if (k > 0) {
        const bool ordered = logprobs_back[k] < logprobs_back[k - 1] ||
                             (logprobs_back[k] == logprobs_back[k - 1] &&
                              (ids_back[k] > ids_back[k - 1] || ids_back[k] == -1));
        expect::that(ordered, "best first, equal ones by id");
      }
      const auto found = std::find(ids_back, ids_back + shape.num_topk, ids[k]);
      expect::that(found != ids_back + shape.num_topk, "every id comes back");
      if (ids[k] == -1) continue;
      const float got = logprobs_back[found - ids_back];
      if (logprobs[k] == -kInf) {
        expect::that(got == -kInf, "-inf comes back");
        continue;
      }
      const double depth = (double)logprobs[0] - (double)logprobs[k];
      expect::near(got, logprobs[k], allowed(at, scale, depth, logprobs[0]), "half a step");
    }
  }
}

// Any bytes: no crash, and what is called whole is a law that encodes to the same bytes.
void fuzz(const Shape& shape, std::mt19937& random, int rounds) {
  Laws laws = laws_of(shape, random);
  std::vector<uint8_t> good(num_bytes(shape));
  opd_topk_codec_args_t args = arguments(shape, laws, good.data());
  expect::that(opd_topk_codec_encode_cpu(&args) == OPD_OK, opd_last_error());
  int damaged = 0;
  for (int round = 0; round < rounds; ++round) {
    std::vector<uint8_t> codes = good;
    if (round % 3 == 0) {
      for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random());
    } else {
      for (int flips = 0; flips < 1 + round % 4; ++flips) {
        codes[random() % codes.size()] ^= static_cast<uint8_t>(1u << random() % 8);
      }
    }
    Laws back = empty(shape);
    args = arguments(shape, back, codes.data());
    expect::that(opd_topk_codec_decode_cpu(&args) == OPD_OK, "any bytes are decoded");
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      const int32_t status = back.status[t];
      expect::that(status == 0 || (status >= OPD_CODEC_ROW_REFUSED && status <= OPD_CODEC_ROW_PADDING),
                   "a status of decode");
      damaged += status != 0;
      int32_t last = -2;
      std::vector<int32_t> ids(&back.ids[t * shape.num_topk], &back.ids[(t + 1) * shape.num_topk]);
      std::sort(ids.begin(), ids.end());
      for (int64_t k = 0; k < shape.num_topk; ++k) {
        const float value = back.logprobs[t * shape.num_topk + k];
        expect::that(status != 0 ? value != value : value <= 0.001f, "NaN if and only if damaged");
        expect::that(ids[k] >= -1 && ids[k] < shape.vocab_size && (ids[k] != last || last == -1),
                     "ids inside the vocabulary, none twice");
        last = ids[k];
      }
    }
  }
  expect::that(damaged > rounds / 4, "damage is seen");
}

void refusals() {
  const Shape shape{1, 4, 100, 8};
  const auto status_of = [&](std::vector<int32_t> ids, std::vector<float> logprobs, float tail) {
    Laws laws{ids, logprobs, {tail}, {-1}};
    std::vector<uint8_t> codes(num_bytes(shape), 0xff);
    opd_topk_codec_args_t args = arguments(shape, laws, codes.data());
    expect::that(opd_topk_codec_encode_cpu(&args) == OPD_OK, opd_last_error());
    Laws back = empty(shape);
    args = arguments(shape, back, codes.data());
    expect::that(opd_topk_codec_decode_cpu(&args) == OPD_OK, opd_last_error());
    expect::that((laws.status[0] == 0) == (back.status[0] == 0), "a refused row says so");
    if (laws.status[0] != 0) {
      expect::that(back.status[0] == OPD_CODEC_ROW_REFUSED, "a refused row says so");
    }
    return laws.status[0];
  };
  const float nan = std::nanf("");
  expect::that(status_of({3, 2, 1, 0}, {-1, -2, -3, -4}, -5) == OPD_CODEC_OK, "a law");
  expect::that(status_of({3, 2, 1, 0}, {-1, -2, nan, -4}, -5) == OPD_CODEC_NAN, "NaN");
  expect::that(status_of({3, 2, 1, 0}, {-1, -2, -3, -4}, nan) == OPD_CODEC_NAN, "NaN tail");
  expect::that(status_of({3, 2, 1, 0}, {7, -2, -3, -4}, -5) == OPD_CODEC_POSITIVE, "logits");
  expect::that(status_of({3, 2, 1, 0}, {-1, -2, -3, -4}, 5) == OPD_CODEC_POSITIVE, "tail");
  expect::that(status_of({3, 100, 1, 0}, {-1, -2, -3, -4}, -5) == OPD_CODEC_ID, "id");
  expect::that(status_of({3, -2, 1, 0}, {-1, -2, -3, -4}, -5) == OPD_CODEC_ID, "id");
  expect::that(status_of({3, 2, 1, -1}, {-1, -2, -3, -4}, -5) == OPD_CODEC_PADDING, "padding");
  expect::that(status_of({3, -1, 1, -1}, {-1, -kInf, -kInf, -kInf}, 0) == OPD_CODEC_PADDING, "hole");
  expect::that(status_of({3, 2, 1, 0}, {-1, -2, -4, -3}, -5) == OPD_CODEC_ORDER, "order");
  expect::that(status_of({3, 2, 1, 3}, {-1, -2, -3, -4}, -5) == OPD_CODEC_DUPLICATE, "twice");
  expect::that(status_of({3, 2, 1, 0}, {-0.5f, -1e38f, -3e38f, -3.4028235e38f}, -5) == OPD_CODEC_OK,
               "the smallest numbers there are");

  Laws laws = empty(shape);
  std::vector<uint8_t> codes(num_bytes(shape));
  opd_topk_codec_args_t args = arguments(shape, laws, codes.data());
  args.num_topk = 101;
  expect::that(refused(opd_topk_codec_encode_cpu(&args), "num_topk must be in"), "K > V");
  args = arguments(shape, laws, codes.data());
  args.bits = 17;
  expect::that(refused(opd_topk_codec_decode_cpu(&args), "bits in [4, 16]"), "bits");
  args = arguments(shape, laws, nullptr);
  expect::that(refused(opd_topk_codec_decode_cpu(&args), "must not be NULL"), "NULL");
  args = arguments(shape, laws, codes.data());
  args.struct_size = 4;
  expect::that(refused(opd_topk_codec_decode_cpu(&args), "struct_size"), "another version");
  expect::that(opd_topk_codec_row_bytes(0, 5, 8) == -1 && opd_topk_codec_row_bytes(5000, 9999, 8) == -1,
               "no such row");
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (const Shape& shape : kShapes) {
    for (int repeat = 0; repeat < 4; ++repeat) round_trip(shape, random);
    fuzz(shape, random, shape.num_topk > 100 ? 60 : 600);
  }
  refusals();
  expect::that(opd_topk_codec_row_bytes(64, 151936, 8) == 184, "184 bytes");
  expect::that(opd_topk_codec_row_bytes(64, 151936, 10) == 200, "200 bytes");
  expect::that(opd_topk_codec_row_bytes(128, 151936, 12) == 400, "400 bytes");
  return expect::report("test_topk_codec");
}
