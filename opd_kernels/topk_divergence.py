# SPDX-License-Identifier: Apache-2.0
"""loss[t] = w[t] D(P_t on K ids, Q_t): a teacher of whom a few entries are known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _cells, _checks, _dispatch, _drop, _laws, _linear, reference
from ._registration import register
from .token_logprobs import Law, pack_law

_OP = "topk_divergence"


def topk_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    tail_logprob: Tensor | None = None,
    divergence: _laws.Loss = "forward_kl",
    support: str = "teacher",
    tail: str = "bucket",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divergence of a teacher whose law is known on a few ids, and the student's, per token.

    With S the distinct ids of a token, p the teacher and q the student:
    tail "bucket": D between (p_v for v in S, p(not S)) and (q_v for v in S, q(not S)).
    "renormalize_both": D between p / p(S) and q / q(S) on S.
    "renormalize_teacher": D between (p_v / p(S), 0) and (q_v, q(not S)).
    "drop": sum over v in S of D's summand at (p_v, q_v).
    loss[t] = w[t] sum_j c_j[t] D_j,  q = softmax(cap(logit_scale * student_logits) / temperature).

    Args:
        student_logits: [T, V], float32 | bfloat16 | float16 (float64 on CPU).
        teacher_ids: [T, K] int64 or int32 below vocab_size, K up to 8192, in any order; negative:
            no id. Of an id that a row names twice the first counts.
        teacher_logprobs: [T, K] of the whole vocabulary, at the teacher's own temperature; no
            gradient. -inf is a token of probability 0, or nothing where there is no id.
        tail_logprob: [T], log p(not S), read by "bucket". Default: log(1 - sum exp
            teacher_logprobs), in float64.
        divergence: a name, `divergences.jsd(beta=0.3)`, or a sum of pairs (coefficient,
            divergence), as `opd_kernels.divergence` takes it; not cross_entropy, which has labels.
        support: where the ids come from: "teacher" (its top k), "student" (its own top k, scored by
            the teacher), "union" (of both, see `topk_support`), "given" (any, such as samples). The
            arithmetic is the same; what a loss does is not, see Notes.
        tail: what becomes of the rest of the vocabulary, see above and docs/divergences.md.
        temperature: divides the student's logits; > 0. A number, or [T] without gradient.
        softcap: c of cap(x) = c tanh(x / c); > 0. None: no cap.
        logit_scale: multiplies the logits before the cap; not 0.
        token_weights: [T], multiplies loss and gradient; 0 gives exactly 0, and nothing of the
            teacher is read.
        vocab_size: the leading columns that count; the rest is not read and gets zero gradient.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one (`explain` says which).

    Returns:
        [T] float32 (float64 for float64 logits), nats, not reduced. Differentiable in
        student_logits.

    Raises:
        ValueError: shapes or numbers that do not fit, a divergence that `tail` makes infinite or
            meaningless; on CPU also ids beyond the vocabulary, probabilities that sum to more than
            1 (logits mistaken for log-probabilities) and a tail that is not the rest of 1. On a GPU
            values are the caller's contract; there probabilities above 1 give NaN.
        TypeError: unsupported dtype. UnsupportedBackendError.

    Notes:
        "bucket" is a lower bound of the divergence of the whole laws for forward_kl, reverse_kl and
        every other f-divergence, and equal to it where S leaves out one entry. "drop" is no
        divergence: its forward_kl is smallest at q = p / p(S), and its reverse_kl at q = p / e on
        the ids, so that on the teacher's support it rewards moving student mass off them: do not
        train on that.

    Source: top-k and tail variants of docs/divergences.md; data processing: Csiszar 1967.
    """
    _checks.tensor(_OP, "student_logits", student_logits, 2)
    _checks.floating(_OP, student_logits=student_logits)
    vocab_size = _checks.vocab_prefix(_OP, vocab_size, student_logits=student_logits.shape[1])
    rows = _laws.rows_of(_OP, student_logits)
    law = pack_law(
        rows, vocab_size, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    target = pack_target(
        rows,
        teacher_ids,
        teacher_logprobs,
        tail_logprob,
        divergence=divergence,
        support=support,
        tail=tail,
        token_weights=token_weights,
    )
    chosen = _dispatch.select(_OP, _dispatch.meta_of(student_logits), backend)
    ids, cells = target.cells(vocab_size, rows.real)
    if chosen == "reference":
        return reference.topk_divergence(
            student_logits,
            teacher_ids,
            teacher_logprobs.detach(),
            tail_logprob=tail_logprob,
            divergence=divergence,
            support=support,
            tail=tail,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            token_weights=token_weights,
            vocab_size=vocab_size,
        ).to(rows.real)
    _checks.no_forward_mode(_OP, student_logits)
    if target.tail == _cells.RENORMALIZE_BOTH:
        # ratios of what is at the ids: the rest of a row is not even read
        student = _logits_at(student_logits, ids, law)
        laws = target.laws(student.shape[1])
        return _dispatch.row_ops(chosen).divergence_fwd(student, cells, None, *laws, False)[0]
    logprobs, tail_mass, *_ = _dispatch.row_ops(chosen).topk_divergence_fwd(
        _checks.unit_stride(student_logits), ids, *law
    )
    student = _cells.student_cells(logprobs, tail_mass, target.tail)
    if target.tail == _cells.DROP:
        return torch.ops.opd.topk_divergence_drop(cells, student, *target.summands)[0]
    laws = target.laws(student.shape[1])
    return _dispatch.row_ops(chosen).divergence_fwd(student, cells, None, *laws, False)[0]


def _logits_at(logits: Tensor, ids: Tensor, law: Law) -> Tensor:
    """What the law is the softmax of, at the ids, [T, K]; -inf where there is none."""
    scale, cap, temperature = law.numbers
    is_none = ids < 0
    values = logits.gather(1, ids.clamp_min(0)).to(_checks.real_dtype(logits))
    # before anything: a row that does not count may hold anything
    values = scale * values.masked_fill(is_none, 0.0)
    if cap:
        values = cap * torch.tanh(values / cap)
    if law.temperatures is not None:
        temperature = law.temperatures.unsqueeze(1)
    return (values / temperature).masked_fill(is_none, -torch.inf)


def topk_support(student_ids: Tensor | None, teacher_ids: Tensor | None, support: str) -> Tensor:
    """The ids of `support`, [T, K'] int64, each once per row.

    "teacher": teacher_ids; "student": student_ids; "union": the student's, then the teacher's.

    Args:
        student_ids: [T, Ks] int64 or int32, negative for none; may be None for "teacher".
        teacher_ids: [T, Kt], likewise; may be None for "student".
        support: "teacher" | "student" | "union".

    Returns:
        [T, K'], -1 in the place of repeated and negative ids; K' is Kt, Ks or their sum. Ask the
        teacher for the log-probabilities of these: `topk_divergence` needs them all.

    Raises:
        ValueError: shapes that do not fit, or ids that `support` needs and did not get.
        TypeError: ids that are not integers.

    Source: student, intersection and union supports of arXiv:2604.13016.
    """
    op = "topk_support"
    _checks.one_of(op, "support", support, ("teacher", "student", "union"))
    wanted = {"student_ids": student_ids, "teacher_ids": teacher_ids}
    if support != "union":
        wanted = {f"{support}_ids": wanted[f"{support}_ids"]}
    for name, ids in wanted.items():
        if ids is None:
            raise ValueError(f"{op}: {name} must be given for support {support!r}, got None.")
        _checks.tensor(op, name, ids, 2)
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: {name} must be int64 or int32, got {ids.dtype}.")
    first = next(iter(wanted.values()))
    for name, ids in wanted.items():
        _checks.length(op, name, ids, first.shape[0], next(iter(wanted)))
    _checks.same_device(op, **wanted)
    ids = torch.cat([ids.to(torch.int64) for ids in wanted.values()], dim=1)
    return ids.masked_fill(_cells.repeated(ids) | (ids < 0), -1)


class Target(NamedTuple):
    """A checked teacher and what is made of it; rows are tokens."""

    teacher_ids: Tensor
    teacher_logprobs: Tensor
    tail_logprob: Tensor | None
    token_weights: Tensor | None
    coefficients: Tensor | None
    divergences: list[int]
    params: list[float]
    tail: int

    @property
    def summands(self) -> tuple[Tensor | None, Tensor | None, list[int], list[float]]:
        """Arguments of topk_divergence_drop after the cells."""
        return self[3:7]

    def rows(self, rows: slice | Tensor) -> Target:
        """The target of some of the tokens."""

        def take(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        coefficients = self.coefficients
        return self._replace(
            teacher_ids=self.teacher_ids[rows],
            teacher_logprobs=self.teacher_logprobs[rows],
            tail_logprob=take(self.tail_logprob),
            token_weights=take(self.token_weights),
            coefficients=None if coefficients is None else coefficients[:, rows].contiguous(),
        )

    def cells(self, vocab_size: int, real: torch.dtype) -> tuple[Tensor, Tensor]:
        """(ids for the row kernels, log-masses of the teacher's cells)."""
        return _cells.teacher_cells(*self[:4], vocab_size, self.tail, real)

    def laws(self, num_cells: int) -> _laws.Laws:
        """The arguments of OPD_LAWS for the row kernel on the cells."""
        return _laws.Laws(
            *(None,) * 5,
            self.token_weights,
            self.coefficients,
            *(None,) * 5,
            self.divergences,
            self.params,
            [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0],
            0,
            False,
            num_cells,
        )


NUM_TARGET = len(Target._fields)


def pack_target(
    rows: _laws.Rows,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    tail_logprob: Tensor | None,
    *,
    divergence: _laws.Loss,
    support: str,
    tail: str,
    token_weights: Tensor | None,
) -> Target:
    """Checks the teacher's side of a call; no value is read."""
    op = rows.op
    _checks.one_of(op, "support", support, _cells.SUPPORTS)
    _checks.one_of(op, "tail", tail, _cells.TAILS)
    for name, value in (("teacher_ids", teacher_ids), ("teacher_logprobs", teacher_logprobs)):
        _checks.tensor(op, name, value, 2)
        _checks.length(op, name, value, rows.num_tokens, "the hidden states or logits")
        if value.device != rows.device:
            raise ValueError(f"{op}: {name} must be on {rows.device}, got {value.device}.")
    if teacher_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: teacher_ids must be int64 or int32, got {teacher_ids.dtype}.")
    if teacher_logprobs.dtype not in _checks.FLOATS:
        raise TypeError(
            f"{op}: teacher_logprobs must be a floating tensor, got {teacher_logprobs.dtype}."
        )
    if teacher_logprobs.shape != teacher_ids.shape:
        raise ValueError(
            f"{op}: teacher_logprobs must have the shape of teacher_ids "
            f"{tuple(teacher_ids.shape)}, got {tuple(teacher_logprobs.shape)}."
        )
    if not 1 <= teacher_ids.shape[1] <= _cells.MAX_IDS:
        raise ValueError(
            f"{op}: teacher_ids must have 1 to {_cells.MAX_IDS} columns, got shape "
            f"{tuple(teacher_ids.shape)}."
        )
    if tail_logprob is not None:
        _checks.tensor(op, "tail_logprob", tail_logprob, 1)
        _checks.length(op, "tail_logprob", tail_logprob, rows.num_tokens, "teacher_ids")
        if tail_logprob.dtype not in _checks.FLOATS:
            raise TypeError(
                f"{op}: tail_logprob must be a floating tensor, got {tail_logprob.dtype}."
            )
        if tail_logprob.device != rows.device:
            raise ValueError(
                f"{op}: tail_logprob must be on {rows.device}, got {tail_logprob.device}."
            )
        tail_logprob = tail_logprob.detach()
    components = _laws.components_of(op, divergence)
    for _, component in components:
        check_tail_divergence(op, component, tail)
    return Target(
        teacher_ids,
        teacher_logprobs.detach(),
        tail_logprob,
        _checks.token_weights(op, token_weights, rows.num_tokens, rows.device, rows.real),
        _laws.coefficients(rows, [coefficient for coefficient, _ in components]),
        [component.id for _, component in components],
        [value for _, component in components for value in component.kernel_params],
        _cells.TAILS.index(tail),
    )


# infinite wherever the student gives mass to what the teacher does not
_INFINITE_OFF_THE_TEACHER = (
    "reverse_kl",
    "jeffreys",
    "neyman_chi2",
    "todi",
    "adaptive_kl",
    "concrete_score",
)


def check_tail_divergence(op: str, component, tail: str) -> None:
    """That this summand of a loss is a divergence of cells, and finite for some student.

    Raises:
        ValueError: it is not.
    """
    name, params = component.name, dict(component.params)
    if name == "cross_entropy":
        raise ValueError(
            f"{op}: divergence must compare two laws, got cross_entropy, which has labels. For "
            "-sum w log q of weighted ids take forward_kl with tail='drop' and log w as "
            "teacher_logprobs: the same gradient."
        )
    if tail == "drop" and name not in _drop.NAMES:
        raise ValueError(
            f"{op}: divergence must be a sum over entries with tail='drop', got {name}, which is "
            "not. Use tail='bucket'."
        )
    if tail != "renormalize_teacher":
        return
    is_infinite = name in _INFINITE_OFF_THE_TEACHER
    if name == "alpha":
        is_infinite = params["alpha"] < 0
    elif name == "alpha_beta":
        is_infinite = params["alpha"] <= 0 or params["alpha"] + params["beta"] <= 0
    if is_infinite:
        raise ValueError(
            f"{op}: divergence must be finite where the teacher has no mass with "
            f"tail='renormalize_teacher', got {component}, which is infinite for every student. "
            "Use tail='bucket' or 'renormalize_both', or forward_kl, jsd, skew_reverse_kl."
        )


def fwd_outputs(like: Tensor, num_ids: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty (logprobs, tail_logprob, lse, entropy) for the rows of `like`."""
    num_tokens, real = like.shape[0], _checks.real_dtype(like)
    return (
        like.new_empty((num_tokens, num_ids), dtype=real),
        like.new_empty(num_tokens, dtype=torch.float64),
        like.new_empty(num_tokens, dtype=torch.float64),
        like.new_empty(num_tokens, dtype=real),
    )


def _fwd_fake(logits, token_ids, *_):
    return fwd_outputs(logits, token_ids.shape[1])


def _fwd_setup_context(ctx, inputs, output):
    logits, token_ids, bias, temperatures, *ctx.numbers = inputs
    logprobs, tail_logprob, lse, entropy = output
    ctx.mark_non_differentiable(lse, entropy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, token_ids, logprobs, tail_logprob, lse, bias, temperatures)


def _fwd_backward(namespace):
    def backward(ctx, grad_logprobs, grad_tail, *_):
        nothing = (None,) * 5
        if grad_logprobs is None and grad_tail is None:
            return None, *nothing
        logits, token_ids, logprobs, tail_logprob, lse, bias, temperatures = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(logprobs)
        # what there is no id for has no logit
        grad_logprobs = grad_logprobs.masked_fill(token_ids < 0, 0.0)
        gradients = _cells.logit_gradients(grad_logprobs, grad_tail, logprobs, tail_logprob, lse)
        grad_logits = getattr(torch.ops, namespace).topk_divergence_bwd(
            logits, token_ids, *gradients, bias, temperatures, *ctx.numbers
        )
        # a bias is a constant here: through the fused op it has a gradient
        return grad_logits, *nothing

    return backward


def _bwd_fake(logits, *_):
    return logits.new_empty(logits.shape)


def _triton_fwd(*arguments):
    from .triton import topk_divergence as kernels

    return kernels.topk_divergence_fwd(*arguments)


def _triton_bwd(*arguments):
    from .triton import topk_divergence as kernels

    return kernels.topk_divergence_bwd(*arguments)


def _triton_bwd_(*arguments):
    from .triton import topk_divergence as kernels

    return kernels.topk_divergence_bwd_(*arguments)


register(
    "topk_divergence_fwd",
    fake=_fwd_fake,
    setup_context=_fwd_setup_context,
    backward=_fwd_backward,
    triton=_triton_fwd,
)
register(
    "topk_divergence_bwd",
    fake=_bwd_fake,
    backward=lambda _: _linear.no_double_backward,
    triton=_triton_bwd,
)
register("topk_divergence_bwd_", fake=lambda *_: None, triton=_triton_bwd_)
