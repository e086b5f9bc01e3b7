// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "expect.h"
#include "opd/opd.h"

namespace {

constexpr int64_t kTokens = 3, kVocab = 700, kStride = 705;
const int64_t kIds[kTokens] = {0, 699, 513};

struct Outputs {
  double logprobs[kTokens], lse[kTokens], entropy[kTokens];
};

opd_token_logprobs_spec_t spec_of(const opd_logits_t& logits) {
  return {kTokens, kVocab, nullptr, logits, kIds};
}

Outputs forward(const opd_logits_t& logits) {
  Outputs out;
  opd_token_logprobs_fwd_args_t args{};
  args.struct_size = sizeof(args);
  args.spec = spec_of(logits);
  args.logprobs = out.logprobs;
  args.lse = out.lse;
  args.entropy = out.entropy;
  expect::that(opd_token_logprobs_fwd_cpu(&args) == OPD_OK, opd_last_error());
  return out;
}

// The logits that row t's law is the softmax of.
long double bent(const opd_logits_t& law, int64_t t, int64_t v) {
  long double z = static_cast<const double*>(law.matrix.data)[t * kStride + v];
  if (law.bias) z += static_cast<const double*>(law.bias)[v];
  z *= law.scale;
  if (law.softcap > 0) z = law.softcap * std::tanh(z / law.softcap);
  return z / (law.temperatures ? static_cast<const double*>(law.temperatures)[t] : law.temperature);
}

void check_values(const opd_logits_t& law) {
  const Outputs out = forward(law);
  for (int64_t t = 0; t < kTokens; ++t) {
    long double sum = 0, entropy = 0;
    for (int64_t v = 0; v < kVocab; ++v) sum += std::exp(bent(law, t, v));
    for (int64_t v = 0; v < kVocab; ++v) {
      const long double lq = bent(law, t, v) - std::log(sum);
      entropy -= std::exp(lq) * lq;
    }
    expect::near(out.lse[t], (double)std::log(sum), 1e-13, "lse");
    expect::near(out.entropy[t], (double)entropy, 1e-13, "entropy");
    expect::near(out.logprobs[t], (double)(bent(law, t, kIds[t]) - std::log(sum)), 1e-13,
                 "logprobs");
  }
}

const double kGradLogprobs[kTokens] = {1.0, -0.5, 0.0}, kGradLse[kTokens] = {0.2, 0.0, 0.0},
             kGradEntropy[kTokens] = {-0.3, 0.7, 0.0};

opd_token_logprobs_bwd_args_t backward_args(const opd_logits_t& law, const Outputs& out,
                                            double* gradient) {
  opd_token_logprobs_bwd_args_t args{};
  args.struct_size = sizeof(args);
  args.spec = spec_of(law);
  args.grad_logprobs = kGradLogprobs;
  args.grad_lse = kGradLse;
  args.grad_entropy = kGradEntropy;
  args.lse = out.lse;
  args.entropy = out.entropy;
  args.grad_logits = {gradient, kStride, OPD_FLOAT64};
  args.grad_width = kStride;
  return args;
}

// Central difference of the objective by one number that the call reads.
double slope_by(double* number, const std::function<double()>& objective) {
  const double step = 1e-5, kept = *number;
  *number = kept + step;
  const double above = objective();
  *number = kept - step;
  const double below = objective();
  *number = kept;
  return (above - below) / (2 * step);
}

void check_gradient(const opd_logits_t& law, std::vector<double>& logits, double* bias) {
  const Outputs out = forward(law);
  std::vector<double> gradient(kTokens * kStride, std::nan(""));
  const opd_token_logprobs_bwd_args_t args = backward_args(law, out, gradient.data());
  expect::that(opd_token_logprobs_bwd_cpu(&args) == OPD_OK, opd_last_error());
  const auto objective = [&] {
    const Outputs moved = forward(law);
    double sum = 0.0;
    for (int64_t t = 0; t < kTokens; ++t) {
      sum += kGradLogprobs[t] * moved.logprobs[t] + kGradLse[t] * moved.lse[t] +
             kGradEntropy[t] * moved.entropy[t];
    }
    return sum;
  };
  for (int64_t v : {0, 1, 512, 513, 699}) {
    double over_rows = 0.0;
    for (int64_t t = 0; t < kTokens; ++t) {
      const double found = gradient[t * kStride + v];
      over_rows += found;
      if (t < 2) expect::near(found, slope_by(&logits[t * kStride + v], objective), 2e-9, "gradient");
    }
    expect::that(gradient[2 * kStride + v] == 0.0, "no upstream gradient, no gradient");
    if (law.bias) expect::near(over_rows, slope_by(&bias[v], objective), 2e-9, "bias gradient");
  }
  expect::that(gradient[kVocab] == 0.0, "columns past vocab_size have gradient exactly 0");

  // in place gives the same bits
  std::vector<double> overwritten = logits;
  opd_logits_t same = law;
  same.matrix.data = overwritten.data();
  const opd_token_logprobs_bwd_args_t in_place = backward_args(same, out, overwritten.data());
  expect::that(opd_token_logprobs_bwd_cpu(&in_place) == OPD_OK, opd_last_error());
  expect::that(std::memcmp(overwritten.data(), gradient.data(), kVocab * sizeof(double)) == 0,
               "in place is bitwise the same");
}

void check_refused(const opd_logits_t& law, const int64_t* token_ids, const char* sentence) {
  std::vector<double> gradient(kTokens * kStride);
  Outputs out{};
  opd_token_logprobs_bwd_args_t args = backward_args(law, out, gradient.data());
  args.spec.token_ids = token_ids;
  expect::that(opd_token_logprobs_bwd_cpu(&args) == OPD_INVALID_ARGUMENT &&
                   std::strstr(opd_last_error(), sentence) != nullptr,
               sentence);
}

}  // namespace

int main() {
  std::mt19937 generator(0);
  std::normal_distribution<double> normal(0.0, 3.0);
  std::vector<double> logits(kTokens * kStride, std::nan("")), bias(kVocab);
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t v = 0; v < kVocab; ++v) logits[t * kStride + v] = normal(generator);
  }
  for (double& value : bias) value = normal(generator);
  const double temperatures[kTokens] = {0.6, 1.0, 2.5};
  const opd_const_matrix_t matrix = {logits.data(), kStride, OPD_FLOAT64};
  const opd_logits_t plain = {matrix, nullptr, 1.0, 0.0, 1.7, nullptr};
  const opd_logits_t laws[] = {
      plain,
      {matrix, bias.data(), 1.0, 0.0, 1.0, nullptr},
      {matrix, nullptr, -0.5, 0.0, 1.0, nullptr},
      {matrix, nullptr, 1.0, 4.0, 1.0, nullptr},
      {matrix, bias.data(), 0.7, 6.0, 0.0, temperatures},
  };
  for (const opd_logits_t& law : laws) {
    check_values(law);
    check_gradient(law, logits, bias.data());
  }

  const int64_t outside[kTokens] = {0, kVocab, 0};
  check_refused(plain, outside, "got 700 at position 1");
  opd_logits_t wrong = plain;
  wrong.temperature = 0.0;
  check_refused(wrong, kIds, "temperature of logits must be positive and finite, got 0");
  wrong = plain;
  wrong.scale = 0.0;
  check_refused(wrong, kIds, "logits scale must be finite and not 0");
  wrong = plain;
  wrong.softcap = -1.0;
  check_refused(wrong, kIds, "logits softcap must be >= 0");
  return expect::report("test_token_logprobs");
}
