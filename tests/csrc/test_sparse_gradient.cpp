// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "expect.h"
#include "opd/opd.h"

namespace {

// more than one tile of columns, and no multiple of anything
constexpr int64_t kTokens = 5, kVocab = 9001, kStride = 9007;
constexpr float kTolerance = 1e-3f;

opd_sparse_gradient_args_t arguments(const std::vector<float>& gradient,
                                     const std::vector<float>& weights,
                                     std::vector<uint8_t>& kept) {
  opd_sparse_gradient_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = kTokens;
  args.vocab_size = kVocab;
  args.grad_logits = {gradient.data(), kStride, OPD_FLOAT32};
  args.token_weights = weights.data();
  args.tolerance = kTolerance;
  args.kept = kept.data();
  return args;
}

bool refused(opd_status_t status, const char* words) {
  return status == OPD_INVALID_ARGUMENT && std::strstr(opd_last_error(), words) != nullptr;
}

}  // namespace

int main() {
  std::mt19937 generator(0);
  std::uniform_real_distribution<float> log_size(-24.0f, -1.0f);
  const std::vector<float> weights = {0.5f, -2.0f, 0.0f, 1.0f, 1e-3f};
  std::vector<float> gradient(kTokens * kStride, std::nanf(""));
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t v = 0; v < kVocab; ++v) {
      const float size = weights[t] * std::exp(log_size(generator) - (v % 7 ? 7.0f : 0.0f));
      gradient[t * kStride + v] = v % 2 ? size : -size;
    }
  }
  // the row of weight 0 is not read
  for (int64_t v = 0; v < kVocab; ++v) gradient[2 * kStride + v] = std::nanf("");
  gradient[0 * kStride + 3] = std::nanf("");
  gradient[1 * kStride + 4] = std::numeric_limits<float>::infinity();
  gradient[3 * kStride + 5] = kTolerance;  // not beyond it

  std::vector<uint8_t> kept(kVocab, 7);
  opd_sparse_gradient_args_t args = arguments(gradient, weights, kept);
  expect::that(opd_sparse_gradient_mark_cpu(&args) == OPD_OK, opd_last_error());
  std::vector<int64_t> columns;
  for (int64_t v = 0; v < kVocab; ++v) {
    bool needed = false;
    for (int64_t t = 0; t < kTokens; ++t) {
      if (weights[t] == 0.0f) continue;
      needed |= !(std::fabs(gradient[t * kStride + v]) <= kTolerance * std::fabs(weights[t]));
    }
    expect::that(kept[v] == (needed ? 1 : 0), "a column is kept if and only if some row needs it");
    if (kept[v]) columns.push_back(v);
  }
  expect::that(kept[3] == 1 && kept[4] == 1, "NaN and inf are needed");
  expect::that(columns.size() > 100 && columns.size() < kVocab / 2, "the case is a mixed one");

  const int64_t width = static_cast<int64_t>(columns.size());
  std::vector<float> packed(kTokens * width, -1.0f), dropped(kTokens, -1.0f);
  args.columns = columns.data();
  args.num_columns = width;
  args.packed = {packed.data(), width, OPD_FLOAT32};
  args.dropped = dropped.data();
  expect::that(opd_sparse_gradient_pack_cpu(&args) == OPD_OK, opd_last_error());
  for (int64_t t = 0; t < kTokens; ++t) {
    double sum = 0.0;
    for (int64_t v = 0; v < kVocab; ++v) {
      if (!kept[v] && weights[t] != 0.0f) sum += std::fabs((double)gradient[t * kStride + v]);
    }
    if (weights[t] != 0.0f) sum /= std::fabs((double)weights[t]);
    expect::near(dropped[t], sum, 1e-7 * sum, "dropped");
    for (int64_t k = 0; k < width; ++k) {
      const float expected = weights[t] == 0.0f ? 0.0f : gradient[t * kStride + columns[k]];
      const float got = packed[t * width + k];
      expect::that(got == expected || (std::isnan(got) && std::isnan(expected)), "packed");
    }
  }

  // an infinite or NaN weight drops neither infinities nor NaN
  for (const float weight : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    std::vector<float> others = weights;
    others[1] = weight;
    std::vector<uint8_t> also(kVocab);
    opd_sparse_gradient_args_t again = arguments(gradient, others, also);
    expect::that(opd_sparse_gradient_mark_cpu(&again) == OPD_OK && also[3] && also[4],
                 "NaN and inf are needed under any weight");
  }

  // rows added where their columns belong
  std::vector<double> target(6 * 3, 1.0), rows = {1, 2, 3, 4};
  const int64_t where[2] = {1, 5};
  opd_sparse_gradient_add_args_t add{};
  add.struct_size = sizeof(add);
  add.num_columns = 2;
  add.vocab_size = 6;
  add.width = 2;
  add.columns = where;
  add.rows = {rows.data(), 2, OPD_FLOAT64};
  add.target = {target.data(), 3, OPD_FLOAT64};
  expect::that(opd_sparse_gradient_add_cpu(&add) == OPD_OK, opd_last_error());
  const double sums[6][3] = {{1, 1, 1}, {2, 3, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {4, 5, 1}};
  expect::that(std::memcmp(target.data(), sums, sizeof(sums)) == 0, "rows are added in place");

  const int64_t twice[2] = {1, 1}, outside[2] = {0, 6};
  add.columns = twice;
  expect::that(refused(opd_sparse_gradient_add_cpu(&add), "must ascend in [0, 6), got 1 at position 1"),
               "columns that repeat are refused");
  add.columns = outside;
  expect::that(refused(opd_sparse_gradient_add_cpu(&add), "got 6 at position 1"),
               "columns out of range are refused");
  args.tolerance = -1.0;
  expect::that(refused(opd_sparse_gradient_mark_cpu(&args), "tolerance must be >= 0"),
               "a negative tolerance is refused");
  args.grad_logits.dtype = OPD_BFLOAT16;
  expect::that(refused(opd_sparse_gradient_pack_cpu(&args), "must be float32 or float64"),
               "16-bit gradients are refused");
  args.struct_size = 8;
  expect::that(refused(opd_sparse_gradient_pack_cpu(&args), "struct_size"),
               "a struct of another version is refused");
  return expect::report("test_sparse_gradient");
}
