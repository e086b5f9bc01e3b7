# SPDX-License-Identifier: Apache-2.0
"""speculative_verify from hidden states and LM heads, the logits of a few places at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _buffers, _checks, _dispatch, _gemms, _laws, _linear, _plan, _verify, reference
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
    student_lora: tuple[Tensor, Tensor, float] | None = None,
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
        student_lora: (A [r, Ds], B [V, r], scaling): the student's head is W + scaling * B @ A,
            which is never formed. On a CPU a B of 16 bits is widened in each call, 4 V r bytes
            beside the budget.
        vocab_size: the leading rows of the heads that count, where they are padded differently.
        workspace_bytes: budget for logits and other temporaries. The default of 1 GiB stands for
            56 MiB on a CPU, or two sequences where a step takes whole ones, also where it is given.
        The rest: as in `speculative_verify`.

    Returns:
        SpeculativeVerification in float32 (float64 for float64), nats.

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
    check_student(
        _OP, mode, student_hidden=student_hidden, student_lm_head_weight=student_lm_head_weight
    )
    if (student_hidden is None) != (student_lm_head_weight is None):
        raise ValueError(
            f"{_OP}: student_hidden and student_lm_head_weight must be given together, got one."
        )
    if student_lora is not None and student_lm_head_weight is None:
        raise ValueError(
            f"{_OP}: student_lora must be None without student_lm_head_weight, to which it adds."
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
    low_rank = _checks.lora(rows, student_lora, student_lm_head_weight)
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
        vocab_size,
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
    cut(
        _OP,
        drafts.shape,
        vocab_size,
        list(heads.values()),
        workspace_bytes,
        mode,
        low_rank=0 if student_lora is None else low_rank[0].shape[0],
    )
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
            student_lora=student_lora,
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
            *(None if tensor is None else tensor.detach() for tensor in low_rank),
            hiddens["teacher_hidden"],
            heads["teacher_lm_head_weight"],
            *law_arguments(laws),
            *decision,
            workspace_bytes,
            chosen,
        )
    return outputs_of(values, rows.real, decision)


def cut(
    op: str,
    shape: tuple[int, int],
    vocab_size: int,
    heads: Sequence[Tensor],
    workspace_bytes: int,
    mode: str,
    with_acceptance: bool = False,
    low_rank: int = 0,
) -> tuple[_plan.Plan, bool]:
    """How a call of drafts [B, G] is cut, and whether the teacher's logits take the student's room.

    A token of the plan is a place of a sequence. In shared room a row of the student per sequence
    is formed again at most: its GEMM reads the head once more, where two steps of half the places
    would read both heads.

    Raises:
        ValueError: the workspace does not hold one place, or one sequence where that is what a
        step takes.
    """
    places = shape[1] + 1
    whole_rows = _plan.NO_PATH_B
    more = 0
    if not _in_waves(heads[0], mode):
        whole_rows = f"all {places} places of a sequence at a time"
        stride = _buffers.row_stride(heads[0], vocab_size)
        more = (places - 1) * len(heads) * stride * _checks.real_dtype(heads[0]).itemsize
    if heads[0].device.type == "cpu" and workspace_bytes == _checks.DEFAULT_WORKSPACE_BYTES:
        workspace_bytes = max(_DEFAULT_ON_CPU, 2 * more)
    _plan.check(op, vocab_size, heads, workspace_bytes, whole_rows=whole_rows, per_token=more)
    plan = _plan.plan(
        op,
        # not in equal parts: what fits of the sequences that are open is for the steps to say
        max(1 << 20, shape[0] * places),
        vocab_size,
        heads,
        workspace_bytes,
        whole_rows=whole_rows,
        in_parts=False,
        low_rank=low_rank,
        trained=False,
    )
    tokens = shape[0] * places
    fits, why = plan.chunk_tokens, plan.why
    shares_room = (
        fits < tokens
        and len(heads) == 2
        and _in_waves(heads[0], mode)
        # this takes both laws of every place
        and not with_acceptance
    )
    if shares_room:
        # and a row of the student for each sequence
        fits, why = max(fits, 2 * fits - shape[0]), "the teacher's logits in the student's room"
    fits = min(fits, max(1, tokens))
    plan = dataclasses.replace(
        plan, num_tokens=tokens, chunk_tokens=fits, teacher_tokens=fits, why=why
    )
    return plan, shares_room


def _in_waves(tensor: Tensor, mode: str) -> bool:
    """Whether a step takes a few places of all sequences, and the next those that are still open.

    On a GPU nobody waits to see which these are; and block looks at all places before it decides.
    """
    return tensor.device.type == "cpu" and mode in ("rejection", "topk", "greedy")


class _Call(NamedTuple):
    """What every step of a call reads and writes."""

    spec: _verify.Spec
    drafts: Tensor
    hidden: tuple[Tensor | None, Tensor]
    heads: tuple[Tensor | None, Tensor]
    low_rank: tuple[_gemms.LowRank | None, None]
    # the student's and the teacher's; a third for rows of the student, where these share theirs
    buffers: tuple[Tensor, ...]
    head_slice_rows: int
    uniforms: Tensor
    num_draft: Tensor
    history: Tensor | None
    outputs: _verify.Verdict

    def step(self, sequences: Tensor, begin: int, width: int, places: int) -> Tensor:
        """Drafts [begin, begin + width) of these sequences, and so many places of the teacher.

        Returns [n] bool: whether a sequence's verdict is final.
        """
        here, to = slice(begin, begin + width), begin + places
        drafts, num_left = self.drafts[sequences, here], self.num_draft[sequences] - begin
        student, formed_again = None, None
        if self.heads[0] is not None:
            hidden = self.hidden[0][sequences, here].flatten(0, 1)
            student = self._logits(0, 0, hidden)
            if len(self.buffers) == 3:
                rows = _verify.student_rows(self.spec, drafts, student, num_left)
                formed_again = _verify.FormedAgain(
                    rows, lambda places: self._logits(0, 2, hidden[places])
                )
                student = None
        verdict, final = _verify.verify(
            self.spec,
            drafts,
            student,
            self._logits(1, 1, self.hidden[1][sequences, begin:to].flatten(0, 1)),
            torch.cat([self.uniforms[sequences, here], self.uniforms[sequences, -1:]], 1),
            num_left,
            None if self.history is None else self.history[sequences],
            formed_again,
        )
        out = self.outputs
        out.num_accepted[sequences] += verdict.num_accepted
        out.next_token[sequences] = verdict.next_token
        out.accepted[sequences, here] = verdict.accepted
        out.student_logprobs[sequences, here] = verdict.student_logprobs
        out.teacher_logprobs[sequences, begin : begin + width + 1] = verdict.teacher_logprobs
        for one, two in (
            (out.acceptance, verdict.acceptance),
            (out.divergence, verdict.divergence),
        ):
            if one.shape[1] > 0:
                one[sequences, here] = two
        return final

    def _logits(self, side: int, buffer: int, hidden: Tensor) -> Tensor:
        logits = _buffers.rows_of(
            self.buffers[buffer], len(hidden), self.spec.laws[side].vocab_size
        )
        if len(hidden):
            hidden = hidden.float() if _gemms.widens(hidden) else hidden
            _linear.form_logits(
                _OP, logits, hidden, self.heads[side], self.low_rank[side], self.head_slice_rows
            )
        return logits


def _fwd(
    drafts,
    student_hidden,
    student_head,
    student_lora_a,
    student_lora_b,
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
    num_draft = check_values(drafts, decision, vocab_size, _OP)
    num_sequences, num_drafts = drafts.shape
    outputs = _verify.empty_verdict(drafts, num_sequences, num_drafts, spec)
    heads = [head for head in (student_head, teacher_head) if head is not None]
    low_rank = None
    if student_lora_a is not None:
        low_rank = _gemms.LowRank.of(student_lora_a, student_lora_b, student_head, _gemms.AS_LOGITS)
    plan, shares_room = cut(
        _OP,
        drafts.shape,
        vocab_size,
        heads,
        workspace_bytes,
        spec.mode,
        spec.with_acceptance,
        0 if low_rank is None else len(low_rank.down),
    )
    in_waves = _in_waves(drafts, spec.mode)
    rows = plan.chunk_tokens
    group = max(1, min(num_sequences, rows if in_waves else rows // (num_drafts + 1)))
    if not in_waves:
        rows = group * (num_drafts + 1)
    of_student = group if shares_room else rows * (student_head is not None)
    shapes = [(of_student, vocab_size), (rows, vocab_size)]
    with _buffers.borrowed_buffers(teacher_hidden, shapes) as buffers:
        call = _Call(
            spec,
            drafts,
            (student_hidden, teacher_hidden),
            (student_head, teacher_head),
            (low_rank, None),
            (buffers[1], buffers[1], buffers[0]) if shares_room else tuple(buffers),
            plan.head_slice_rows,
            decision.uniforms,
            num_draft,
            decision.history,
            outputs,
        )
        for first in range(0, num_sequences, group):
            last = min(first + group, num_sequences)
            sequences = torch.arange(first, last, device=drafts.device)
            if in_waves:
                _in_steps(call, sequences, rows)
            else:
                call.step(sequences, 0, num_drafts, num_drafts + 1)
    return tuple(outputs)


def _in_steps(call: _Call, sequences: Tensor, rows: int) -> None:
    """As many places as fit of the sequences that are open, until none is."""
    begin = 0
    while len(sequences):
        # the place after the last draft is the teacher's alone
        left = int(call.num_draft[sequences].amax()) - begin + 1
        most = max(1, rows // len(sequences))
        # steps of one length
        places = -(-left // -(-left // most))
        width = min(places, left - 1)
        final = call.step(sequences, begin, width, places)
        sequences = sequences[torch.logical_not(final).nonzero().squeeze(1)]
        begin += width


def _fwd_fake(drafts, *arguments):
    # the decision is before the workspace and the backend
    decision = Decision(*arguments[-2 - len(Decision._fields) : -2])
    return fwd_outputs(drafts, decision.mode, decision.with_acceptance)


register("fused_linear_speculative_verify_fwd", fake=_fwd_fake, python=_fwd)
