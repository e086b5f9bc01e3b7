// SPDX-License-Identifier: Apache-2.0
// Random laws for the codec, and a call of it on a backend.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "opd/opd.h"

namespace codec_cases {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Laws {
  std::vector<int32_t> ids;
  std::vector<float> logprobs, tail;
  std::vector<int32_t> status;
};

struct Shape {
  int64_t num_tokens, num_topk, vocab_size;
  int32_t bits;
};

constexpr Shape kShapes[] = {{3, 1, 1, 4},       {5, 2, 2, 16},           {6, 5, 7, 8},
                             {9, 64, 151936, 8}, {4, 128, 151936, 10},    {3, 33, 100, 7},
                             {2, 700, 152064, 12}, {2, 1000, int64_t(1) << 31, 16},
                             {1, 4096, int64_t(1) << 31, 16}};

// Best first; some rows have fewer entries, entries of probability 0, equal ones, or none at all.
inline Laws laws_of(const Shape& shape, std::mt19937& random) {
  Laws laws;
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    std::set<int32_t> chosen;
    std::uniform_int_distribution<int64_t> id(0, shape.vocab_size - 1);
    while (static_cast<int64_t>(chosen.size()) < shape.num_topk) {
      chosen.insert(static_cast<int32_t>(id(random)));
    }
    std::vector<int32_t> ids(chosen.begin(), chosen.end());
    std::shuffle(ids.begin(), ids.end(), random);
    std::vector<float> logprobs(ids.size());
    std::uniform_real_distribution<float> depth(0.01f, t % 2 ? 30.0f : 1.0f);
    for (float& value : logprobs) value = -depth(random);
    if (t % 3 == 1) logprobs[0] = logprobs.back();
    std::sort(logprobs.rbegin(), logprobs.rend());
    const size_t last = ids.size() - 1;
    if (t % 4 == 2) logprobs[last] = -kInf;
    if (t % 4 == 3) ids[last] = -1, logprobs[last] = -kInf;
    if (t % 5 == 4) {
      std::fill(ids.begin(), ids.end(), -1);
      std::fill(logprobs.begin(), logprobs.end(), -kInf);
    }
    laws.ids.insert(laws.ids.end(), ids.begin(), ids.end());
    laws.logprobs.insert(laws.logprobs.end(), logprobs.begin(), logprobs.end());
    laws.tail.push_back(t % 2 ? -kInf : -depth(random));
  }
  laws.status.assign(static_cast<size_t>(shape.num_tokens), -1);
  return laws;
}

inline Laws empty(const Shape& shape) {
  const size_t entries = static_cast<size_t>(shape.num_tokens * shape.num_topk);
  const size_t tokens = static_cast<size_t>(shape.num_tokens);
  return {std::vector<int32_t>(entries, 77), std::vector<float>(entries, 77.0f),
          std::vector<float>(tokens, 77.0f), std::vector<int32_t>(tokens, 77)};
}

inline size_t num_bytes(const Shape& shape) {
  return static_cast<size_t>(
      shape.num_tokens * opd_topk_codec_row_bytes(shape.num_topk, shape.vocab_size, shape.bits));
}

inline opd_topk_codec_args_t arguments(const Shape& shape, Laws& laws, uint8_t* codes) {
  opd_topk_codec_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = shape.num_tokens;
  args.vocab_size = shape.vocab_size;
  args.num_topk = shape.num_topk;
  args.bits = shape.bits;
  args.ids = laws.ids.data();
  args.logprobs = laws.logprobs.data();
  args.tail_logprob = laws.tail.data();
  args.codes = codes;
  args.status = laws.status.data();
  return args;
}

}  // namespace codec_cases
