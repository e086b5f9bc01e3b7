// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of speculative_verify, emulated, against the CPU's in float64: rows by themselves,
// cut and not, and the residual law of pairs with its draws; bit for bit in whatever order threads
// run and wherever a row begins.
#include <functional>
#include <random>

#include "emulated.h"

namespace {

using emulated::kInf;
using emulated::kNaN;
using emulated::Numbers;

constexpr int32_t F32 = OPD_FLOAT32, BF16 = OPD_BFLOAT16, F16 = OPD_FLOAT16;

// logit of column v in row t, given a standard normal number
using Fill = std::function<double(int64_t t, int64_t v, int64_t V, double normal)>;

double spread(int64_t, int64_t, int64_t, double normal) { return 3 * normal; }

struct Case {
  const char* name;
  int32_t dtype;
  int64_t num_rows, vocab_size, row_stride;
  int64_t top_k = 0;
  double top_p = 1.0;
  Fill fill = spread;
  int64_t shift = 0;  // of the first row from a 16-byte address, in elements
  bool bias = false, temperatures = false;
  double scale = 1.0, softcap = 0.0, temperature = 1.0;
  bool bends() const {
    return bias || temperatures || softcap != 0 || temperature != 1 || scale != 1;
  }
};

std::vector<double> all_of(Numbers& numbers, int64_t count) {
  std::vector<double> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = numbers.get(i);
  return values;
}

// One side's logits of `dtype`, whose values come from those of the case's own dtype.
struct Side {
  Side(const Case& c, int32_t dtype, unsigned seed)
      : real(dtype == OPD_FLOAT64 ? OPD_FLOAT64 : OPD_FLOAT32),
        logits(dtype, c.num_rows * c.row_stride, c.shift),
        bias(real, c.vocab_size, 1),
        temperatures(real, c.num_rows) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal(0.0, 1.0);
    Numbers rounded(c.dtype, 1), narrow(OPD_FLOAT32, 1);
    for (int64_t i = 0; i < c.num_rows * c.row_stride; ++i) {
      const int64_t t = i / c.row_stride, v = i % c.row_stride;
      // garbage in the padding
      rounded.set(0, v < c.vocab_size ? c.fill(t, v, c.vocab_size, normal(generator)) : kNaN);
      logits.set(i, rounded.get(0));
    }
    for (int64_t v = 0; v < c.vocab_size; ++v) {
      narrow.set(0, normal(generator));
      bias.set(v, narrow.get(0));
    }
    for (int64_t t = 0; t < c.num_rows; ++t) {
      narrow.set(0, 0.5 + 0.3 * (t % 7));
      temperatures.set(t, narrow.get(0));
    }
    law = {{logits.data(), c.row_stride, dtype},
           c.bias ? bias.data() : nullptr,
           c.scale,
           c.softcap,
           c.temperature,
           c.temperatures ? temperatures.data() : nullptr};
  }
  int32_t real;
  Numbers logits, bias, temperatures;
  opd_logits_t law;
};

struct Rows {
  std::vector<double> lse, floor, logprobs, largest;
  std::vector<int32_t> ranks, argmax;
};

using RowsCall = opd_status_t (*)(const opd_speculative_verify_rows_args_t*);
opd_status_t rows_cuda(const opd_speculative_verify_rows_args_t* args) {
  return opd_speculative_verify_rows_cuda(args, nullptr);
}
using ResidualCall = opd_status_t (*)(const opd_speculative_verify_residual_args_t*);
opd_status_t residual_cuda(const opd_speculative_verify_residual_args_t* args) {
  return opd_speculative_verify_residual_cuda(args, nullptr);
}

std::vector<double> workspace_of(int64_t num_rows, int64_t vocab_size) {
  return std::vector<double>(opd_speculative_verify_workspace_bytes(num_rows, vocab_size) / 8, kNaN);
}

