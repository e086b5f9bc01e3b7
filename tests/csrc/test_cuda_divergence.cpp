// SPDX-License-Identifier: Apache-2.0
// The CUDA row kernels of a divergence under emulation. Truth is the CPU kernel in float64 on
// widened copies of the inputs; the error that is allowed follows from what the CPU kernel in
// float32 has on the same call.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_divergence_cases.h"

namespace {

using namespace cases;

void test_every_divergence() {
  constexpr int64_t kVocabs[] = {17, 1023, 4099, 2, 1};
  unsigned seed = 0;
  for (const Kind& kind : kKinds) {
    for (const Target& target : kTargets) {
      Problem p(3, kVocabs[seed % 5], seed + 1, OPD_FLOAT32, OPD_FLOAT32, seed % 4);
      ++seed;
      p.target = target;
      p.add(kind);
      check(p, name_of(kind, target, p.vocab_size));
      p.options = p.with_statistics = p.with_labels = p.with_weights = true;
      p.add({OPD_CROSS_ENTROPY, 0, 0}, true);
      p.add({OPD_REVERSE_KL, 0, 0}, true);
      check(p, name_of(kind, target, p.vocab_size) + " options");
    }
  }
}

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

bool same_bits(const Outcome& a, const Outcome& b) {
  return same_bits(a.loss, b.loss) && same_bits(a.grad, b.grad) && same_bits(a.state, b.state) &&
         same_bits(a.statistics, b.statistics);
}

// a problem with every option
Problem full_problem(int64_t vocab_size, unsigned seed, const Kind& kind, const Target& target) {
  Problem p(3, vocab_size, seed, OPD_FLOAT32, OPD_FLOAT32, 1);
  p.target = target;
  p.options = p.with_statistics = p.with_labels = p.with_weights = true;
  p.add(kind);
  p.add({OPD_CROSS_ENTROPY, 0, 0}, true);
  p.add({OPD_JSD, 0.3, 0}, true);
  return p;
}

void test_storage() {
  for (int32_t student : {OPD_FLOAT32, OPD_BFLOAT16, OPD_FLOAT16}) {
    for (int32_t teacher : {OPD_FLOAT32, OPD_BFLOAT16, OPD_FLOAT16}) {
      for (int64_t pad : {0, 1, 2, 3}) {
        Problem p(2, 4100, 5, student, teacher, pad);
        p.add({OPD_FORWARD_KL, 0, 0});
        const std::string what = "storage " + std::to_string(student) + " " +
                                 std::to_string(teacher) + " pad " + std::to_string(pad);
        check(p, what);
        p.options = true;
        if (pad < 2) check(p, what + " options");
      }
    }
  }
}

void test_special_values() {
  for (const Kind& kind : kKinds) {
    for (const Target& target : {kTargets[0], kTargets[3], kTargets[5]}) {
      Problem p(3, 1023, 77, OPD_FLOAT32, OPD_FLOAT32, 1);
      p.target = target;
      p.add(kind);
      for (int64_t v = 0; v < 1023; v += 5) {
        p.student.put(0, v, -kInf), p.teacher.put(0, v, -kInf), p.reference.put(0, v, -kInf);
        p.teacher.put(1, v, -kInf);
        p.student.put(2, v, -kInf);
      }
      check(p, name_of(kind, target, 1023) + " with -inf");
    }
  }
  for (double alpha : {2.0, 0.3, 0.9}) {
    Problem p(3, 1023, 78);
    for (int64_t v = 0; v < 1023; ++v) p.teacher.put(1, v, v < 500 ? 60.0 : -60.0);
    for (int64_t v = 0; v < 1023; ++v) p.student.put(1, v, v < 500 ? -60.0 : 60.0);
    p.add({OPD_RENYI, alpha, 0});
    check(p, "renyi of laws apart");
  }
  for (double head_mass : {0.05, 0.95, 0.999999}) {
    Problem p(3, 1023, 79);
    for (int64_t v = 0; v < 1023; ++v) p.teacher.put(1, v, v % 3);  // ties
    for (int64_t v = 0; v < 1023; ++v) p.teacher.put(2, v, v == 700 ? 30.0 : 0.0);
    p.add({OPD_ADAPTIVE_KL, head_mass, 0});
    check(p, "adaptive_kl with ties and a peak");
  }
}

void test_neighbours_of_nan() {
  for (bool options : {false, true}) {
    Problem p = full_problem(4099, 31, kKinds[2], kTargets[0]);
    if (!options) {
      p = Problem(3, 4099, 31);
      p.add(kKinds[2]);
    }
    const Outcome clean = forward_backward<float>(p, true);
    p.student.put(1, 4097, kNan);
    const Outcome got = forward_backward<float>(p, true);
    expect::that(std::isnan(got.loss[1]) && std::isnan(got.grad[4099]), "NaN is NaN in its row");
    for (int t : {0, 2}) {
      const bool same = got.loss[t] == clean.loss[t] &&
                        std::equal(got.grad.begin() + t * 4099, got.grad.begin() + (t + 1) * 4099,
                                   clean.grad.begin() + t * 4099);
      expect::that(same, "rows beside a NaN are what they were");
    }
    if (options) {
      expect::that(std::isnan(got.statistics[OPD_STATISTIC_TOP1_AGREEMENT * 3 + 1]),
                   "no agreement in a row with NaN");
    }
  }
}

void test_masked_rows() {
  for (bool options : {false, true}) {
    Problem p = full_problem(1023, 41, kKinds[0], kTargets[0]);
    p.with_weights = true;
    if (!options) {
      p = Problem(3, 1023, 41);
      p.add(kKinds[0]);
      p.with_weights = true;
    }
    const Outcome clean = forward_backward<float>(p, true);
    p.token_weights.set(1, 0.0);
    for (int64_t v = 0; v < 1023; ++v) p.student.put(1, v, kNan);
    Outcome got = forward_backward<float>(p, true);
    expect::that(got.loss[0] == clean.loss[0] && got.loss[2] == clean.loss[2], "rows that count");
    const auto is_zero = [&](int64_t t) {
      bool zero = got.loss[t] == 0.0;
      for (int64_t v = 0; v < 1023; ++v) zero = zero && got.grad[t * 1023 + v] == 0.0;
      const double* const state = got.state.data() + t * state_size(p);
      for (int64_t i = 0; i < state_size(p); ++i) zero = zero && state[i] == 0.0;
      for (size_t i = t; i < got.statistics.size(); i += 3) zero = zero && got.statistics[i] == 0.0;
      return zero;
    };
    expect::that(is_zero(1), "a row of weight 0 is exactly 0, whatever it holds");
    for (int t = 0; t < 3; ++t) p.token_weights.set(t, 0.0);
    got = forward_backward<float>(p, true);
    expect::that(is_zero(0) && is_zero(1) && is_zero(2), "all rows of weight 0");
  }
  Problem p(3, 17, 1);
  p.add(kKinds[1], true);
  p.coefficients.set(1, 0.0);
  p.student.put(1, 3, kNan);
  const Outcome got = forward_backward<float>(p, true);
  bool zero = got.loss[1] == 0.0;
  for (int v = 0; v < 17; ++v) zero = zero && got.grad[17 + v] == 0.0;
  expect::that(zero, "a coefficient of 0 leaves its divergence out");
}

// fwd_grad of a problem: the gradient in a storage type, in memory of its own or in the logits'.
struct Stored {
  std::vector<float> loss;
  std::vector<uint32_t> grad;  // bits
};

uint32_t bits_at(const void* data, int32_t dtype, int64_t i) {
  if (dtype != OPD_FLOAT32) return static_cast<const uint16_t*>(data)[i];
  return static_cast<const uint32_t*>(data)[i];
}

Stored forward_grad(Problem p, int32_t dtype, bool in_place) {
  std::vector<opd_divergence_component_t> components;
  opd_divergence_args_t args = args_of(p, false, components);
  const int64_t per_logit = dtype == OPD_FLOAT32 ? 1 : 2;
  const int64_t stride = in_place ? p.student.stride * per_logit : p.vocab_size;
  const int64_t width = in_place ? p.student.stride : p.vocab_size;
  std::vector<uint32_t> own(p.num_tokens * p.vocab_size + 4);
  Stored out;
  out.loss.resize(p.num_tokens);
  std::vector<float> statistics(OPD_NUM_STATISTICS * p.num_tokens);
  if (p.with_statistics) args.statistics = statistics.data();
  args.loss = out.loss.data();
  args.grad = {in_place ? p.student.values.single.data() : static_cast<void*>(own.data()), stride,
               dtype};
  args.grad_width = width;
  expect::that(opd_divergence_fwd_grad_cuda(&args, nullptr) == OPD_OK, opd_last_error());
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t v = p.vocab_size; v < width; ++v) {
      expect::that(bits_at(args.grad.data, dtype, t * stride + v) == 0, "zeros up to grad_width");
    }
    for (int64_t v = 0; v < p.vocab_size; ++v) {
      out.grad.push_back(bits_at(args.grad.data, dtype, t * stride + v));
    }
  }
  return out;
}

