# SPDX-License-Identifier: Apache-2.0
"""Tokens drawn from softmax(z_t / proposal_temperature), with weights unbiased for the law."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _laws, reference
from ._registration import register
from .token_logprobs import pack_law

_OP = "sample_tokens"


class TokenSamples(NamedTuple):
    """Distinct tokens of each row's draws; no gradient, nats.

    ids [T, N] int32, ascending, then -1; weights [T, N], 0 beside -1; logprobs [T, N] of the law,
    -inf beside -1; lse [T].
    """

    ids: Tensor
    weights: Tensor
    logprobs: Tensor
    lse: Tensor


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    proposal_temperature: float = 1.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> TokenSamples:
    """N draws per row from a proposal r, as distinct tokens whose weights are the law p on average.

    p = softmax(z),  r = softmax(z / proposal_temperature),
    draw[t, n] = min {v : r_0 + .. + r_v > uniforms[t, n]},  weight = count / N * p / r,
    z = cap(logit_scale * logits[t]) / temperature[t],  cap(x) = c tanh(x / c).

    The weights are not normalised: E[weights scattered to their ids] = p exactly, for each token
    and every N, which a top-k target is not.

    Args:
        logits: [T, V], float32 | bfloat16 | float16 (float64 on CPU). May require grad; the
            outputs have none.
        uniforms: [T, N] float32 or float64 in [0, 1), N from 1 to 4096: the caller's own random
            numbers, so that the same ones give the same tokens. Checked on CPU. A float32 has 24
            bits: of tokens rarer than 6e-8 it skips some; float64 does not.
        proposal_temperature: > 0. 1 draws from p, with weights count / N. Above 1 draws more of
            the tail; below 1 less, with weights that have no bound. Below some 0.2 any number of
            draws one can afford sums to less than the law; above some 10 weights underflow to 0.
        temperature: divides the logits; > 0. A number, or [T] without gradient.
        softcap: c of cap, Gemma's; > 0. None: no cap.
        logit_scale: multiplies the logits before the cap; not 0.
        vocab_size: the leading columns that count; the rest is not read.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one.

    Returns:
        TokenSamples in float32 (float64 for float64 logits), nats. A row with a NaN or a +inf z, or
        of nothing but -inf, has ids -1 and NaN elsewhere; the lse of the last is -inf.

    Raises:
        ValueError: shapes or numbers that do not fit. TypeError: unsupported dtype.
        RuntimeError: a uniform outside [0, 1) (on CPU). UnsupportedBackendError.

    Source: random-sampling knowledge distillation, arXiv:2503.16870.
    """
    _checks.tensor(_OP, "logits", logits, 2)
    _checks.floating(_OP, logits=logits)
    vocab_size = _checks.vocab_prefix(_OP, vocab_size, logits=logits.shape[1])
    rows = _laws.rows_of(_OP, logits)
    law = pack_law(
        rows, vocab_size, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    proposal_temperature = checked_proposal(_OP, proposal_temperature)
    uniforms = uniform_table(rows, uniforms)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(logits), backend)
    if chosen == "reference":
        values = reference.sample_tokens(
            logits,
            uniforms,
            proposal_temperature=proposal_temperature,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            vocab_size=vocab_size,
        )
    else:
        values = _dispatch.row_ops(chosen).sample_tokens_fwd(
            _checks.unit_stride(logits.detach()), uniforms, *law, proposal_temperature
        )
    return outputs_of(values, rows.real)


def checked_proposal(op: str, value: float) -> float:
    """A positive number whose inverse is one in float32 too."""
    value = _checks.temperature(op, "proposal_temperature", value)
    if not 1e-30 <= value <= 1e30:
        raise ValueError(f"{op}: proposal_temperature must be in [1e-30, 1e30], got {value}.")
    return value


def uniform_table(rows: _laws.Rows, uniforms: Tensor) -> Tensor:
    """[T, N] as contiguous float64; their range is checked by the kernel, on CPU."""
    _checks.tensor(rows.op, "uniforms", uniforms, 2)
    if uniforms.dtype not in (torch.float32, torch.float64):
        # 16 bits would draw from a few hundred places, or be 1
        raise TypeError(f"{rows.op}: uniforms must be float32 or float64, got {uniforms.dtype}.")
    _checks.length(rows.op, "uniforms", uniforms, rows.num_tokens, "the hidden states or logits")
    if uniforms.device != rows.device:
        raise ValueError(f"{rows.op}: uniforms must be on {rows.device}, got {uniforms.device}.")
    if not 1 <= uniforms.shape[1] <= _checks.MAX_TOPK:
        raise ValueError(
            f"{rows.op}: uniforms must have 1 to {_checks.MAX_TOPK} columns, one per draw, got "
            f"{uniforms.shape[1]}."
        )
    return uniforms.detach().to(torch.float64).contiguous()


def outputs_of(values: tuple[Tensor, ...], real: torch.dtype) -> TokenSamples:
    """What a call returns, from what a row kernel or the reference does."""
    ids, *reals = values
    return TokenSamples(ids, *(value.to(real) for value in reals))


def fwd_outputs(like: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty (ids, weights, logprobs, lse) for the rows of `like`; lse in float64."""
    num_tokens, num_draws = uniforms.shape
    real = _checks.real_dtype(like)
    return (
        like.new_empty(num_tokens, num_draws, dtype=torch.int32),
        like.new_empty(num_tokens, num_draws, dtype=real),
        like.new_empty(num_tokens, num_draws, dtype=real),
        like.new_empty(num_tokens, dtype=torch.float64),
    )


def _fwd_fake(logits, uniforms, *_):
    return fwd_outputs(logits, uniforms)


def _triton_fwd(*arguments):
    from .triton import sample_tokens as kernels

    return kernels.sample_tokens_fwd(*arguments)


register("sample_tokens_fwd", fake=_fwd_fake, triton=_triton_fwd)
