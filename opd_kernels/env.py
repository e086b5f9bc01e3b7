# SPDX-License-Identifier: Apache-2.0
"""The environment variables that this package reads, all of them.

| variable | meaning |
|---|---|
| `OPD_BACKEND` | backend for every call that names none: cuda, triton, cpu, reference |
| `OPD_CPU_GEMM` | own, library: the GEMMs on a CPU; unset: the quicker. Read on import |
| `TRITON_INTERPRET` | Triton's own: 1 runs Triton kernels on CPU tensors, for tests |
| `OPD_CUDA_EMULATION` | path of opd_emulated.so: CUDA kernels on CPU tensors, for tests |
| `OPD_CLUSTER_BLOCKS` | read in C++: 0 keeps calls from the cluster kernel: docs/kernels.md |
"""

from __future__ import annotations

import os


def forced_backend() -> str | None:
    """`OPD_BACKEND`, or None."""
    return os.environ.get("OPD_BACKEND") or None


def triton_interpreted() -> bool:
    """Whether Triton kernels run under Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def cpu_gemm() -> str | None:
    """`OPD_CPU_GEMM`, or None.

    Raises:
        ValueError: it is set to something else.
    """
    chosen = os.environ.get("OPD_CPU_GEMM") or None
    if chosen not in (None, "own", "library"):
        raise ValueError(f"OPD_CPU_GEMM must be 'own' or 'library', got {chosen!r}.")
    return chosen


def cuda_emulation() -> str | None:
    """`OPD_CUDA_EMULATION`, or None."""
    return os.environ.get("OPD_CUDA_EMULATION") or None