void test_gradient_in_place() {
  // the kernels that stream, bit for bit; the one that reads once is held to the truth elsewhere
  setenv("OPD_EMULATION_CAPABILITY", "80", 1);
  unsigned seed = 0;
  for (const Target& target : {kTargets[0], kTargets[3], kTargets[5]}) {
    for (int64_t vocab_size : {1, 17, 4099, 9000}) {
      for (bool options : {false, true}) {
        const Kind& kind = kKinds[seed % 4 == 3 ? 10 : seed % 4];
        Problem p = full_problem(vocab_size, ++seed, kind, target);
        if (!options) {
          p = Problem(3, vocab_size, seed, OPD_FLOAT32, OPD_FLOAT32, seed % 2 ? 600 : 0);
          p.target = target;
          p.add(kind);
        }
        for (int64_t t = 0; t < p.num_tokens; ++t) p.grad_loss.set(t, 1.0);
        const std::string what = name_of(kind, target, vocab_size) + " at once";
        const Stored apart = forward_grad(p, OPD_FLOAT32, false);
        Outcome got = forward_backward<float>(p, true);
        const std::vector<float> two_calls(got.grad.begin(), got.grad.end());
        expect::that(std::memcmp(two_calls.data(), apart.grad.data(), two_calls.size() * 4) == 0,
                     (what + ": the gradient of fwd and bwd").c_str());
        for (int64_t t = 0; t < p.num_tokens; ++t) {
          expect::that(apart.loss[t] == got.loss[t], (what + ": the loss of fwd").c_str());
        }
        const Stored in_place = forward_grad(p, OPD_FLOAT32, true);
        expect::that(in_place.grad == apart.grad, (what + ": in place").c_str());
        for (int32_t dtype : {OPD_BFLOAT16, OPD_FLOAT16}) {
          const Stored half = forward_grad(p, dtype, false);
          const Stored over = forward_grad(p, dtype, true);
          bool rounded = true;
          for (size_t i = 0; i < two_calls.size(); ++i) {
            opd::BFloat16 bfloat;
            opd::Float16 float16;
            opd::from_real(two_calls[i], &bfloat);
            opd::from_real(two_calls[i], &float16);
            const uint32_t expected = dtype == OPD_BFLOAT16 ? bfloat.bits : float16.bits;
            rounded = rounded && half.grad[i] == expected;
          }
          expect::that(rounded, (what + ": a 16-bit gradient is the float32 one, rounded").c_str());
          expect::that(over.grad == half.grad && over.loss == half.loss,
                       (what + ": 16 bits in the logits' rows").c_str());
        }
      }
    }
  }
  unsetenv("OPD_EMULATION_CAPABILITY");
}

