# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a call: one table, read on metadata only (never on values)."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _library, env
from .errors import UnsupportedBackendError

OPS = (
    "divergence",
    "fused_linear_divergence",
    "token_logprobs",
    "fused_linear_token_logprobs",
    "segment_scan",
    "topk_codec",
    "topk_logprobs",
    "fused_linear_topk",
    "topk_divergence",
    "fused_linear_topk_divergence",
    "fused_linear_overlap_divergence",
    "sample_tokens",
    "fused_linear_sample_tokens",
    "speculative_verify",
    "fused_linear_speculative_verify",
    "sorted_l1",
    "fused_linear_sorted_l1",
)
# the functions of an op that has no function of its own name
FUNCTIONS = {"topk_codec": ("encode_topk", "decode_topk")}

# on a GPU out of the library's sort, called by the name of the kernels that they do without
_OF_LIBRARY_CALLS = ("sorted_l1", "fused_linear_sorted_l1")

# the oldest GPUs that csrc/cuda is written for
_OLDEST_CAPABILITY = (8, 0)


class Meta(NamedTuple):
    """What the choice may depend on."""

    device: str
    dtype: torch.dtype
    # compute capability (major, minor) of a CUDA device
    capability: tuple[int, int] | None = None


class Row(NamedTuple):
    """A backend and its objection to a call: a reason, or None if it can run it."""

    backend: str
    objection: Callable[[Meta], str | None]


