# SPDX-License-Identifier: Apache-2.0
"""Which of a student's draft tokens a teacher keeps, and the token that it puts after them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _laws, _verify, reference
from ._registration import register
from .token_logprobs import Law, pack_law

_OP = "speculative_verify"
# the largest float64 below 1
_BELOW_ONE = 1.0 - 2.0**-53


class SpeculativeVerification(NamedTuple):
    """What is kept of each sequence's drafts and what follows them; no gradient, nats.

    num_accepted [B] int32; next_token [B] int32, -1 where a law that it needs is no law;
    accepted [B, G] bool, num_accepted times True and then False.

    student_logprobs [B, G], teacher_logprobs [B, G + 1]: of the kept drafts and, at place
    num_accepted, of next_token, under the laws after temperature, top_k and top_p; -inf outside of
    these, NaN elsewhere and where there is no law of the student.

    acceptance [B, G], of `with_acceptance`: sum_v min(p_v, q_v) at the kept drafts and the first
    refused one, NaN elsewhere. divergence [B, G], of mode threshold: KL(p || q) likewise. Or None.
    """

    num_accepted: Tensor
    next_token: Tensor
    accepted: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    acceptance: Tensor | None
    divergence: Tensor | None


def speculative_verify(
    draft_token_ids: Tensor,
    student_logits: Tensor | None,
    teacher_logits: Tensor,
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
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    num_topk: int = 25,
    threshold: float | None = None,
    history: Tensor | None = None,
    with_acceptance: bool = False,
    backend: str | None = None,
) -> SpeculativeVerification:
    """Keeps a prefix of each sequence's drafts x_0 .. x_{G-1} and draws the token after it.

    With q_i the student's law at place i and p_i the teacher's, u_i = uniforms[b, i], n the number
    of drafts kept, and norm(r) = r / sum r:

    rejection   keep i while u_i q_i(x_i) < p_i(x_i); next ~ norm(max(p_n - q_n, 0)), or p_G if all
                are kept. What comes out has the teacher's law.
    block       w_0 = 1, w_{i+1} = min(1, w_i p_i(x_i) / q_i(x_i)), h_G = w_G and else, with
                S_i = sum_v max(w_i p_i(v) - q_i(v), 0), h_i = S_i / (S_i + 1 - w_i). n is the
                largest i with u_{i-1} < h_i, or 0; next ~ norm(max(w_n p_n - q_n, 0)), or p_G.
                The same law, and on average no fewer kept.
    topk        keep i while fewer than num_topk tokens come before x_i in p_i; next ~ p_n.
                num_topk = V keeps all, 0 none.
    threshold   d_i = KL(p_i || q_i) of the laws before they are cut: keep i until the first d_i
                above threshold times the mean of the `window` values before it, of which none
                may be unknown: until these are there all are kept; next ~ p_n. A d below 1e-10,
                rounding of equal laws, counts as 0. A d of inf (q = 0 < p) is above every finite
                limit, and nothing is while it is in the window, but that 0 * inf = 0.
    greedy      keep i while x_i is the teacher's best token, then its best one; of equals the
                smallest id. Temperatures, top_k, top_p and uniforms are not read.

    A law is the softmax of cap(logit_scale * logits) / temperature on its top_k largest entries,
    then on the fewest largest of these whose mass reaches top_p, at least one; equals of the last
    of them stay. next is drawn as min {v: r_0 + .. + r_v > u_G sum r}, never a v of r_v = 0.

    Args:
        draft_token_ids: [B, G] int64 or int32; G may be 0. Checked on CPU; on a GPU an id outside
            the vocabulary ends its sequence as a NaN there would.
        student_logits: [B, G, V], float32 | bfloat16 | float16 (float64 on CPU). May be None in the
            modes topk and greedy, which never need it.
        teacher_logits: [B, G + 1, V]; float64 with float64.
        uniforms: [B, G + 1] float32 or float64 in [0, 1), the caller's own random numbers: a coin
            per draft and the one that draws. Checked on CPU. Only greedy goes without.
        mode: one of the above.
        num_draft: [B] int, how many of the G drafts there are, 0 to G; what follows these is not
            read. None: all.
        temperature: divides the logits; > 0. student_temperature: the student's, where it differs.
        top_k: entries that a law keeps; 0 for all. student_top_k as above.
        top_p: in (0, 1]; 1 keeps all. student_top_p as above.
        student_softcap, teacher_softcap: c of cap(x) = c tanh(x / c), > 0. None: no cap.
        student_logit_scale, teacher_logit_scale: multiply the logits before the cap; not 0.
        vocab_size: the leading columns that count; the rest is not read.
        num_topk: of mode topk.
        threshold: of mode threshold, >= 0. inf keeps all, 0 none after the first `window` tokens
            where the laws differ.
        history: [B, window] of mode threshold: d of the tokens before the drafts, the last one
            last, NaN where there was none. None: the drafts are the first, and window is G, so
            that all are kept.
        with_acceptance: in the modes rejection and block, adds the expected acceptance: one more
            pass over both laws.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one.

    Returns:
        SpeculativeVerification in float32 (float64 for float64 logits), nats. A draft with q = 0
        is kept if p > 0. Where a law that a decision needs has a NaN or a +inf, or nothing but
        -inf, num_accepted ends before it and next_token is -1; other sequences are untouched.
        Where rounding leaves the residual law without mass, next is drawn from p_n.

    Raises:
        ValueError: shapes or numbers that do not fit; on CPU ids, uniforms and num_draft out of
        range. TypeError: unsupported dtype. UnsupportedBackendError.

    Source: rejection arXiv:2211.17192 and arXiv:2302.01318; block arXiv:2403.10444; topk (SKD)
    arXiv:2410.11325; threshold (AdaSwitch) arXiv:2510.07842.
    """
    sides = ("student", "teacher")
    logits = [student_logits, teacher_logits]
    _checks.one_of(_OP, "mode", mode, _verify.MODES)
    check_student(_OP, mode, student_logits=student_logits)
    for side, value in zip(sides, logits, strict=True):
        if value is not None:
            _checks.tensor(_OP, f"{side}_logits", value, 3)
    given = {f"{side}_logits": v for side, v in zip(sides, logits, strict=True) if v is not None}
    _checks.floating(_OP, **given)
    _checks.same_device(_OP, **given)
    vocab_size = _checks.vocab_prefix(
        _OP, vocab_size, **{name: value.shape[2] for name, value in given.items()}
    )
    drafts = draft_table(draft_token_ids, teacher_logits, "teacher_logits")
    for name, value in given.items():
        check_places(name, value, drafts, int(name == "teacher_logits"))
    laws = [
        pack_law(
            _laws.rows_of(_OP, teacher_logits),
            vocab_size,
            temperature=value,
            softcap=cap,
            logit_scale=scale,
        )
        for value, cap, scale in zip(
            pair_of(mode, student_temperature, temperature, 1.0),
            (student_softcap, teacher_softcap),
            (student_logit_scale, teacher_logit_scale),
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
    )
    chosen = _dispatch.select(_OP, _dispatch.meta_of(teacher_logits), backend)
    if chosen == "reference":
        values = reference.speculative_verify(
            draft_token_ids,
            student_logits,
            teacher_logits,
            uniforms=uniforms,
            mode=mode,
            num_draft=num_draft,
            temperature=temperature,
            student_temperature=student_temperature,
            top_k=top_k,
            student_top_k=student_top_k,
            top_p=top_p,
            student_top_p=student_top_p,
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
        detached = [None if value is None else value.detach() for value in logits]
        values = torch.ops.opd.speculative_verify_fwd(
            drafts,
            *detached,
            *law_arguments(laws),
            *decision,
            chosen,
        )
    return outputs_of(values, _checks.real_dtype(teacher_logits), decision)


# -- arguments, shared with the fused op -----------------------------------------------------------


class Decision(NamedTuple):
    """The arguments of OPD_DECISION in csrc/torch/ops.cpp."""

    uniforms: Tensor
    num_draft: Tensor | None
    history: Tensor | None
    top_k: list[int]
    top_p: list[float]
    mode: str
    num_topk: int
    threshold: float
    with_acceptance: bool


def check_student(op: str, mode: str, **tensors: Tensor | None) -> None:
    """The student's tensors are there where the mode needs its law."""
    if mode not in _verify.NEEDS_STUDENT or all(value is not None for value in tensors.values()):
        return
    raise ValueError(
        f"{op}: {' and '.join(tensors)} must be given in mode {mode!r}, which compares the laws, "
        "got None. Only the modes 'topk' and 'greedy' go without."
    )


