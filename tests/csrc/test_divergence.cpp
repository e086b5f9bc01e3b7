// SPDX-License-Identifier: Apache-2.0
// The row kernels through the C API: values against long double sums over the definitions,
// gradients against central differences, layouts, masks and special values.
#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "expect.h"
#include "opd/opd.h"

namespace {

struct Problem {
  int64_t num_tokens, vocab_size, stride;
  std::vector<double> student, teacher;
};

Problem make_problem(int64_t num_tokens, int64_t vocab_size, unsigned seed) {
  Problem problem{num_tokens, vocab_size, vocab_size + 3, {}, {}};
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0.0, 2.0);
  for (auto* logits : {&problem.student, &problem.teacher}) {
    logits->assign(num_tokens * problem.stride, std::nan(""));  // the padding is poison
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t v = 0; v < vocab_size; ++v) (*logits)[t * problem.stride + v] = normal(generator);
    }
  }
  return problem;
}

struct Kind {
  int divergence;
  double param0, param1;
};

constexpr Kind kKinds[] = {
    {OPD_FORWARD_KL, 0, 0},      {OPD_REVERSE_KL, 0, 0},         {OPD_JSD, 0.3, 0},
    {OPD_SKEW_FORWARD_KL, 0.1, 0}, {OPD_SKEW_REVERSE_KL, 0.1, 0}, {OPD_TOTAL_VARIATION, 0, 0},
    {OPD_JEFFREYS, 0.3, 0},      {OPD_SQUARED_HELLINGER, 0, 0},  {OPD_ALPHA, 0.3, 0},
    {OPD_ALPHA, 1.5, 0},         {OPD_RENYI, 0.3, 0},            {OPD_RENYI, 2, 0},
    {OPD_PEARSON_CHI2, 0, 0},    {OPD_NEYMAN_CHI2, 0, 0},        {OPD_ALPHA_BETA, 0.2, 0.7},
    {OPD_ALPHA_BETA, 0, 0.7},    {OPD_ALPHA_BETA, 0.4, 0},       {OPD_ALPHA_BETA, 0.5, -0.5},
    {OPD_ALPHA_BETA, 0, 0},
};

opd_logits_t make_side(const std::vector<double>& logits, int64_t stride, double temperature) {
  return {{logits.data(), stride, OPD_FLOAT64}, nullptr, 1.0, 0.0, temperature, nullptr};
}

opd_divergence_args_t make_args(const Problem& problem, const opd_divergence_component_t* component) {
  opd_divergence_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = problem.num_tokens;
  args.vocab_size = problem.vocab_size;
  args.student = make_side(problem.student, problem.stride, 1.5);
  args.teacher = make_side(problem.teacher, problem.stride, 0.8);
  args.components = component;
  args.num_components = 1;
  return args;
}

opd_divergence_component_t component_of(const Kind& kind) {
  return {kind.divergence, kind.param0, kind.param1, nullptr};
}

std::vector<long double> softmax(const double* logits, int64_t n, double temperature) {
  std::vector<long double> p(n);
  long double sum = 0;
  for (int64_t v = 0; v < n; ++v) sum += p[v] = std::exp((long double)(logits[v]) / temperature);
  for (auto& value : p) value /= sum;
  return p;
}

