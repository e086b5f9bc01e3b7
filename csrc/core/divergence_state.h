// SPDX-License-Identifier: Apache-2.0
// What the row kernels of the CPU and of CUDA share: the layout of a row of state, and how two
// logits become an entry.
#pragma once

#include "opd/divergences.h"
#include "opd/opd.h"
#include "rows.h"

namespace opd {

enum State {
  kStudentLse,  // until the phase is closed: the sum relative to the largest logit
  kTeacherLse,
  kStudentLargest,
  kTeacherLargest,
  kStudentArgmax,
  kTeacherArgmax,
  kGradSum,         // sum of dterm
  kTeacherGradSum,  // sum of dterm_teacher, for a live geometric target
  kStudentEntropy,
  kTeacherEntropy,
  kForwardKl,
  kReverseKl,
  kStudentLogprob,
  kTeacherLogprob,
  kStudentTopkMass,
  kTeacherTopkMass,
  kCrossEntropy_,
  kStateSize = OPD_DIVERGENCE_STATE
};
static_assert(kCrossEntropy_ < kStateSize, "opd.h must leave room for the state");

// ... and after that, for each component:
enum ComponentState { kTermSum, kRowSum, kThreshold = 3, kComponentState = 4 };
static_assert(int(kComponentState) == int(OPD_DIVERGENCE_STATE_PER_COMPONENT),
              "opd.h and core differ");

// What turns two logits into an Entry.
template <class T>
struct Shifts {
  OPD_HD explicit Shifts(const double* state)
      : student(state[kStudentLse]),
        teacher(state[kTeacherLse]),
        gap(state[kStudentLse] - state[kTeacherLse]) {}
  Shift<T> student, teacher, gap;
};

// logit - shift in one rounding and, in `low`, what that has lost: 0 where nothing is finite.
template <class T>
OPD_HD T log_probability(T logit, const Shift<T>& shift, T* low) {
  T lost;
  const T below = difference(logit, shift.high, &lost);
  const T rest = shift.low - lost;
  const T value = below - rest;
  // exact while the rest is the smaller; where it is not, both are far below anything that counts
  *low = select(below - below == T(0), (below - value) - rest, T(0));
  return value;
}

template <class T>
OPD_HD Entry<T> entry_of(T student, T teacher, const Shifts<T>& shifts) {
  T lq_low, lp_low, lost;
  const T lq = log_probability(student, shifts.student, &lq_low);
  const T lp = log_probability(teacher, shifts.teacher, &lp_low);
  // what a difference has lost goes with the low part of the shift: one rounding in all
  const T apart = difference(student, teacher, &lost);
  const T gap = (apart - shifts.gap.high) - (shifts.gap.low - lost);
  return {lp, lq, exp_nonpositive(lp), exp_nonpositive(lq), gap, lp_low, lq_low};
}

// dterm sums to 0 as it is, and summing it would only add rounding. With a weight that is the
// student's law, the sum is what takes the rounding of the means out again.
OPD_HD bool is_centred(const opd_divergence_component_t& component) {
  return component.divergence == OPD_CONCRETE_SCORE && component.param0 != 0 &&
         component.param1 != 0;
}

OPD_HD bool needs_threshold(const opd_divergence_component_t& component) {
  return component.divergence == OPD_ADAPTIVE_KL;
}

// Order of the bits is order of the values, from -inf to inf.
OPD_HD uint64_t ordered_bits(float value) {
  const uint32_t bits = static_cast<uint32_t>(detail::float_to_bits(value));
  return (bits >> 31) ? ~bits & 0xffffffffu : bits | 0x80000000u;
}
OPD_HD uint64_t ordered_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return (bits >> 63) ? ~bits : bits | (uint64_t{1} << 63);
}
OPD_HD float value_of(uint64_t bits, float) {
  const uint32_t word = static_cast<uint32_t>(bits);
  return detail::bits_to_float(static_cast<int32_t>((word >> 31) ? word & 0x7fffffffu : ~word));
}
OPD_HD double value_of(uint64_t bits, double) {
  const uint64_t word = (bits >> 63) ? bits & ~(uint64_t{1} << 63) : ~bits;
  double value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

}  // namespace opd
