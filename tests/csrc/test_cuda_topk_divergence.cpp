// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of topk_divergence, emulated, against the CPU's in float64.
#include <random>

#include "emulated_law.h"

namespace {

using emulated::kInf;
using emulated::kNaN;
using emulated::Numbers;

enum Where { kApart, kInPlace, kNarrow };

struct Case {
  const char* name;
  int32_t dtype, grad_dtype;
  int64_t num_tokens, vocab_size, row_stride, num_ids;
  int64_t shift = 0;  // of the first row from a 16-byte address, in elements
  bool bias = false, temperatures = false;
  double scale = 1.0, softcap = 0.0, temperature = 1.0;
  double spread = 4.0;
  Where where = kApart;
  double on_ids = 0.0;   // added to the logits at the ids: what is left off them
  double special = 0.0;  // some logits of row 1, and all of row 2
  bool of_rest = false;  // grad_rest is relative to the mass off the ids
};

struct Outputs {
  std::vector<double> logprobs, tail, lse, entropy, gradient;
};

using Forward = opd_status_t (*)(const opd_topk_divergence_fwd_args_t*);
using Backward = opd_status_t (*)(const opd_topk_divergence_bwd_args_t*);

opd_status_t forward_cuda(const opd_topk_divergence_fwd_args_t* args) {
  return opd_topk_divergence_fwd_cuda(args, nullptr);
}
opd_status_t backward_cuda(const opd_topk_divergence_bwd_args_t* args) {
  return opd_topk_divergence_bwd_cuda(args, nullptr);
}

// Distinct, in no order, with the first and the last column and some that are none.
std::vector<int64_t> ids_of(const Case& c) {
  std::vector<int64_t> ids;
  for (int64_t t = 0; t < c.num_tokens; ++t) {
    std::vector<int64_t> columns(c.vocab_size);
    for (int64_t v = 0; v < c.vocab_size; ++v) columns[v] = v;
    std::shuffle(columns.begin() + 1, columns.end(), std::mt19937(static_cast<unsigned>(t)));
    for (int64_t k = 0; k < c.num_ids; ++k) {
      const bool is_none = k >= c.vocab_size || (k > 2 && (k + t) % 7 == 3);
      ids.push_back(is_none ? -1 - k : columns[k]);
    }
  }
  return ids;
}

// Row 3 of five has weight 0, row 4 no gradient off the ids.
double rest_of(int64_t t) { return t % 5 >= 3 ? 0.0 : 0.7 - 0.9 * t; }
double id_of(int64_t t, int64_t k) { return t % 5 == 3 ? 0.0 : 0.5 * (k % 5 - 1.7); }

// Both calls on the logits of `dtype`, whose values come from those of the case's own dtype.
Outputs run(const Case& c, int32_t dtype, int32_t grad_dtype, bool in_place, Forward forward,
            Backward backward) {
  const int64_t T = c.num_tokens, V = c.vocab_size, K = c.num_ids;
  const int32_t real = dtype == OPD_FLOAT64 ? OPD_FLOAT64 : OPD_FLOAT32;
  const std::vector<int64_t> ids = ids_of(c);
  std::mt19937 generator(3);
  std::normal_distribution<double> normal(0.0, c.spread);
  Numbers rounded(c.dtype, 1), logits(dtype, T * c.row_stride, c.shift);
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> row(c.row_stride, kNaN);  // garbage in the padding
    for (int64_t v = 0; v < V; ++v) row[v] = normal(generator);
    for (int64_t k = 0; k < K; ++k) {
      if (ids[t * K + k] >= 0) row[ids[t * K + k]] += c.on_ids;
    }
    for (int64_t v = 0; v < c.row_stride; ++v) {
      const bool is_special = c.special != 0.0 && ((t == 1 && v % 5 == 2) || t == 2);
      rounded.set(0, is_special && v < V ? c.special : row[v]);
      logits.set(t * c.row_stride + v, rounded.get(0));
    }
  }
  emulated::Bend bend(real, T, V, [&] { return normal(generator) / 2; });

