// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "expect.h"
#include "opd/opd.h"

namespace {

constexpr int64_t kTokens = 4, kVocab = 1100, kStride = 1107, kIds = 3;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
const int64_t kTokenIds[kTokens * kIds] = {0, 1099, -1, 513, 512, 511, 7, 7, 7, -5, -1, 3};

template <class T>
struct Outputs {
  explicit Outputs(int64_t num_topk, int64_t num_tokens = kTokens)
      : ids(num_tokens * num_topk, -7),
        logprobs(num_tokens * num_topk),
        tail(num_tokens),
        entropy(num_tokens),
        token_logprobs(num_tokens * kIds),
        lse(num_tokens) {}
  std::vector<int32_t> ids;
  std::vector<T> logprobs, tail, entropy, token_logprobs;
  std::vector<double> lse;
  bool operator==(const Outputs& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
    };
    return same(ids, other.ids) && same(logprobs, other.logprobs) && same(tail, other.tail) &&
           same(entropy, other.entropy) && same(token_logprobs, other.token_logprobs) &&
           same(lse, other.lse);
  }
};

template <class T>
opd_topk_logprobs_args_t args_of(const opd_logits_t& law, int64_t num_topk, Outputs<T>& out) {
  opd_topk_logprobs_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = static_cast<int64_t>(out.lse.size());
  args.vocab_size = kVocab;
  args.logits = law;
  args.num_topk = num_topk;
  args.token_ids = kTokenIds;
  args.num_ids = kIds;
  args.ids = out.ids.data();
  args.logprobs = out.logprobs.data();
  args.lse = out.lse.data();
  args.tail_logprob = out.tail.data();
  args.entropy = out.entropy.data();
  args.token_logprobs = out.token_logprobs.data();
  return args;
}

template <class T>
opd_logits_t plain(const std::vector<T>& logits, int64_t row_stride = kStride) {
  const int32_t dtype = sizeof(T) == 8 ? OPD_FLOAT64 : OPD_FLOAT32;
  return {{logits.data(), row_stride, dtype}, nullptr, 1.0, 0.0, 1.0, nullptr};
}

// A row's logits as its law takes them.
template <class T>
std::vector<double> bent(const opd_logits_t& law, int64_t t) {
  std::vector<double> row(kVocab);
  for (int64_t v = 0; v < kVocab; ++v) {
    double z = static_cast<const T*>(law.matrix.data)[t * law.matrix.row_stride + v];
    if (law.bias) z += static_cast<const T*>(law.bias)[v];
    z *= law.scale;
    if (law.softcap > 0) z = law.softcap * std::tanh(z / law.softcap);
    row[v] = z / (law.temperatures ? static_cast<const T*>(law.temperatures)[t] : law.temperature);
  }
  return row;
}

template <class T>
void check_values(const opd_logits_t& law, int64_t num_topk, double tolerance) {
  Outputs<T> out(num_topk);
  const opd_topk_logprobs_args_t args = args_of(law, num_topk, out);
  expect::that(opd_topk_logprobs_fwd_cpu(&args) == OPD_OK, opd_last_error());
  for (int64_t t = 0; t < kTokens; ++t) {
    const std::vector<double> z = bent<T>(law, t);
    std::vector<int32_t> order(kVocab);
    for (int32_t v = 0; v < kVocab; ++v) order[v] = v;
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return z[a] > z[b]; });
    long double sum = 0, tail = 0, entropy = 0;
    for (int64_t v = 0; v < kVocab; ++v) sum += std::exp(static_cast<long double>(z[v]));
    const double lse = static_cast<double>(std::log(sum));
    for (int64_t i = 0; i < kVocab; ++i) {
      const long double q = std::exp(static_cast<long double>(z[order[i]])) / sum;
      if (q > 0) entropy -= q * std::log(q);
      if (i >= num_topk) tail += q;
    }
    expect::near(out.lse[t], lse, tolerance, "lse");
    expect::near(out.entropy[t], static_cast<double>(entropy), tolerance, "entropy");
    if (num_topk < kVocab) {
      expect::near(out.tail[t], static_cast<double>(std::log(tail)), tolerance, "tail");
    } else {
      expect::that(out.tail[t] == -kInfinity, "the tail of nothing is -inf");
    }
    for (int64_t i = 0; i < num_topk; ++i) {
      const int64_t at = t * num_topk + i;
      expect::near(out.logprobs[at], z[order[i]] - lse, tolerance, "logprobs");
      // neighbours of almost the same logit may change places by rounding
      expect::near(z[std::max(0, out.ids[at])], z[order[i]], tolerance, "ids");
    }
    for (int64_t j = 0; j < kIds; ++j) {
      const int64_t id = kTokenIds[t * kIds + j];
      const double got = out.token_logprobs[t * kIds + j];
      if (id < 0) {
        expect::that(got == -kInfinity, "no id is -inf");
      } else {
        expect::near(got, z[id] - lse, tolerance, "token_logprobs");
      }
    }
  }
}

