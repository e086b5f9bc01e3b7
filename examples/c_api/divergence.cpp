// SPDX-License-Identifier: Apache-2.0
// JSD of two rows of logits and its gradient, on the CPU, from plain C++.
#include <opd/opd.h>

#include <cmath>
#include <cstdio>
#include <vector>

namespace {

constexpr int64_t kTokens = 2, kVocabulary = 5;

opd_logits_t side(const std::vector<float>& logits) {
  opd_logits_t result{};
  result.matrix = {logits.data(), kVocabulary, OPD_FLOAT32};
  result.scale = 1.0;
  result.temperature = 1.0;
  return result;
}

// loss[t] and, where grad is not null, d loss[t] / d student[t, v]; false after a failure.
bool jsd(const std::vector<float>& student, const std::vector<float>& teacher,
         std::vector<float>* loss, std::vector<float>* grad) {
  const opd_divergence_component_t component = {OPD_JSD, 0.5, 0.0, nullptr};
  std::vector<double> state(kTokens *
                            (OPD_DIVERGENCE_STATE + OPD_DIVERGENCE_STATE_PER_COMPONENT));
  opd_divergence_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = kTokens;
  args.vocab_size = kVocabulary;
  args.student = side(student);
  args.teacher = side(teacher);
  args.components = &component;
  args.num_components = 1;
  args.loss = loss->data();
  opd_status_t status;
  if (grad == nullptr) {
    args.state = state.data();
    status = opd_divergence_fwd_cpu(&args);
  } else {
    args.grad = {grad->data(), kVocabulary, OPD_FLOAT32};
    args.grad_width = kVocabulary;
    status = opd_divergence_fwd_grad_cpu(&args);
  }
  if (status != OPD_OK) std::printf("opd: %s\n", opd_last_error());
  return status == OPD_OK;
}

}  // namespace

int main() {
  const std::vector<float> student = {0.1f, -0.3f, 1.2f, 0.0f, 0.4f, 2.0f, 0.0f, -1.0f, 0.5f, 0.2f};
  const std::vector<float> teacher = {0.3f, -0.1f, 0.7f, 0.2f, 0.9f, 1.0f, 0.1f, -2.0f, 0.8f, 0.0f};
  std::vector<float> loss(kTokens), grad(kTokens * kVocabulary);
  if (!jsd(student, teacher, &loss, &grad)) return 1;
  for (int64_t t = 0; t < kTokens; ++t) {
    std::printf("token %d: JSD %.6f nats, gradient", static_cast<int>(t), loss[t]);
    for (int64_t v = 0; v < kVocabulary; ++v) std::printf(" %+.6f", grad[t * kVocabulary + v]);
    std::printf("\n");
  }
  // the slope that the loss shows between two points 2 * step apart
  const float step = 0.01f;
  double worst = 0.0;
  for (int64_t i = 0; i < kTokens * kVocabulary; ++i) {
    std::vector<float> moved = student, above(kTokens), below(kTokens);
    moved[i] = student[i] + step;
    if (!jsd(moved, teacher, &above, nullptr)) return 1;
    moved[i] = student[i] - step;
    if (!jsd(moved, teacher, &below, nullptr)) return 1;
    const int64_t t = i / kVocabulary;
    const double slope = (above[t] - below[t]) / (2.0 * step);
    worst = std::fmax(worst, std::fabs(slope - grad[i]));
  }
  std::printf("largest difference from finite differences: %.1e\n", worst);
  if (!(worst < 1e-4)) {
    std::printf("FAILED: expected less than 1e-4\n");
    return 1;
  }
  std::printf("ok, opd %s\n", opd_version());
  return 0;
}