  opd_topk_divergence_spec_t spec{};
  spec.num_tokens = T;
  spec.vocab_size = V;
  spec.token_ids = ids.data();
  spec.num_ids = K;
  spec.logits = bend.side(c, logits, dtype);
  Numbers logprobs(real, T * K), entropy(real, T);
  Outputs out;
  out.lse.resize(T);
  out.tail.resize(T);
  opd_topk_divergence_fwd_args_t fwd{};
  fwd.struct_size = sizeof(fwd);
  fwd.spec = spec;
  fwd.logprobs = logprobs.data();
  fwd.tail_logprob = out.tail.data();
  fwd.lse = out.lse.data();
  fwd.entropy = entropy.data();
  expect::that(forward(&fwd) == OPD_OK, opd_last_error());

  emulated::Gradient gradient(c, dtype, grad_dtype, in_place, logits);
  Numbers grad_ids(real, T * K), grad_rest(real, T);
  std::vector<double> shift(T);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t k = 0; k < K; ++k) {
      grad_ids.set(t * K + k, ids[t * K + k] < 0 ? kNaN : id_of(t, k));
    }
    grad_rest.set(t, std::isinf(out.tail[t]) ? 0.0 : rest_of(t));
    shift[t] = out.lse[t] + (c.of_rest && std::isfinite(out.tail[t]) ? out.tail[t] : 0.0);
  }
  opd_topk_divergence_bwd_args_t bwd{};
  bwd.struct_size = sizeof(bwd);
  bwd.spec = spec;
  bwd.grad_ids = grad_ids.data();
  bwd.grad_rest = grad_rest.data();
  bwd.lse = shift.data();
  bwd.grad_logits = gradient.matrix();
  bwd.grad_width = gradient.width();
  expect::that(backward(&bwd) == OPD_OK, opd_last_error());
  out.gradient = gradient.read([](int64_t t) { return t % 5 == 3; });
  for (int64_t i = 0; i < T * K; ++i) out.logprobs.push_back(logprobs.get(i));
  for (int64_t t = 0; t < T; ++t) out.entropy.push_back(entropy.get(t));
  return out;
}

bool same(const Outputs& a, const Outputs& b) {
  using emulated::same;
  return same(a.logprobs, b.logprobs) && same(a.tail, b.tail) && same(a.lse, b.lse) &&
         same(a.entropy, b.entropy) && same(a.gradient, b.gradient);
}

void check(const Case& c) {
  const Outputs truth = run(c, OPD_FLOAT64, OPD_FLOAT64, false, opd_topk_divergence_fwd_cpu,
                            opd_topk_divergence_bwd_cpu);
  const Outputs baseline = run(c, c.dtype, c.grad_dtype, false, opd_topk_divergence_fwd_cpu,
                               opd_topk_divergence_bwd_cpu);
  emulated::shuffle_threads(0);
  const bool in_place = c.where != kApart;
  const Outputs got = run(c, c.dtype, c.grad_dtype, in_place, forward_cuda, backward_cuda);
  const int before = expect::failures;
  const double eps = emulated::eps_of(OPD_FLOAT32);
  emulated::within(got.logprobs, baseline.logprobs, truth.logprobs, eps, "logprobs");
  emulated::within(got.tail, baseline.tail, truth.tail, eps, "tail_logprob");
  emulated::within(got.lse, baseline.lse, truth.lse, eps, "lse");
  emulated::within(got.entropy, baseline.entropy, truth.entropy, eps, "entropy");
  emulated::within(got.gradient, baseline.gradient, truth.gradient, emulated::eps_of(c.grad_dtype),
                   "gradient");
  for (size_t t = 0; t < truth.tail.size(); ++t) {
    // of each row by itself, however near 0 its tail_logprob is: nothing cancels
    if (!std::isfinite(truth.tail[t])) continue;
    expect::near(got.tail[t], truth.tail[t], 1e-5 * std::fabs(truth.tail[t]), "each tail_logprob");
  }
  if (expect::failures != before) std::printf("  in case %s\n", c.name);

  emulated::shuffle_threads(7);
  const Outputs again = run(c, c.dtype, c.grad_dtype, in_place, forward_cuda, backward_cuda);
  expect::that(same(got, again), "the order of threads changes no bit");
}

constexpr int32_t F32 = OPD_FLOAT32, BF16 = OPD_BFLOAT16, F16 = OPD_FLOAT16;

