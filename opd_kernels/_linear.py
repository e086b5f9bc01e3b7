# SPDX-License-Identifier: Apache-2.0
"""What the loops of the fused_linear ops share beside their GEMMs and their plan.

Which tokens take part, their rows in and out, float16 gradients within float16's range, what the
upstream gradient does, NVTX ranges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from . import _gemms, _rounding

# float16 gradients are formed with the largest weight between these and twice these: 65,504 / 32
# leaves room for |dD/dz|, and entries of 1 / vocab_size keep all of their digits
_LARGEST_FLOAT16_WEIGHT = 16.0
# powers of two that float32 values survive to be multiplied and divided by
_LARGEST_EXPONENT = 64


def active_tokens(token_weights: Tensor | None, compact: bool | None) -> Tensor | None:
    """Indices of the tokens of non-zero weight; None if all tokens take part.

    On a GPU this is a host sync: with weights, and in the backward of reduction "none", where the
    upstream gradient is one. `compact` False leaves it out, and so does None in a CUDA graph.

    Raises:
        RuntimeError: asked for while a CUDA graph is captured.
    """
    if token_weights is None or compact is False:
        return None
    if is_captured(token_weights):
        if compact:
            raise RuntimeError(
                "opd_kernels: compact_tokens must be False or None while a CUDA graph is captured, "
                "got True: how many tokens count is not known before the graph runs."
            )
        return None
    return torch.nonzero(token_weights).squeeze(1)


def is_captured(tensor: Tensor) -> bool:
    """Whether the call becomes a part of a CUDA graph, in which nothing waits for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def take(
    values: Tensor,
    token_idx: Tensor | None,
    begin: int,
    end: int,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Rows [begin, end) of the active tokens, widened where the GEMM wants it.

    token_weights: of these rows, where tokens of weight 0 are among them: their rows become 0, so
    that what they hold does not reach a sum over tokens.
    """
    rows = values[begin:end] if token_idx is None else values[token_idx[begin:end]]
    if token_weights is not None and token_idx is None:
        rows = rows.masked_fill((token_weights == 0).unsqueeze(1), 0.0)
    return rows.float() if _gemms.widens(rows) else rows


def form_logits(
    op: str,
    logits: Tensor,
    chunk: Tensor,
    head: Tensor,
    low_rank: _gemms.LowRank | None,
    head_slice_rows: int,
) -> Tensor | None:
    """Fills `logits` [C, V] with chunk @ head[:V].T, and what a low-rank pair adds to it.

    Returns chunk @ A.T of the pair.
    """
    with phase(chunk, op, "logits"):
        _gemms.logits_into(logits, chunk, head, head_slice_rows)
    if low_rank is None:
        return None
    with phase(chunk, op, "low_rank"):
        projected = low_rank.project(chunk)
        low_rank.add_logits(logits, projected)
        return projected


def put(target: Tensor, token_idx: Tensor | None, begin: int, end: int, rows: Tensor) -> None:
    """Writes rows of the active tokens back to their places in dimension 0 of `target`."""
    if token_idx is None:
        target[begin:end] = rows
    else:
        target[token_idx[begin:end]] = rows.to(target.dtype)


def no_double_backward(*_: object) -> None:
    """The ops have first derivatives only, and say so.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "opd_kernels: the gradients of these losses have no derivative (create_graph=True). "
        "Use backend='reference' for second derivatives."
    )


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in this dtype, rounded once.

    In place where that is the gradient's own, and on a CPU giving its pages back where that has 16
    bits, unless the graph is kept for another backward: a second copy of dW is the largest thing
    that the op would ever hold.

    Raises:
        RuntimeError: the backward is itself to be differentiated.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        no_double_backward()
    if torch.compiler.is_compiling() or type(gradient) is not Tensor:
        return (gradient * factor.to(gradient.dtype)).to(dtype)
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    # the usual case; the scalar is at hand on CPU, and dW is not worth a pass for nothing
    is_one = factor.device.type == "cpu" and bool(factor == 1)
    factor = factor.to(gradient.dtype)
    if not kept and _rounding.is_worth_it(gradient, dtype):
        return _rounding.round_and_free(gradient, dtype, None if is_one else factor)
    if is_one:
        return gradient.to(dtype)
    if dtype == gradient.dtype and not kept:
        return gradient.mul_(factor)
    # one pass, which also rounds
    return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))


def rounded(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient that nobody else reads, in this dtype."""
    if _rounding.is_worth_it(gradient, dtype):
        return _rounding.round_and_free(gradient, dtype)
    return gradient.to(dtype)


def phase(tensor: Tensor, op: str, name: str) -> contextlib.AbstractContextManager:
    """Range `opd::<op>::<phase>` for profilers: NVTX on CUDA, torch's while it runs."""
    label = f"opd::{op}::{name}"
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(label)
    return torch.cuda.nvtx.range(label) if tensor.is_cuda else contextlib.nullcontext()


def gradient_unit(
    head: Tensor, *weights: Tensor | None, times: Tensor | None = None
) -> Tensor | None:
    """A power of two that the weights in dZ are divided by, and its gradients multiplied by.

    None where dZ has the range of float32. Weights like 1e-6 would make most of a float16 dZ zero;
    divided by the unit, the largest of them, times the largest of `times`, is between 16 and 32. A
    tensor, so that nothing waits.
    """
    if _gemms.grad_dtype(head) == _gemms.AS_LOGITS or head.dtype != torch.float16:
        return None
    one = head.new_ones((), dtype=torch.float32)

    def largest(values: list[Tensor]) -> Tensor:
        sizes = [value.abs().amax().to(torch.float32) for value in values if value.numel()]
        return torch.stack(sizes).amax() if sizes else one

    size = largest([values for values in weights if values is not None])
    if times is not None:
        size = size * largest([times])
    size = torch.where(size.isfinite() & (size > 0), size, one)
    mantissa, _ = torch.frexp(size)
    # the power of two below it, exactly
    power = size / (2 * mantissa)
    limit = 2.0**_LARGEST_EXPONENT
    return power.clamp(1 / limit, limit) / _LARGEST_FLOAT16_WEIGHT


def in_units(weights: Tensor | None, unit: Tensor | None, num_tokens: int) -> Tensor | None:
    """The weights that dZ is formed with: exact, for the unit is a power of two."""
    if unit is None:
        return weights
    if weights is None:
        return unit.reciprocal().expand(num_tokens).contiguous()
    return weights / unit.to(weights.dtype)


@contextlib.contextmanager
def summed_in_units(total: Tensor | None, unit: Tensor | None) -> Iterator[None]:
    """The caller's sum of a head's gradients in units while products are added to it.

    Exact, for units are powers of two; two passes over it, for float16 heads only.
    """
    if total is None or unit is None:
        yield
        return
    total.div_(unit)
    try:
        yield
    finally:
        total.mul_(unit)
