# SPDX-License-Identifier: Apache-2.0
"""Laws of standardised logits through a head: sums over a text, and single columns.

Logits are formed for some rows at a time within the law's workspace, and again in backward: no
[T, V] is held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opd.batch import Head, Law, law_size
from opd_kernels.gemm import gemm

# rows of logits that are alive at one time: what autograd holds of a chunk
_ROWS_ALIVE = 10
_EPSILON = 1e-4


def column_sums(law: Law, hidden: Tensor, text: Tensor, *, temperature: float = 1.0) -> Tensor:
    """sum over the rows t of each text of q_t, [B, V], without gradient.

    q_t = softmax(z_t / (std(z_t) + 1e-4) / temperature), std over the tokens that the head's bias
    leaves, 0 of one token.

    Args:
        law: whose head it is.
        hidden: [M, D].
        text: [M] int64, ascending; B is one more than the last.
    """
    head, vocab_size = _head(law)
    num_texts = int(text[-1]) + 1 if len(text) else 0
    with torch.no_grad():
        real = _real(hidden)
        sums = torch.zeros(num_texts, vocab_size, dtype=real, device=hidden.device)
        text = text.to(hidden.device)
        for begin, end in _chunks(law, len(hidden), vocab_size, real):
            logits = _logits(hidden[begin:end].detach(), head, vocab_size)
            probabilities = _standardized(logits, head, temperature)
            # a product and no scattered sum, whose order is a GPU's own
            rows = torch.arange(num_texts, device=hidden.device)[:, None] == text[begin:end]
            sums.addmm_(rows.to(real), probabilities)
    return sums


def columns(law: Law, hidden: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """q_t[ids[t, k]], [M, K] float32 (float64), differentiable in hidden, head and bias.

    q_t = softmax(z_t / (std(z_t) + 1e-4) / temperature), as in `column_sums`.

    Args:
        law: whose head it is.
        hidden: [M, D].
        ids: [M, K] int64.
    """
    head, vocab_size = _head(law)
    step = _rows_at_a_time(law, vocab_size, _real(hidden))
    bias = head.bias
    if bias is not None:
        bias = bias.to(_real(hidden))
    options = head.softcap, head.logit_scale, temperature, vocab_size, step
    return _Columns.apply(hidden, head.weight, bias, ids, options)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, options):
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.options = softcap, scale, temperature, vocab_size, step = options
        head = Head(weight, bias, softcap, scale)
        out = hidden.new_empty(ids.shape, dtype=_real(hidden))
        for begin in range(0, len(hidden), step):
            here = slice(begin, begin + step)
            logits = _logits(hidden[here], head, vocab_size)
            out[here] = _standardized(logits, head, temperature).gather(1, ids[here])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, ids = ctx.saved_tensors
        softcap, scale, temperature, vocab_size, step = ctx.options
        with_hidden, with_weight, with_bias, *_ = ctx.needs_input_grad
        real = _real(hidden)
        grad_hidden = torch.zeros_like(hidden, dtype=real) if with_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=real) if with_weight else None
        grad_bias = torch.zeros_like(bias) if with_bias else None
        head = Head(weight, bias, softcap, scale)
        for begin in range(0, len(hidden), step):
            here = slice(begin, begin + step)
            logits = _logits(hidden[here], head, vocab_size).requires_grad_()
            with torch.enable_grad():
                chosen = _standardized(logits, head, temperature).gather(1, ids[here])
                (grad_logits,) = torch.autograd.grad(chosen, logits, grad[here])
            if grad_bias is not None:
                grad_bias[:vocab_size] += grad_logits.sum(0)
            # a GPU multiplies operands of one dtype
            operand = grad_logits.to(weight.dtype) if weight.is_cuda else grad_logits
            if grad_hidden is not None:
                gemm(grad_hidden[here], operand, weight[:vocab_size])
            if grad_weight is not None:
                gemm(grad_weight[:vocab_size], operand.t(), hidden[here], accumulate=True)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _head(law: Law) -> tuple[Head, int]:
    return law.head, law_size(law)


def _real(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _rows_at_a_time(law: Law, vocab_size: int, real: torch.dtype) -> int:
    return max(1, law.workspace_bytes // (_ROWS_ALIVE * real.itemsize * vocab_size))


def _chunks(
    law: Law, num_rows: int, vocab_size: int, real: torch.dtype
) -> Iterator[tuple[int, int]]:
    step = _rows_at_a_time(law, vocab_size, real)
    for begin in range(0, num_rows, step):
        yield begin, min(begin + step, num_rows)


def _logits(hidden: Tensor, head: Head, vocab_size: int) -> Tensor:
    """hidden @ weight.T, [C, V] in float32 (float64)."""
    weight = head.weight[:vocab_size].detach()
    out = hidden.new_empty(len(hidden), vocab_size, dtype=_real(hidden))
    return gemm(out, hidden.detach(), weight.t())


def _standardized(logits: Tensor, head: Head, temperature: float) -> Tensor:
    """softmax(z / (std(z) + 1e-4) / temperature), z = cap(scale * (logits + bias)).

    std of the finite z alone: a token of a bias of -inf is none.
    """
    if head.bias is not None:
        logits = logits + head.bias[: logits.shape[1]].detach().to(logits.dtype)
    z = head.logit_scale * logits
    if head.softcap is not None:
        z = head.softcap * (z / head.softcap).tanh()
    vocab_size = z.shape[1]
    if vocab_size == 1:
        return z.softmax(1)
    if head.bias is None or head.softcap is not None:
        return (z / (z.std(1, keepdim=True) + _EPSILON) / temperature).softmax(1)
    is_out = head.bias[:vocab_size].detach() == -torch.inf
    count = vocab_size - is_out.sum()
    # where they count nothing in the deviation, and give it no gradient
    mean = z.detach().masked_fill(is_out, 0.0).sum(1, keepdim=True) / count
    z = torch.where(is_out, mean, z)
    factor = ((vocab_size - 1) / (count - 1).clamp_min(1)).to(z.dtype).sqrt()
    z = z / (factor * z.std(1, keepdim=True) + _EPSILON) / temperature
    return z.masked_fill(is_out, -torch.inf).softmax(1)
