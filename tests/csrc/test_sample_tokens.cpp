// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "expect.h"
#include "opd/opd.h"

namespace {

constexpr int64_t kTokens = 3, kVocab = 1100, kStride = 1107, kDraws = 2000;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Outputs {
  std::vector<int32_t> ids = std::vector<int32_t>(kTokens * kDraws, -7);
  std::vector<double> weights = std::vector<double>(kTokens * kDraws);
  std::vector<double> logprobs = std::vector<double>(kTokens * kDraws);
  double lse[kTokens] = {};
  std::vector<char> workspace;
};

opd_sample_tokens_args_t args_of(const std::vector<double>& logits,
                                 const std::vector<double>& uniforms, double proposal_temperature,
                                 Outputs& out) {
  out.workspace.resize(opd_sample_tokens_workspace_bytes(kTokens, kVocab));
  opd_sample_tokens_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = kTokens;
  args.vocab_size = kVocab;
  args.logits = {{logits.data(), kStride, OPD_FLOAT64}, nullptr, 1.0, 0.0, 1.0, nullptr};
  args.uniforms = uniforms.data();
  args.num_draws = kDraws;
  args.proposal_temperature = proposal_temperature;
  args.ids = out.ids.data();
  args.weights = out.weights.data();
  args.logprobs = out.logprobs.data();
  args.lse = out.lse;
  args.workspace = out.workspace.data();
  return args;
}

// With one uniform in the middle of each of kDraws strata, a token's weight is its probability but for
// the two strata at its cell's ends.
void check_weights(const std::vector<double>& logits, double proposal_temperature) {
  std::vector<double> uniforms(kTokens * kDraws);
  for (int64_t i = 0; i < kTokens * kDraws; ++i) {
    uniforms[i] = (static_cast<double>((i * 7) % kDraws) + 0.5) / kDraws;
  }
  Outputs out;
  const opd_sample_tokens_args_t args = args_of(logits, uniforms, proposal_temperature, out);
  expect::that(opd_sample_tokens_fwd_cpu(&args) == OPD_OK, opd_last_error());
  for (int64_t t = 0; t < kTokens; ++t) {
    const double* z = &logits[t * kStride];
    long double law = 0, proposal = 0;
    for (int64_t v = 0; v < kVocab; ++v) {
      law += std::exp(static_cast<long double>(z[v]));
      proposal += std::exp(static_cast<long double>(z[v]) / proposal_temperature);
    }
    expect::near(out.lse[t], static_cast<double>(std::log(law)), 1e-12, "lse");
    double count = 0.0;
    for (int64_t n = 0; n < kDraws; ++n) {
      const int64_t at = t * kDraws + n;
      const int32_t id = out.ids[at];
      if (id < 0) {
        expect::that(out.weights[at] == 0.0 && out.logprobs[at] == -kInfinity, "padding");
        expect::that(n > 0, "at least one token");
        continue;
      }
      expect::that(n == 0 || (out.ids[at - 1] >= 0 && out.ids[at - 1] < id), "ascending ids");
      const double p = static_cast<double>(std::exp(static_cast<long double>(z[id])) / law);
      const double r = static_cast<double>(
          std::exp(static_cast<long double>(z[id]) / proposal_temperature) / proposal);
      expect::near(out.logprobs[at], std::log(p), 1e-11, "logprobs");
      expect::near(out.weights[at], p, 2.0 / kDraws * p / r * (1 + 1e-9), "weights");
      count += out.weights[at] * kDraws * r / p;
    }
    expect::near(count, static_cast<double>(kDraws), 1e-6, "every draw is counted");
  }
}

void check_refusals(const std::vector<double>& logits) {
  std::vector<double> uniforms(kTokens * kDraws, 0.5);
  Outputs out;
  const opd_sample_tokens_args_t good = args_of(logits, uniforms, 1.0, out);
  const auto refused = [&](auto change, const char* words) {
    opd_sample_tokens_args_t args = good;
    change(args);
    expect::that(opd_sample_tokens_fwd_cpu(&args) == OPD_INVALID_ARGUMENT, words);
    expect::that(std::strstr(opd_last_error(), words) != nullptr, words);
  };
  using Args = opd_sample_tokens_args_t;
  refused([](Args& args) { args.struct_size = 8; }, "struct_size must be");
  refused([](Args& args) { args.num_draws = 0; }, "num_draws must be in [1, 4096], got 0");
  refused([](Args& args) { args.num_draws = 4097; }, "num_draws must be in [1, 4096]");
  refused([](Args& args) { args.proposal_temperature = 0; }, "proposal_temperature must be");
  refused([](Args& args) { args.uniforms = nullptr; }, "every pointer must not be NULL");
  refused([](Args& args) { args.workspace = nullptr; }, "every pointer must not be NULL");
  for (const double bad : {1.0, -1e-300, std::nan(""), kInfinity}) {
    uniforms[kDraws + 3] = bad;
    refused([](Args&) {}, "uniforms must be in [0, 1)");
  }
  expect::that(std::strstr(opd_last_error(), "at position (1, 3)") != nullptr, "position");
  opd_sample_tokens_args_t none = good;
  none.num_tokens = 0;
  none.ids = nullptr;
  expect::that(opd_sample_tokens_fwd_cpu(&none) == OPD_OK, "no tokens");
}

void check_ends(std::vector<double> logits) {
  // nothing has mass at the ends of blocks and of rows
  for (int64_t v = 0; v < kVocab; ++v) {
    if (v != 100 && v != 511 && v != 600) logits[v] = -kInfinity;
  }
  logits[kStride + 50] = std::nan("");
  for (int64_t v = 0; v < kVocab; ++v) logits[2 * kStride + v] = -kInfinity;
  std::vector<double> uniforms(kTokens * kDraws, 1.0 - std::numeric_limits<double>::epsilon() / 2);
  uniforms[0] = 0.0;
  Outputs out;
  const opd_sample_tokens_args_t args = args_of(logits, uniforms, 1.7, out);
  expect::that(opd_sample_tokens_fwd_cpu(&args) == OPD_OK, opd_last_error());
  expect::that(out.ids[0] == 100 && out.ids[1] == 600 && out.ids[2] == -1, "first and last");
  for (const int64_t t : {1, 2}) {
    expect::that(out.ids[t * kDraws] == -1 && std::isnan(out.weights[t * kDraws]) &&
                     std::isnan(out.logprobs[t * kDraws]),
                 "no law");
  }
  expect::that(std::isnan(out.lse[1]) && out.lse[2] == -kInfinity, "no law: lse");
}

}  // namespace

int main() {
  std::mt19937 generator(5);
  std::normal_distribution<double> normal(0.0, 3.0);
  std::vector<double> logits(kTokens * kStride, std::nan(""));
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t v = 0; v < kVocab; ++v) logits[t * kStride + v] = normal(generator);
  }
  for (const double proposal_temperature : {1.0, 0.7, 2.0}) {
    check_weights(logits, proposal_temperature);
  }
  check_refusals(logits);
  check_ends(logits);
  return expect::report("sample_tokens");
}
