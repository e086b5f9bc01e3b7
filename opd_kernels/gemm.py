# SPDX-License-Identifier: Apache-2.0
"""out (+)= a @ b: the one place where the LM-head GEMMs of this package run.

They are the library's (torch.mm) on a GPU, in float64, and on CPUs whose library is quick. On the
others `opd::gemm_` is quicker: docs/decisions/0004-cpu-gemm.md has the measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import env
from ._registration import register

# kDepth and kShared of csrc/core/gemm.cpp, and the widest of its tiles
_DEPTH, _SHARED, _TILE = 512, 1024, 32

# read once, since torch.compile traces what asks for it
OWN = (env.cpu_gemm() or ("own" if torch.ops.opd.gemm_preferred() else "library")) == "own"


def is_own(tensor: Tensor) -> bool:
    """Whether products of this operand run in our own kernel."""
    return OWN and tensor.device.type == "cpu" and tensor.dtype != torch.float64


def workspace_bytes(lines: int) -> int:
    """What our own kernel allocates for a while, at most.

    It packs the smaller operand: `lines` is the larger of tokens and hidden size, whatever the
    size of the vocabulary.
    """
    return 4 * _DEPTH * (min(_SHARED, lines + _TILE))


def gemm(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    accumulate: bool = False,
    factor: float = 1.0,
    thin: bool = False,
) -> Tensor:
    """out = factor * a @ b, or out += it, accumulated and kept in float32 (float64).

    Args:
        out: [m, n] float32 (float64), contiguous along its rows.
        a: [m, k], b: [k, n]; of the dtype of `out` or of 16 bits, and on a GPU of one dtype.
            Transposed views are as good as contiguous ones.
        thin: one side is as short as a low-rank pair's r, which our own kernel has no tile for.

    Returns:
        out. The caller's autocast does not touch the operands.
    """
    if is_own(out) and not thin:
        if factor != 1.0:
            # the smaller operand: hidden states, beside a dZ or a head
            b = b.to(out.dtype) * factor
        torch.ops.opd.gemm_(out, _unit_stride(a), _unit_stride(b), accumulate)
        return out
    if not out.is_cuda:
        # the library has products of mixed widths for CUDA only
        a, b = a.to(out.dtype), b.to(out.dtype)
    beta, is_plain = int(accumulate), not accumulate and factor == 1.0
    if a.dtype == out.dtype:
        if is_plain:
            return torch.mm(a, b, out=out)
        return torch.addmm(out, a, b, beta=beta, alpha=factor, out=out)
    if is_plain:
        return torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    return torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=beta, alpha=factor, out=out)


def _unit_stride(matrix: Tensor) -> Tensor:
    """The matrix with a stride of 1 in one dimension, copied only if it has none."""
    fits = any(
        stride == 1 or size <= 1 for stride, size in zip(matrix.stride(), matrix.shape, strict=True)
    )
    return matrix if fits else matrix.contiguous()


register("gemm_", fake=lambda *_: None, cpu_only=True)
register("gemm_preferred", fake=lambda: False, cpu_only=True)