def draft_table(value: Tensor, like: Tensor, name: str, op: str = _OP) -> Tensor:
    """draft_token_ids as contiguous int64 on the device of `like` [B, G + 1, ..]."""
    _checks.tensor(op, "draft_token_ids", value, 2)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: draft_token_ids must be int64 or int32, got {value.dtype}.")
    _checks.same_device(op, **{name: like, "draft_token_ids": value})
    return value.to(torch.int64).contiguous()


def check_places(name: str, value: Tensor, drafts: Tensor, more: int, op: str = _OP) -> None:
    """[B, G, ..] or [B, G + 1, ..] for drafts [B, G]."""
    expected = (drafts.shape[0], drafts.shape[1] + more)
    if tuple(value.shape[:2]) != expected:
        raise ValueError(
            f"{op}: {name} must have shape ({expected[0]}, {expected[1]}, ..) for draft_token_ids "
            f"{tuple(drafts.shape)}{', one place more than drafts' if more else ''}, got "
            f"{tuple(value.shape)}."
        )


def pair_of(mode: str, of_student: object, of_both: object, in_greedy: object) -> tuple:
    """(student's, teacher's) of an option whose plain name is that of both."""
    if mode == "greedy":
        return in_greedy, in_greedy
    return of_both if of_student is None else of_student, of_both