std::vector<Case> cases() {
  std::vector<Case> all = {
      {"one word", F32, F32, 3, 1, 1, 1},
      {"five words", F32, F32, 4, 5, 5, 2},
      {"more ids than words", F32, F32, 4, 5, 5, 9},
      {"aligned", F32, F32, 2, 8192, 8192, 64},
      {"unaligned rows", F32, F32, 5, 9001, 9003, 64},
      {"unaligned rows", BF16, BF16, 5, 9001, 9003, 64},
      {"unaligned rows", F16, F16, 5, 701, 703, 8},
      {"many ids", F32, F32, 2, 9001, 9003, 4096},
      {"many ids", BF16, F32, 2, 9001, 9003, 8192},
      {"mixed dtypes", BF16, F32, 5, 4099, 4104, 20},
      {"mixed dtypes", F16, BF16, 5, 700, 705, 20, 3},
      {"mixed dtypes", F32, F16, 5, 4099, 4100, 20},
      {"flat", F32, F32, 4, 9000, 9000, 64, 0, false, false, 1, 0, 1, 1e-3},
      {"cold", F32, F32, 4, 700, 701, 8, 0, false, false, 1, 0, 0.7},
      {"rows of temperatures", BF16, BF16, 5, 700, 712, 8, 0, false, true},
      {"bias", F32, F32, 3, 700, 704, 8, 3, true},
      {"scale", F32, F32, 3, 700, 704, 8, 0, false, false, -0.5},
      {"softcap", F32, F32, 5, 700, 704, 700, 0, false, false, 1, 5},
      {"everything", F32, F32, 5, 4099, 4101, 600, 1, true, true, 0.7, 6},
      {"everything", BF16, F32, 5, 4099, 4101, 20, 1, true, true, 0.7, 6},
  };
  const auto add = [&](Case c, Where where, double special = 0.0, double on_ids = 0.0,
                       bool of_rest = false) {
    c.where = where;
    c.special = special;
    c.on_ids = on_ids;
    c.of_rest = of_rest;
    all.push_back(c);
  };
  add({"in place", F32, F32, 5, 9001, 9003, 64}, kInPlace);
  add({"16-bit in place", F32, BF16, 5, 9001, 9003, 64}, kNarrow);
  // one barrier more would hide a tile that is written before it is read
  add({"16-bit in place", F32, F16, 5, 33000, 33004, 700, 3, true, true, 0.7, 6}, kNarrow);
  add({"16-bit in place", BF16, BF16, 5, 700, 703, 16}, kInPlace);
  for (const double special : {-double(kInf), double(kInf), double(kNaN)}) {
    add({"special values", F32, F32, 5, 701, 701, 8}, kApart, special);
    add({"special values", BF16, BF16, 5, 701, 704, 8, 1, true, true, 0.7}, kApart, special);
  }
  add({"-inf under a cap", F32, F32, 5, 701, 701, 8, 0, false, false, 1, 5}, kApart, -kInf);
  // a mass of e^-32, of 1 - e^-32, and one beyond the range of float32's exponential
  for (const double on_ids : {40.0, -40.0, 130.0}) {
    add({"all but nothing", F32, F32, 12, 2000, 2001, 16}, kApart, 0.0, on_ids, true);
    add({"all but nothing", F32, BF16, 12, 2000, 2001, 16, 0, false, false, 1, 200}, kNarrow, 0.0,
        on_ids, true);
  }
  return all;
}

// More than one window of the set of ids, with ids on both sides of its border.
void check_windows() {
  constexpr int64_t kWindow = 1 << 19;
  Case c{"two windows", F32, F32, 1, kWindow + 300, kWindow + 301, 40, 1};
  check(c);
  // one window, of more than the 48 KiB that a kernel has without asking
  check({"more than 48 KiB", F32, F32, 1, 400000, 400000, 5});
  const int64_t V = c.vocab_size;
  std::vector<float> logits(V + 4);
  std::mt19937 generator(5);
  std::normal_distribution<float> normal(0.0f, 2.0f);
  for (float& value : logits) value = normal(generator);
  std::vector<int64_t> ids;
  for (int64_t v = kWindow - 15; v < kWindow + 15; ++v) ids.push_back(v);
  // where the bits of the second window take the place of those of the first
  for (int64_t v = 60; v < 70; ++v) ids.push_back(v);
  float logprobs[2][40] = {}, entropy[2] = {};
  double tail[2] = {}, lse[2] = {};
  for (int64_t shift = 0; shift < 4; ++shift) {
    for (int side = 0; side < 2; ++side) {
      opd_topk_divergence_fwd_args_t fwd{};
      fwd.struct_size = sizeof(fwd);
      fwd.spec = {1, V, nullptr, {}, ids.data(), 40};
      fwd.spec.logits = {{logits.data() + shift, V, F32}, nullptr, 1.0, 0.0, 1.0, nullptr};
      fwd.logprobs = logprobs[side];
      fwd.tail_logprob = &tail[side];
      fwd.lse = &lse[side];
      fwd.entropy = &entropy[side];
      const opd_status_t status = side ? forward_cuda(&fwd) : opd_topk_divergence_fwd_cpu(&fwd);
      expect::that(status == OPD_OK, opd_last_error());
    }
    expect::near(tail[1], tail[0], 1e-5 * std::fabs(tail[0]), "ids at the border of a window");
    expect::near(lse[1], lse[0], 1e-6 * std::fabs(lse[0]), "lse with two windows");
    for (int k = 0; k < 40; ++k) {
      expect::near(logprobs[1][k], logprobs[0][k], 4e-6, "logprobs with two windows");
    }
  }
}