Rows rows(const Case& c, Side& side, const std::vector<int64_t>& ids, RowsCall call) {
  const int64_t T = c.num_rows;
  Rows out;
  out.lse.assign(T, 7), out.logprobs.assign(T, 7), out.ranks.assign(T, 7), out.argmax.assign(T, 7);
  Numbers floor(side.real, T), largest(side.real, T);
  std::vector<double> workspace = workspace_of(T, c.vocab_size);
  opd_speculative_verify_rows_args_t args{};
  args.struct_size = sizeof(args);
  args.num_rows = T;
  args.vocab_size = c.vocab_size;
  args.logits = side.law;
  args.token_ids = ids.data();
  args.top_k = c.top_k;
  args.top_p = c.top_p;
  args.lse = out.lse.data();
  args.floor = floor.data();
  args.logprobs = out.logprobs.data();
  args.ranks = out.ranks.data();
  args.argmax = out.argmax.data();
  args.largest = largest.data();
  args.workspace = workspace.data();
  expect::that(call(&args) == OPD_OK, opd_last_error());
  out.floor = all_of(floor, T);
  out.largest = all_of(largest, T);
  return out;
}

bool same(const Rows& a, const Rows& b) {
  using emulated::same;
  return same(a.lse, b.lse) && same(a.floor, b.floor) && same(a.logprobs, b.logprobs) &&
         same(a.largest, b.largest) && same(a.ranks, b.ranks) && same(a.argmax, b.argmax);
}

struct Residual {
  std::vector<double> mass, overlap, student_logprobs, teacher_logprobs;
  std::vector<int32_t> tokens;
};

// Each row of the teacher against the student's row before it, the first against none.
Residual residual(const Case& c, Side& teacher, const Rows& of_teacher, Side& student,
                  const Rows& of_student, const std::vector<double>& uniforms, ResidualCall call) {
  const int64_t T = c.num_rows;
  Numbers teacher_floor(teacher.real, T), student_floor(student.real, T);
  std::vector<int64_t> teacher_rows(T), student_rows(T);
  std::vector<double> teacher_scale(T), student_scale(T);
  for (int64_t t = 0; t < T; ++t) {
    teacher_floor.set(t, of_teacher.floor[t]);
    student_floor.set(t, of_student.floor[t]);
    teacher_rows[t] = t, student_rows[t] = t - 1;
    teacher_scale[t] = t % 3 == 2 ? 0.25 : 1.0, student_scale[t] = t % 5 == 4 ? 0.0 : 1.0;
  }
  Residual out;
  for (auto* values : {&out.mass, &out.overlap, &out.student_logprobs, &out.teacher_logprobs}) {
    values->assign(T, 7);
  }
  out.tokens.assign(T, 7);
  std::vector<double> workspace = workspace_of(T, c.vocab_size);
  opd_speculative_verify_residual_args_t args{};
  args.struct_size = sizeof(args);
  args.num_rows = T;
  args.vocab_size = c.vocab_size;
  args.teacher = {teacher.law, T, of_teacher.lse.data(), teacher_floor.data(), teacher_rows.data(),
                  teacher_scale.data()};
  args.student = {student.law, T, of_student.lse.data(), student_floor.data(), student_rows.data(),
                  student_scale.data()};
  args.draws = 1;
  args.uniforms = uniforms.data();
  args.mass = out.mass.data();
  args.overlap = out.overlap.data();
  args.tokens = out.tokens.data();
  args.student_logprobs = out.student_logprobs.data();
  args.teacher_logprobs = out.teacher_logprobs.data();
  args.workspace = workspace.data();
  expect::that(call(&args) == OPD_OK, opd_last_error());
  return out;
}

bool same(const Residual& a, const Residual& b) {
  using emulated::same;
  return same(a.mass, b.mass) && same(a.overlap, b.overlap) && same(a.tokens, b.tokens) &&
         same(a.student_logprobs, b.student_logprobs) &&
         same(a.teacher_logprobs, b.teacher_logprobs);
}

// The cumulative residual on either side of a token must hold the place, but for rounding.
void check_tokens(const Case& c, const Residual& got, Side& teacher, const Rows& of_teacher,
                  Side& student, const Rows& of_student, const std::vector<double>& uniforms) {
  // the residual's own CPU kernel at places a little to the left and right brackets the token
  constexpr double kApart = 2e-6;
  std::vector<double> left = uniforms, right = uniforms;
  for (double& u : left) u = std::max(0.0, u - kApart);
  for (double& u : right) u = std::min(1.0 - 1e-9, u + kApart);
  const Residual low = residual(c, teacher, of_teacher, student, of_student, left,
                                opd_speculative_verify_residual_cpu);
  const Residual high = residual(c, teacher, of_teacher, student, of_student, right,
                                 opd_speculative_verify_residual_cpu);
  for (int64_t t = 0; t < c.num_rows; ++t) {
    expect::that(low.tokens[t] <= got.tokens[t] && got.tokens[t] <= high.tokens[t],
                 "a token is where its place is");
  }
}

