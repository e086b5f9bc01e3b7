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

opd_divergence_spec_t make_spec(const Problem& problem, int divergence) {
  opd_divergence_spec_t spec{};
  spec.divergence = divergence;
  spec.param0 = divergence == OPD_JSD ? 0.3 : 0.1;
  spec.student_temperature = 1.5;
  spec.teacher_temperature = 0.8;
  spec.num_tokens = problem.num_tokens;
  spec.vocab_size = problem.vocab_size;
  return spec;
}

std::vector<long double> softmax(const double* logits, int64_t n, double temperature) {
  std::vector<long double> p(n);
  long double sum = 0;
  for (int64_t v = 0; v < n; ++v) sum += p[v] = std::exp((long double)(logits[v]) / temperature);
  for (auto& value : p) value /= sum;
  return p;
}

// straight from the definitions, in long double
long double truth(int divergence, double param, const std::vector<long double>& p,
                  const std::vector<long double>& q) {
  long double sum = 0;
  for (size_t v = 0; v < p.size(); ++v) {
    const auto kl = [](long double a, long double b) { return a * std::log(a / b); };
    const long double jsd = param * p[v] + (1 - param) * q[v];
    const long double skew_forward = jsd;
    const long double skew_reverse = (1 - param) * p[v] + param * q[v];
    switch (divergence) {
      case OPD_FORWARD_KL: sum += kl(p[v], q[v]); break;
      case OPD_REVERSE_KL: sum += kl(q[v], p[v]); break;
      case OPD_JSD: sum += param * kl(p[v], jsd) + (1 - param) * kl(q[v], jsd); break;
      case OPD_SKEW_FORWARD_KL: sum += kl(p[v], skew_forward); break;
      case OPD_SKEW_REVERSE_KL: sum += kl(q[v], skew_reverse); break;
      default: sum += std::fabs(p[v] - q[v]) / 2;
    }
  }
  return sum;
}

struct Forward {
  std::vector<double> loss, student_lse, teacher_lse, grad_sum, statistics;
};

Forward forward(const Problem& problem, const opd_divergence_spec_t& spec, const double* weights) {
  Forward out;
  for (auto* values : {&out.loss, &out.student_lse, &out.teacher_lse, &out.grad_sum}) {
    values->assign(problem.num_tokens, std::nan(""));
  }
  out.statistics.assign(OPD_NUM_STATISTICS * problem.num_tokens, std::nan(""));
  opd_divergence_fwd_args_t args{};
  args.struct_size = sizeof(args);
  args.spec = spec;
  args.student_logits = {problem.student.data(), problem.stride, OPD_FLOAT64};
  args.teacher_logits = {problem.teacher.data(), problem.stride, OPD_FLOAT64};
  args.token_weights = weights;
  args.loss = out.loss.data();
  args.student_lse = out.student_lse.data();
  args.teacher_lse = out.teacher_lse.data();
  args.grad_sum = out.grad_sum.data();
  args.statistics = out.statistics.data();
  expect::that(opd_divergence_fwd_cpu(&args) == OPD_OK, opd_last_error());
  return out;
}

std::vector<double> backward(const Problem& problem, const opd_divergence_spec_t& spec,
                             const Forward& saved, const double* grad_loss, const double* weights) {
  std::vector<double> gradient(problem.num_tokens * problem.stride, std::nan(""));
  opd_divergence_bwd_args_t args{};
  args.struct_size = sizeof(args);
  args.spec = spec;
  args.student_logits = {problem.student.data(), problem.stride, OPD_FLOAT64};
  args.teacher_logits = {problem.teacher.data(), problem.stride, OPD_FLOAT64};
  args.grad_loss = grad_loss;
  args.token_weights = weights;
  args.student_lse = saved.student_lse.data();
  args.teacher_lse = saved.teacher_lse.data();
  args.grad_sum = saved.grad_sum.data();
  args.grad_student_logits = {gradient.data(), problem.stride, OPD_FLOAT64};
  args.grad_width = problem.stride;
  expect::that(opd_divergence_bwd_cpu(&args) == OPD_OK, opd_last_error());
  return gradient;
}

void test_values_and_gradients(int divergence, int64_t vocab_size) {
  Problem problem = make_problem(3, vocab_size, 17 * divergence + 1);
  const opd_divergence_spec_t spec = make_spec(problem, divergence);
  const double weights[3] = {0.7, 0.0, 1.3}, grad_loss[3] = {1.0, 5.0, -2.0};
  // a row of weight 0 may hold anything
  for (int64_t v = 0; v < vocab_size; ++v) problem.student[problem.stride + v] = std::nan("");
  const Forward out = forward(problem, spec, weights);
  for (int t : {0, 2}) {
    const auto p = softmax(&problem.teacher[t * problem.stride], vocab_size, 0.8);
    const auto q = softmax(&problem.student[t * problem.stride], vocab_size, 1.5);
    const double expected = weights[t] * static_cast<double>(truth(divergence, spec.param0, p, q));
    expect::near(out.loss[t], expected, 1e-13 * (1 + std::fabs(expected)), "value");
    expect::near(out.statistics[OPD_STATISTIC_FORWARD_KL * 3 + t],
                 static_cast<double>(truth(OPD_FORWARD_KL, 0, p, q)), 1e-13, "statistic");
  }
  expect::that(out.loss[1] == 0.0, "a row of weight 0 has loss exactly 0");
  const std::vector<double> gradient = backward(problem, spec, out, grad_loss, weights);
  for (int64_t v = 0; v < problem.stride; ++v) {
    expect::that(gradient[problem.stride + v] == 0.0, "a row of weight 0 has gradient exactly 0");
  }
  expect::that(gradient[vocab_size] == 0.0, "columns past vocab_size have gradient exactly 0");
  for (int64_t v = 0; v < vocab_size; v += std::max<int64_t>(1, vocab_size / 7)) {
    const double step = 1e-6, kept = problem.student[v];
    problem.student[v] = kept + step;
    const double above = forward(problem, spec, weights).loss[0];
    problem.student[v] = kept - step;
    const double below = forward(problem, spec, weights).loss[0];
    problem.student[v] = kept;
    expect::near(gradient[v], grad_loss[0] * (above - below) / (2 * step), 2e-9, "gradient");
  }
}