void backwards(int64_t num_rows, opd_rows_fn body, void* context) {
  for (int64_t row = num_rows; row > 0; --row) body(context, row - 1, row);
}

void check_order_and_threads(const std::vector<float>& logits) {
  Outputs<float> one(65), two(65);
  opd_topk_logprobs_args_t args = args_of(plain(logits), 65, one);
  opd_topk_logprobs_fwd_cpu(&args);
  args = args_of(plain(logits), 65, two);
  args.parallel_for = &backwards;
  opd_topk_logprobs_fwd_cpu(&args);
  expect::that(one == two, "results do not depend on the order of the rows");
}

// Rows on which a buffer overflows or is cut at every block.
void check_hostile() {
  std::vector<float> rows(kTokens * kStride, std::nanf(""));
  for (int64_t v = 0; v < kVocab; ++v) {
    rows[v] = 0.01f * static_cast<float>(v);
    rows[kStride + v] = -0.01f * static_cast<float>(v);
    rows[2 * kStride + v] = 3.0f;
    rows[3 * kStride + v] = static_cast<float>(v % 3);
  }
  for (const int64_t num_topk : {int64_t{1}, int64_t{64}, int64_t{600}, kVocab}) {
    check_values<float>(plain(rows), num_topk, 2e-5);
    Outputs<float> out(num_topk);
    const opd_topk_logprobs_args_t args = args_of(plain(rows), num_topk, out);
    opd_topk_logprobs_fwd_cpu(&args);
    for (int64_t i = 0; i < num_topk; ++i) {
      expect::that(out.ids[i] == kVocab - 1 - i, "ascending: the last first");
      expect::that(out.ids[num_topk + i] == i, "descending: the first first");
      expect::that(out.ids[2 * num_topk + i] == i, "equal: the smaller id first");
      const int64_t of_two = kVocab / 3;
      if (i < of_two) expect::that(out.ids[3 * num_topk + i] == 3 * i + 2, "ties over blocks");
    }
  }
}

void check_lawless() {
  std::vector<float> rows(kTokens * kStride, -std::numeric_limits<float>::infinity());
  rows[5] = std::nanf("");
  rows[kStride + 700] = std::numeric_limits<float>::infinity();
  rows[2 * kStride + 700] = 1.0f;
  Outputs<float> out(2);
  const opd_topk_logprobs_args_t args = args_of(plain(rows), 2, out);
  opd_topk_logprobs_fwd_cpu(&args);
  for (const int64_t t : {0, 1, 3}) {
    expect::that(out.ids[2 * t] == -1 && out.ids[2 * t + 1] == -1, "no law: no ids");
    expect::that(std::isnan(out.logprobs[2 * t]) && std::isnan(out.tail[t]) &&
                     std::isnan(out.entropy[t]) && std::isnan(out.token_logprobs[kIds * t]),
                 "no law: NaN");
  }
  expect::that(std::isnan(out.lse[0]) && std::isnan(out.lse[1]) && out.lse[3] == -kInfinity,
               "no law: lse");
  expect::that(out.ids[4] == 700 && out.ids[5] == -1 && out.logprobs[4] == 0.0f &&
                   out.logprobs[5] == -std::numeric_limits<float>::infinity() &&
                   out.tail[2] == -std::numeric_limits<float>::infinity(),
               "one possible token");
}

