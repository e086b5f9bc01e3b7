// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of sample_tokens, emulated: each draw in its cell of the law in float64, weights and
// log-probs of what is drawn; rows without a law, rows of few tokens, uniforms at both ends and beyond.
#include <cuda_runtime.h>

#include <functional>
#include <random>

#include "emulated.h"

namespace {

using emulated::kInf;
using emulated::kNaN;
using emulated::Numbers;

constexpr int32_t F32 = OPD_FLOAT32, BF16 = OPD_BFLOAT16, F16 = OPD_FLOAT16;
// how far float32 terms may move a border between cells
constexpr double kBorder = 2e-6;
const double kAlmostOne = 1.0 - std::ldexp(1.0, -53);

// logit of column v in row t, given a standard normal number
using Fill = std::function<double(int64_t t, int64_t v, int64_t V, double normal)>;

double spread(int64_t, int64_t, int64_t, double normal) { return 3 * normal; }

struct Case {
  const char* name;
  int32_t dtype;
  int64_t num_tokens, vocab_size, row_stride, num_draws;
  double proposal_temperature = 1.0;
  Fill fill = spread;
  int64_t shift = 0;  // of the first row from a 16-byte address, in elements
  bool bias = false, temperatures = false;
  double scale = 1.0, softcap = 0.0;
};

struct Outputs {
  std::vector<int32_t> ids;
  std::vector<float> weights, logprobs;
  std::vector<double> lse;
};

bool same(const Outputs& a, const Outputs& b) {
  using emulated::same;
  return same(a.ids, b.ids) && same(a.weights, b.weights) && same(a.logprobs, b.logprobs) &&
         same(a.lse, b.lse);
}

// The inputs of a case, and its rows as a law takes them.
struct Problem {
  Problem(const Case& c, const std::vector<double>& given)
      : c(c), logits(c.dtype, c.num_tokens * c.row_stride, c.shift), bias(F32, c.vocab_size, 1),
        temperatures(F32, c.num_tokens), uniforms(given) {
    std::mt19937 generator(3);
    std::normal_distribution<double> normal(0.0, 1.0);
    for (int64_t i = 0; i < c.num_tokens * c.row_stride; ++i) {
      const int64_t t = i / c.row_stride, v = i % c.row_stride;
      // garbage in the padding
      logits.set(i, v < c.vocab_size ? c.fill(t, v, c.vocab_size, normal(generator)) : kNaN);
    }
    for (int64_t v = 0; v < c.vocab_size; ++v) bias.set(v, normal(generator));
    for (int64_t t = 0; t < c.num_tokens; ++t) temperatures.set(t, 0.5 + 0.3 * (t % 7));
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    while (static_cast<int64_t>(uniforms.size()) < c.num_tokens * c.num_draws) {
      const int64_t n = static_cast<int64_t>(uniforms.size()) % c.num_draws;
      uniforms.push_back(n == 1 ? 0.0 : n == 3 ? kAlmostOne : uniform(generator));
    }
  }
  std::vector<double> row(int64_t t) {
    std::vector<double> z(c.vocab_size);
    for (int64_t v = 0; v < c.vocab_size; ++v) {
      z[v] = c.scale * (logits.get(t * c.row_stride + v) + (c.bias ? bias.get(v) : 0.0));
      if (c.softcap != 0) z[v] = c.softcap * std::tanh(z[v] / c.softcap);
      if (c.temperatures) z[v] /= temperatures.get(t);
    }
    return z;
  }
  Outputs run() {
    const int64_t T = c.num_tokens, N = c.num_draws;
    Outputs out{std::vector<int32_t>(T * N, 77), std::vector<float>(T * N),
                std::vector<float>(T * N), std::vector<double>(T)};
    std::vector<double> workspace(
        opd_sample_tokens_workspace_bytes(T, c.vocab_size) / sizeof(double), kNaN);
    opd_sample_tokens_args_t args{};
    args.struct_size = sizeof(args);
    args.num_tokens = T;
    args.vocab_size = c.vocab_size;
    args.logits = {{logits.data(), c.row_stride, c.dtype},
                   c.bias ? bias.data() : nullptr,
                   c.scale,
                   c.softcap,
                   1.0,
                   c.temperatures ? temperatures.data() : nullptr};
    args.uniforms = uniforms.data();
    args.num_draws = N;
    args.proposal_temperature = c.proposal_temperature;
    args.ids = out.ids.data();
    args.weights = out.weights.data();
    args.logprobs = out.logprobs.data();
    args.lse = out.lse.data();
    args.workspace = workspace.data();
    expect::that(opd_sample_tokens_fwd_cuda(&args, nullptr) == OPD_OK, opd_last_error());
    return out;
  }