// float32 in place must be what the two-step path gives, and must not depend on the threads
void test_in_place(int divergence) {
  const int64_t num_tokens = 5, vocab_size = 1033;
  const Problem problem = make_problem(num_tokens, vocab_size, 5);
  opd_divergence_spec_t spec = make_spec(problem, divergence);
  const Forward out = forward(problem, spec, nullptr);
  const std::vector<double> ones(num_tokens, 1.0);
  const std::vector<double> gradient = backward(problem, spec, out, ones.data(), nullptr);
  std::vector<float> first;
  for (int threads : {0, 1}) {
    std::vector<float> student(problem.student.begin(), problem.student.end());
    std::vector<float> teacher(problem.teacher.begin(), problem.teacher.end());
    std::vector<float> loss(num_tokens);
    spec.parallel_for = threads ? [](int64_t n, opd_rows_fn body, void* context) {
      for (int64_t row = n; row-- > 0;) body(context, row, row + 1);
    } : opd_parallel_for_fn{nullptr};
    opd_divergence_fwd_grad_args_t args{};
    args.struct_size = sizeof(args);
    args.spec = spec;
    args.student_logits = {student.data(), problem.stride, OPD_FLOAT32};
    args.teacher_logits = {teacher.data(), problem.stride, OPD_FLOAT32};
    args.loss = loss.data();
    expect::that(opd_divergence_fwd_grad_cpu(&args) == OPD_OK, opd_last_error());
    for (int64_t t = 0; t < num_tokens; ++t) {
      expect::near(loss[t], out.loss[t], 4e-6 * (1 + out.loss[t]), "float32 value");
      for (int64_t v = 0; v < vocab_size; ++v) {
        expect::near(student[t * problem.stride + v], gradient[t * problem.stride + v], 3e-7,
                     "float32 gradient in place");
      }
      expect::that(std::isnan(student[t * problem.stride + vocab_size]), "padding is untouched");
    }
    if (threads == 0) first = student;
    expect::that(std::memcmp(first.data(), student.data(), vocab_size * sizeof(float)) == 0,
                 "bitwise the same under another partition of the rows");
  }
}

void test_equal_laws(int divergence) {
  Problem problem = make_problem(2, 100, 3);
  problem.teacher = problem.student;
  opd_divergence_spec_t spec = make_spec(problem, divergence);
  spec.teacher_temperature = spec.student_temperature;
  const Forward out = forward(problem, spec, nullptr);
  const double ones[2] = {1.0, 1.0};
  const std::vector<double> gradient = backward(problem, spec, out, ones, nullptr);
  for (int t : {0, 1}) {
    expect::that(out.loss[t] == 0.0, "D(p, p) is exactly 0");
    for (int v = 0; v < 100; ++v) {
      expect::near(gradient[t * problem.stride + v], 0.0, 1e-17, "gradient at p = q");
    }
  }
}

void test_eval_matches_finite_differences() {
  for (int divergence = 0; divergence <= OPD_TOTAL_VARIATION; ++divergence) {
    for (double lp : {-0.1, -1.0, -7.0, -40.0}) {
      for (double lq : {-0.2, -1.1, -6.5, -41.0}) {
        const double step = 1e-6, at[2] = {lq + step, lq - step}, teacher[2] = {lp, lp};
        double term[2], dterm[2], value, slope;
        opd_divergence_eval(divergence, 0.3, 0.0, 2, teacher, at, term, dterm);
        opd_divergence_eval(divergence, 0.3, 0.0, 1, &lp, &lq, &value, &slope);
        expect::near(slope, (term[0] - term[1]) / (2 * step), 1e-8, "dterm is d term / d log q");
        expect::that(value >= 0.0, "every term is non-negative");
      }
    }
  }
  double term, dterm;
  const double zero = -std::numeric_limits<double>::infinity(), half = std::log(0.5);
  opd_divergence_eval(OPD_FORWARD_KL, 0, 0, 1, &zero, &half, &term, &dterm);
  expect::near(term, 0.5, 0.0, "forward_kl with p = 0: the Bregman term is q");
  opd_divergence_eval(OPD_REVERSE_KL, 0, 0, 1, &zero, &half, &term, &dterm);
  expect::that(std::isinf(term), "reverse_kl with p = 0 < q is inf");
  opd_divergence_eval(OPD_JSD, 0.3, 0, 1, &zero, &zero, &term, &dterm);
  expect::that(term == 0.0 && dterm == 0.0, "jsd with p = q = 0");
  expect::that(opd_divergence_eval(99, 0, 0, 1, &half, &half, &term, &dterm) ==
                   OPD_INVALID_ARGUMENT,
               "an unknown id is refused");
}

}  // namespace

int main() {
  for (int divergence = 0; divergence <= OPD_TOTAL_VARIATION; ++divergence) {
    for (int64_t vocab_size : {1, 2, 17, 511, 512, 513, 1600}) {
      test_values_and_gradients(divergence, vocab_size);
    }
    test_in_place(divergence);
    test_equal_laws(divergence);
  }
  test_eval_matches_finite_differences();
  return expect::report("test_divergence");
}
