# SPDX-License-Identifier: Apache-2.0
"""The backend of tests that every GPU backend has: a test file names its own in a fixture `gpu`.

A file takes all tests of a module beside this one with `import *`, under its own marks, and adds
those that only its backend has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """Its name, and the namespace of its row kernels."""

    name: str
    ops: object


CUDA = Gpu("cuda", torch.ops.opd_cuda)
TRITON = Gpu("triton", torch.ops.opd_triton)