void check(const Case& c) {
  const int before = expect::failures;
  const int64_t T = c.num_rows, V = c.vocab_size;
  std::vector<int64_t> ids(T);
  std::vector<double> uniforms(T);
  for (int64_t t = 0; t < T; ++t) {
    ids[t] = t % 4 == 3 ? -1 : (t * 7919 + V / 2) % V;
    uniforms[t] = (0.5 + t) / T;
  }
  emulated::shuffle_threads(0);
  Side teacher(c, c.dtype, 3), student(c, c.dtype, 4);
  const Rows got = rows(c, teacher, ids, rows_cuda), other = rows(c, student, ids, rows_cuda);
  const Residual pairs = residual(c, teacher, got, student, other, uniforms, residual_cuda);

  Side exact_teacher(c, OPD_FLOAT64, 3), exact_student(c, OPD_FLOAT64, 4);
  const Rows truth = rows(c, exact_teacher, ids, opd_speculative_verify_rows_cpu);
  const Rows baseline = rows(c, teacher, ids, opd_speculative_verify_rows_cpu);
  const double eps = emulated::eps_of(OPD_FLOAT32);
  emulated::within(got.lse, baseline.lse, truth.lse, eps, "lse");
  emulated::within(got.floor, baseline.floor, truth.floor, eps, "floor");
  emulated::within(got.largest, baseline.largest, truth.largest, eps, "largest");
  emulated::within(got.logprobs, baseline.logprobs, truth.logprobs, eps, "logprobs");
  if (!c.bends()) {
    expect::that(got.ranks == truth.ranks && got.argmax == truth.argmax, "ranks and argmax");
    // the residual of the same cuts
    const Rows of_student = rows(c, exact_student, ids, opd_speculative_verify_rows_cpu);
    const Residual right = residual(c, exact_teacher, truth, exact_student, of_student, uniforms,
                                    opd_speculative_verify_residual_cpu);
    const Residual near = residual(c, teacher, baseline, student,
                                   rows(c, student, ids, opd_speculative_verify_rows_cpu),
                                   uniforms, opd_speculative_verify_residual_cpu);
    emulated::within(pairs.mass, near.mass, right.mass, eps, "mass");
    emulated::within(pairs.overlap, near.overlap, right.overlap, eps, "overlap");
    check_tokens(c, pairs, exact_teacher, truth, exact_student, of_student, uniforms);
  }
  emulated::shuffle_threads(7);
  expect::that(same(got, rows(c, teacher, ids, rows_cuda)), "rows: the order of threads");
  expect::that(same(pairs, residual(c, teacher, got, student, other, uniforms, residual_cuda)),
               "pairs: the order of threads");
  Case moved = c;
  moved.shift = c.shift + 1;
  Side elsewhere(moved, c.dtype, 3);
  expect::that(same(got, rows(moved, elsewhere, ids, rows_cuda)), "rows: where they begin");
  if (expect::failures != before) std::printf("  in case %s\n", c.name);
}