def _constant_for_dynamo(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, which would import torch._dynamo: seconds."""
    function._dynamo_marked_constant = True
    return function


@_constant_for_dynamo
def num_threads() -> int:
    """Threads that a CPU's kernels run on."""
    return torch.get_num_threads()


def _cuda(meta: Meta) -> str | None:
    if meta.device == "cpu" and _cuda_emulated():
        return None
    if meta.device != "cuda":
        return f"the tensors are on {meta.device}"
    if _library.CUDA_OBJECTION is not None:
        return _library.CUDA_OBJECTION
    return None if meta.capability is None else _gpu_objection(meta.capability)


@_constant_for_dynamo
def _cuda_emulated() -> bool:
    return _library.cuda_emulated()


@_constant_for_dynamo
def _gpu_objection(capability: tuple[int, int]) -> str | None:
    gpu = f"the GPU has compute capability {capability[0]}.{capability[1]}"
    if capability < _OLDEST_CAPABILITY:
        return f"{gpu} and the CUDA kernels need {_OLDEST_CAPABILITY[0]}.{_OLDEST_CAPABILITY[1]}"
    built = _library.architectures()
    if _library.runs_on(capability, built):
        return None
    return (
        f"{gpu} and the CUDA kernels were built for {', '.join(built)}; rebuild them with "
        f"OPD_CUDA_ARCHITECTURES={10 * capability[0] + capability[1]}"
    )


def _cuda_of_logits(meta: Meta) -> str | None:
    if meta.dtype == torch.float64:
        return "float64 is not supported by the CUDA kernels of logits"
    return _cuda(meta)


def _cpu(meta: Meta) -> str | None:
    return None if meta.device == "cpu" else f"the tensors are on {meta.device}"


@_constant_for_dynamo
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton(meta: Meta) -> str | None:
    if not _has_triton():
        return "triton is not installed"
    if meta.dtype == torch.float64:
        return "float64 is not supported by the Triton kernels"
    if meta.device == "cpu" and not env.triton_interpreted():
        return "CPU tensors need TRITON_INTERPRET=1 (Triton's interpreter, for tests)"
    return None if meta.device in ("cpu", "cuda") else f"the tensors are on {meta.device}"


def _reference(meta: Meta) -> str | None:
    return None


def _of_library(meta: Meta) -> str | None:
    return None if meta.device == "cuda" else f"the tensors are on {meta.device}"


def _cuda_row(op: str) -> Callable[[Meta], str | None]:
    if op in _OF_LIBRARY_CALLS:
        return _of_library
    return _cuda if op in ("segment_scan", "topk_codec") else _cuda_of_logits


def _no_triton(meta: Meta) -> str | None:
    return "it has no Triton kernel"


# in order of preference; the fused_linear ops use the row kernels of the rest
BACKENDS: dict[str, tuple[Row, ...]] = {
    op: (
        Row("cpu", _cpu),
        Row("cuda", _cuda_row(op)),
        Row("triton", _no_triton if op in ("topk_codec", *_OF_LIBRARY_CALLS) else _triton),
        Row("reference", _reference),
    )
    for op in OPS
}

# never chosen by itself: it forms every [T, V] in float64
_ONLY_ON_REQUEST = "reference"


class _Forced(threading.local):
    """Backends that `use_backend` blocks of this thread have asked for, the innermost last."""

    def __init__(self) -> None:
        self.backends: list[str] = []


_forced = _Forced()


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Runs the calls of this thread inside on one backend, unless a call names its own.

    Raises:
        ValueError: no backend has this name.
    """
    _check_name("use_backend", backend)
    _forced.backends.append(backend)
    try:
        yield
    finally:
        _forced.backends.pop()


def _check_name(op: str, backend: str) -> None:
    names = [row.backend for row in BACKENDS[OPS[0]]]
    if backend not in names:
        raise ValueError(f"{op}: backend must be one of {', '.join(names)}, got {backend!r}.")


def meta_of(tensor: Tensor) -> Meta:
    """Metadata of a call from its first tensor."""
    device = tensor.device
    return Meta(device.type, tensor.dtype, _capability(device.type, device.index))


@_constant_for_dynamo
def _capability(device: str, index: int | None) -> tuple[int, int] | None:
    known = device == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(index) if known else None


def select(op: str, meta: Meta, backend: str | None = None) -> str:
    """The backend for this call: the argument, `use_backend`, OPD_BACKEND, or the first that can.

    Raises:
        UnsupportedBackendError: a named backend cannot run the call, or none can.
    """
    wanted = backend
    if wanted is None:
        wanted = _forced.backends[-1] if _forced.backends else env.forced_backend()
    if wanted is not None:
        _check_name(op, wanted)
        for row in BACKENDS[op]:
            if row.backend == wanted:
                reason = row.objection(meta)
                if reason is not None:
                    raise UnsupportedBackendError(
                        f"{op}: backend '{wanted}' was requested but {reason}."
                    )
        return wanted
    reasons = []
    for row in BACKENDS[op]:
        if row.backend == _ONLY_ON_REQUEST:
            continue
        reason = row.objection(meta)
        if reason is None:
            return row.backend
        reasons.append(f"{row.backend}: {reason}")
    raise UnsupportedBackendError(
        f"{op}: no backend can run this call ({'; '.join(reasons)}). backend='reference' runs "
        "everywhere, in float64 and with every [T, V] formed."
    )


_ROW_OPS = {"cpu": "opd", "cuda": "opd_cuda", "triton": "opd_triton"}


def row_ops(backend: str):
    """The namespace of compiled row kernels of a backend."""
    return getattr(torch.ops, _ROW_OPS[backend])


def table(op: str, meta: Meta) -> list[tuple[str, bool, str]]:
    """(backend, can run, reason) for each backend of an op."""
    rows = []
    for row in BACKENDS[op]:
        reason = row.objection(meta)
        note = "on request only: float64, forms [T, V]" if row.backend == "reference" else ""
        rows.append((row.backend, reason is None, reason or note))
    return rows


def kernel_table() -> list[dict[str, object]]:
    """One row per op and backend on this machine: op, backend, available, reason."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meta = Meta(device, torch.float32, _capability(device, None))
    return [
        {"op": op, "backend": backend, "available": available, "reason": reason}
        for op in OPS
        for backend, available, reason in table(op, meta)
    ]
