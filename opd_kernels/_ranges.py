# SPDX-License-Identifier: Apache-2.0
"""Named ranges for profilers."""

from __future__ import annotations

import contextlib

import torch


def named_range(name: str, is_cuda: bool) -> contextlib.AbstractContextManager:
    """What a profiler shows a body under; next to nothing when there is none."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(name)
    return torch.cuda.nvtx.range(name) if is_cuda else contextlib.nullcontext()
