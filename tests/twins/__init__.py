# SPDX-License-Identifier: Apache-2.0
"""Tests that the CUDA kernels (emulated) and the Triton kernels (interpreted) pass alike.

A module here holds the tests of one op. tests/opd_kernels/test_cuda_<op>.py and test_triton_<op>.py
import them and define the fixture `gpu`; what only one of the two has is tested there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Gpu(NamedTuple):
    """A backend by its public name, and the namespace of its row kernels."""

    backend: str
    ops: Any


def cuda() -> Gpu:
    return Gpu("cuda", torch.ops.opd_cuda)


def triton() -> Gpu:
    return Gpu("triton", torch.ops.opd_triton)
