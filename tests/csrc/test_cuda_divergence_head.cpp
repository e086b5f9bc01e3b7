// SPDX-License-Identifier: Apache-2.0
// The head of adaptive_kl under the emulation: the kernels that stream find the very tokens of its
// definition, for masses that fit exactly and by one rounding do not, ties, -inf, every dtype.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "cuda_divergence_cases.h"
#include "divergence_state.h"

namespace {

using namespace cases;

// One token's teacher as the kernels have it.
struct Law {
  std::vector<float> log_p, p;
};

// Of groups of tied tokens from the most probable on: their log p, and the mass up to each.
struct Groups {
  std::vector<float> log_p;
  std::vector<double> upto;
};

Groups groups_of(const Law& law) {
  std::vector<size_t> order(law.p.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return law.log_p[a] > law.log_p[b]; });
  Groups out;
  double mass = 0;  // exact: a few thousand float32 of much the same size
  for (size_t i : order) {
    if (out.log_p.empty() || out.log_p.back() != law.log_p[i]) {
      out.log_p.push_back(law.log_p[i]);
      out.upto.push_back(mass);
    }
    out.upto.back() = mass += law.p[i];
  }
  return out;
}

// Its least log p, by the definition.
float head_of(const Groups& groups, double head_mass) {
  size_t count = 0;
  while (count < groups.upto.size() && groups.upto[count] <= head_mass) ++count;
  return groups.log_p[count == 0 ? 0 : count - 1];
}

struct Found {
  Law law;
  float threshold;
};

Found run(Problem p, double head_mass) {
  p.components.clear(), p.gated.clear();
  p.add({OPD_ADAPTIVE_KL, head_mass, 0});
  const Outcome got = forward_backward<float>(p, true);
  const opd::Shifts<float> shifts(got.state.data());
  Found out;
  for (int64_t v = 0; v < p.vocab_size; ++v) {
    float low;
    const float z = p.teacher.values.single[v];
    out.law.log_p.push_back(opd::log_probability(z, shifts.teacher, &low));
    out.law.p.push_back(opd::exp_nonpositive(out.law.log_p.back()));
  }
  out.threshold = static_cast<float>(got.state[OPD_DIVERGENCE_STATE + opd::kThreshold]);
  return out;
}

int num_checked = 0;

void check_head(const Problem& p, double head_mass, const std::string& what) {
  if (!(head_mass > 0 && head_mass < 1)) return;
  const Found got = run(p, head_mass);
  const float least = head_of(groups_of(got.law), head_mass);
  bool same = true;
  for (float log_p : got.law.log_p) same = same && (log_p >= got.threshold) == (log_p >= least);
  const std::string message = what + ": the head at " + std::to_string(head_mass);
  expect::that(same, message.c_str());
  ++num_checked;
}

// Masses at which the head takes one group more, those just below and above them, and some others.
void check_heads(const Problem& p, const std::string& what) {
  const Groups groups = groups_of(run(p, 0.5).law);
  const size_t count = groups.upto.size();
  for (size_t k : {size_t{0}, size_t{1}, size_t{2}, count / 2, count - 1}) {
    if (k >= count) continue;
    const double mass = groups.upto[k];
    for (double head_mass : {mass, std::nextafter(mass, 0.0), std::nextafter(mass, 1.0)}) {
      check_head(p, head_mass, what);
    }
  }
  for (double head_mass : {1e-6, 0.3, 0.9, 1 - 1e-9}) check_head(p, head_mass, what);
}

using Row = std::function<double(int64_t)>;

struct Kind {
  const char* name;
  Row logit;
};

const Kind kRows[] = {
    {"equal", [](int64_t) { return 0.7; }},
    {"one-hot", [](int64_t v) { return v == 0 ? 1.0 : -kInf; }},
    {"a peak", [](int64_t v) { return v == 11 ? 30.0 : 0.0; }},
    {"ties", [](int64_t v) { return static_cast<double>(v % 3); }},
    {"far below", [](int64_t v) { return v < 9 ? 0.25 * static_cast<double>(v % 5) : -200.0; }},
    {"every other -inf", [](int64_t v) { return v % 2 ? -kInf : std::sin(1.0 * v); }},
    {"a ramp", [](int64_t v) { return 0.002 * static_cast<double>(v); }},
};

