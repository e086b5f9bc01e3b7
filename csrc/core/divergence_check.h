// SPDX-License-Identifier: Apache-2.0
// What is refused of the arguments of a divergence, in words; before any row is read.
#pragma once

#include <cmath>
#include <limits>

#include "check.h"
#include "opd/divergences.h"
#include "rows.h"

namespace opd {

inline constexpr char kOp[] = "divergence";

inline void check_component(const opd_divergence_component_t& component,
                     const opd_divergence_args_t& args) {
  const double p = component.param0, sum = component.param0 + component.param1;
  const auto is_weight = [](double value) { return value == 0 || value == 1 || value == 2; };
  const auto is_exponent = [](double value) { return value == 0 || std::fabs(value) >= 1e-3; };
  switch (component.divergence) {
    case OPD_JSD:
    case OPD_SKEW_FORWARD_KL:
    case OPD_SKEW_REVERSE_KL:
    case OPD_JEFFREYS:
    case OPD_ADAPTIVE_KL:
      OPD_CHECK(p > 0.0 && p < 1.0, kOp, ": param0 of this divergence must be in (0, 1), got ", p);
      return;
    case OPD_ALPHA:
      OPD_CHECK(std::isfinite(p) && p != 0.0 && p != 1.0, kOp,
                ": alpha must be finite and neither 0 nor 1, got ", p);
      return;
    case OPD_RENYI:
      OPD_CHECK(std::isfinite(p) && p > 0.0 && p != 1.0, kOp,
                ": the order must be positive, finite and not 1, got ", p);
      return;
    case OPD_ALPHA_BETA:
      OPD_CHECK(is_exponent(p) && is_exponent(component.param1) &&
                    (is_exponent(sum) || std::fabs(sum) < 1e-12) && std::isfinite(sum),
                kOp, ": alpha, beta and their sum must each be 0 or at least 1e-3 in size, got ", p,
                " and ", component.param1);
      return;
    case OPD_CONCRETE_SCORE:
      OPD_CHECK(is_weight(p) && is_weight(component.param1), kOp,
                ": weights must be 0 (student), 1 (teacher) or 2 (uniform), got ", p, " and ",
                component.param1);
      return;
    case OPD_CROSS_ENTROPY:
      OPD_CHECK(args.num_tokens == 0 || args.num_labels == 0 || args.labels != nullptr, kOp,
                ": cross_entropy needs labels");
      return;
    default: {
      const bool known = visit_divergence(component.divergence, p, component.param1, [](auto) {});
      OPD_CHECK(known, kOp, ": divergence must be an opd_divergence_t, got ",
                component.divergence);
    }
  }
}

inline void check_args(const opd_divergence_args_t& args) {
  check_struct_size(kOp, args.struct_size, sizeof(args));
  check_sizes(kOp, args.num_tokens, args.vocab_size);
  check_side(kOp, "student_logits", args.student, args.num_tokens);
  check_side(kOp, "teacher_logits", args.teacher, args.num_tokens);
  OPD_CHECK((args.student.matrix.dtype == OPD_FLOAT64) == (args.teacher.matrix.dtype == OPD_FLOAT64),
            kOp, ": student_logits and teacher_logits must both be float64 or neither");
  OPD_CHECK(args.num_components > 0 && args.num_components <= OPD_MAX_COMPONENTS, kOp,
            ": num_components must be in [1, ", OPD_MAX_COMPONENTS, "], got ", args.num_components);
  check_pointer(kOp, "components", args.components);
  for (int j = 0; j < args.num_components; ++j) check_component(args.components[j], args);
  OPD_CHECK(args.target >= OPD_TARGET_TEACHER && args.target <= OPD_TARGET_MIXTURE, kOp,
            ": target must be an opd_target_t, got ", args.target);
  if (args.target == OPD_TARGET_GEOMETRIC && args.target_reference != 0.0) {
    check_side(kOp, "reference_logits", args.reference, args.num_tokens);
    OPD_CHECK((args.student.matrix.dtype == OPD_FLOAT64) ==
                  (args.reference.matrix.dtype == OPD_FLOAT64),
              kOp, ": student_logits and reference_logits must both be float64 or neither");
  }
  OPD_CHECK(args.target != OPD_TARGET_MIXTURE || args.num_tokens == 0 || args.mixture_weights, kOp,
            ": mixture_weights must not be NULL");
}

// Of whole rows: a slice cannot tell an id of another slice from one of none.
inline void check_ids(const char* name, const int64_t* ids, int64_t count,
               const opd_divergence_args_t& args) {
  for (int64_t i = 0; ids && i < count; ++i) {
    OPD_CHECK(ids[i] < args.vocab_size, kOp, ": ", name, " must be below ", args.vocab_size,
              ", got ", ids[i], " at position ", i);
  }
}

// Of the rows that count.
template <class T>
inline void check_values(const opd_divergence_args_t& args) {
  const T* weights = static_cast<const T*>(args.token_weights);
  const auto check = [&](const char* name, const void* values, double low, double high) {
    const T* const value = static_cast<const T*>(values);
    for (int64_t t = 0; value && t < args.num_tokens; ++t) {
      if (weights && weights[t] == T(0)) continue;
      OPD_CHECK(value[t] >= T(low) && value[t] <= T(high), kOp, ": ", name, " must be ",
                high > 1 ? "positive and finite" : "in [0, 1]", ", got ", value[t],
                " at position ", t);
    }
  };
  const double tiny = std::numeric_limits<T>::min(), large = std::numeric_limits<T>::max();
  check("student temperature", args.student.temperatures, tiny, large);
  check("teacher temperature", args.teacher.temperatures, tiny, large);
  check("teacher_weight of the mixture", args.mixture_weights, 0, 1);
  for (int64_t t = 0; args.token_ids && t < args.num_tokens; ++t) {
    if (weights && weights[t] == T(0)) continue;
    OPD_CHECK(args.token_ids[t] >= 0, kOp, ": token_ids must be >= 0, got ", args.token_ids[t],
              " at position ", t);
  }
}

inline void check_all_ids(const opd_divergence_args_t& args) {
  check_ids("labels", args.labels, args.num_tokens * args.num_labels, args);
  check_ids("topk_ids", args.topk_ids, args.num_tokens * args.num_topk, args);
  check_ids("token_ids", args.token_ids, args.num_tokens, args);
}

}  // namespace opd