// straight from the definitions, in long double
long double truth(const Kind& kind, const std::vector<long double>& p,
                  const std::vector<long double>& q) {
  const long double c = kind.param0, a = kind.param0, b = kind.param1;
  long double sum = 0;
  for (size_t v = 0; v < p.size(); ++v) {
    const auto kl = [](long double x, long double y) { return x * std::log(x / y); };
    const long double pv = p[v], qv = q[v];
    const long double mixture = c * pv + (1 - c) * qv, other = (1 - c) * pv + c * qv;
    switch (kind.divergence) {
      case OPD_FORWARD_KL: sum += kl(pv, qv); break;
      case OPD_REVERSE_KL: sum += kl(qv, pv); break;
      case OPD_JSD: sum += c * kl(pv, mixture) + (1 - c) * kl(qv, mixture); break;
      case OPD_SKEW_FORWARD_KL: sum += kl(pv, mixture); break;
      case OPD_SKEW_REVERSE_KL: sum += kl(qv, other); break;
      case OPD_TOTAL_VARIATION: sum += std::fabs(pv - qv) / 2; break;
      case OPD_JEFFREYS: sum += c * kl(pv, qv) + (1 - c) * kl(qv, pv); break;
      case OPD_SQUARED_HELLINGER: sum += std::pow(std::sqrt(pv) - std::sqrt(qv), 2) / 2; break;
      case OPD_ALPHA:
      case OPD_RENYI: sum += std::pow(pv, a) * std::pow(qv, 1 - a); break;
      case OPD_PEARSON_CHI2: sum += (pv - qv) * (pv - qv) / qv; break;
      case OPD_NEYMAN_CHI2: sum += (pv - qv) * (pv - qv) / pv; break;
      default: {
        const long double x = std::log(qv / pv), pa = std::pow(pv, a), qb = std::pow(qv, b);
        if (a == 0 && b == 0) {
          sum += x * x / 2;
        } else if (a == 0) {
          sum += (qb * b * x - qb + std::pow(pv, b)) / (b * b);
        } else if (b == 0) {
          sum += (-pa * a * x - pa + std::pow(qv, a)) / (a * a);
        } else if (a + b == 0) {
          sum += (a * x + std::pow(pv / qv, a) - 1) / (a * a);
        } else {
          sum -= (pa * qb - a / (a + b) * std::pow(pv, a + b) - b / (a + b) * std::pow(qv, a + b)) /
                 (a * b);
        }
      }
    }
  }
  if (kind.divergence == OPD_ALPHA) return (sum - 1) / (a * (a - 1));
  if (kind.divergence == OPD_RENYI) return std::log(sum) / (a - 1);
  return sum;
}

struct Forward {
  std::vector<double> loss, state, statistics;
};

Forward forward(opd_divergence_args_t args) {
  Forward out;
  const size_t size = OPD_DIVERGENCE_STATE + args.num_components * OPD_DIVERGENCE_STATE_PER_COMPONENT;
  out.loss.assign(args.num_tokens, std::nan(""));
  out.state.assign(args.num_tokens * size, std::nan(""));
  out.statistics.assign(OPD_NUM_STATISTICS * args.num_tokens, std::nan(""));
  args.with_statistics = 1;
  args.loss = out.loss.data();
  args.state = out.state.data();
  args.statistics = out.statistics.data();
  expect::that(opd_divergence_fwd_cpu(&args) == OPD_OK, opd_last_error());
  return out;
}

std::vector<double> backward(opd_divergence_args_t args, int64_t stride, Forward& saved,
                             const double* grad_loss) {
  std::vector<double> gradient(args.num_tokens * stride, std::nan(""));
  args.grad_loss = grad_loss;
  args.state = saved.state.data();
  args.grad = {gradient.data(), stride, OPD_FLOAT64};
  args.grad_width = stride;
  expect::that(opd_divergence_bwd_cpu(&args) == OPD_OK, opd_last_error());
  return gradient;
}

void test_values_and_gradients(const Kind& kind, int64_t vocab_size) {
  Problem problem = make_problem(3, vocab_size, 17 * kind.divergence + 1);
  const opd_divergence_component_t component = component_of(kind);
  opd_divergence_args_t args = make_args(problem, &component);
  const double weights[3] = {0.7, 0.0, 1.3}, grad_loss[3] = {1.0, 5.0, -2.0};
  args.token_weights = weights;
  // a row of weight 0 may hold anything
  for (int64_t v = 0; v < vocab_size; ++v) problem.student[problem.stride + v] = std::nan("");
  Forward out = forward(args);
  for (int t : {0, 2}) {
    const auto p = softmax(&problem.teacher[t * problem.stride], vocab_size, 0.8);
    const auto q = softmax(&problem.student[t * problem.stride], vocab_size, 1.5);
    const double expected = weights[t] * static_cast<double>(truth(kind, p, q));
    expect::near(out.loss[t], expected, 2e-13 * (1 + std::fabs(expected)), "value");
    expect::near(out.statistics[OPD_STATISTIC_FORWARD_KL * 3 + t],
                 static_cast<double>(truth({OPD_FORWARD_KL, 0, 0}, p, q)), 1e-13, "statistic");
  }
  expect::that(out.loss[1] == 0.0, "a row of weight 0 has loss exactly 0");
  const std::vector<double> gradient = backward(args, problem.stride, out, grad_loss);
  for (int64_t v = 0; v < problem.stride; ++v) {
    expect::that(gradient[problem.stride + v] == 0.0, "a row of weight 0 has gradient exactly 0");
  }
  expect::that(gradient[vocab_size] == 0.0, "columns past vocab_size have gradient exactly 0");
  for (int64_t v = 0; v < vocab_size; v += std::max<int64_t>(1, vocab_size / 7)) {
    const double step = 1e-6, kept = problem.student[v];
    problem.student[v] = kept + step;
    const double above = forward(args).loss[0];
    problem.student[v] = kept - step;
    const double below = forward(args).loss[0];
    problem.student[v] = kept;
    const double scale = 1 + std::fabs(out.loss[0]);
    expect::near(gradient[v], grad_loss[0] * (above - below) / (2 * step), 2e-9 * scale, "gradient");
  }
}