void check_refusals(const std::vector<double>& logits) {
  Outputs<double> out(5);
  const opd_topk_logprobs_args_t good = args_of(plain(logits), 5, out);
  const auto refused = [&](auto change, const char* words) {
    opd_topk_logprobs_args_t args = good;
    change(args);
    expect::that(opd_topk_logprobs_fwd_cpu(&args) == OPD_INVALID_ARGUMENT, words);
    if (!std::strstr(opd_last_error(), words)) {
      std::printf("expected '%s' in '%s'\n", words, opd_last_error());
      expect::that(false, "words of a refusal");
    }
  };
  using Args = opd_topk_logprobs_args_t;
  refused([](Args& args) { args.struct_size = 8; }, "struct_size must be");
  refused([](Args& args) { args.num_topk = 0; }, "num_topk must be in [1, 1100], got 0");
  refused([](Args& args) { args.num_topk = kVocab + 1; }, "num_topk must be in [1, 1100]");
  refused([](Args& args) { args.vocab_size = 9000, args.num_topk = 4097; }, "in [1, 4096]");
  refused([](Args& args) { args.vocab_size = int64_t{1} << 31; }, "vocab_size must be below 2^31");
  refused([](Args& args) { args.vocab_size = 0; }, "vocab_size must be > 0");
  refused([](Args& args) { args.num_ids = 4097; }, "num_ids must be in [0, 4096]");
  refused([](Args& args) { args.num_ids = -1; }, "num_ids must be in [0, 4096]");
  refused([](Args& args) { args.vocab_size = 1000; }, "token_ids must be below 1000, got 1099");
  refused([](Args& args) { args.token_ids = nullptr; }, "token_ids and token_logprobs");
  refused([](Args& args) { args.token_logprobs = nullptr; }, "token_ids and token_logprobs");
  refused([](Args& args) { args.tail_logprob = nullptr; }, "every output must not be NULL");
  refused([](Args& args) { args.logits.temperature = 0; }, "temperature of logits");
  expect::that(opd_topk_logprobs_fwd_cpu(nullptr) == OPD_INVALID_ARGUMENT, "no args");
  opd_topk_logprobs_args_t args = good;
  args.num_tokens = 0;
  args.ids = nullptr;
  expect::that(opd_topk_logprobs_fwd_cpu(&args) == OPD_OK, "no tokens");
  args = good;
  args.num_ids = 0;
  args.token_ids = nullptr;
  args.token_logprobs = nullptr;
  expect::that(opd_topk_logprobs_fwd_cpu(&args) == OPD_OK, "no token_ids");
}

}  // namespace

int main() {
  std::mt19937 generator(5);
  std::normal_distribution<double> normal(0.0, 4.0);
  std::vector<double> logits(kTokens * kStride, std::nan("")), bias(kVocab);
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t v = 0; v < kVocab; ++v) logits[t * kStride + v] = normal(generator);
  }
  for (double& value : bias) value = 0.3 * normal(generator);
  const std::vector<float> narrow(logits.begin(), logits.end());
  const double temperatures[kTokens] = {0.5, 1.0, 2.0, 0.7};
  opd_logits_t everything = plain(logits);
  everything.bias = bias.data();
  everything.scale = -0.7;
  everything.softcap = 6.0;
  everything.temperatures = temperatures;
  for (const int64_t num_topk : {int64_t{1}, int64_t{64}, int64_t{513}, kVocab}) {
    check_values<double>(plain(logits), num_topk, 1e-12);
    check_values<double>(everything, num_topk, 1e-12);
    check_values<float>(plain(narrow), num_topk, 1e-5);
  }
  check_order_and_threads(narrow);
  check_hostile();
  check_lawless();
  check_refusals(logits);
  expect::that(opd_topk_logprobs_workspace_bytes(512, 151936, 64) >= 0, "workspace");
  return expect::report("topk_logprobs");
}
