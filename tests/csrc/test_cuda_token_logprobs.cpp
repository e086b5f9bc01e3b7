// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of token_logprobs, emulated, against the CPU's in float64.
#include <random>

#include "emulated_law.h"

namespace {

using emulated::kInf;
using emulated::kNaN;
using emulated::Numbers;

struct Case {
  const char* name;
  int32_t dtype, grad_dtype;
  int64_t num_tokens, vocab_size, row_stride;
  int64_t shift = 0;  // of the first row from a 16-byte address, in elements
  bool bias = false, temperatures = false;
  double scale = 1.0, softcap = 0.0, temperature = 1.0;
  double spread = 4.0;
  enum { kApart, kInPlace, kNarrow } where = kApart;
  double special = 0.0;  // some logits of row 1, and all of row 2
};

struct Outputs {
  std::vector<double> logprobs, lse, entropy, gradient;
};

using Forward = opd_status_t (*)(const opd_token_logprobs_fwd_args_t*);
using Backward = opd_status_t (*)(const opd_token_logprobs_bwd_args_t*);

opd_status_t forward_cuda(const opd_token_logprobs_fwd_args_t* args) {
  return opd_token_logprobs_fwd_cuda(args, nullptr);
}
opd_status_t backward_cuda(const opd_token_logprobs_bwd_args_t* args) {
  return opd_token_logprobs_bwd_cuda(args, nullptr);
}

double upstream(int64_t t, double by) { return t % 4 == 3 ? 0.0 : by * (t % 5 - 1.7); }

// Both calls on the logits of `dtype`, whose values come from those of the case's own dtype.
Outputs run(const Case& c, int32_t dtype, int32_t grad_dtype, bool in_place, Forward forward,
            Backward backward) {
  const int64_t T = c.num_tokens, V = c.vocab_size;
  const int32_t real = dtype == OPD_FLOAT64 ? OPD_FLOAT64 : OPD_FLOAT32;
  std::mt19937 generator(3);
  std::normal_distribution<double> normal(0.0, c.spread);
  Numbers rounded(c.dtype, 1), logits(dtype, T * c.row_stride, c.shift);
  for (int64_t i = 0; i < T * c.row_stride; ++i) {
    const int64_t t = i / c.row_stride, v = i % c.row_stride;
    double value = normal(generator);
    if (c.special != 0.0 && ((t == 1 && v % 5 == 2) || t == 2)) value = c.special;
    if (v >= V) value = kNaN;  // garbage in the padding
    rounded.set(0, value);
    logits.set(i, rounded.get(0));
  }
  emulated::Bend bend(real, T, V, [&] { return normal(generator) / 2; });
  std::vector<int64_t> ids(T);
  for (int64_t t = 0; t < T; ++t) ids[t] = t == 0 ? 0 : t == 1 ? V - 1 : (t * 7919) % V;

  opd_token_logprobs_spec_t spec{};
  spec.num_tokens = T;
  spec.vocab_size = V;
  spec.token_ids = ids.data();
  spec.logits = bend.side(c, logits, dtype);
  Numbers logprobs(real, T), entropy(real, T);
  Outputs out;
  out.lse.resize(T);
  opd_token_logprobs_fwd_args_t fwd{};
  fwd.struct_size = sizeof(fwd);
  fwd.spec = spec;
  fwd.logprobs = logprobs.data();
  fwd.lse = out.lse.data();
  fwd.entropy = entropy.data();
  expect::that(forward(&fwd) == OPD_OK, opd_last_error());

  emulated::Gradient gradient(c, dtype, grad_dtype, in_place, logits);
  Numbers grad_logprobs(real, T), grad_entropy(real, T);
  std::vector<double> grad_lse(T);
  for (int64_t t = 0; t < T; ++t) {
    grad_logprobs.set(t, upstream(t, 0.5));
    grad_entropy.set(t, upstream(t, -0.25));
    grad_lse[t] = upstream(t, 0.125);
  }
  opd_token_logprobs_bwd_args_t bwd{};
  bwd.struct_size = sizeof(bwd);
  bwd.spec = spec;
  bwd.grad_logprobs = grad_logprobs.data();
  bwd.grad_lse = grad_lse.data();
  bwd.grad_entropy = grad_entropy.data();
  bwd.lse = out.lse.data();
  bwd.entropy = entropy.data();
  bwd.grad_logits = gradient.matrix();
  bwd.grad_width = gradient.width();
  expect::that(backward(&bwd) == OPD_OK, opd_last_error());
  out.gradient = gradient.read([](int64_t t) { return t % 4 == 3; });
  for (int64_t t = 0; t < T; ++t) {
    out.logprobs.push_back(logprobs.get(t));
    out.entropy.push_back(entropy.get(t));
  }
  return out;
}

void check(const Case& c) {
  const Outputs truth = run(c, OPD_FLOAT64, OPD_FLOAT64, false, opd_token_logprobs_fwd_cpu,
                            opd_token_logprobs_bwd_cpu);
  const Outputs baseline = run(c, c.dtype, c.grad_dtype, false, opd_token_logprobs_fwd_cpu,
                               opd_token_logprobs_bwd_cpu);
  emulated::shuffle_threads(0);
  const Outputs got =
      run(c, c.dtype, c.grad_dtype, c.where != Case::kApart, forward_cuda, backward_cuda);
  const int before = expect::failures;
  emulated::within(got.logprobs, baseline.logprobs, truth.logprobs, emulated::eps_of(OPD_FLOAT32),
                   "logprobs");
  emulated::within(got.lse, baseline.lse, truth.lse, emulated::eps_of(OPD_FLOAT32), "lse");
  emulated::within(got.entropy, baseline.entropy, truth.entropy, emulated::eps_of(OPD_FLOAT32),
                   "entropy");
  emulated::within(got.gradient, baseline.gradient, truth.gradient, emulated::eps_of(c.grad_dtype),
                   "gradient");
  if (expect::failures != before) std::printf("  in case %s\n", c.name);

  emulated::shuffle_threads(7);
  const Outputs again =
      run(c, c.dtype, c.grad_dtype, c.where != Case::kApart, forward_cuda, backward_cuda);
  using emulated::same;
  expect::that(same(got.logprobs, again.logprobs) && same(got.lse, again.lse) &&
                   same(got.entropy, again.entropy) && same(got.gradient, again.gradient),
               "the order of threads changes no bit");
}

constexpr int32_t F32 = OPD_FLOAT32, BF16 = OPD_BFLOAT16, F16 = OPD_FLOAT16;

std::vector<Case> cases() {
  std::vector<Case> all = {
      {"one word", F32, F32, 3, 1, 1},
      {"five words", F32, F32, 4, 5, 5},
      {"aligned", F32, F32, 2, 8192, 8192},
      {"unaligned rows", F32, F32, 5, 9001, 9003},
      {"unaligned rows", BF16, BF16, 5, 9001, 9003},
      {"unaligned rows", F16, F16, 5, 701, 703},
      {"mixed dtypes", BF16, F32, 3, 4099, 4104},
      {"mixed dtypes", F16, BF16, 3, 700, 705, 3},
      {"mixed dtypes", F32, F16, 3, 4099, 4100},
      {"peaked", F32, F32, 4, 3000, 3001, 0, false, false, 1, 0, 1, 40},
      {"flat", F32, F32, 4, 9000, 9000, 0, false, false, 1, 0, 1, 1e-3},
      {"cold", F32, F32, 4, 700, 701, 0, false, false, 1, 0, 0.7},
      {"rows of temperatures", BF16, BF16, 5, 700, 712, 0, false, true},
      {"bias", F32, F32, 3, 700, 704, 3, true},
      {"scale", F32, F32, 3, 700, 704, 0, false, false, -0.5},
      {"softcap", F32, F32, 3, 700, 704, 0, false, false, 1, 5},
      {"everything", F32, F32, 5, 4099, 4101, 1, true, true, 0.7, 6},
      {"everything", BF16, F32, 5, 4099, 4101, 1, true, true, 0.7, 6},
  };
  const auto add = [&](Case c, decltype(Case::kApart) where, double special) {
    c.where = where;
    c.special = special;
    all.push_back(c);
  };
  const Case plain{"in place", F32, F32, 5, 9001, 9003};
  const Case narrow{"16-bit in place", F32, BF16, 5, 9001, 9003};
  add(plain, Case::kInPlace, 0.0);
  add(narrow, Case::kNarrow, 0.0);
  // one barrier more would hide a tile that is written before it is read
  add({"16-bit in place", F32, F16, 3, 33000, 33004, 3, true, true, 0.7, 6}, Case::kNarrow, 0.0);
  add({"16-bit in place", BF16, BF16, 3, 700, 703}, Case::kInPlace, 0.0);
  for (double special : {-double(kInf), double(kInf), double(kNaN)}) {
    add({"special values", F32, F32, 5, 701, 701}, Case::kApart, special);
    add({"special values", BF16, BF16, 5, 701, 704, 1, true, true, 0.7}, Case::kApart, special);
  }
  add({"-inf under a cap", F32, F32, 5, 701, 701, 0, false, false, 1, 5}, Case::kApart, -kInf);
  return all;
}

void check_edges() {
  float logits[8] = {1, 2, 3, kNaN, 4, 5, 6, kNaN}, logprobs[2] = {}, entropy[2] = {};
  double lse[2] = {};
  const int64_t ids[2] = {-100, 3};
  opd_token_logprobs_fwd_args_t fwd{};
  fwd.struct_size = sizeof(fwd);
  fwd.spec.num_tokens = 2;
  fwd.spec.vocab_size = 3;
  fwd.spec.token_ids = ids;
  fwd.spec.logits = {{logits, 4, F32}, nullptr, 1.0, 0.0, 1.0, nullptr};
  fwd.logprobs = logprobs;
  fwd.lse = lse;
  fwd.entropy = entropy;
  expect::that(forward_cuda(&fwd) == OPD_OK, opd_last_error());
  expect::that(std::isnan(logprobs[0]) && std::isnan(logprobs[1]) && std::isfinite(lse[0]),
               "an id out of range is NaN in its own row");

  opd_token_logprobs_bwd_args_t bwd{};
  bwd.grad_logprobs = bwd.grad_entropy = bwd.entropy = entropy;
  bwd.grad_lse = bwd.lse = lse;
  emulated::check_refusals(fwd, bwd, forward_cuda, backward_cuda);
}

}  // namespace

int main() {
  for (const Case& c : cases()) check(c);
  check_edges();
  return expect::report("test_cuda_token_logprobs");
}
