# SPDX-License-Identifier: Apache-2.0
"""logprobs[t] = log softmax(z_t)[token_ids[t]], with lse and entropy, z_t made of logits[t]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _laws, _linear, reference
from ._registration import register

_OP = "token_logprobs"


class TokenLogprobs(NamedTuple):
    """Three [T] tensors, nats, each differentiable in the logits (or hidden states and head).

    `lse` is the log-sum-exp of the logits as the law takes them; `entropy` that of the whole law.
    """

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor


class Law(NamedTuple):
    """The arguments of OPD_LAW in csrc/torch/ops.cpp; numbers: scale, softcap, temperature."""

    bias: Tensor | None
    temperatures: Tensor | None
    numbers: list[float]
    vocab_size: int

    def rows(self, rows: slice | Tensor) -> Law:
        """The law of some of the tokens."""
        temperatures = None if self.temperatures is None else self.temperatures[rows]
        return self._replace(temperatures=temperatures)


def pack_law(
    rows: _laws.Rows,
    vocab_size: int,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    bias: Tensor | None = None,
) -> Law:
    """Checks the keyword arguments that turn one model's logits into a law."""
    scale = _checks.logit_scale(rows.op, "logit_scale", logit_scale)
    cap = _checks.softcap(rows.op, "softcap", softcap)
    temperatures = None
    if isinstance(temperature, Tensor):
        temperature, temperatures = 1.0, _checks.per_token(rows, "temperature", temperature)
    temperature = _checks.temperature(rows.op, "temperature", temperature)
    # a softcap of 0 is none
    for name, value in (("logit_scale", scale), ("softcap", cap), ("temperature", temperature)):
        if value != 0:
            _checks.law_number(rows, name, value)
    if bias is not None:
        bias = _checks.bias(rows, "bias", bias, vocab_size)
    return Law(bias, temperatures, [scale, cap, temperature], vocab_size)


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> TokenLogprobs:
    """Log-probability of one token per row, with the row's log-sum-exp and entropy.

    logprobs[t] = z[token_ids[t]] - lse[t],  z = cap(logit_scale * logits[t]) / temperature[t],
    lse[t] = log sum_v exp z_v,  entropy[t] = -sum_v q_v log q_v,  cap(x) = c tanh(x / c).

    Args:
        logits: [T, V], float32 | bfloat16 | float16 (float64 on CPU).
        token_ids: [T] int64 or int32, each in [0, vocab_size). Drop ignored positions (-100) before
            the call. Checked on CPU; on a GPU it is the caller's contract.
        temperature: divides the logits; > 0. A number, or [T] without gradient.
        softcap: c of cap, Gemma's; > 0. None: no cap.
        logit_scale: multiplies the logits before the cap; not 0.
        vocab_size: the leading columns that count; the rest is not read and gets zero gradient.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one.

    Returns:
        TokenLogprobs of [T] float32 (float64 for float64 logits), nats, all three differentiable.

    Raises:
        ValueError: shapes or numbers that do not fit. TypeError: unsupported dtype.
        RuntimeError: an id out of range (on CPU). UnsupportedBackendError.

    Source: the chosen-token quantities of arXiv:2306.08543 and of policy-gradient distillation.
    """
    _checks.tensor(_OP, "logits", logits, 2)
    _checks.floating(_OP, logits=logits)
    vocab_size = _checks.vocab_prefix(_OP, vocab_size, logits=logits.shape[1])
    law = pack_law(
        _laws.rows_of(_OP, logits),
        vocab_size,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    token_ids = _checks.token_ids(_OP, token_ids, logits.shape[0], logits.device)
    real = _checks.real_dtype(logits)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(logits), backend)
    if chosen == "reference":
        values = reference.token_logprobs(
            logits,
            token_ids,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            vocab_size=vocab_size,
        )
    else:
        _checks.no_forward_mode(_OP, logits)
        values = _dispatch.row_ops(chosen).token_logprobs_fwd(
            _checks.unit_stride(logits), token_ids, *law
        )
    return TokenLogprobs(*(value.to(real) for value in values))


def fwd_outputs(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty (logprobs, lse, entropy) for the rows of `like`; lse in float64."""
    num_tokens = like.shape[0]
    real = _checks.real_dtype(like)
    return (
        like.new_empty(num_tokens, dtype=real),
        like.new_empty(num_tokens, dtype=torch.float64),
        like.new_empty(num_tokens, dtype=real),
    )


def _fwd_fake(logits, *_):
    return fwd_outputs(logits)


def _fwd_setup_context(ctx, inputs, output):
    logits, token_ids, bias, temperatures, *ctx.numbers = inputs
    _, lse, entropy = output
    ctx.save_for_backward(logits, token_ids, lse, entropy, bias, temperatures)


def _fwd_backward(namespace):
    def backward(ctx, grad_logprobs, grad_lse, grad_entropy):
        grad_logits = getattr(torch.ops, namespace).token_logprobs_bwd(
            grad_logprobs.contiguous(),
            grad_lse.contiguous(),
            grad_entropy.contiguous(),
            *ctx.saved_tensors,
            *ctx.numbers,
        )
        # a bias is a constant here: through the fused op it has a gradient
        return grad_logits, *(None,) * 5

    return backward


def _bwd_fake(grad_logprobs, grad_lse, grad_entropy, logits, *_):
    return logits.new_empty(logits.shape)


def _bwd_inplace_fake(*_):
    return None


def _triton_fwd(*arguments):
    from .triton import token_logprobs as kernels

    return kernels.token_logprobs_fwd(*arguments)


def _triton_bwd(*arguments):
    from .triton import token_logprobs as kernels

    return kernels.token_logprobs_bwd(*arguments)


def _triton_bwd_(*arguments):
    from .triton import token_logprobs as kernels

    return kernels.token_logprobs_bwd_(*arguments)


register(
    "token_logprobs_fwd",
    fake=_fwd_fake,
    setup_context=_fwd_setup_context,
    backward=_fwd_backward,
    triton=_triton_fwd,
)
register(
    "token_logprobs_bwd",
    fake=_bwd_fake,
    backward=lambda _: _linear.no_double_backward,
    triton=_triton_bwd,
)
register("token_logprobs_bwd_", fake=_bwd_inplace_fake, triton=_triton_bwd_)
