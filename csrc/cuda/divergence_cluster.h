// SPDX-License-Identifier: Apache-2.0
// Loss, statistics and gradient of float32 logits from one read of each: for GPUs with clusters.
#pragma once

#include "launch.h"
#include "opd/opd.h"

namespace opd {
namespace cuda {

// Whether the call is one that forward_grad_cluster() can do: one divergence against the teacher's
// own law, without bias or softcap, on rows of float32 that begin on 16 bytes and fit on chip. The
// gradient may be float32, bfloat16 or float16. In the student's own memory a 16-bit row begins
// where its float32 row does: grad.row_stride == 2 * student.row_stride.
bool cluster_takes(const opd_divergence_args_t& args, const Device& device);

// opd_divergence_fwd_grad_cuda() of such a call; `scratch` is left as it is.
void forward_grad_cluster(const opd_divergence_args_t& args, const Device& device, void* stream);

}  // namespace cuda
}  // namespace opd