// fwd of a problem in slices of the vocabulary, and the gradient of each slice
Outcome sliced(const Problem& p, const std::vector<int64_t>& starts, bool cuda) {
  std::vector<opd_divergence_component_t> components;
  opd_divergence_args_t args = args_of(p, false, components);
  std::vector<float> loss(p.num_tokens), statistics(OPD_NUM_STATISTICS * p.num_tokens);
  Outcome out;
  out.state.assign(p.num_tokens * state_size(p), kNan);
  out.grad.assign(p.num_tokens * p.vocab_size, kNan);
  args.loss = loss.data();
  args.statistics = statistics.data();
  args.state = out.state.data();
  args.grad_loss = p.grad_loss.of(false);
  const auto slice_of = [&](size_t k) {
    opd_divergence_args_t slice = args;
    slice.first_column = starts[k];
    slice.vocab_size = starts[k + 1] - starts[k];
    slice.student.matrix = p.student.matrix(false, starts[k]);
    slice.teacher.matrix = p.teacher.matrix(false, starts[k]);
    slice.reference.matrix = p.reference.matrix(false, starts[k]);
    if (p.options) {
      slice.student.bias = p.student_bias.single.data() + starts[k];
      slice.teacher.bias = p.teacher_bias.single.data() + starts[k];
    }
    return slice;
  };
  const auto done = [](opd_status_t status) { expect::that(status == OPD_OK, opd_last_error()); };
  opd_divergence_args_t first = slice_of(0);
  done(cuda ? opd_divergence_init_cuda(&first, nullptr) : opd_divergence_init_cpu(&first));
  for (int phase : {OPD_PHASE_LSE, OPD_PHASE_ROW_SUMS, OPD_PHASE_TERMS}) {
    for (size_t k = 0; k + 1 < starts.size(); ++k) {
      opd_divergence_args_t slice = slice_of(k);
      done(cuda ? opd_divergence_phase_cuda(&slice, phase, nullptr)
                : opd_divergence_phase_cpu(&slice, phase));
    }
    if (phase == OPD_PHASE_LSE) {
      done(cuda ? opd_divergence_close_lse_cuda(&first, nullptr)
                : opd_divergence_close_lse_cpu(&first));
    }
  }
  done(cuda ? opd_divergence_finish_cuda(&first, nullptr) : opd_divergence_finish_cpu(&first));
  for (size_t k = 0; k + 1 < starts.size(); ++k) {
    opd_divergence_args_t slice = slice_of(k);
    std::vector<float> part(p.num_tokens * slice.vocab_size);
    slice.grad = {part.data(), slice.vocab_size, OPD_FLOAT32};
    slice.grad_width = slice.vocab_size;
    done(cuda ? opd_divergence_bwd_cuda(&slice, nullptr) : opd_divergence_bwd_cpu(&slice));
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      std::copy_n(part.begin() + t * slice.vocab_size, slice.vocab_size,
                  out.grad.begin() + t * p.vocab_size + starts[k]);
    }
  }
  out.loss.assign(loss.begin(), loss.end());
  if (p.with_statistics) out.statistics.assign(statistics.begin(), statistics.end());
  return out;
}

