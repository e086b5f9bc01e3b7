# SPDX-License-Identifier: Apache-2.0
"""Registers an op's fake, its backward and its twins on other backends, each once.

A row kernel is three torch ops with one schema, one fake and one backward: `opd::x` (compiled, for
CPU), `opd_cuda::x` (compiled, for CUDA) and `opd_triton::x` (Triton). Schemas are read from the
compiled library, never written twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import _library, env

assert _library.PATH  # importing it has registered torch.ops.opd

REGISTERED: dict[str, Callable] = {}

_cuda_library = torch.library.Library("opd_cuda", "DEF")
_triton_library = torch.library.Library("opd_triton", "DEF")
_python_library = torch.library.Library("opd", "IMPL")


def register(
    name: str,
    *,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    triton: Callable | None = None,
    python: Callable | None = None,
    cuda: Callable | None = None,
    cpu_only: bool = False,
) -> None:
    """Registers op `name`.

    Args:
        name: as in csrc/torch/ops.cpp.
        fake: shapes and dtypes of the outputs, from the inputs.
        setup_context: as torch.library.register_autograd takes it.
        backward: the same, but made from the namespace of the op that it belongs to.
        triton: host launcher with the schema's signature; makes `opd_triton::name`.
        python: the op itself, for ops that are loops over library GEMMs and row kernels; any other
            is a row kernel and has a twin `opd_cuda::name`, unless its C++ is `cpu_only`.
        cuda: the op itself on a GPU, out of library calls, where its C++ is `cpu_only`.
    """
    names = [f"opd::{name}"]
    schema = str(getattr(torch.ops.opd, name).default._schema).removeprefix("opd::")
    if python is not None:
        _python_library.impl(name, python, "CompositeExplicitAutograd")
    elif not cpu_only:
        # implemented by csrc/torch/ops_cuda.cpp, where that is loaded
        _cuda_library.define(schema)
        names.append(f"opd_cuda::{name}")
    if cuda is not None:
        _python_library.impl(name, cuda, "CUDA")
    if triton is not None:
        _triton_library.define(schema)
        _triton_library.impl(name, triton, "CUDA")
        if env.triton_interpreted():
            _triton_library.impl(name, triton, "CPU")
        names.append(f"opd_triton::{name}")
    for qualified in names:
        torch.library.register_fake(qualified, fake)
        if backward is not None:
            namespace = qualified.partition("::")[0]
            torch.library.register_autograd(
                qualified, backward(namespace), setup_context=setup_context
            )
        REGISTERED[qualified] = fake