void check_rows() {
  for (int64_t vocab_size : {1, 31, 4097}) {
    for (const Kind& kind : kRows) {
      Problem p(1, vocab_size, 5, OPD_FLOAT32, OPD_FLOAT32, 1);
      for (int64_t v = 0; v < vocab_size; ++v) p.teacher.put(0, v, kind.logit(v));
      check_heads(p, std::string(kind.name) + " V " + std::to_string(vocab_size));
    }
  }
  // 16 bits: tokens with the same logit are many
  for (int32_t dtype : {OPD_FLOAT32, OPD_BFLOAT16, OPD_FLOAT16}) {
    check_heads(Problem(1, 4097, 6, OPD_FLOAT32, dtype, 1), "dtype " + std::to_string(dtype));
  }
}

// Beside another divergence the kernel of every option finds the head. Not at a mass so near 1 that
// the rounding of the law decides where it ends.
void check_every_option() {
  for (const Target& target : kTargets) {
    for (double head_mass : {0.05, 0.5, 0.95}) {
      Problem p(3, 1023, 79);
      p.target = target;
      for (int64_t v = 0; v < 1023; ++v) p.teacher.put(1, v, static_cast<double>(v % 3));
      for (int64_t v = 0; v < 1023; ++v) p.teacher.put(2, v, v == 700 ? 30.0 : 0.0);
      p.add({OPD_ADAPTIVE_KL, head_mass, 0});
      p.add({OPD_ADAPTIVE_KL, 0.5, 0}, true);
      check(p, "two heads, target " + std::to_string(target.kind));
      p.options = p.with_statistics = p.with_labels = p.with_weights = true;
      check(p, "two heads and options, target " + std::to_string(target.kind));
    }
  }
}

void check_neighbours_of_nan() {
  Problem p(3, 1023, 31);
  p.add({OPD_ADAPTIVE_KL, 0.5, 0});
  const Outcome clean = forward_backward<float>(p, true);
  for (double value : {kNan, kInf}) {
    p.teacher.put(1, 1000, value);
    const Outcome got = forward_backward<float>(p, true);
    expect::that(std::isnan(got.loss[1]), "NaN is NaN in its row");
    expect::that(got.loss[0] == clean.loss[0] && got.loss[2] == clean.loss[2], "and nowhere else");
  }
}

// Tokens that are all as probable are all in the head, whatever it may have: forward KL, on a CPU too.
void check_uniform_teachers() {
  for (int64_t vocab_size : {1, 31, 4097}) {
    Problem p(1, vocab_size, 9);
    for (int64_t v = 0; v < vocab_size; ++v) p.teacher.put(0, v, 0.7);
    const auto losses = [&](const cases::Kind& kind) {
      Problem one = p;
      one.add(kind);
      return std::vector<double>{forward_backward<double>(one, false).loss[0],
                                 forward_backward<float>(one, false).loss[0],
                                 forward_backward<float>(one, true).loss[0]};
    };
    const std::vector<double> expected = losses({OPD_FORWARD_KL, 0, 0});
    for (double head_mass : {0.5, 1 - 1e-6, 1 - 1e-9}) {
      const std::vector<double> got = losses({OPD_ADAPTIVE_KL, head_mass, 0});
      for (size_t i = 0; i < got.size(); ++i) {
        expect::near(got[i], expected[i], 1e-6 * expected[0], "a head of all tokens");
      }
    }
  }
}

void check_a_large_vocabulary() {
  Problem p(1, 151936, 8);
  for (double head_mass : {0.5, 0.95}) check_head(p, head_mass, "V 151,936");
}

}  // namespace

int main() {
  check_rows();
  check_every_option();
  check_neighbours_of_nan();
  check_uniform_teachers();
  check_a_large_vocabulary();
  std::printf("%d heads; worst error over bound %.2f at %s\n", num_checked, worst.ratio,
              worst.where.c_str());
  return expect::report("test_cuda_divergence_head");
}
