// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <random>
#include <vector>

#include "expect.h"
#include "opd/opd.h"

namespace {

constexpr int64_t kTokens = 3, kVocab = 700, kStride = 705;

struct Outputs {
  double logprobs[kTokens], lse[kTokens], entropy[kTokens];
};

opd_token_logprobs_spec_t spec() { return {1.7, kTokens, kVocab, nullptr}; }

Outputs forward(const std::vector<double>& logits, const int64_t* token_ids) {
  Outputs out;
  opd_token_logprobs_fwd_args_t args{};
  args.struct_size = sizeof(args);
  args.spec = spec();
  args.logits = {logits.data(), kStride, OPD_FLOAT64};
  args.token_ids = token_ids;
  args.logprobs = out.logprobs;
  args.lse = out.lse;
  args.entropy = out.entropy;
  expect::that(opd_token_logprobs_fwd_cpu(&args) == OPD_OK, opd_last_error());
  return out;
}

}  // namespace

int main() {
  std::mt19937 generator(0);
  std::normal_distribution<double> normal(0.0, 3.0);
  std::vector<double> logits(kTokens * kStride, std::nan(""));
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t v = 0; v < kVocab; ++v) logits[t * kStride + v] = normal(generator);
  }
  const int64_t token_ids[kTokens] = {0, 699, 513};
  const Outputs out = forward(logits, token_ids);
  for (int64_t t = 0; t < kTokens; ++t) {
    long double sum = 0, entropy = 0;
    for (int64_t v = 0; v < kVocab; ++v) sum += std::exp((long double)logits[t * kStride + v] / 1.7L);
    for (int64_t v = 0; v < kVocab; ++v) {
      const long double lq = logits[t * kStride + v] / 1.7L - std::log(sum);
      entropy -= std::exp(lq) * lq;
    }
    expect::near(out.lse[t], (double)std::log(sum), 1e-13, "lse");
    expect::near(out.entropy[t], (double)entropy, 1e-13, "entropy");
    expect::near(out.logprobs[t],
                 (double)(logits[t * kStride + token_ids[t]] / 1.7L - std::log(sum)), 1e-13,
                 "logprobs");
  }

  const double g_logprobs[kTokens] = {1.0, -0.5, 0.0}, g_lse[kTokens] = {0.2, 0.0, 0.0},
               g_entropy[kTokens] = {-0.3, 0.7, 0.0};
  std::vector<double> gradient(kTokens * kStride, std::nan(""));
  opd_token_logprobs_bwd_args_t args{};
  args.struct_size = sizeof(args);
  args.spec = spec();
  args.logits = {logits.data(), kStride, OPD_FLOAT64};
  args.token_ids = token_ids;
  args.grad_logprobs = g_logprobs;
  args.grad_lse = g_lse;
  args.grad_entropy = g_entropy;
  args.lse = out.lse;
  args.entropy = out.entropy;
  args.grad_logits = {gradient.data(), kStride, OPD_FLOAT64};
  args.grad_width = kStride;
  expect::that(opd_token_logprobs_bwd_cpu(&args) == OPD_OK, opd_last_error());
  for (int64_t v : {0, 1, 512, 513, 699}) {
    for (int64_t t = 0; t < 2; ++t) {
      const double step = 1e-5, kept = logits[t * kStride + v];
      double objective[2];
      for (int side : {0, 1}) {
        logits[t * kStride + v] = kept + (side ? step : -step);
        const Outputs moved = forward(logits, token_ids);
        objective[side] = g_logprobs[t] * moved.logprobs[t] + g_lse[t] * moved.lse[t] +
                          g_entropy[t] * moved.entropy[t];
      }
      logits[t * kStride + v] = kept;
      expect::near(gradient[t * kStride + v], (objective[1] - objective[0]) / (2 * step), 2e-9,
                   "gradient");
    }
    expect::that(gradient[2 * kStride + v] == 0.0, "no upstream gradient, no gradient");
  }
  expect::that(gradient[kVocab] == 0.0, "columns past vocab_size have gradient exactly 0");

  // in place gives the same bits
  args.grad_logits = {logits.data(), kStride, OPD_FLOAT64};
  expect::that(opd_token_logprobs_bwd_cpu(&args) == OPD_OK, opd_last_error());
  expect::that(std::memcmp(logits.data(), gradient.data(), kVocab * sizeof(double)) == 0,
               "in place is bitwise the same");

  const int64_t outside[kTokens] = {0, kVocab, 0};
  args.token_ids = outside;
  expect::that(opd_token_logprobs_bwd_cpu(&args) == OPD_INVALID_ARGUMENT &&
                   std::strstr(opd_last_error(), "got 700 at position 1") != nullptr,
               "an id out of range is refused, with its value and position");
  return expect::report("test_token_logprobs");
}
