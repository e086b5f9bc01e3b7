# SPDX-License-Identifier: Apache-2.0
"""Every test: seeded, one thread, uninitialised memory filled with NaN, Triton interpreted."""

from __future__ import annotations

import os

# read by triton.jit when a kernel is decorated, so it must be set before triton is imported
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# two threads on a machine that others use too spend their time waiting for each other; what depends
# on the thread count sets it (the determinism tests)
NUM_THREADS = 1


@pytest.fixture(autouse=True)
def _reproducible():
    """Seeds, thread count, and NaN in all memory that torch hands out, in C++ as in Python.

    An op that reads what it has not written, or leaves a part of its output unwritten, then fails.
    """
    torch.manual_seed(0)
    torch.set_num_threads(NUM_THREADS)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def interpreted_triton():
    """Skips, with the reason, where the Triton kernels can't run on this machine's tensors."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not 1, so Triton can't take CPU tensors")
    from opd_kernels import triton as opd_triton

    reason = opd_triton.available()
    if reason is not None:
        pytest.skip(f"triton backend: {reason}")
    return opd_triton
