// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of sparse_gradient, emulated, against the CPU's: marks, packed columns and sums
// of rows are the same numbers, what is dropped is held to the CPU's in float64.
#include <random>

#include "emulated.h"

namespace {

using emulated::kInf;
using emulated::kNaN;
using emulated::Numbers;

using Args = opd_sparse_gradient_args_t;
using Call = opd_status_t (*)(const Args*);

opd_status_t mark_cuda(const Args* args) { return opd_sparse_gradient_mark_cuda(args, nullptr); }
opd_status_t pack_cuda(const Args* args) { return opd_sparse_gradient_pack_cuda(args, nullptr); }

struct Case {
  const char* name;
  int64_t num_tokens, vocab_size, row_stride;
  int64_t shift = 0;
  bool has_weights = true;
  float tolerance = 1e-3f;
  float weight_of_row_1 = -2.0f;
};

struct Result {
  std::vector<uint8_t> kept;
  std::vector<double> packed, dropped;
};

Result run(const Case& c, int32_t dtype, Call mark, Call pack) {
  const int64_t T = c.num_tokens, V = c.vocab_size;
  std::mt19937 generator(5);
  std::uniform_real_distribution<float> log_size(-24.0f, -1.0f);
  Numbers gradient(dtype, T * c.row_stride, c.shift), weights(dtype, T);
  const float some[5] = {0.5f, c.weight_of_row_1, 0.0f, 1.0f, 1e-3f};
  for (int64_t t = 0; t < T; ++t) {
    const float weight = c.has_weights ? some[t % 5] : 1.0f;
    weights.set(t, weight);
    for (int64_t v = 0; v < c.row_stride; ++v) {
      const float drawn = std::exp(log_size(generator) - (v % 7 ? 7.0f : 0.0f));
      const float size = (std::isfinite(weight) ? weight : 1.0f) * drawn;
      // neither the padding nor a row of weight 0 is read
      const bool unread = v >= V || (weight == 0.0f && t % 5 == 2);
      gradient.set(t * c.row_stride + v, unread ? kNaN : v % 2 ? size : -size);
    }
  }
  if (V > 10) {
    gradient.set(3, kNaN);
    gradient.set((T > 1 ? c.row_stride : 0) + 4, kInf);
    if (T > 3) gradient.set(3 * c.row_stride + 5, c.tolerance);  // not beyond it
  }
  Result out;
  out.kept.assign(V + 3, 7);
  uint8_t* const kept = out.kept.data() + c.shift % 4;
  Args args{};
  args.struct_size = sizeof(args);
  args.num_tokens = T;
  args.vocab_size = V;
  args.grad_logits = {gradient.data(), c.row_stride, dtype};
  args.token_weights = c.has_weights ? weights.data() : nullptr;
  args.tolerance = c.tolerance;
  args.kept = kept;
  expect::that(mark(&args) == OPD_OK, opd_last_error());
  std::vector<int64_t> columns;
  for (int64_t v = 0; v < V; ++v) {
    expect::that(kept[v] <= 1, "a mark is 0 or 1");
    if (kept[v]) columns.push_back(v);
  }
  const int64_t width = static_cast<int64_t>(columns.size());
  Numbers packed(dtype, T * (width + 1), 1), dropped(dtype, T);
  args.columns = columns.data();
  args.num_columns = width;
  args.packed = {packed.data(), width + 1, dtype};
  args.dropped = dropped.data();
  expect::that(pack(&args) == OPD_OK, opd_last_error());
  for (int64_t t = 0; t < T; ++t) {
    out.dropped.push_back(dropped.get(t));
    for (int64_t k = 0; k < width; ++k) out.packed.push_back(packed.get(t * (width + 1) + k));
  }
  return out;
}

// bit by bit, but for the payload of a NaN
bool same_numbers(const std::vector<double>& a, const std::vector<double>& b) {
  bool same = a.size() == b.size();
  for (size_t i = 0; same && i < a.size(); ++i) {
    same = a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i]));
  }
  return same;
}

void check(const Case& c) {
  const auto cpu = [&](int32_t dtype) {
    return run(c, dtype, opd_sparse_gradient_mark_cpu, opd_sparse_gradient_pack_cpu);
  };
  const Result baseline = cpu(OPD_FLOAT32), truth = cpu(OPD_FLOAT64);
  emulated::shuffle_threads(0);
  const Result got = run(c, OPD_FLOAT32, mark_cuda, pack_cuda);
  emulated::shuffle_threads(7);
  const Result again = run(c, OPD_FLOAT32, mark_cuda, pack_cuda);
  const int before = expect::failures;
  expect::that(emulated::same(got.kept, baseline.kept), "marks are the CPU's");
  expect::that(same_numbers(got.packed, baseline.packed), "packed columns are the CPU's");
  expect::that(emulated::same(truth.kept, baseline.kept), "a case that float64 marks alike");
  for (int64_t t = 0; t < c.num_tokens; ++t) {
    const double exact = truth.dropped[t];
    // added up in float64, and rounded once
    if (std::isfinite(exact)) expect::near(got.dropped[t], exact, 6e-8 * exact, "dropped");
    if (!std::isfinite(exact)) expect::that(!std::isfinite(got.dropped[t]), "dropped of no weight");
  }
  expect::that(emulated::same(got.kept, again.kept) && same_numbers(got.packed, again.packed) &&
                   emulated::same(got.dropped, again.dropped),
               "the order of threads changes no bit");
  if (expect::failures != before) std::printf("  in case %s\n", c.name);
}

