/* SPDX-License-Identifier: Apache-2.0 */
/* opd.h is C99: this file is compiled by a C compiler and calls the library through it. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "opd/opd.h"

int main(void) {
  /* P = (3/4, 1/4), Q = (1/2, 1/2): KL(P||Q) = .75 ln 1.5 - .25 ln 2 */
  float student[2] = {0.0f, 0.0f};
  float teacher[2];
  float loss = -1.0f;
  double state[OPD_DIVERGENCE_STATE + OPD_DIVERGENCE_STATE_PER_COMPONENT];
  opd_divergence_component_t component = {OPD_FORWARD_KL, 0.0, 0.0, NULL};
  opd_divergence_args_t args;
  teacher[0] = logf(0.75f);
  teacher[1] = logf(0.25f);
  memset(&args, 0, sizeof(args));
  args.struct_size = sizeof(args);
  args.num_tokens = 1;
  args.vocab_size = 2;
  args.student.matrix.data = student;
  args.teacher.matrix.data = teacher;
  args.student.matrix.row_stride = args.teacher.matrix.row_stride = 2;
  args.student.scale = args.teacher.scale = 1.0;
  args.student.temperature = args.teacher.temperature = 1.0;
  args.components = &component;
  args.num_components = 1;
  args.loss = &loss;
  args.state = state;
  if (opd_divergence_fwd_cpu(&args) != OPD_OK || fabsf(loss - 0.130812036f) > 1e-6f) {
    printf("FAILED: loss must be 0.130812, got %g (%s)\n", loss, opd_last_error());
    return 1;
  }
  args.student.temperature = 0.0;
  if (opd_divergence_fwd_cpu(&args) != OPD_INVALID_ARGUMENT ||
      strstr(opd_last_error(), "temperature of student_logits must be positive") == NULL) {
    printf("FAILED: a temperature of 0 must be refused in words, got '%s'\n", opd_last_error());
    return 1;
  }
  args.struct_size = 8;
  if (opd_divergence_fwd_cpu(&args) != OPD_INVALID_ARGUMENT) {
    printf("FAILED: a struct of another version must be refused\n");
    return 1;
  }
  printf("test_c_header: ok, opd %s\n", opd_version());
  return 0;
}
