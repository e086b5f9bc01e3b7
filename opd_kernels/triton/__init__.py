# SPDX-License-Identifier: Apache-2.0
"""The portable GPU kernels. Importing this package does not import triton; `available` may."""

from __future__ import annotations

from importlib.util import find_spec

import torch

__all__ = ["available"]


def available() -> str | None:
    """None if the kernels can run here, else the reason why not, in words."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from triton import knobs

    if knobs.runtime.interpret or torch.cuda.is_available():
        return None
    return "there is no CUDA device, and TRITON_INTERPRET is not 1"