// float32 in place must be what the two-step path gives, and must not depend on the threads
void test_in_place(const Kind& kind) {
  const int64_t num_tokens = 5, vocab_size = 1033;
  const Problem problem = make_problem(num_tokens, vocab_size, 5);
  const opd_divergence_component_t component = component_of(kind);
  opd_divergence_args_t args = make_args(problem, &component);
  Forward out = forward(args);
  const std::vector<double> ones(num_tokens, 1.0);
  const std::vector<double> gradient = backward(args, problem.stride, out, ones.data());
  std::vector<float> first;
  for (int threads : {0, 1}) {
    std::vector<float> student(problem.student.begin(), problem.student.end());
    std::vector<float> teacher(problem.teacher.begin(), problem.teacher.end());
    std::vector<float> loss(num_tokens);
    args.parallel_for = threads ? [](int64_t n, opd_rows_fn body, void* context) {
      for (int64_t row = n; row-- > 0;) body(context, row, row + 1);
    } : opd_parallel_for_fn{nullptr};
    args.student.matrix = {student.data(), problem.stride, OPD_FLOAT32};
    args.teacher.matrix = {teacher.data(), problem.stride, OPD_FLOAT32};
    args.loss = loss.data();
    args.grad = {student.data(), problem.stride, OPD_FLOAT32};
    args.grad_width = vocab_size;
    args.scratch = {teacher.data(), problem.stride, OPD_FLOAT32};
    expect::that(opd_divergence_fwd_grad_cpu(&args) == OPD_OK, opd_last_error());
    for (int64_t t = 0; t < num_tokens; ++t) {
      const double scale = 1 + out.loss[t];
      expect::near(loss[t], out.loss[t], 1e-5 * scale, "float32 value");
      for (int64_t v = 0; v < vocab_size; ++v) {
        expect::near(student[t * problem.stride + v], gradient[t * problem.stride + v],
                     4e-6 * scale, "float32 gradient in place");
      }
      expect::that(std::isnan(student[t * problem.stride + vocab_size]), "padding is untouched");
    }
    if (threads == 0) first = student;
    expect::that(std::memcmp(first.data(), student.data(), vocab_size * sizeof(float)) == 0,
                 "bitwise the same under another partition of the rows");
  }
}

void test_equal_laws(const Kind& kind) {
  Problem problem = make_problem(2, 100, 3);
  problem.teacher = problem.student;
  const opd_divergence_component_t component = component_of(kind);
  opd_divergence_args_t args = make_args(problem, &component);
  args.teacher.temperature = args.student.temperature;
  Forward out = forward(args);
  const double ones[2] = {1.0, 1.0};
  const std::vector<double> gradient = backward(args, problem.stride, out, ones);
  for (int t : {0, 1}) {
    expect::near(out.loss[t], 0.0, 1e-30, "D(p, p) is 0");
    for (int v = 0; v < 100; ++v) {
      expect::near(gradient[t * problem.stride + v], 0.0, 1e-15, "gradient at p = q");
    }
  }
}

