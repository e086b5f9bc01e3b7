// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "expect.h"
#include "opd/opd.h"

namespace {

constexpr int64_t kTokens = 3, kVocab = 1300, kStride = 1307, kIds = 5;
// in no order; a row with a slot without id, one whose ids are all in one block, one with a repeat
const int64_t kTable[kTokens * kIds] = {700, 3, -1, 1299, 0, 520, 515, 512, 513, 511,
                                        9,   9, -7, 1024, 88};

struct Outputs {
  std::vector<double> logprobs = std::vector<double>(kTokens * kIds);
  double tail[kTokens], lse[kTokens], entropy[kTokens];
};

opd_topk_divergence_spec_t spec_of(const opd_logits_t& logits) {
  return {kTokens, kVocab, nullptr, logits, kTable, kIds};
}

Outputs forward(const opd_logits_t& logits) {
  Outputs out;
  opd_topk_divergence_fwd_args_t args{};
  args.struct_size = sizeof(args);
  args.spec = spec_of(logits);
  args.logprobs = out.logprobs.data();
  args.tail_logprob = out.tail;
  args.lse = out.lse;
  args.entropy = out.entropy;
  expect::that(opd_topk_divergence_fwd_cpu(&args) == OPD_OK, opd_last_error());
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

// The first column of row t that names v, or -1.
int64_t column_of(int64_t t, int64_t v) {
  for (int64_t k = 0; k < kIds; ++k) {
    if (kTable[t * kIds + k] == v) return k;
  }
  return -1;
}

void check_values(const opd_logits_t& law) {
  const Outputs out = forward(law);
  for (int64_t t = 0; t < kTokens; ++t) {
    long double sum = 0, rest = 0, entropy = 0;
    for (int64_t v = 0; v < kVocab; ++v) {
      sum += std::exp(bent(law, t, v));
      if (column_of(t, v) < 0) rest += std::exp(bent(law, t, v));
    }
    const long double lse = std::log(sum);
    for (int64_t v = 0; v < kVocab; ++v) {
      const long double lq = bent(law, t, v) - lse;
      entropy -= std::exp(lq) * lq;
    }
    expect::near(out.lse[t], (double)lse, 1e-13, "lse");
    expect::near(out.tail[t], (double)(std::log(rest) - lse), 1e-13, "tail");
    expect::near(out.entropy[t], (double)entropy, 1e-13, "entropy");
    for (int64_t k = 0; k < kIds; ++k) {
      const int64_t id = kTable[t * kIds + k];
      const double found = out.logprobs[t * kIds + k];
      if (id < 0 || column_of(t, id) != k) {
        expect::that(std::isinf(found) && found < 0, "no id, and a repeat, have no mass");
      } else {
        expect::near(found, (double)(bent(law, t, id) - lse), 1e-13, "logprobs");
      }
    }
  }
}

void check_gradient(const opd_logits_t& law, const std::vector<double>& logits) {
  const Outputs out = forward(law);
  std::vector<double> grad_ids(kTokens * kIds), gradient(kTokens * kStride, std::nan(""));
  for (size_t i = 0; i < grad_ids.size(); ++i) grad_ids[i] = 0.3 - 0.1 * (i % 7);
  double grad_rest[kTokens] = {0.7, -0.2, 0.0}, lse[kTokens];
  for (int64_t t = 0; t < kTokens; ++t) lse[t] = out.lse[t] + out.tail[t];
  opd_topk_divergence_bwd_args_t args{};
  args.struct_size = sizeof(args);
  args.spec = spec_of(law);
  args.grad_ids = grad_ids.data();
  args.grad_rest = grad_rest;
  args.lse = lse;
  args.grad_logits = {gradient.data(), kStride, OPD_FLOAT64};
  args.grad_width = kStride;
  expect::that(opd_topk_divergence_bwd_cpu(&args) == OPD_OK, opd_last_error());
  for (int64_t t = 0; t < kTokens; ++t) {
    long double shared = 0;
    const double temperature =
        law.temperatures ? static_cast<const double*>(law.temperatures)[t] : law.temperature;
    for (int64_t v = 0; v < kVocab; ++v) {
      const long double z = bent(law, t, v) * temperature;
      long double slope = law.scale / temperature;
      if (law.softcap > 0) slope *= 1 - (z / law.softcap) * (z / law.softcap);
      const int64_t k = column_of(t, v);
      const long double share = std::exp(bent(law, t, v) - (long double)lse[t]);
      const long double expected =
          slope * (k >= 0 ? (long double)grad_ids[t * kIds + k] : grad_rest[t] * share);
      if (k < 0) shared += grad_rest[t] * share;
      expect::near(gradient[t * kStride + v], (double)expected, 1e-13, "gradient");
    }
    expect::near((double)shared, grad_rest[t], 1e-12, "what is off the ids is divided");
    expect::that(gradient[t * kStride + kVocab] == 0.0, "columns past vocab_size are exactly 0");
  }
  // in place gives the same bits
  std::vector<double> overwritten = logits;
  opd_logits_t same = law;
  same.matrix.data = overwritten.data();
  args.spec.logits = same;
  args.grad_logits.data = overwritten.data();
  expect::that(opd_topk_divergence_bwd_cpu(&args) == OPD_OK, opd_last_error());
  expect::that(std::memcmp(overwritten.data(), gradient.data(), gradient.size() * 8) == 0,
               "in place is out of place");
}

void check_refusals(const opd_logits_t& law) {
  const int64_t beyond[kTokens * kIds] = {0, 0, kVocab};
  Outputs out;
  opd_topk_divergence_fwd_args_t args{};
  args.struct_size = sizeof(args);
  args.spec = spec_of(law);
  const auto refuses = [&](const char* words) {
    expect::that(opd_topk_divergence_fwd_cpu(&args) == OPD_INVALID_ARGUMENT, "not refused");
    expect::that(std::strstr(opd_last_error(), words) != nullptr, opd_last_error());
  };
  refuses("every output must not be NULL");
  args.logprobs = out.logprobs.data();
  args.tail_logprob = out.tail;
  args.lse = out.lse;
  args.entropy = out.entropy;
  args.spec.token_ids = beyond;
  refuses("token_ids must be below 1300, got 1300 at position (0, 2)");
  args.spec.num_ids = 0;
  refuses("num_ids must be in [1, 8192], got 0");
  args.struct_size = 3;
  refuses("struct_size");
}

}  // namespace

int main() {
  std::mt19937 engine(3);
  std::normal_distribution<double> normal(0.0, 2.0);
  std::vector<double> logits(kTokens * kStride), bias(kVocab);
  for (double& value : logits) value = normal(engine);
  for (double& value : bias) value = 0.3 * normal(engine);
  const double temperatures[kTokens] = {0.7, 1.0, 2.0};
  const opd_const_matrix_t matrix = {logits.data(), kStride, OPD_FLOAT64};
  const opd_logits_t plain = {matrix, nullptr, 1.0, 0.0, 1.0, nullptr};
  const opd_logits_t everything = {matrix, bias.data(), -1.1, 5.0, 1.0, temperatures};
  for (const opd_logits_t& law : {plain, everything}) {
    check_values(law);
    check_gradient(law, logits);
  }
  check_refusals(plain);
  return expect::report("test_topk_divergence");
}
