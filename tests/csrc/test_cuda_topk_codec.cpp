// SPDX-License-Identifier: Apache-2.0
// The CUDA codec under its emulation: the bytes, numbers and statuses of the CPU's.
#include <cstring>
#include <random>
#include <vector>

#include "emulated.h"
#include "topk_codec_cases.h"

namespace {

using namespace codec_cases;
using emulated::same;

void agree(const Laws& a, const Laws& b, const char* what) {
  expect::that(same(a.ids, b.ids) && same(a.status, b.status), what);
  // as bits: NaN are compared too
  expect::that(same(a.logprobs, b.logprobs) && same(a.tail, b.tail), what);
}

void compare(const Shape& shape, std::mt19937& random) {
  Laws laws = laws_of(shape, random);
  // the first row is refused, each time for something else
  const int kind = static_cast<int>(random() % 6);
  if (kind == 1) laws.logprobs[0] = emulated::kNaN;
  if (kind == 2) laws.logprobs[0] = 3.0f;
  if (kind == 3) laws.ids[0] = -2;
  if (kind == 4 && shape.num_topk > 1) laws.ids[1] = laws.ids[0];
  if (kind == 5) laws.tail[0] = emulated::kNaN;
  Laws again = laws;
  std::vector<uint8_t> cpu(num_bytes(shape), 0x11), cuda(num_bytes(shape) + 3, 0x22);
  opd_topk_codec_args_t args = arguments(shape, laws, cpu.data());
  expect::that(opd_topk_codec_encode_cpu(&args) == OPD_OK, opd_last_error());
  for (const int64_t shift : {0, 3}) {
    args = arguments(shape, again, cuda.data() + shift);
    expect::that(opd_topk_codec_encode_cuda(&args, nullptr) == OPD_OK, opd_last_error());
    expect::that(std::memcmp(cpu.data(), cuda.data() + shift, cpu.size()) == 0, "the CPU's bytes");
    expect::that(same(laws.status, again.status), "the CPU's statuses");
  }
  for (int round = 0; round < 6; ++round) {
    if (round > 0) {
      for (int flip = 0; flip < round; ++flip) {
        cpu[random() % cpu.size()] ^= static_cast<uint8_t>(1u << random() % 8);
      }
    }
    if (round == 5) {
      for (uint8_t& byte : cpu) byte = static_cast<uint8_t>(random());
    }
    std::memcpy(cuda.data() + round % 2, cpu.data(), cpu.size());
    Laws one = empty(shape), two = empty(shape);
    args = arguments(shape, one, cpu.data());
    expect::that(opd_topk_codec_decode_cpu(&args) == OPD_OK, opd_last_error());
    args = arguments(shape, two, cuda.data() + round % 2);
    expect::that(opd_topk_codec_decode_cuda(&args, nullptr) == OPD_OK, opd_last_error());
    agree(one, two, "the CPU's laws");
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (const int seed : {0, 5}) {
    emulated::shuffle_threads(seed);
    for (const Shape& shape : kShapes) {
      for (int repeat = 0; repeat < (shape.num_topk > 100 ? 1 : 4); ++repeat) compare(shape, random);
    }
  }
  return expect::report("test_cuda_topk_codec");
}