// a row through the phases in three slices, with everything that state carries
void test_slices() {
  const int64_t num_tokens = 2, vocab_size = 700;
  const Problem problem = make_problem(num_tokens, vocab_size, 9);
  const double coefficients[2] = {0.5, 0.0};
  const opd_divergence_component_t components[] = {
      {OPD_RENYI, 0.3, 0, nullptr}, {OPD_CROSS_ENTROPY, 0, 0, nullptr},
      {OPD_CONCRETE_SCORE, 2, 1, coefficients}};
  const int64_t labels[4] = {0, 699, 650, -1}, ids[2] = {401, 3}, topk[4] = {0, 1, -1, 699};
  opd_divergence_args_t args = make_args(problem, components);
  args.num_components = 3;
  args.labels = labels, args.num_labels = 2;
  args.token_ids = ids;
  args.topk_ids = topk, args.num_topk = 2;
  Forward whole = forward(args);
  const double ones[2] = {1.0, 1.0};
  const std::vector<double> gradient = backward(args, problem.stride, whole, ones);
  Forward sliced = whole;
  const int64_t starts[] = {0, 256, 511, 700};
  const auto slice_of = [&](int k) {
    opd_divergence_args_t slice = args;
    slice.first_column = starts[k];
    slice.vocab_size = starts[k + 1] - starts[k];
    slice.student.matrix.data = problem.student.data() + starts[k];
    slice.teacher.matrix.data = problem.teacher.data() + starts[k];
    slice.with_statistics = 1;
    slice.state = sliced.state.data();
    slice.loss = sliced.loss.data();
    slice.statistics = sliced.statistics.data();
    return slice;
  };
  opd_divergence_args_t first = slice_of(0);
  expect::that(opd_divergence_init_cpu(&first) == OPD_OK, opd_last_error());
  for (int phase : {OPD_PHASE_LSE, OPD_PHASE_ROW_SUMS, OPD_PHASE_TERMS}) {
    for (int k = 0; k < 3; ++k) {
      opd_divergence_args_t slice = slice_of(k);
      expect::that(opd_divergence_phase_cpu(&slice, phase) == OPD_OK, opd_last_error());
    }
    if (phase == OPD_PHASE_LSE) {
      expect::that(opd_divergence_close_lse_cpu(&first) == OPD_OK, opd_last_error());
    }
  }
  expect::that(opd_divergence_finish_cpu(&first) == OPD_OK, opd_last_error());
  for (int t = 0; t < 2; ++t) expect::near(sliced.loss[t], whole.loss[t], 1e-12, "sliced loss");
  for (size_t i = 0; i < whole.statistics.size(); ++i) {
    expect::near(sliced.statistics[i], whole.statistics[i], 1e-12, "sliced statistics");
  }
  for (int k = 0; k < 3; ++k) {
    opd_divergence_args_t slice = slice_of(k);
    std::vector<double> part(num_tokens * slice.vocab_size);
    slice.grad_loss = ones;
    slice.grad = {part.data(), slice.vocab_size, OPD_FLOAT64};
    slice.grad_width = slice.vocab_size;
    expect::that(opd_divergence_bwd_cpu(&slice) == OPD_OK, opd_last_error());
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t v = 0; v < slice.vocab_size; ++v) {
        expect::near(part[t * slice.vocab_size + v], gradient[t * problem.stride + starts[k] + v],
                     1e-14, "sliced gradient");
      }
    }
  }
}

void test_refusals() {
  const Problem problem = make_problem(2, 10, 1);
  const opd_divergence_component_t good = {OPD_JSD, 0.5, 0, nullptr};
  const auto refused = [&](const char* part, auto&& change) {
    opd_divergence_args_t args = make_args(problem, &good);
    double loss[2], state[2 * (OPD_DIVERGENCE_STATE + OPD_DIVERGENCE_STATE_PER_COMPONENT)];
    args.loss = loss, args.state = state;
    change(args);
    const bool as_expected = opd_divergence_fwd_cpu(&args) == OPD_INVALID_ARGUMENT &&
                             std::strstr(opd_last_error(), part) != nullptr;
    expect::that(as_expected, part);
  };
  static const opd_divergence_component_t bad[] = {
      {OPD_ALPHA, 1.0, 0, nullptr},       {OPD_RENYI, -1.0, 0, nullptr},
      {OPD_ALPHA_BETA, 1e-9, 1, nullptr}, {OPD_CONCRETE_SCORE, 3, 0, nullptr},
      {OPD_JSD, 1.0, 0, nullptr},         {99, 0, 0, nullptr}};
  const char* words[] = {"neither 0 nor 1", "the order must be", "at least 1e-3 in size",
                         "weights must be", "in (0, 1)",         "must be an opd_divergence_t"};
  for (int i = 0; i < 6; ++i) refused(words[i], [&](auto& args) { args.components = &bad[i]; });
  refused("num_components", [](auto& args) { args.num_components = 0; });
  refused("num_components", [](auto& args) { args.num_components = OPD_MAX_COMPONENTS + 1; });
  refused("scale", [](auto& args) { args.student.scale = 0; });
  refused("softcap", [](auto& args) { args.teacher.softcap = -1; });
  refused("target", [](auto& args) { args.target = 3; });
  refused("mixture_weights", [](auto& args) { args.target = OPD_TARGET_MIXTURE; });
  refused("reference_logits", [](auto& args) {
    args.target = OPD_TARGET_GEOMETRIC, args.target_reference = 1;
    args.reference = {{nullptr, 0, OPD_FLOAT64}, nullptr, 1.0, 0.0, 1.0, nullptr};
  });
  static const int64_t ids[2] = {0, 10};
  refused("token_ids must be below 10, got 10 at position 1",
          [](auto& args) { args.token_ids = ids; });
  refused("loss and state", [](auto& args) { args.state = nullptr; });
}

