# SPDX-License-Identifier: Apache-2.0
"""Every test: seeded, one thread, uninitialised memory filled with NaN, Triton interpreted."""

from __future__ import annotations

import os

# read by triton.jit when a kernel is decorated, so it must be set before triton is imported
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import settings

# tests that several files take
pytest.register_assert_rewrite("tests.row_kernels", "tests.twins")

# two threads on a machine that others use too spend their time waiting for each other; what depends
# on the thread count sets it (the determinism tests)
NUM_THREADS = 1

# the same few examples each time; --hypothesis-profile=search draws new ones
settings.register_profile("fixed", max_examples=8, deadline=None, derandomize=True, database=None)
settings.register_profile("search", max_examples=200, deadline=None, print_blob=True)
settings.load_profile("fixed")


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
def emulated_cuda_library():
    """Path of the CUDA kernels as C++ on CPU tensors; compiled if they are not."""
    from tests import native

    return native.build("opd_torch_emulated") / "opd_emulated.so"


@pytest.fixture
def emulated_cuda(emulated_cuda_library, monkeypatch):
    """backend="cuda" takes CPU tensors; skips, with the reason, where nothing compiles them."""
    from opd_kernels import _library

    monkeypatch.setenv("OPD_CUDA_EMULATION", str(emulated_cuda_library))
    assert _library.cuda_emulated()


@pytest.fixture(scope="session")
def interpreted_triton():
    """The Triton kernels on CPU tensors; skips, with the reason, where they can't run."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not 1, so Triton can't take CPU tensors")
    from opd_kernels import triton as opd_triton

    reason = opd_triton.available()
    if reason is not None:
        pytest.skip(f"triton backend: {reason}")
    with pytest.MonkeyPatch.context() as patch:
        _round_to_bfloat16_as_hardware_does(patch)
        _fuse_multiply_and_add_as_hardware_does(patch)
        _patch_the_language_once_per_launch(patch)
        yield opd_triton


def _round_to_bfloat16_as_hardware_does(patch: pytest.MonkeyPatch) -> None:
    """Triton 3.7's interpreter cuts float32 to bfloat16 where every GPU rounds to nearest even."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(values, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy()
        return convert(values, source, target, rounding_mode)

    patch.setattr(interpreter, "_convert_float", convert_float)


def _fuse_multiply_and_add_as_hardware_does(patch: pytest.MonkeyPatch) -> None:
    """Triton 3.7's interpreter rounds the product of a fused multiply-add."""
    import numpy as np
    from triton.runtime import interpreter

    def create_fma(self, x, y, z):
        wide = [value.data.astype(np.float64) for value in (x, y, z)]
        fused = (wide[0] * wide[1] + wide[2]).astype(z.data.dtype)
        return interpreter.TensorHandle(fused, z.dtype)

    patch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)


def _patch_the_language_once_per_launch(patch: pytest.MonkeyPatch) -> None:
    """The interpreter patches triton.language anew in each call of a device function.

    That is half of its time. Once per launch is enough, for each of the two modules.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang
    patched = set()

    def patch_once(function):
        modules = (tl, tl.core)
        names = frozenset(
            module.__name__
            for module in modules
            if any(value is module for value in function.__globals__.values())
        )
        if names in patched:
            return None
        is_launch = not patched
        patched.add(names)
        scope = patch_language(function)
        if is_launch:
            restore = scope.restore

            def restore_and_forget():
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    patch.setattr(interpreter, "_patch_lang", patch_once)
