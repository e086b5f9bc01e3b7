// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "expect.h"
#include "half.h"
#include "opd/opd.h"

namespace {

std::mt19937 generator(0);

struct Matrix {
  std::vector<float> values;  // as a GEMM must see them, row by row
  std::vector<unsigned char> storage;
  opd_gemm_operand_t operand;
};

template <class Storage>
void fill(Matrix& matrix, int64_t rows, int64_t columns, bool transposed, int32_t dtype) {
  // room between lines, and what lies there must not be read
  const int64_t length = transposed ? rows : columns, lines = transposed ? columns : rows;
  const int64_t line = length + (length % 2 == 0 ? 4 : 3);
  std::vector<Storage> stored(line * lines);
  for (auto& value : stored) opd::from_real(std::numeric_limits<float>::quiet_NaN(), &value);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      Storage& at = stored[transposed ? j * line + i : i * line + j];
      opd::from_real(normal(generator), &at);
      matrix.values.push_back(opd::to_real(at));
    }
  }
  matrix.storage.resize(stored.size() * sizeof(Storage));
  std::memcpy(matrix.storage.data(), stored.data(), matrix.storage.size());
  matrix.operand = {matrix.storage.data(), transposed ? 1 : line, transposed ? line : 1, dtype};
}

Matrix random(int64_t rows, int64_t columns, bool transposed, int32_t dtype) {
  Matrix matrix;
  if (dtype == OPD_FLOAT32) fill<float>(matrix, rows, columns, transposed, dtype);
  if (dtype == OPD_BFLOAT16) fill<opd::BFloat16>(matrix, rows, columns, transposed, dtype);
  if (dtype == OPD_FLOAT16) fill<opd::Float16>(matrix, rows, columns, transposed, dtype);
  return matrix;
}

void one_thread(int64_t rows, opd_rows_fn body, void* context) { body(context, 0, rows); }
void one_by_one_backwards(int64_t rows, opd_rows_fn body, void* context) {
  for (int64_t row = rows - 1; row >= 0; --row) body(context, row, row + 1);
}

void check_product(int64_t m, int64_t n, int64_t k, bool a_transposed, bool b_transposed,
                   int32_t a_dtype, int32_t b_dtype, bool accumulate) {
  const Matrix a = random(m, k, a_transposed, a_dtype), b = random(k, n, b_transposed, b_dtype);
  const int64_t stride = n + 5;
  std::vector<float> out(m * stride, 0.25f), again;
  std::vector<float> workspace(opd_gemm_workspace_bytes(m, n, k) / sizeof(float));
  opd_gemm_args_t args{};
  args.struct_size = sizeof(args);
  args.m = m, args.n = n, args.k = k;
  args.a = a.operand, args.b = b.operand;
  args.out_row_stride = stride;
  args.accumulate = accumulate;
  args.workspace = workspace.data();
  again = out;
  args.out = out.data();
  args.parallel_for = &one_thread;
  expect::that(opd_gemm_cpu(&args) == OPD_OK, opd_last_error());
  args.out = again.data();
  args.parallel_for = &one_by_one_backwards;
  expect::that(opd_gemm_cpu(&args) == OPD_OK, opd_last_error());
  expect::that(std::memcmp(out.data(), again.data(), out.size() * sizeof(float)) == 0,
               "the same bits whatever the threads do");
  double worst = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = accumulate ? 0.25 : 0.0, size = 1.0;
      for (int64_t l = 0; l < k; ++l) {
        const double product = double(a.values[i * k + l]) * b.values[l * n + j];
        sum += product;
        size += std::fabs(product);
      }
      worst = std::fmax(worst, std::fabs(out[i * stride + j] - sum) / size);
    }
    for (int64_t j = n; j < stride; ++j) {
      expect::that(out[i * stride + j] == 0.25f, "nothing is written beside out");
    }
  }
  // a sum of k products in order is off by k eps / 2 at the very most; that of a panel, by 512
  expect::near(worst, 0.0, 2e-6, "a product");
}

}  // namespace

int main() {
  // a tile of each height, and so many columns beside whole squares of them
  for (int64_t m = 1; m <= 30; ++m) {
    check_product(m, 33 + m, 19, false, m % 2 == 0, OPD_FLOAT32, OPD_FLOAT32, m % 3 == 0);
    check_product(m, 33 + m, 38, false, false, OPD_BFLOAT16, OPD_BFLOAT16, m % 3 == 0);
  }
  for (bool a_transposed : {false, true}) {
    for (bool b_transposed : {false, true}) {
      // an even and an odd depth of bfloat16 pairs, and strides of both kinds
      for (int64_t k : {1101, 1102, 1103, 2}) {
        check_product(33, 65, k, a_transposed, b_transposed, OPD_BFLOAT16, OPD_BFLOAT16, k == 1101);
      }
      // more of each than one tile, one panel, one shared group; fewer rows and fewer columns
      check_product(5, 70, 600, a_transposed, b_transposed, OPD_FLOAT32, OPD_FLOAT32, false);
      check_product(70, 33, 7, a_transposed, b_transposed, OPD_BFLOAT16, OPD_FLOAT32, true);
      check_product(1, 1, 1, a_transposed, b_transposed, OPD_FLOAT32, OPD_FLOAT16, true);
      check_product(28, 64, 1025, a_transposed, b_transposed, OPD_FLOAT16, OPD_BFLOAT16, true);
      check_product(1100, 1030, 3, a_transposed, b_transposed, OPD_FLOAT32, OPD_BFLOAT16, false);
      check_product(1030, 1100, 3, a_transposed, b_transposed, OPD_FLOAT32, OPD_FLOAT32, false);
    }
  }
  const int64_t huge = int64_t(1) << 31;
  expect::that(opd_gemm_workspace_bytes(huge, huge, huge) <= 2 << 20, "at most 2 MiB of workspace");
  expect::that(opd_gemm_workspace_bytes(0, 5, 5) == 0, "no workspace for nothing");
  float out[2] = {1.0f, 2.0f}, workspace[64];
  const float value = 1.0f;
  opd_gemm_args_t args{};
  args.struct_size = sizeof(args);
  args.m = 1, args.n = 2, args.k = 0;
  args.a = args.b = {&value, 1, 1, OPD_FLOAT32};
  args.out = out, args.out_row_stride = 2;
  args.accumulate = 1;
  expect::that(opd_gemm_cpu(&args) == OPD_OK && out[0] == 1.0f && out[1] == 2.0f, "k = 0 adds 0");
  args.accumulate = 0;
  expect::that(opd_gemm_cpu(&args) == OPD_OK && out[0] == 0.0f && out[1] == 0.0f, "k = 0 is 0");
  args.k = 1;
  expect::that(opd_gemm_cpu(&args) == OPD_INVALID_ARGUMENT && std::strstr(opd_last_error(), "workspace"),
               "k = 1 needs a workspace");
  args.workspace = workspace;
  args.a.dtype = OPD_FLOAT64;
  expect::that(opd_gemm_cpu(&args) == OPD_INVALID_ARGUMENT, "float64 is refused");
  args.a = {&value, 2, 2, OPD_FLOAT32};
  expect::that(opd_gemm_cpu(&args) == OPD_INVALID_ARGUMENT && std::strstr(opd_last_error(), "contiguous"),
               "strides in both directions are refused");
  return expect::report("test_gemm");
}