  const Case& c;
  Numbers logits, bias, temperatures;
  std::vector<double> uniforms;
};

bool is_none(const Outputs& out, int64_t at, bool has_law) {
  const bool is_empty = has_law ? out.weights[at] == 0 && out.logprobs[at] == -kInf
                                : std::isnan(out.weights[at]) && std::isnan(out.logprobs[at]);
  return out.ids[at] == -1 && is_empty;
}

void check_row(Problem& problem, const Outputs& out, int64_t t) {
  const Case& c = problem.c;
  const int64_t V = c.vocab_size, N = c.num_draws;
  const std::vector<double> z = problem.row(t);
  double largest = -kInf, law = 0;
  bool is_broken = false;
  for (const double value : z) {
    is_broken |= std::isnan(value) || value == kInf;
    largest = std::max(largest, value);
  }
  const bool has_law = !is_broken && largest != -kInf;
  if (!has_law) {
    for (int64_t n = 0; n < N; ++n) expect::that(is_none(out, t * N + n, false), "no law");
    expect::that(is_broken ? std::isnan(out.lse[t]) : out.lse[t] == -kInf, "lse of no law");
    return;
  }
  std::vector<double> upto(V + 1, 0.0);
  for (int64_t v = 0; v < V; ++v) {
    law += std::exp(z[v] - largest);
    upto[v + 1] = upto[v] + std::exp((z[v] - largest) / c.proposal_temperature);
  }
  const double lse = largest + std::log(law);
  expect::near(out.lse[t], lse, 1e-6 * (1 + std::fabs(lse)), "lse");
  std::vector<double> ordered(problem.uniforms.begin() + t * N,
                              problem.uniforms.begin() + (t + 1) * N);
  std::sort(ordered.begin(), ordered.end());
  int64_t drawn = 0, last = -1, n = 0;
  for (; n < N && out.ids[t * N + n] != -1; ++n) {
    const int64_t at = t * N + n, id = out.ids[at];
    expect::that(id > last && id < V, "ids ascend below V");
    if (id <= last || id >= V) return;
    last = id;
    const double logprob = z[id] - lse;
    const double of_proposal = (z[id] - largest) / c.proposal_temperature - std::log(upto[V]);
    expect::near(out.logprobs[at], logprob, 2e-6 * (1 + std::fabs(z[id]) + std::fabs(lse)),
                 "log-prob");
    expect::that(std::isfinite(logprob) && of_proposal > -kInf, "drawn without mass");
    const double count = out.weights[at] * N / std::exp(logprob - of_proposal);
    const int64_t whole = std::llround(count);
    expect::near(count, static_cast<double>(whole), 1e-4 * (1 + count), "a whole number of draws");
    if (c.proposal_temperature == 1.0) {
      expect::that(out.weights[at] == static_cast<float>(double(whole) / double(N)),
                   "the law's own draws weigh their share");
    }
    if (whole < 1 || drawn + whole > N) {
      expect::that(false, "at least one draw each, N in all");
      return;
    }
    expect::that(ordered[drawn] >= upto[id] / upto[V] - kBorder, "the first draw is in its cell");
    drawn += whole;
    expect::that(ordered[drawn - 1] <= upto[id + 1] / upto[V] + kBorder, "so is the last");
  }
  expect::that(drawn == N, "every draw is counted");
  for (; n < N; ++n) expect::that(is_none(out, t * N + n, true), "the rest is none");
}

void check(const Case& c, const std::vector<double>& uniforms = {}) {
  const int before = expect::failures;
  Problem problem(c, uniforms);
  emulated::shuffle_threads(0);
  const Outputs out = problem.run();
  for (int64_t t = 0; t < c.num_tokens; ++t) check_row(problem, out, t);
  emulated::shuffle_threads(7);
  emulated_multiprocessors() = 1;
  expect::that(same(out, problem.run()),
               "neither the order of threads nor the blocks that share a row change a bit");
  emulated_multiprocessors() = 4;
  if (expect::failures != before) {
    std::printf("  in case %s, V = %d, N = %d\n", c.name, int(c.vocab_size), int(c.num_draws));
  }
}

std::vector<Case> cases() {
  const Fill equal = [](int64_t t, int64_t, int64_t, double) { return t == 0 ? 1.5 : 0.0; };
  const Fill one_hot = [](int64_t t, int64_t v, int64_t V, double) {
    return v == (t == 0 ? 0 : t == 1 ? V - 1 : V / 2) ? 2.0 : -double(kInf);
  };
  // mass in a few tiles, also at both ends of them, none between
  const Fill islands = [](int64_t, int64_t v, int64_t, double x) {
    return v % 512 == 0 || v % 1536 == 511 || v % 2500 == 7 ? x : -double(kInf);
  };
  const Fill peaked = [](int64_t t, int64_t v, int64_t V, double x) {
    return v == V / 3 ? 12.0 + 4 * t : x - 4;
  };
  const Fill far = [](int64_t t, int64_t v, int64_t V, double x) {
    return t == 0 ? 1e30 * x : v * 5 / V * 30.0 + x;
  };
  const auto one_of = [](double value) {
    return [value](int64_t t, int64_t v, int64_t V, double x) {
      return t == 1 && v == V / 3 ? value : t == 2 ? (v % 2 ? value : x) : t == 3 ? -kInf : x;
    };
  };
  std::vector<Case> all = {
      {"one word", F32, 3, 1, 1, 1},
      {"one word", BF16, 5, 1, 3, 70, 2.0},
      {"17 words", F32, 4, 17, 19, 5},
      {"17 words", BF16, 4, 17, 17, 64, 0.7},
      {"a tile", F32, 2, 512, 512, 64},
      {"a tile less one", BF16, 3, 511, 512, 33, 1.5, spread, 1},
      {"a tile and one", F16, 3, 513, 513, 65, 1.0, spread, 7},
      {"unaligned rows", F32, 5, 9001, 9003, 64, 1.3, spread, 3},
      {"unaligned rows", BF16, 5, 9001, 9003, 129, 0.8, spread, 5},
      {"the most draws", F32, 1, 3000, 3000, 4096},
      {"the most draws", BF16, 1, 1030, 1031, 4096, 3.0},
      {"a real vocabulary", BF16, 1, 151936, 151936, 50},
      {"a real vocabulary", F32, 1, 151936, 151936, 64, 1.2},
      {"special values", F32, 4, 5001, 5003, 20, 1.0, one_of(kNaN)},
      {"special values", BF16, 4, 5001, 5003, 20, 1.4, one_of(kInf)},
      {"special values", F16, 4, 5001, 5003, 20, 0.6, one_of(-kInf)},
      {"the coldest", F32, 2, 2000, 2001, 9, 1e-30},
      {"the hottest", F32, 2, 2000, 2001, 90, 1e30},
      {"everything", F32, 4, 4099, 4101, 40, 1.4, spread, 1, true, true, 0.7, 6},
      {"everything", BF16, 3, 1500, 1504, 40, 0.9, spread, 0, true, true, -0.7, 6},
      {"scale", F16, 3, 700, 704, 30, 1.0, spread, 0, false, false, -0.5},
  };
  for (const int32_t dtype : {F32, BF16}) {
    for (const double proposal_temperature : {1.0, 1.7}) {
      const auto add = [&](const char* name, const Fill& fill) {
        all.push_back({name, dtype, 3, 6007, 6011, 40, proposal_temperature, fill, 1});
      };
      add("equal", equal);
      add("one hot", one_hot);
      add("islands", islands);
      add("peaked", peaked);
      add("far apart", far);
    }
  }
  return all;
}

// Mass at 100, 511 and 1800 alone; a row of NaN; a row of nothing.
double few(int64_t t, int64_t v, int64_t, double) {
  const bool has_mass = v == 100 || v == 511 || v == 1800;
  return t == 1 ? double(kNaN) : t == 0 && has_mass ? 0.0 : -double(kInf);
}

void check_ends() {
  const Case c{"the ends", F32, 3, 3000, 3001, 3, 1.7, few};
  check(c, {0.0, 0.5, kAlmostOne, 0.0, 0.5, kAlmostOne, 0.0, 0.5, kAlmostOne});
  Problem ends(c, {0.0, 0.0, kAlmostOne});
  const Outputs out = ends.run();
  expect::that(out.ids[0] == 100 && out.ids[1] == 1800 && out.ids[2] == -1, "first and last");
  for (const double bad : {double(kNaN), -1.0, -double(kInf), 1.0, 2.0, double(kInf)}) {
    const Outputs some = Problem(c, {bad, 0.5, bad}).run();
    const bool is_above = bad >= 1.0;
    expect::that(some.ids[0] == (is_above ? 511 : 100) && some.ids[1] == (is_above ? 1800 : 511) &&
                     some.ids[2] == -1,
                 "a uniform that is none draws the first token or the last");
  }
}

void check_refusals() {
  float logits[6] = {1, 2, 3, 4, 5, 6}, weights[4] = {}, logprobs[4] = {};
  double uniforms[4] = {0.1, 0.2, 0.3, 0.9}, lse[2] = {}, workspace[6] = {};
  int32_t ids[4] = {};
  opd_sample_tokens_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = 2;
  args.vocab_size = 3;
  args.logits = {{logits, 3, F32}, nullptr, 1.0, 0.0, 1.0, nullptr};
  args.uniforms = uniforms;
  args.num_draws = 2;
  args.proposal_temperature = 1.0;
  args.ids = ids;
  args.weights = weights;
  args.logprobs = logprobs;
  args.lse = lse;
  args.workspace = workspace;
  expect::that(opd_sample_tokens_workspace_bytes(2, 3) == sizeof(workspace), "a tile per row");
  expect::that(opd_sample_tokens_fwd_cuda(&args, nullptr) == OPD_OK, opd_last_error());
  const auto refused = [&](opd_status_t status, const char* words) {
    expect::that(opd_sample_tokens_fwd_cuda(&args, nullptr) == status, words);
    expect::that(std::strstr(opd_last_error(), words) != nullptr, opd_last_error());
  };
  args.num_draws = 4097;
  refused(OPD_INVALID_ARGUMENT, "num_draws must be in [1, 4096], got 4097");
  args.num_draws = 2;
  args.workspace = nullptr;
  refused(OPD_INVALID_ARGUMENT, "every pointer must not be NULL");
  args.workspace = workspace;
  args.logits.matrix.dtype = OPD_FLOAT64;
  refused(OPD_UNSUPPORTED, "logits must be float32, bfloat16 or float16");
  args.num_tokens = 0;
  args.ids = nullptr;
  expect::that(opd_sample_tokens_fwd_cuda(&args, nullptr) == OPD_OK, "no tokens, nothing to do");
}

}  // namespace

int main() {
  for (const Case& c : cases()) check(c);
  check_ends();
  check_refusals();
  return expect::report("test_cuda_sample_tokens");
}
