# SPDX-License-Identifier: Apache-2.0
"""Tokens drawn from softmax(z_t / proposal_temperature), z_t made of hidden[t] @ W.T, in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _dispatch, _laws, _one_head, _plan, reference
from ._registration import register
from .sample_tokens import TokenSamples, checked_proposal, fwd_outputs, outputs_of, uniform_table
from .token_logprobs import pack_law

_OP = "fused_linear_sample_tokens"


def fused_linear_sample_tokens(
    hidden: Tensor,
    lm_head_weight: Tensor,
    uniforms: Tensor,
    *,
    proposal_temperature: float = 1.0,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int = _checks.DEFAULT_WORKSPACE_BYTES,
    backend: str | None = None,
) -> TokenSamples:
    """N draws per position from a proposal r, as distinct tokens whose weights are p on average.

    p = softmax(z_t),  r = softmax(z_t / proposal_temperature),
    draw[t, n] = min {v : r_0 + .. + r_v > uniforms[t, n]},  weight = count / N * p / r,
    z_t = cap(logit_scale * (hidden[t] @ W.T + bias)) / temperature[t],  cap(x) = c tanh(x / c).

    Args:
        hidden: [T, D], float32 | bfloat16 | float16 (float64 on CPU). Like every tensor here it may
            require grad; the outputs have none.
        lm_head_weight: [V, D] of the same dtype, one row per token.
        uniforms: [T, N] float32 or float64 in [0, 1), N from 1 to 4096: the caller's own random
            numbers, so that the same ones give the same tokens. Checked on CPU.
        proposal_temperature: > 0. 1 draws from p, with weights count / N. Above 1 draws more of
            the tail; below 1 less, with weights that have no bound.
        temperature: divides the logits; > 0. A number, or [T] without gradient.
        bias: [V] of the head.
        softcap: c of cap, Gemma's; > 0. None: no cap.
        logit_scale: multiplies the logits before the cap, Cohere's; not 0.
        lora: (A [r, D], B [V, r], scaling): the head is W + scaling * B @ A, which is never formed.
        vocab_size: the leading rows of the head that count.
        workspace_bytes: budget for logits and other temporaries.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one.

    Returns:
        TokenSamples in float32 (float64 for float64), nats; not normalised: E[weights scattered to
        their ids] = p exactly, for each token.

    Raises:
        ValueError: shapes, ranges or a workspace that do not fit. TypeError: unsupported dtype.
        RuntimeError: a uniform outside [0, 1) (on CPU). UnsupportedBackendError.

    Notes:
        FLOPs 2TVD.

    Source: random-sampling knowledge distillation, arXiv:2503.16870.
    """
    hidden, lm_head_weight = _checks.autocast_pair(hidden, lm_head_weight)
    _checks.hidden_and_head(_OP, "", hidden, lm_head_weight)
    _checks.floating(_OP, hidden=hidden)
    _checks.same_device(_OP, hidden=hidden, lm_head_weight=lm_head_weight)
    vocab_size = _checks.vocab_prefix(_OP, vocab_size, lm_head_weight=lm_head_weight.shape[0])
    rows = _laws.rows_of(_OP, hidden)
    law = pack_law(
        rows,
        vocab_size,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        bias=bias.detach() if isinstance(bias, Tensor) else bias,
    )
    low_rank = _checks.lora(rows, lora, lm_head_weight, "lora")
    proposal_temperature = checked_proposal(_OP, proposal_temperature)
    uniforms = uniform_table(rows, uniforms)
    _plan.check(_OP, vocab_size, (lm_head_weight,), workspace_bytes, whole_rows=_plan.NO_PATH_B)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(hidden), backend)
    if chosen == "reference":
        values = reference.fused_linear_sample_tokens(
            hidden,
            lm_head_weight,
            uniforms,
            proposal_temperature=proposal_temperature,
            temperature=temperature,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            lora=lora,
            vocab_size=vocab_size,
        )
    else:
        tensors = [
            None if tensor is None else tensor.detach()
            for tensor in (hidden, lm_head_weight, *low_rank)
        ]
        values = torch.ops.opd.fused_linear_sample_tokens_fwd(
            *tensors, uniforms, *law, proposal_temperature, workspace_bytes, chosen
        )
    return outputs_of(values, rows.real)


def _fwd(*arguments):
    inputs, law, (proposal_temperature, workspace_bytes, backend) = _one_head.split(arguments)
    kernels, uniforms = _dispatch.row_ops(backend), inputs.per_token
    plan = inputs.plan(_OP, law.vocab_size, workspace_bytes)
    outputs = fwd_outputs(inputs.hidden, uniforms)

    def rows(logits: Tensor, here: slice) -> tuple[Tensor, ...]:
        return kernels.sample_tokens_fwd(
            logits, uniforms[here], *law.rows(here), proposal_temperature
        )

    _one_head.fill(_OP, outputs, inputs, law, plan, rows)
    return outputs


def _fwd_fake(*arguments):
    inputs, *_ = _one_head.split(arguments)
    return fwd_outputs(inputs.hidden, inputs.per_token)


register("fused_linear_sample_tokens_fwd", fake=_fwd_fake, python=_fwd)