std::vector<Case> cases() {
  const Fill flat = [](int64_t, int64_t, int64_t, double x) { return x / 1e3; };
  const Fill equal = [](int64_t t, int64_t, int64_t, double) { return t == 0 ? 1.5 : 0.0; };
  const Fill two_values = [](int64_t, int64_t v, int64_t, double) { return v * 7 % 3 == 0; };
  const Fill masked = [](int64_t t, int64_t v, int64_t, double x) {
    return v % (37 + t) == 5 ? x : -double(kInf);
  };
  const Fill peaked = [](int64_t t, int64_t v, int64_t V, double x) {
    return v == V / 2 ? 10.0 + 20 * t : x - 8;
  };
  const Fill ascending = [](int64_t, int64_t v, int64_t V, double) { return 20.0 * v / V; };
  const Fill far = [](int64_t t, int64_t v, int64_t V, double x) {
    return t == 0 ? 1e30 * x : v * 5 / V * 60.0 + x;
  };
  const auto one_of = [](double value) {
    return [value](int64_t t, int64_t v, int64_t V, double x) {
      return t == 1 && v == V / 3 ? value : x;
    };
  };
  std::vector<Case> all = {
      {"one word", F32, 3, 1, 1},
      {"one word", F32, 3, 1, 1, 1, 0.5},
      {"five words", BF16, 4, 5, 7, 2},
      {"one tile", F32, 6, 1024, 1024},
      {"two tiles and a word", F32, 6, 2049, 2051, 0, 0.9},
      {"unaligned rows", BF16, 5, 5001, 5003, 300},
      {"unaligned rows", F16, 3, 5001, 5003, 300, 0.9, spread, 3},
      {"a real vocabulary", F32, 1, 151936, 151936, 50, 0.95},
      {"a real vocabulary", BF16, 1, 151936, 151936},
      {"more than the tiles", F32, 2, 9000, 9000, 3000, 0.5},
      {"all but one", F32, 2, 3000, 3000, 2999},
      {"as many as there are", F32, 2, 3000, 3000, 3000},
      {"almost all mass", F32, 2, 3000, 3000, 0, 0.9999},
      {"almost none", F32, 2, 3000, 3000, 0, 1e-9},
      {"special values", F32, 4, 2100, 2103, 0, 1.0, one_of(kNaN)},
      {"special values", F32, 4, 2100, 2103, 9, 0.9, one_of(kInf)},
      {"special values", BF16, 4, 2100, 2103, 9, 0.9, one_of(-kInf)},
      {"rows of temperatures", F32, 5, 1500, 1512, 0, 1.0, spread, 0, false, true},
      {"cold", F32, 3, 3001, 3001, 20, 1.0, spread, 0, false, false, 1, 0, 0.7},
      {"bias", F32, 3, 3001, 3004, 0, 1.0, spread, 3, true},
      {"scale", F32, 3, 1500, 1504, 0, 0.9, spread, 0, false, false, -0.5},
      {"softcap", BF16, 3, 3001, 3004, 0, 1.0, spread, 0, false, false, 1, 5},
      {"everything", F32, 5, 1500, 1501, 0, 1.0, spread, 1, true, true, 0.7, 6},
  };
  const std::pair<int64_t, double> cuts[] = {{0, 1.0}, {3, 1.0}, {1000, 0.9}, {0, 0.7}};
  for (const auto& [top_k, top_p] : cuts) {
    const auto add = [&, k = top_k, p = top_p](const char* name, const Fill& fill) {
      all.push_back({name, F32, 3, 4500, 4503, k, p, fill, 1});
    };
    add("flat", flat);
    add("equal", equal);
    add("two values", two_values);
    add("masked", masked);
    add("peaked", peaked);
    add("ascending", ascending);
    add("far apart", far);
  }
  return all;
}

void check_edges() {
  const Case c{"edges", F32, 6, 1100, 1100};
  emulated::shuffle_threads(0);
  Side side(c, F32, 3);
  const Rows got = rows(c, side, {1099, 1100, -1, -2, 0, INT64_MAX}, rows_cuda);
  for (int64_t t : {1, 3, 5}) {
    expect::that(std::isnan(got.lse[t]) && std::isnan(got.floor[t]) && got.ranks[t] == -1 &&
                     got.argmax[t] == -1,
                 "a row of an id that it cannot have is not read");
  }
  expect::that(std::isnan(got.logprobs[2]) && std::isfinite(got.lse[2]) && got.argmax[2] >= 0,
               "a row without an id has all but its log-probability");
  opd_speculative_verify_rows_args_t args{};
  args.struct_size = sizeof(args);
  args.vocab_size = 3;
  args.top_p = 1.0;
  args.logits = {{nullptr, 0, F32}, nullptr, 1.0, 0.0, 1.0, nullptr};
  expect::that(rows_cuda(&args) == OPD_OK, "no rows, nothing to do");
  args.top_p = 0.0;
  expect::that(rows_cuda(&args) == OPD_INVALID_ARGUMENT, "what the CPU refuses is refused");
  Side wide(c, OPD_FLOAT64, 3);
  opd_speculative_verify_residual_args_t pair{};
  pair.struct_size = sizeof(pair);
  pair.vocab_size = 1100;
  pair.teacher.logits = wide.law;
  expect::that(residual_cuda(&pair) == OPD_OK, "no pairs, nothing to do");
}

}  // namespace

int main() {
  for (const Case& c : cases()) check(c);
  check_edges();
  return expect::report("test_cuda_speculative_verify");
}