void check_add(int64_t width, int64_t row_stride, int64_t target_stride, int64_t shift) {
  constexpr int64_t kRows = 7;
  const int64_t columns[3] = {0, 2, 6};
  for (int seed : {0, 7}) {
    emulated::shuffle_threads(seed);
    Numbers rows(OPD_FLOAT32, 3 * row_stride, shift), target(OPD_FLOAT32, kRows * target_stride);
    Numbers expected(OPD_FLOAT32, kRows * target_stride);
    for (int64_t i = 0; i < 3 * row_stride; ++i) rows.set(i, 0.1 * static_cast<double>(i % 31));
    for (int64_t i = 0; i < kRows * target_stride; ++i) {
      target.set(i, 1.0 / (1.0 + static_cast<double>(i % 17)));
      expected.set(i, target.get(i));
    }
    opd_sparse_gradient_add_args_t args{};
    args.struct_size = sizeof(args);
    args.num_columns = 3;
    args.vocab_size = kRows;
    args.width = width;
    args.columns = columns;
    args.rows = {rows.data(), row_stride, OPD_FLOAT32};
    args.target = {expected.data(), target_stride, OPD_FLOAT32};
    expect::that(opd_sparse_gradient_add_cpu(&args) == OPD_OK, opd_last_error());
    args.target.data = target.data();
    expect::that(opd_sparse_gradient_add_cuda(&args, nullptr) == OPD_OK, opd_last_error());
    expect::that(std::memcmp(target.data(), expected.data(), kRows * target_stride * 4) == 0,
                 "rows are added in place, and nothing else is touched");
  }
}

void check_edges() {
  // values are not checked on a GPU, but nothing outside is read or written
  float gradient[4] = {1, 2, 3, 4}, packed[3] = {7, 7, 7}, dropped[1] = {7};
  uint8_t kept[4] = {1, 0, 0, 1};
  const int64_t outside[2] = {-1, 4};
  Args args{};
  args.struct_size = sizeof(args);
  args.num_tokens = 1;
  args.vocab_size = 4;
  args.grad_logits = {gradient, 4, OPD_FLOAT32};
  args.kept = kept;
  args.columns = outside;
  args.num_columns = 2;
  args.packed = {packed, 2, OPD_FLOAT32};
  args.dropped = dropped;
  expect::that(pack_cuda(&args) == OPD_OK, opd_last_error());
  expect::that(std::isnan(packed[0]) && std::isnan(packed[1]) && packed[2] == 7,
               "a column out of range is NaN");
  expect::that(dropped[0] == 5, "what is dropped, with no weights");
  args.num_columns = 0;
  args.packed.data = nullptr;
  expect::that(pack_cuda(&args) == OPD_OK && dropped[0] == 5, "no columns");
  args.num_tokens = 0;
  args.tolerance = 1e-3;
  expect::that(pack_cuda(&args) == OPD_OK, "no tokens");
  expect::that(mark_cuda(&args) == OPD_OK && !kept[0] && !kept[3], "no token needs a column");

  float target[4] = {1, 1, 1, 1};
  opd_sparse_gradient_add_args_t add{};
  add.struct_size = sizeof(add);
  add.num_columns = 2;
  add.vocab_size = 4;
  add.width = 1;
  add.columns = outside;
  add.rows = {gradient, 1, OPD_FLOAT32};
  add.target = {target, 1, OPD_FLOAT32};
  expect::that(opd_sparse_gradient_add_cuda(&add, nullptr) == OPD_OK && target[0] == 1 &&
                   target[3] == 1,
               "a row out of range is left out");

  args.grad_logits.dtype = OPD_FLOAT64;
  expect::that(mark_cuda(&args) == OPD_UNSUPPORTED &&
                   std::strstr(opd_last_error(), "must be float32 on a GPU"),
               "float64 is refused in words");
  args.tolerance = -1.0;
  expect::that(mark_cuda(&args) == OPD_INVALID_ARGUMENT &&
                   std::strstr(opd_last_error(), "tolerance must be >= 0"),
               "what the CPU refuses is refused");
}

}  // namespace

int main() {
  const Case cases[] = {
      {"one column", 1, 1, 1},
      {"a few columns", 3, 5, 5},
      {"aligned", 40, 1024, 1024},
      {"unaligned rows", 23, 9001, 9007},
      {"an unaligned start", 5, 9001, 9004, 3},
      {"no weights", 6, 4099, 4100, 2, false},
      {"an infinite weight", 7, 700, 703, 1, true, 1e-3f, kInf},
      {"a weight that is NaN", 7, 700, 703, 1, true, 1e-3f, kNaN},
      {"no tolerance", 3, 515, 517, 0, true, 0.0f},
  };
  for (const Case& c : cases) check(c);
  check_add(4096, 4096, 4096, 0);
  check_add(1030, 1032, 1036, 0);
  check_add(37, 40, 41, 1);
  check_add(37, 40, 41, 0);
  check_edges();
  return expect::report("test_cuda_sparse_gradient");
}