void test_slices() {
  const std::vector<int64_t> starts = {0, 1, 700, 2777, 4800};
  for (const Kind& kind : kKinds) {
    if (kind.divergence == OPD_ADAPTIVE_KL) continue;
    for (const Target& target : {kTargets[0], kTargets[3], kTargets[5]}) {
      Problem p = full_problem(4800, 100 + kind.divergence, kind, target);
      p.with_weights = false;
      const std::string what = name_of(kind, target, 4800) + " in slices";
      const Outcome cpu = sliced(p, starts, false), cuda = sliced(p, starts, true);
      compare_rows(p, forward_backward<double>(p, false), cpu, cuda, what);
      for (size_t i = 0; i < cpu.state.size(); ++i) {
        const double size = 1 + std::fabs(cpu.state[i]);
        expect::near(cuda.state[i], cpu.state[i], 2e-5 * size, (what + ": state").c_str());
      }
    }
  }
  Problem plain(3, 4800, 7);
  plain.add(kKinds[3]);
  compare_rows(plain, forward_backward<double>(plain, false), sliced(plain, starts, false),
               sliced(plain, starts, true), "plain in slices");
}

void test_order_does_not_matter() {
  const char* const kept = std::getenv("OPD_EMULATION_SEED");
  const std::string seed = kept ? kept : "0";
  for (const Kind& kind : kKinds) {
    Problem p = full_problem(4099, 55, kind, kTargets[kind.divergence % 6]);
    Problem plain(3, 4099, 56);
    plain.add(kind);
    setenv("OPD_EMULATION_SEED", "0", 1);
    const Outcome first = forward_backward<float>(p, true);
    const Outcome plain_first = forward_backward<float>(plain, true);
    setenv("OPD_EMULATION_SEED", "7", 1);
    expect::that(same_bits(first, forward_backward<float>(p, true)), "threads in another order");
    expect::that(same_bits(plain_first, forward_backward<float>(plain, true)),
                 "threads in another order, without options");
  }
  setenv("OPD_EMULATION_SEED", seed.c_str(), 1);
}

// more rows than blocks
void test_many_rows() {
  Problem p(1030, 5, 61);
  p.add(kKinds[2]);
  p.with_weights = true;
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    if (t % 1024 > 4) p.token_weights.set(t, 0.0);
  }
  emulated_multiprocessors() = 1;
  check(p, "more rows than blocks");
  emulated_multiprocessors() = 4;
}

