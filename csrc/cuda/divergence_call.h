// SPDX-License-Identifier: Apache-2.0
// What a launch of the row kernels of a divergence is given, and which steps it takes.
#pragma once

#include "launch.h"
#include "opd/divergences.h"
#include "side.h"

namespace opd {
namespace cuda {

// Steps of a row, in the order in which they are taken.
enum Step : unsigned {
  kInit = 1,         // empties the state
  kLoad = 2,         // takes the state from memory instead
  kLse = 4,          // largest logits and sums relative to them
  kCloseLse = 8,     // ... become log-sum-exps
  kHead = 16,        // the head of the teacher's law, where a divergence needs it
  kRowSums = 32,     // what terms need first
  kTerms = 64,       // loss, sums for the gradient, statistics
  kFinish = 128,     // loss and statistics are written
  kGradient = 256,   // the gradient is written
  kStore = 512,      // the state goes to memory
  kWholeRows = 1024  // the columns are all there are, so that an id beyond them is an error
};

constexpr unsigned kForward =
    kInit | kLse | kCloseLse | kHead | kRowSums | kTerms | kFinish | kWholeRows;

struct Call {
  unsigned steps;
  int32_t vocab_size, grad_width;
  int32_t num_components;
  int64_t num_tokens, first_column;
  Side student, teacher, reference;
  int32_t target;
  float target_student, target_teacher, target_reference;
  const float* mixture_weights;
  const float* token_weights;
  const int64_t* labels;
  const float* label_weights;
  const int64_t* token_ids;
  const int64_t* topk_ids;
  int64_t num_labels, num_topk;
  double* state;
  float* loss;
  float* statistics;
  const float* grad_loss;
  opd_matrix_t grad;
  bool live_target, with_statistics;
  bool grad_is_narrower;  // than the student's logits, whose memory it is written to
  opd_divergence_component_t components[OPD_MAX_COMPONENTS];
};

// Whether this divergence has a kernel of its own, which takes calls without options.
bool has_plain_kernel(int divergence);

void launch_plain(const Call& call, int64_t blocks, void* stream);
void launch_general(const Call& call, int64_t blocks, void* stream);

}  // namespace cuda
}  // namespace opd