void check_edges() {
  float logits[8] = {1, 2, 3, kNaN, 4, 5, 6, kNaN}, logprobs[6] = {}, entropy[2] = {};
  double lse[2] = {}, tail[2] = {};
  const int64_t ids[6] = {2, 3, int64_t{1} << 40, 1, 1, -100};
  opd_topk_divergence_fwd_args_t fwd{};
  fwd.struct_size = sizeof(fwd);
  fwd.spec.num_tokens = 2;
  fwd.spec.vocab_size = 3;
  fwd.spec.token_ids = ids;
  fwd.spec.num_ids = 3;
  fwd.spec.logits = {{logits, 4, F32}, nullptr, 1.0, 0.0, 1.0, nullptr};
  fwd.logprobs = logprobs;
  fwd.tail_logprob = tail;
  fwd.lse = lse;
  fwd.entropy = entropy;
  expect::that(forward_cuda(&fwd) == OPD_OK, opd_last_error());
  expect::that(std::isfinite(logprobs[0]) && std::isnan(logprobs[1]) && std::isnan(logprobs[2]),
               "an id out of range is NaN and nothing else is");
  expect::that(logprobs[5] == -kInf && std::isfinite(tail[0]), "no id has no probability");
  const double without = std::exp(4.0) + std::exp(6.0);
  expect::near(tail[1], std::log(without / (without + std::exp(5.0))), 1e-6,
               "a mass that is named twice counts once");

  opd_topk_divergence_bwd_args_t bwd{};
  bwd.grad_ids = logprobs;
  bwd.grad_rest = entropy;
  bwd.lse = lse;
  emulated::check_refusals(fwd, bwd, forward_cuda, backward_cuda);
}

// A row without gradients, and the part of a row that has none, are not read.
void check_what_is_not_read() {
  float logits[2][8] = {{kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN},
                        {kNaN, 2, kNaN, kNaN, 1, kNaN, kNaN, kNaN}};
  const int64_t ids[4] = {1, 4, 4, 1};
  const float grad_ids[4] = {0, 0, 3, -1}, grad_rest[2] = {0, 0};
  const double lse[2] = {kNaN, kNaN};
  for (const double softcap : {0.0, 5.0}) {
    float grad[2][8];
    opd_topk_divergence_bwd_args_t bwd{};
    bwd.struct_size = sizeof(bwd);
    bwd.spec = {2, 8, nullptr, {}, ids, 2};
    bwd.spec.logits = {{logits, 8, F32}, nullptr, 1.0, softcap, 1.0, nullptr};
    bwd.grad_ids = grad_ids;
    bwd.grad_rest = grad_rest;
    bwd.lse = lse;
    bwd.grad_logits = {grad, 8, F32};
    bwd.grad_width = 8;
    expect::that(backward_cuda(&bwd) == OPD_OK, opd_last_error());
    for (int v = 0; v < 8; ++v) {
      expect::that(grad[0][v] == 0.0f, "a row of weight 0 has no gradient, whatever is in it");
      const auto slope = [&](double z) {
        return softcap == 0.0 ? 1.0 : 1.0 - std::pow(std::tanh(z / softcap), 2);
      };
      const double expected = v == 4 ? 3 * slope(1) : v == 1 ? -slope(2) : 0.0;
      expect::near(grad[1][v], expected, 1e-6, "only what is at the ids is read");
    }
  }
}

}  // namespace

int main() {
  for (const Case& c : cases()) check(c);
  check_windows();
  check_edges();
  check_what_is_not_read();
  return expect::report("test_cuda_topk_divergence");
}