def pack_decision(
    drafts: Tensor,
    vocab_size: int,
    uniforms: Tensor | None,
    mode: str,
    num_draft: Tensor | None,
    top_k: tuple[int | None, int],
    top_p: tuple[float | None, float],
    num_topk: int,
    threshold: float | None,
    history: Tensor | None,
    with_acceptance: bool,
    op: str = _OP,
) -> Decision:
    """Checks what is the same from logits and from hidden states."""
    num_sequences = drafts.shape[0]
    # as many as there are is all; the ops hold no larger number
    top_ks = [min(checked_top_k(op, value), vocab_size) for value in pair_of(mode, *top_k, 0)]
    top_ps = [checked_top_p(op, value) for value in pair_of(mode, *top_p, 1.0)]
    if isinstance(num_topk, bool) or not isinstance(num_topk, int):
        raise TypeError(f"{op}: num_topk must be an int, got {type(num_topk).__name__}.")
    if num_topk < 0:
        raise ValueError(f"{op}: num_topk must be at least 0, got {num_topk}.")
    if (mode == "threshold") != (threshold is not None):
        raise ValueError(
            f"{op}: threshold must be given in mode 'threshold' and only there, got {threshold!r} "
            f"in mode {mode!r}."
        )
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"{op}: threshold must be at least 0, got {threshold!r}.")
    if history is not None:
        if mode != "threshold":
            raise ValueError(
                f"{op}: history must be None outside of mode 'threshold', got a tensor in mode "
                f"{mode!r}."
            )
        _checks.tensor(op, "history", history, 2)
        _checks.real_values(op, "history", history)
        _checks.length(op, "history", history, num_sequences, "draft_token_ids")
        _checks.same_device(op, draft_token_ids=drafts, history=history)
        history = history.detach().to(torch.float64)
    if num_draft is not None:
        _checks.tensor(op, "num_draft", num_draft, 1)
        if num_draft.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: num_draft must be int64 or int32, got {num_draft.dtype}.")
        _checks.length(op, "num_draft", num_draft, num_sequences, "draft_token_ids")
        _checks.same_device(op, draft_token_ids=drafts, num_draft=num_draft)
        num_draft = num_draft.to(torch.int64)
    return Decision(
        _uniform_table(op, uniforms, drafts, mode),
        num_draft,
        history,
        top_ks,
        top_ps,
        mode,
        min(num_topk, vocab_size),
        math.inf if threshold is None else float(threshold),
        bool(with_acceptance) and mode in ("rejection", "block"),
    )


