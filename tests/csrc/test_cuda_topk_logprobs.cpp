// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of topk_logprobs, emulated, against the CPU's in float64: random rows and rows that
// are made to fill the buffer of candidates, to tie, to cancel or to underflow.
#include <functional>
#include <random>

#include "emulated_law.h"

namespace {

using emulated::kInf;
using emulated::kNaN;
using emulated::Numbers;

constexpr int32_t F32 = OPD_FLOAT32, BF16 = OPD_BFLOAT16, F16 = OPD_FLOAT16;
constexpr double kLowest = std::numeric_limits<float>::lowest();

// logit of column v in row t, given a standard normal number
using Fill = std::function<double(int64_t t, int64_t v, int64_t V, double normal)>;

double spread(int64_t, int64_t, int64_t, double normal) { return 3 * normal; }

struct Case {
  const char* name;
  int32_t dtype;
  int64_t num_tokens, vocab_size, row_stride, num_topk;
  Fill fill = spread;
  int64_t shift = 0;  // of the first row from a 16-byte address, in elements
  bool bias = false, temperatures = false;
  double scale = 1.0, softcap = 0.0, temperature = 1.0;
  bool bends() const { return bias || temperatures || softcap != 0 || temperature != 1; }
};

struct Outputs {
  std::vector<int32_t> ids;
  std::vector<double> logprobs, lse, tail_logprob, entropy, token_logprobs;
};

using Forward = opd_status_t (*)(const opd_topk_logprobs_args_t*);
opd_status_t forward_cuda(const opd_topk_logprobs_args_t* args) {
  return opd_topk_logprobs_fwd_cuda(args, nullptr);
}

std::vector<double> all_of(Numbers& numbers, int64_t count) {
  std::vector<double> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = numbers.get(i);
  return values;
}

// On logits of `dtype`, whose values come from those of the case's own dtype.
Outputs run(const Case& c, int32_t dtype, const std::vector<int64_t>& token_ids, Forward forward) {
  const int64_t T = c.num_tokens, V = c.vocab_size, K = c.num_topk;
  const int64_t J = static_cast<int64_t>(token_ids.size()) / T;
  const int32_t real = dtype == OPD_FLOAT64 ? OPD_FLOAT64 : OPD_FLOAT32;
  std::mt19937 generator(3);
  std::normal_distribution<double> normal(0.0, 1.0);
  Numbers rounded(c.dtype, 1), logits(dtype, T * c.row_stride, c.shift);
  for (int64_t i = 0; i < T * c.row_stride; ++i) {
    const int64_t t = i / c.row_stride, v = i % c.row_stride;
    rounded.set(0, v < V ? c.fill(t, v, V, normal(generator)) : kNaN);  // garbage in the padding
    logits.set(i, rounded.get(0));
  }
  emulated::Bend bend(real, T, V, [&] { return normal(generator); });
  Outputs out;
  out.ids.assign(T * K, 77);
  out.lse.resize(T);
  Numbers logprobs(real, T * K), tail(real, T), entropy(real, T), at_ids(real, T * J);
  opd_topk_logprobs_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = T;
  args.vocab_size = V;
  args.logits = bend.side(c, logits, dtype);
  args.num_topk = K;
  args.token_ids = token_ids.data();
  args.num_ids = J;
  args.ids = out.ids.data();
  args.logprobs = logprobs.data();
  args.lse = out.lse.data();
  args.tail_logprob = tail.data();
  args.entropy = entropy.data();
  args.token_logprobs = at_ids.data();
  std::vector<char> workspace(opd_topk_logprobs_workspace_bytes(T, V, K) + 1);
  args.workspace = workspace.data();
  expect::that(forward(&args) == OPD_OK, opd_last_error());
  out.logprobs = all_of(logprobs, T * K);
  out.tail_logprob = all_of(tail, T);
  out.entropy = all_of(entropy, T);
  out.token_logprobs = all_of(at_ids, T * J);
  return out;
}

bool same(const Outputs& a, const Outputs& b) {
  using emulated::same;
  return same(a.ids, b.ids) && same(a.logprobs, b.logprobs) && same(a.lse, b.lse) &&
         same(a.tail_logprob, b.tail_logprob) && same(a.entropy, b.entropy) &&
         same(a.token_logprobs, b.token_logprobs);
}

void check(const Case& c) {
  const int before = expect::failures;
  const int64_t T = c.num_tokens, K = c.num_topk;
  std::vector<int64_t> some(T * 3, -1);
  for (int64_t t = 0; t < T; ++t) {
    some[3 * t] = c.vocab_size - 1;
    some[3 * t + 2] = t * 7919 % c.vocab_size;
  }
  emulated::shuffle_threads(0);
  const Outputs got = run(c, c.dtype, some, forward_cuda);
  const Outputs truth = run(c, OPD_FLOAT64, some, opd_topk_logprobs_fwd_cpu);
  const Outputs baseline = run(c, c.dtype, some, opd_topk_logprobs_fwd_cpu);
  const double eps = emulated::eps_of(OPD_FLOAT32);
  emulated::within(got.logprobs, baseline.logprobs, truth.logprobs, eps, "logprobs");
  emulated::within(got.lse, baseline.lse, truth.lse, eps, "lse");
  emulated::within(got.tail_logprob, baseline.tail_logprob, truth.tail_logprob, eps, "tail_logprob");
  emulated::within(got.entropy, baseline.entropy, truth.entropy, eps, "entropy");
  emulated::within(got.token_logprobs, baseline.token_logprobs, truth.token_logprobs, eps,
                   "token_logprobs");
  if (!c.bends()) {
    expect::that(got.ids == truth.ids, "the ids are those of the CPU");
  } else {
    // rounding may swap neighbours: each id must have the log-probability that is said to be its
    const std::vector<int64_t> ids(got.ids.begin(), got.ids.end());
    const Outputs at = run(c, OPD_FLOAT64, ids, opd_topk_logprobs_fwd_cpu);
    emulated::within(got.logprobs, baseline.logprobs, at.token_logprobs, eps, "logprobs of the ids");
    for (int64_t t = 0; t < T; ++t) {
      std::vector<int32_t> sorted(got.ids.begin() + t * K, got.ids.begin() + (t + 1) * K);
      std::sort(sorted.begin(), sorted.end());
      const auto first = std::upper_bound(sorted.begin(), sorted.end(), -1);
      expect::that(std::adjacent_find(first, sorted.end()) == sorted.end(), "no id comes twice");
    }
  }
  emulated::shuffle_threads(7);
  expect::that(same(got, run(c, c.dtype, some, forward_cuda)),
               "the order of threads changes no bit");
  if (expect::failures != before) std::printf("  in case %s, K = %d\n", c.name, int(K));
}

std::vector<Case> cases() {
  // the best come last: every tile fills the buffer
  const Fill ascending = [](int64_t, int64_t v, int64_t V, double) { return 20.0 * v / V; };
  const Fill descending = [](int64_t, int64_t v, int64_t V, double) { return -20.0 * v / V; };
  const Fill equal = [](int64_t t, int64_t, int64_t, double) { return t == 0 ? 1.5 : 0.0; };
  const Fill two_values = [](int64_t, int64_t v, int64_t, double) { return v * 7 % 3 == 0; };
  const Fill zeros = [](int64_t, int64_t v, int64_t, double) { return v % 2 ? 0.0 : -0.0; };
  // what the first tiles show is far below the rest
  const Fill late = [](int64_t, int64_t v, int64_t V, double x) { return x + (v > V / 2 ? 30 : 0); };
  const Fill masked = [](int64_t t, int64_t v, int64_t, double x) {
    return v % (37 + t) == 5 ? x : -double(kInf);
  };
  const Fill nothing = [](int64_t t, int64_t, int64_t, double x) {
    return t == 1 ? -double(kInf) : x;
  };
  const Fill lowest = [](int64_t t, int64_t v, int64_t, double x) {
    return t == 0 || v % 3 ? kLowest : x;
  };
  const auto one_of = [](double value) {
    return [value](int64_t t, int64_t v, int64_t V, double x) {
      return t == 1 && v == V / 3 ? value : t == 2 && v % 2 ? value : x;
    };
  };
  // one token has all the mass but 1e-12 of it, or none of it but 1e-12
  const Fill peaked = [](int64_t t, int64_t v, int64_t V, double x) {
    return v == V / 2 ? 10.0 + 20 * t : x - 8;
  };
  const Fill deep = [](int64_t, int64_t v, int64_t, double x) { return v < 4 ? 300 + v : x - 300; };
  const Fill far = [](int64_t t, int64_t v, int64_t V, double x) {
    return t == 0 ? 1e30 * x : v * 5 / V * 60.0 + x;  // a thread's largest moves on and on
  };
  std::vector<Case> all = {
      {"one word", F32, 3, 1, 1, 1},
      {"five words", F32, 4, 5, 7, 5},
      {"five words", BF16, 4, 5, 5, 2},
      {"aligned", F32, 2, 8192, 8192, 64},
      {"aligned", BF16, 2, 8192, 8192, 64},
      {"unaligned rows", F32, 5, 9001, 9003, 64},
      {"unaligned rows", BF16, 5, 20001, 20003, 64, spread, 3},
      {"unaligned rows", F16, 5, 9001, 9003, 128},
      {"every token", F32, 2, 701, 703, 701},
      {"all but one", F16, 2, 701, 704, 700},
      {"the best", F32, 3, 9001, 9003, 1},
      {"the best", BF16, 3, 9001, 9008, 1, equal},
      {"a real vocabulary", BF16, 1, 151936, 151936, 64},
      {"half of the sample", F32, 2, 20000, 20000, 512},
      {"no sample", F32, 2, 20000, 20000, 513},
      {"no sample", BF16, 1, 20000, 20000, 4096},
      {"the most", F32, 1, 20000, 20000, 4096, ascending},
      {"most of the row", F32, 1, 4100, 4101, 4096},
      {"special values", F32, 4, 9001, 9003, 64, one_of(kNaN)},
      {"special values", BF16, 4, 9001, 9003, 600, one_of(kNaN)},
      {"special values", F32, 4, 9001, 9003, 64, one_of(kInf)},
      {"special values", F16, 4, 9001, 9003, 600, one_of(kInf)},
      {"special values", F32, 4, 9001, 9003, 64, one_of(-kInf)},
      {"flat", F32, 2, 9000, 9000, 64, [](int64_t, int64_t, int64_t, double x) { return x / 1e3; }},
      {"rows of temperatures", BF16, 5, 700, 712, 32, spread, 0, false, true},
      {"cold", F32, 3, 9001, 9001, 64, spread, 0, false, false, 1, 0, 0.7},
      {"bias", F32, 3, 9001, 9004, 64, spread, 3, true},
      {"scale", F32, 3, 700, 704, 64, spread, 0, false, false, -0.5},
      {"softcap", F32, 3, 9001, 9004, 64, spread, 0, false, false, 1, 5},
      {"everything", F32, 5, 4099, 4101, 64, spread, 1, true, true, 0.7, 6},
      {"everything", BF16, 3, 9001, 9003, 600, spread, 1, true, true, -0.7, 6},
  };
  for (int64_t num_topk : {3, 64, 600}) {
    for (int32_t dtype : {F32, BF16}) {
      const auto add = [&](const char* name, const Fill& fill) {
        all.push_back({name, dtype, 2, 20011, 20013, num_topk, fill, 1});
      };
      add("ascending", ascending);
      add("descending", descending);
      add("equal", equal);
      add("two values", two_values);
      add("zeros of both signs", zeros);
      add("the best come late", late);
      add("masked", masked);
      add("no token", nothing);
      add("the lowest float", lowest);
      add("peaked", peaked);
      add("a deep tail", deep);
      add("far apart", far);
    }
  }
  return all;
}

void check_edges() {
  float logits[8] = {1, 2, 3, kNaN, 4, 5, 6, kNaN}, logprobs[4] = {}, tail[2] = {}, entropy[2] = {};
  float at_ids[2] = {};
  double lse[2] = {};
  int32_t ids[4] = {};
  const int64_t token_ids[2] = {3, -100};
  opd_topk_logprobs_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = 2;
  args.vocab_size = 3;
  args.num_topk = 2;
  args.logits = {{logits, 4, F32}, nullptr, 1.0, 0.0, 1.0, nullptr};
  args.token_ids = token_ids;
  args.num_ids = 1;
  args.ids = ids;
  args.logprobs = logprobs;
  args.lse = lse;
  args.tail_logprob = tail;
  args.entropy = entropy;
  args.token_logprobs = at_ids;
  expect::that(forward_cuda(&args) == OPD_OK, opd_last_error());
  expect::that(std::isnan(at_ids[0]) && at_ids[1] == -kInf && ids[0] == 2 && ids[3] == 1,
               "an id out of range is NaN in its own row, a negative one is none");
  args.num_ids = 0;
  args.token_ids = nullptr;
  args.token_logprobs = nullptr;
  expect::that(forward_cuda(&args) == OPD_OK, "no ids, no log-probs of them");
  args.num_topk = 4;
  expect::that(forward_cuda(&args) == OPD_INVALID_ARGUMENT &&
                   std::strstr(opd_last_error(), "num_topk must be in [1, 3], got 4"),
               "what the CPU refuses is refused");
  args.num_topk = 2;
  args.logits.matrix.dtype = OPD_FLOAT64;
  expect::that(forward_cuda(&args) == OPD_UNSUPPORTED &&
                   std::strstr(opd_last_error(), "logits must be float32, bfloat16 or float16"),
               "float64 is refused in words");
  args.num_tokens = 0;
  args.ids = nullptr;
  expect::that(forward_cuda(&args) == OPD_OK, "no tokens, nothing to do");
}

}  // namespace

int main() {
  for (const Case& c : cases()) check(c);
  check_edges();
  return expect::report("test_cuda_topk_logprobs");
}
