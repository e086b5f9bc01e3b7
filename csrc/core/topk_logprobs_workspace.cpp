// SPDX-License-Identifier: Apache-2.0
// Bytes that a call of topk_logprobs needs beside its outputs; a file of its own, since a library of
// the CUDA kernels alone needs it too.
#include "opd/opd.h"

int64_t opd_topk_logprobs_workspace_bytes(int64_t, int64_t, int64_t) { return 0; }
