# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled ops; importing this module registers `torch.ops.opd`."""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import BuildError

PATH = Path(__file__).with_name("_C.so")

if not PATH.exists():
    raise BuildError(
        f"opd_kernels: the compiled library {PATH.name} is missing. Build it with "
        "`pip install --no-build-isolation -e .` in the source tree (needs g++)."
    )
try:
    torch.ops.load_library(str(PATH))
except OSError as error:
    raise BuildError(
        f"opd_kernels: {PATH.name} does not load on torch {torch.__version__} ({error}). "
        "Rebuild it with `pip install --no-build-isolation -e .`; torch must be >= 2.11."
    ) from error