void test_eval_matches_finite_differences() {
  for (const Kind& kind : kKinds) {
    // what needs sums over the row is no function of one entry
    if (kind.divergence == OPD_RENYI || kind.divergence == OPD_ALPHA_BETA) continue;
    for (double lp : {-0.1, -1.0, -7.0, -40.0}) {
      for (double lq : {-0.2, -1.1, -6.5, -41.0}) {
        const double step = 1e-6, at[2] = {lq + step, lq - step}, same[2] = {lp, lp};
        const double p_at[2] = {lp + step, lp - step}, q_same[2] = {lq, lq};
        double term[2], value, slope, slope_teacher;
        const auto eval = [&](int n, const double* p, const double* q, double* out, double* dterm,
                              double* dterm_teacher) {
          opd_divergence_eval(kind.divergence, kind.param0, kind.param1, n, p, q, out, dterm,
                              dterm_teacher, nullptr);
        };
        eval(1, &lp, &lq, &value, &slope, &slope_teacher);
        const double scale = 1 + std::fabs(slope) + std::fabs(slope_teacher);
        eval(2, same, at, term, nullptr, nullptr);
        // a multiple of q (of p) in the derivative changes no gradient
        const double p = std::exp(lp), q = std::exp(lq);
        const double by_student = (term[0] - term[1]) / (2 * step);
        eval(2, p_at, q_same, term, nullptr, nullptr);
        const double by_teacher = (term[0] - term[1]) / (2 * step);
        const double student_multiple = (by_student - slope) / q;
        const double teacher_multiple = (by_teacher - slope_teacher) / p;
        const bool exact = kind.divergence <= OPD_TOTAL_VARIATION;
        if (exact) expect::near(slope, by_student, 1e-8, "dterm is d term / d log q");
        if (p > 1e-3 && q > 1e-3) {
          // the multiple is one constant of the divergence: compare with that of another entry
          const double lp2 = -0.5, lq2 = -0.7;
          const double p2_at[2] = {lp2 + step, lp2 - step}, q2_at[2] = {lq2 + step, lq2 - step};
          const double p2_same[2] = {lp2, lp2}, q2_same[2] = {lq2, lq2};
          double slope2, slope_teacher2, value2;
          eval(1, &lp2, &lq2, &value2, &slope2, &slope_teacher2);
          eval(2, p2_same, q2_at, term, nullptr, nullptr);
          const double other = ((term[0] - term[1]) / (2 * step) - slope2) / std::exp(lq2);
          expect::near(student_multiple, other, 1e-5 * scale / q, "dterm up to a multiple of q");
          eval(2, p2_at, q2_same, term, nullptr, nullptr);
          const double of_p = ((term[0] - term[1]) / (2 * step) - slope_teacher2) / std::exp(lp2);
          expect::near(teacher_multiple, of_p, 1e-5 * scale / p,
                       "dterm_teacher up to a multiple of p");
        }
        expect::that(value >= 0.0, "every term is non-negative");
      }
    }
  }
  double term, dterm;
  const double zero = -std::numeric_limits<double>::infinity(), half = std::log(0.5);
  const auto one = [&](int divergence, double param0, double lp, double lq) {
    return opd_divergence_eval(divergence, param0, 0, 1, &lp, &lq, &term, &dterm, nullptr, nullptr);
  };
  one(OPD_FORWARD_KL, 0, zero, half);
  expect::near(term, 0.5, 0.0, "forward_kl with p = 0: the Bregman term is q");
  one(OPD_REVERSE_KL, 0, zero, half);
  expect::that(std::isinf(term), "reverse_kl with p = 0 < q is inf");
  for (int divergence = 0; divergence <= OPD_CONCRETE_SCORE; ++divergence) {
    one(divergence, 0.3 * (divergence < OPD_CONCRETE_SCORE), zero, zero);
    expect::that(term == 0.0 && dterm == 0.0, "an absent token counts for nothing");
  }
  expect::that(one(99, 0, half, half) == OPD_INVALID_ARGUMENT, "an unknown id is refused");
}

}  // namespace

int main() {
  for (const Kind& kind : kKinds) {
    for (int64_t vocab_size : {1, 2, 17, 511, 512, 513, 1600}) {
      test_values_and_gradients(kind, vocab_size);
    }
    test_in_place(kind);
    test_equal_laws(kind);
  }
  test_slices();
  test_refusals();
  test_eval_matches_finite_differences();
  return expect::report("test_divergence");
}