def checked_top_k(op: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: top_k must be an int, got {type(value).__name__}.")
    if value < 0:
        raise ValueError(f"{op}: top_k must be at least 0 (0: all), got {value}.")
    return value


def checked_top_p(op: str, value: float) -> float:
    value = _checks.temperature(op, "top_p", value)
    if value > 1:
        raise ValueError(f"{op}: top_p must be in (0, 1], got {value}.")
    return value


def _uniform_table(op: str, uniforms: Tensor | None, drafts: Tensor, mode: str) -> Tensor:
    shape = (drafts.shape[0], drafts.shape[1] + 1)
    if uniforms is None:
        if mode != "greedy":
            raise ValueError(
                f"{op}: uniforms must be given in mode {mode!r}, got None. Draw them with "
                f"torch.rand{shape} on the device of the drafts, in float64."
            )
        return drafts.new_zeros(shape, dtype=torch.float64)
    _checks.tensor(op, "uniforms", uniforms, 2)
    if uniforms.dtype not in (torch.float32, torch.float64):
        # 16 bits would draw from a few hundred places, or be 1
        raise TypeError(f"{op}: uniforms must be float32 or float64, got {uniforms.dtype}.")
    if tuple(uniforms.shape) != shape:
        raise ValueError(
            f"{op}: uniforms must have shape {shape}, a coin per draft and one more, got "
            f"{tuple(uniforms.shape)}."
        )
    _checks.same_device(op, draft_token_ids=drafts, uniforms=uniforms)
    return uniforms.detach().to(torch.float64).contiguous()


def law_arguments(laws: list[Law]) -> tuple:
    """The arguments of OPD_TWO_LAWS in csrc/torch/ops.cpp."""
    student, teacher = laws
    return student.bias, teacher.bias, [*student.numbers, *teacher.numbers], teacher.vocab_size


def spec_of(student_bias, teacher_bias, numbers, vocab_size, decision: Decision, backend: str):
    """The `_verify.Spec` of an op's arguments."""
    return _verify.Spec(
        decision.mode,
        decision.num_topk,
        decision.threshold,
        decision.with_acceptance,
        (
            Law(student_bias, None, list(numbers[:3]), vocab_size),
            Law(teacher_bias, None, list(numbers[3:]), vocab_size),
        ),
        tuple(decision.top_k),
        tuple(decision.top_p),
        backend,
    )


def check_values(drafts: Tensor, decision: Decision, vocab_size: int, op: str = _OP) -> Tensor:
    """[B] drafts of each sequence. For the body of an op: values are read on a CPU alone."""
    num_drafts = drafts.shape[1]
    num_draft = decision.num_draft
    if num_draft is None:
        num_draft = drafts.new_full((drafts.shape[0],), num_drafts)
    _checks.values_in_range(
        op, "num_draft", num_draft, None, 0, num_drafts, f"from 0 to {num_drafts}"
    )
    places = torch.arange(num_drafts, device=drafts.device)
    real = torch.where(places < num_draft.unsqueeze(1), drafts, 0)
    _checks.token_ids_in_range(op, real, vocab_size, "draft_token_ids")
    if decision.mode != "greedy":
        coins = torch.where(places < num_draft.unsqueeze(1), decision.uniforms[:, :-1], 0.0)
        flat = torch.cat([coins, decision.uniforms[:, -1:]], 1).reshape(-1)
        _checks.values_in_range(op, "uniforms", flat, None, 0.0, _BELOW_ONE, "in [0, 1)")
    return num_draft


def outputs_of(values: tuple, real: torch.dtype, decision: Decision) -> SpeculativeVerification:
    """What a call returns, from what an op or the reference does."""
    num_accepted, next_token, accepted, student, teacher, acceptance, divergence = values
    return SpeculativeVerification(
        num_accepted,
        next_token,
        accepted,
        student.to(real),
        teacher.to(real),
        acceptance.to(real) if decision.with_acceptance else None,
        divergence.to(real) if decision.mode == "threshold" else None,
    )


# -- the op ----------------------------------------------------------------------------------------

_NUM_DECISION = len(Decision._fields)


def _fwd(drafts, student_logits, teacher_logits, student_bias, teacher_bias, numbers, *arguments):
    vocab_size, *decision, backend = arguments
    decision = Decision(*decision)
    spec = spec_of(student_bias, teacher_bias, numbers, vocab_size, decision, backend)
    num_left = check_values(drafts, decision, vocab_size)
    if drafts.shape[0] == 0:
        return tuple(_verify.empty_verdict(drafts, *drafts.shape, spec))
    flat = [
        None if value is None else _checks.unit_stride(value.flatten(0, 1))
        for value in (student_logits, teacher_logits)
    ]
    verdict, _ = _verify.verify(spec, drafts, *flat, decision.uniforms, num_left, decision.history)
    return tuple(verdict)


def fwd_outputs(drafts: Tensor, mode: str, with_acceptance: bool) -> tuple[Tensor, ...]:
    """Empty outputs of an op."""
    num_sequences, num_drafts = drafts.shape

    def real(places: int) -> Tensor:
        return drafts.new_empty((num_sequences, places), dtype=torch.float64)

    return (
        drafts.new_empty(num_sequences, dtype=torch.int32),
        drafts.new_empty(num_sequences, dtype=torch.int32),
        drafts.new_empty((num_sequences, num_drafts), dtype=torch.bool),
        real(num_drafts),
        real(num_drafts + 1),
        real(num_drafts if with_acceptance else 0),
        real(num_drafts if mode == "threshold" else 0),
    )


def _fwd_fake(drafts, *arguments):
    decision = Decision(*arguments[-1 - _NUM_DECISION : -1])
    return fwd_outputs(drafts, decision.mode, decision.with_acceptance)


def _rows_fake(logits, *_):
    num_rows, real = logits.shape[0], _checks.real_dtype(logits)
    dtypes = (torch.float64, real, torch.float64, torch.int32, torch.int32, real)
    return tuple(logits.new_empty(num_rows, dtype=dtype) for dtype in dtypes)


def _residual_fake(teacher_logits, student_logits, teacher_rows, *_):
    dtypes = (torch.float64, torch.float64, torch.int32, torch.float64, torch.float64)
    return tuple(teacher_rows.new_empty(teacher_rows.shape, dtype=dtype) for dtype in dtypes)


def _triton_rows_fwd(*arguments):
    from .triton import speculative_verify as kernels

    return kernels.speculative_verify_rows_fwd(*arguments)


def _triton_residual_fwd(*arguments):
    from .triton import speculative_verify as kernels

    return kernels.speculative_verify_residual_fwd(*arguments)


register("speculative_verify_fwd", fake=_fwd_fake, python=_fwd)
register("speculative_verify_rows_fwd", fake=_rows_fake, triton=_triton_rows_fwd)
register("speculative_verify_residual_fwd", fake=_residual_fake, triton=_triton_residual_fwd)
