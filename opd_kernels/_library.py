# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled ops; importing this module registers `torch.ops.opd`.

The kernels of `torch.ops.opd_cuda` are loaded with them where they were built and torch has CUDA;
`CUDA_OBJECTION` says why not elsewhere.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

import torch

from . import env
from .errors import BuildError

PATH = Path(__file__).with_name("_C.so")
CUDA_PATH = PATH.with_name("_C_cuda.so")
_BUILD = "`OPD_CUDA=1 pip install --no-build-isolation -e .` in the source tree"

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


def _load_cuda() -> str | None:
    """None if the CUDA kernels are loaded, else the reason why not, in words."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not CUDA_PATH.exists():
        return f"the CUDA kernels were not built; run {_BUILD} (needs nvcc, of CUDA 12.8 or newer)"
    try:
        torch.ops.load_library(str(CUDA_PATH))
    except OSError as error:
        cause = error.__cause__ or error
        return f"{CUDA_PATH.name} does not load ({cause}); run {_BUILD} to rebuild it"
    return None


CUDA_OBJECTION = _load_cuda()


@cache
def architectures() -> tuple[str, ...]:
    """What the loaded CUDA kernels were compiled for, as CMake says it: ("80-real", "90a-real")."""
    function = ctypes.CDLL(str(CUDA_PATH)).opd_cuda_architectures
    function.restype = ctypes.c_char_p
    return tuple(function().decode().split(";"))


@cache
def runs_on(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether code for one of these architectures runs on a GPU of this compute capability."""
    return any(_code_runs_on(capability, architecture) for architecture in architectures)


def _code_runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """CUDA's rules: machine code within a major version, that of 90a nowhere else, PTX upwards."""
    number, suffix, kind = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", architecture).groups()
    built, wanted = divmod(int(number), 10), capability
    if suffix == "a":
        return built == wanted
    if suffix == "f" or kind == "-real":
        return built[0] == wanted[0] and built <= wanted
    return built <= wanted


@cache
def _load_emulation(path: str) -> None:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise BuildError(
            f"opd_kernels: OPD_CUDA_EMULATION must be the path of opd_emulated.so, got {path!r} "
            f"({error.__cause__ or error})."
        ) from error


def cuda_emulated() -> bool:
    """Whether the CUDA kernels take CPU tensors; loads their emulation when first asked."""
    path = env.cuda_emulation()
    if path is not None:
        _load_emulation(path)
    return path is not None


cuda_emulated()
