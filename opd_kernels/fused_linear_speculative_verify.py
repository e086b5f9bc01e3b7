# SPDX-License-Identifier: Apache-2.0
"""speculative_verify from hidden states and LM heads, the logits of a few places at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _buffers, _checks, _dispatch, _laws, _linear, _plan, _verify, reference
from ._registration import register
from .speculative_verify import (
    Decision,
    SpeculativeVerification,
    check_places,
    check_student,
    check_values,
    draft_table,
    fwd_outputs,
    law_arguments,
    outputs_of,
    pack_decision,
    pair_of,
    spec_of,
)
from .token_logprobs import pack_law

_OP = "fused_linear_speculative_verify"
# the budget of a call on a CPU that has not asked for another: 8 sequences of 8 drafts and 152k
# tokens stay below 64 MiB
_DEFAULT_ON_CPU = 56 << 20


def fused_linear_speculative_verify(
    draft_token_ids: Tensor,
    student_hidden: Tensor | None,
    student_lm_head_weight: Tensor | None,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor,
    *,
    uniforms: Tensor | None = None,
    mode: str = "rejection",
    num_draft: Tensor | None = None,
    temperature: float = 1.0,
    student_temperature: float | None = None,
    top_k: int = 0,
    student_top_k: int | None = None,
    top_p: float = 1.0,
    student_top_p: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    num_topk: int = 25,
    threshold: float | None = None,
    history: Tensor | None = None,
    with_acceptance: bool = False,
    workspace_bytes: int = _checks.DEFAULT_WORKSPACE_BYTES,
    backend: str | None = None,
) -> SpeculativeVerification:
    """`speculative_verify` of logits = hidden @ W.T + bias, which are never there all at once.

    Args:
        draft_token_ids: [B, G] int64 or int32.
        student_hidden: [B, G, Ds], float32 | bfloat16 | float16 (float64 on CPU): place i is the
            hidden state that draft i is drawn from. With student_lm_head_weight None in the modes
            topk and greedy, where log-probs of the student are not wanted.
        student_lm_head_weight: [V, Ds] of the same dtype, one row per token.
        teacher_hidden: [B, G + 1, Dt].
        teacher_lm_head_weight: [V, Dt] of the same dtype.
        student_bias, teacher_bias: [V] of the heads.
        vocab_size: the leading rows of the heads that count, where they are padded differently.
        workspace_bytes: budget for logits and other temporaries.
        The rest: as in `speculative_verify`.

    Returns:
        SpeculativeVerification in float32 (float64 for float64).

    Raises:
        ValueError: shapes, ranges or a workspace that do not fit; on CPU ids, uniforms and
        num_draft out of range. TypeError: unsupported dtype. UnsupportedBackendError.

    Notes:
        FLOPs of all places 2BGV Ds + 2B(G+1)V Dt; none of these tensors may require a gradient of
        the result, which has none.

    Source: `speculative_verify`.
    """
    _checks.one_of(_OP, "mode", mode, _verify.MODES)
    student = (student_hidden, student_lm_head_weight)
    check_student(mode, *student, "student_hidden and student_lm_head_weight")
    if (student_hidden is None) != (student_lm_head_weight is None):
        raise ValueError(
            f"{_OP}: student_hidden and student_lm_head_weight must be given together, got one."
        )
    models = {"teacher": (teacher_hidden, teacher_lm_head_weight)}
    if student_hidden is not None:
        models = {"student": student} | models
    heads, hiddens = {}, {}
    for side, (hidden, head) in models.items():
        hidden, head = _checks.autocast_pair(hidden, head)
        _checks.tensor(_OP, f"{side}_hidden", hidden, 3)
        _checks.hidden_and_head(_OP, side, hidden.flatten(0, 1), head)
        hiddens[f"{side}_hidden"], heads[f"{side}_lm_head_weight"] = hidden.detach(), head.detach()
    _checks.floating(_OP, **hiddens)
    _checks.same_device(_OP, **hiddens, **heads)
    vocab_size = _checks.vocab_prefix(
        _OP, vocab_size, **{name: head.shape[0] for name, head in heads.items()}
    )
    drafts = draft_table(draft_token_ids, teacher_hidden, "teacher_hidden", _OP)
    for name, hidden in hiddens.items():
        check_places(name, hidden, drafts, int(name == "teacher_hidden"), _OP)
    rows = _laws.rows_of(_OP, teacher_hidden)
    laws = [
        pack_law(
            rows,
            vocab_size,
            temperature=value,
            softcap=cap,
            logit_scale=scale,
            bias=bias.detach() if isinstance(bias, Tensor) else bias,
        )
        for value, cap, scale, bias in zip(
            pair_of(mode, student_temperature, temperature, 1.0),
            (student_softcap, teacher_softcap),
            (student_logit_scale, teacher_logit_scale),
            (student_bias, teacher_bias),
            strict=True,
        )
    ]
    decision = pack_decision(
        drafts,
        uniforms,
        mode,
        num_draft,
        (student_top_k, top_k),
        (student_top_p, top_p),
        num_topk,
        threshold,
        history,
        with_acceptance,
        _OP,
    )
    cut(drafts.shape, vocab_size, list(heads.values()), workspace_bytes)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(teacher_hidden), backend)
    if chosen == "reference":
        values = reference.fused_linear_speculative_verify(
            draft_token_ids,
            student_hidden,
            student_lm_head_weight,
            teacher_hidden,
            teacher_lm_head_weight,
            uniforms=uniforms,
            mode=mode,
            num_draft=num_draft,
            temperature=temperature,
            student_temperature=student_temperature,
            top_k=top_k,
            student_top_k=student_top_k,
            top_p=top_p,
            student_top_p=student_top_p,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            vocab_size=vocab_size,
            num_topk=num_topk,
            threshold=threshold,
            history=history,
            with_acceptance=with_acceptance,
        )
    else:
        values = torch.ops.opd.fused_linear_speculative_verify_fwd(
            drafts,
            hiddens.get("student_hidden"),
            heads.get("student_lm_head_weight"),
            hiddens["teacher_hidden"],
            heads["teacher_lm_head_weight"],
            *law_arguments(laws),
            *decision,
            workspace_bytes,
            chosen,
        )
    return outputs_of(values, rows.real, decision)


def cut(
    shape: tuple[int, int], vocab_size: int, heads: list[Tensor], workspace_bytes: int
) -> _plan.Plan:
    """How a call of drafts [B, G] is cut: a token of the plan is a place, with both models' logits.

    Raises:
        ValueError: the workspace does not hold one sequence.
    """
    num_sequences, places = shape[0], shape[1] + 1
    if heads[0].device.type == "cpu" and workspace_bytes == _checks.DEFAULT_WORKSPACE_BYTES:
        workspace_bytes = _DEFAULT_ON_CPU
    plan = _plan.plan(
        _OP,
        num_sequences * places,
        vocab_size,
        heads,
        workspace_bytes,
        whole_rows=_plan.NO_PATH_B,
        in_parts=False,
        trained=False,
    )
    return plan


def _fwd(
    drafts,
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    student_bias,
    teacher_bias,
    numbers,
    vocab_size,
    *arguments,
):
    *decision, workspace_bytes, backend = arguments
    decision = Decision(*decision)
    spec = spec_of(student_bias, teacher_bias, numbers, vocab_size, decision, backend)
    num_left = check_values(drafts, decision, vocab_size, _OP)
    num_sequences, num_drafts = drafts.shape
    outputs = _verify.empty_verdict(drafts, num_sequences, num_drafts, spec)
    heads = [head for head in (student_head, teacher_head) if head is not None]
    plan = cut(drafts.shape, vocab_size, heads, workspace_bytes)
    group = max(1, plan.chunk_tokens // (num_drafts + 1))
    shapes = [(group * num_drafts * (student_head is not None), vocab_size)]
    shapes.append((group * (num_drafts + 1), vocab_size))
    with _buffers.borrowed_buffers(teacher_hidden, shapes) as buffers:

        def logits(buffer: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
            chunk = _linear.take(hidden.flatten(0, 1), None, 0, hidden.shape[0] * hidden.shape[1])
            buffer = buffer[: len(chunk)]
            _linear.form_logits(_OP, buffer, chunk, head, None, plan.head_slice_rows)
            return buffer

        for begin in range(0, num_sequences, group):
            here = slice(begin, begin + group)
            student = None
            if student_head is not None:
                student = logits(buffers[0], student_hidden[here], student_head)
            teacher = logits(buffers[1], teacher_hidden[here], teacher_head)
            verdict, _ = _verify.verify(
                spec,
                drafts[here],
                student,
                teacher,
                decision.uniforms[here],
                num_left[here],
                None if decision.history is None else decision.history[here],
            )
            for output, value in zip(outputs, verdict, strict=True):
                output[here] = value
    return tuple(outputs)


def _fwd_fake(drafts, *arguments):
    # the decision is before the workspace and the backend
    decision = Decision(*arguments[-2 - len(Decision._fields) : -2])
    return fwd_outputs(drafts, decision.mode, decision.with_acceptance)


register("fused_linear_speculative_verify_fwd", fake=_fwd_fake, python=_fwd)
