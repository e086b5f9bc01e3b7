// SPDX-License-Identifier: Apache-2.0
// Loss, statistics and gradient of float32 logits from one read of each: for GPUs with clusters.
#pragma once

#include "launch.h"
#include "opd/opd.h"
#include "tuning.h"

namespace opd {
namespace cuda {

// How rows lie on chip, and how many clusters the device holds at once.
struct RowLaunch {
  RowPlan plan;
  int64_t clusters = 0;
  int64_t blocks() const { return clusters * plan.cluster; }
};

// Whether the call is one that forward_grad_cluster() can do on this device, the current one, and
// how: one divergence against the teacher's own law, without bias or softcap, on rows of float32
// that begin on 16 bytes and fit on chip. The gradient may be float32, bfloat16 or float16. In the
// student's own memory a 16-bit row begins where its float32 row does: grad.row_stride == 2 *
// student.row_stride. A part of a GPU may have no room for a cluster that holds a row: false.
bool cluster_takes(const opd_divergence_args_t& args, const Device& device, RowLaunch* launch);

// opd_divergence_fwd_grad_cuda() of such a call.
void forward_grad_cluster(const opd_divergence_args_t& args, const RowLaunch& launch, void* stream);

}  // namespace cuda
}  // namespace opd