// offsets of rows beyond 32 bits
void test_far_rows() {
  constexpr int64_t kStride = (int64_t{1} << 30) + 4, kBytes = (2 * kStride + 64) * 2;
  void* const memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return expect::that(false, "no address space for 4 GB");
  Problem p(3, 17, 71, OPD_BFLOAT16, OPD_BFLOAT16);
  p.add(kKinds[1]);
  const Outcome near = forward_backward<float>(p, true);
  std::vector<opd_divergence_component_t> components;
  opd_divergence_args_t args = args_of(p, false, components);
  uint16_t* const far = static_cast<uint16_t*>(memory);
  for (int64_t t = 0; t < 3; ++t) {
    std::copy_n(p.student.bits.begin() + t * 17, 17, far + t * kStride);
    std::copy_n(p.teacher.bits.begin() + t * 17, 17, far + t * kStride + 20);
  }
  float loss[3];
  std::vector<double> state(3 * state_size(p));
  args.student.matrix = {far, kStride, OPD_BFLOAT16};
  args.teacher.matrix = {far + 20, kStride, OPD_BFLOAT16};
  args.loss = loss, args.state = state.data();
  expect::that(opd_divergence_fwd_cuda(&args, nullptr) == OPD_OK, opd_last_error());
  args.grad_loss = p.grad_loss.of(false);
  args.grad = {far, kStride, OPD_BFLOAT16};
  args.grad_width = 17;
  expect::that(opd_divergence_bwd_cuda(&args, nullptr) == OPD_OK, opd_last_error());
  for (int64_t t = 0; t < 3; ++t) {
    expect::that(loss[t] == near.loss[t], "loss of rows far apart");
    for (int64_t v = 0; v < 17; ++v) {
      opd::BFloat16 expected;
      opd::from_real(static_cast<float>(near.grad[t * 17 + v]), &expected);
      expect::that(far[t * kStride + v] == expected.bits, "gradient of rows far apart");
    }
  }
  munmap(memory, kBytes);
}

void test_refusals() {
  Problem p(2, 16, 1);
  p.add(kKinds[0]);
  std::vector<opd_divergence_component_t> components;
  float loss[2];
  const auto refused = [&](const char* part, auto&& change) {
    opd_divergence_args_t args = args_of(p, false, components);
    args.loss = loss;
    args.grad = {p.student.values.single.data(), 16, OPD_FLOAT32};
    args.grad_width = 16;
    change(args);
    const bool as_expected = opd_divergence_fwd_grad_cuda(&args, nullptr) == OPD_INVALID_ARGUMENT &&
                             std::strstr(opd_last_error(), part) != nullptr;
    expect::that(as_expected, part);
  };
  refused("float64", [&](auto& args) {
    args.student.matrix = p.student.matrix(true), args.teacher.matrix = p.teacher.matrix(true);
  });
  refused("row_stride must be 32", [](auto& args) { args.grad.dtype = OPD_BFLOAT16; });
  refused("grad must be", [](auto& args) { args.grad.dtype = OPD_FLOAT64; });
  refused("vocab_size must be at most", [](auto& args) { args.vocab_size = int64_t{1} << 40; });
  refused("must be float32 to be", [](auto& args) { args.student.matrix.dtype = OPD_FLOAT16; });
  refused("loss and grad", [](auto& args) { args.loss = nullptr; });
  opd_divergence_args_t none = args_of(p, false, components);
  none.num_tokens = 0;
  none.student.matrix.data = none.teacher.matrix.data = nullptr;
  for (auto* entry : {&opd_divergence_fwd_cuda, &opd_divergence_bwd_cuda,
                      &opd_divergence_fwd_grad_cuda, &opd_divergence_init_cuda,
                      &opd_divergence_close_lse_cuda, &opd_divergence_finish_cuda}) {
    expect::that(entry(&none, nullptr) == OPD_OK, "no tokens, nothing to do");
  }
  expect::that(opd_divergence_phase_cuda(&none, OPD_PHASE_TERMS, nullptr) == OPD_OK, "no tokens");
}

}  // namespace

int main() {
  test_every_divergence();
  test_storage();
  test_special_values();
  test_neighbours_of_nan();
  test_masked_rows();
  test_gradient_in_place();
  test_slices();
  test_order_does_not_matter();
  test_many_rows();
  test_far_rows();
  test_refusals();
  std::printf("worst error over bound %.2f at %s\n", worst.ratio, worst.where.c_str());
  return expect::report("test_cuda_divergence");
}
