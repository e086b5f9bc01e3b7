# SPDX-License-Identifier: Apache-2.0
"""sum_t w[t] D(P_t, Q_t) from hidden states and LM heads; no [T, V] is ever formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _formed, _grad_sums, _laws, _linear, _parallel, _plan, reference
from ._divergence_paths import Gradients, Inputs, Options, Sum, empty_gradients, run
from ._registration import register

_OP = "fused_linear_divergence"
STATISTICS = _laws.STATISTICS


class FusedLinearDivergenceOutput(NamedTuple):
    """`loss`: scalar ("sum") or [T] ("none"), nats. `statistics`: name -> [T], no gradient."""

    loss: Tensor
    statistics: dict[str, Tensor]


def fused_linear_divergence(
    student_hidden: Tensor,
    student_lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor,
    *,
    divergence: _laws.Loss = "reverse_kl",
    temperature: _laws.Temperature = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    statistics: Sequence[str] = (),
    target: _laws.Target | None = None,
    reference_hidden: Tensor | None = None,
    reference_lm_head_weight: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    student_lora: tuple[Tensor, Tensor, float] | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reference_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    reference_logit_scale: float = 1.0,
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
    token_ids: Tensor | None = None,
    topk_ids: Tensor | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int = _checks.DEFAULT_WORKSPACE_BYTES,
    process_group: torch.distributed.ProcessGroup | None = None,
    gradient_tolerance: float | None = None,
    student_lm_head_weight_grad: Tensor | None = None,
    grad_scale: float = 1.0,
    compact_tokens: bool | None = None,
    backend: str | None = None,
) -> FusedLinearDivergenceOutput:
    """Divergence of teacher and student from their hidden states, through both LM heads.

    loss = sum_t w[t] sum_j c_j[t] D_j(P_t, Q_t),
    Q_t = softmax(softcap(logit_scale * (student_hidden[t] @ W_S.T + bias)) / temperature), P_t
    likewise.

    Args:
        student_hidden: [T, Ds], float32 | bfloat16 | float16 (float64 on CPU).
        student_lm_head_weight: [Vs, Ds] of the same dtype, one row per token.
        teacher_hidden: [T, Dt], teacher_lm_head_weight: [Vt, Dt]; no gradient. Any float dtype,
            but float64 with float64 alone.
        divergence, temperature, target, labels, label_weights: as `opd_kernels.divergence` takes
            them; so are softcap and logit_scale of each side.
        token_weights: [T], no gradient: mask x weight x 1/N. A token of weight 0 costs no FLOP and
            gives exactly 0. Default: ones.
        reduction: "sum": a scalar, gradients formed in forward (two student GEMMs cheaper).
            "none": [T], for weights that are known only later; backward recomputes the logits.
        statistics: of `student_entropy`, `teacher_entropy`, `forward_kl`, `reverse_kl`,
            `top1_agreement` (1 or 0), `student_lse`, `teacher_lse`, `student_logprobs` and
            `teacher_logprobs` (of token_ids), `student_topk_mass` and `teacher_topk_mass` (of
            topk_ids); from the same pass, unweighted; 0 where the weight is 0. With a geometric
            target the teacher's are the target's.
        reference_hidden: [T, Dr], reference_lm_head_weight: [Vr, Dr]; no gradient. The third model
            of a geometric target.
        student_bias: [V] of the head, differentiable; teacher_bias, reference_bias: no gradient.
        student_lora: (A [r, Ds], B [V, r], scaling): the head is W_S + scaling * B @ A, which is
            never formed. A and B are differentiable; freeze W_S and no gradient of it exists.
        token_ids: [T], topk_ids: [T, K] (negative: no id) for the statistics.
        vocab_size: leading rows that both heads share, when they are padded differently.
        workspace_bytes: budget for logits and other temporaries; the gradients come on top
            (dW is float32 until it is returned in the head's dtype). Small budgets cut the
            vocabulary too and form logits again (`explain` says so).
        process_group: every head and bias is this rank's rows of the vocabulary, all cut at the
            same rows; hidden states and per-token arguments are the same on every rank.
            vocab_size is of the whole vocabulary then. Heads that are
            DTensors sharded in dimension 0 bring their group along.
        gradient_tolerance: keep only the vocabulary columns in which |dD/dz| of some token of the
            chunk exceeds this (z the head's output, before the token's weight); dX and dW leave the
            others out. Statistics then have `gradient_dropped_l1` [T], the sum of |dD/dz| that the
            token lost, which bounds the error: norm(dX[t] - exact) <= |w[t]| dropped[t]
            max_v norm(W[v]), and sum_v norm(dW[v] - exact) <= sum_t |w[t]| dropped[t] norm(X[t]).
            Bias and low-rank pair get exact gradients. Only with "sum". Default: exact.
        student_lm_head_weight_grad: float32 (float64) [Vs, Ds], a main_grad: this forward, unless
            gradients are off, adds grad_scale * dW to it; the head gets no .grad, and no other dW
            exists. Only with "sum", for one backward, outside activation checkpointing.
        grad_scale: what the upstream gradient of that loss will be (1 / accumulation steps, a loss
            scale). Another one raises on CPU; on a GPU it is the caller's contract.
        compact_tokens: gather the tokens of non-zero weight before the first GEMM, which waits for
            the device once. False: GEMMs run on all tokens and nothing waits, but for a
            process_group. None: unless a CUDA graph is captured.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one (`explain` says which).

    Returns:
        FusedLinearDivergenceOutput(loss, statistics): float32 (float64 for float64), nats.

    Raises:
        ValueError: shapes, vocabularies, ranges or a workspace that do not fit.
        TypeError: a dtype or type that is not supported. UnsupportedBackendError.

    Notes:
        FLOPs 2TV(3Ds + Dt) with both gradients, 2TV(2Ds + Dt) with the head frozen ("none": one
        student and one teacher GEMM more), towards 2TV(Ds + Dt) with a gradient_tolerance and
        peaked laws, at the price of one wait for the device per chunk. Logits are float32 whatever
        the inputs are; precision, special values and memory: docs/numerics.md.

    Source: GKD, arXiv:2306.13649; MiniLLM, arXiv:2306.08543; DistiLLM, arXiv:2402.03898; the rest
    of the family in docs/divergences.md.
    """
    heads = {
        "student": (student_hidden, student_lm_head_weight, student_bias),
        "teacher": (teacher_hidden, teacher_lm_head_weight, teacher_bias),
    }
    if (reference_hidden is None) != (reference_lm_head_weight is None):
        got = "reference_lm_head_weight" if reference_hidden is None else "reference_hidden"
        raise ValueError(
            f"{_OP}: reference_hidden and reference_lm_head_weight must be given together, got "
            f"only {got}."
        )
    _checks.used_reference(
        _OP, reference_hidden, reference_bias, reference_softcap, reference_logit_scale
    )
    if reference_hidden is not None:
        heads["reference"] = (reference_hidden, reference_lm_head_weight, reference_bias)
    weights = {side: weight for side, (_, weight, _) in heads.items()}
    weights, process_group = _parallel.local_heads(_OP, weights, process_group)
    for side, (hidden, _, bias) in heads.items():
        hidden, weight = _checks.autocast_pair(hidden, weights[side])
        _checks.hidden_and_head(_OP, side, hidden, weight)
        _checks.length(_OP, f"{side}_hidden", hidden, student_hidden.shape[0], "student_hidden")
        heads[side] = (hidden, weight, bias)
    hidden = {f"{side}_hidden": hidden for side, (hidden, _, _) in heads.items()}
    _checks.floating(_OP, **hidden)
    _checks.same_device(
        _OP, **hidden, **{f"{side}_lm_head_weight": head for side, (_, head, _) in heads.items()}
    )
    rows = _laws.rows_of(_OP, hidden["student_hidden"])
    widths = {f"{side}_lm_head_weight": weight.shape[0] for side, (_, weight, _) in heads.items()}
    vocab_size, group_name = _parallel.vocabulary(_OP, vocab_size, widths, process_group)
    biases = [heads[side][2] if side in heads else None for side in ("student", "teacher")]
    laws = _laws.pack(
        rows,
        vocab_size,
        divergence=divergence,
        temperature=temperature,
        token_weights=token_weights,
        target=target,
        has_reference=reference_hidden is not None,
        softcaps=(student_softcap, teacher_softcap, reference_softcap),
        logit_scales=(student_logit_scale, teacher_logit_scale, reference_logit_scale),
        labels=labels,
        label_weights=label_weights,
        biases=(*biases, reference_bias),
        bias_size=min(widths.values()) if group_name else vocab_size,
        token_ids=token_ids,
        topk_ids=topk_ids,
    )
    lora = _checks.lora(rows, student_lora, heads["student"][1])
    _checks.one_of(_OP, "reduction", reduction, ("sum", "none"))
    tolerance = _checks.gradient_tolerance(_OP, gradient_tolerance, reduction)
    head_sum = _grad_sums.checked(
        _OP, "student_lm_head_weight_grad", student_lm_head_weight_grad, heads["student"][1]
    )
    grad_scale = _grad_sums.grad_scale(_OP, grad_scale, reduction, head_sum is not None)
    _checks.optional_bool(_OP, "compact_tokens", compact_tokens)
    statistics = _laws.statistic_names(_OP, statistics, laws, tolerance)
    whole_rows = _laws.needs_whole_rows(laws.divergences)
    if group_name and whole_rows is not None:
        raise ValueError(f"{_OP}: process_group must be None here: {whole_rows}.")
    chosen = _dispatch.select(_OP, _dispatch.meta_of(hidden["student_hidden"]), backend)
    if chosen == "reference":
        if group_name or tolerance:
            raise ValueError(
                f"{_OP}: backend 'reference' must be used without process_group and "
                "gradient_tolerance: it is exact and on one rank."
            )
        if head_sum is not None:
            raise ValueError(
                f"{_OP}: backend 'reference' must be used without student_lm_head_weight_grad: its "
                "gradients are autograd's."
            )
        loss, named = reference.fused_linear_divergence(
            student_hidden,
            student_lm_head_weight,
            teacher_hidden,
            teacher_lm_head_weight,
            divergence=divergence,
            temperature=temperature,
            token_weights=token_weights,
            reduction=reduction,
            statistics=statistics,
            target=target,
            reference_hidden=reference_hidden,
            reference_lm_head_weight=reference_lm_head_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            reference_bias=reference_bias,
            student_lora=student_lora,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            reference_softcap=reference_softcap,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            reference_logit_scale=reference_logit_scale,
            labels=labels,
            label_weights=label_weights,
            token_ids=token_ids,
            topk_ids=topk_ids,
            vocab_size=vocab_size,
        )
        return FusedLinearDivergenceOutput(
            loss.to(rows.real), {name: row.to(rows.real) for name, row in named.items()}
        )
    _checks.no_forward_mode(_OP, *heads["student"][:2], *heads["teacher"][:2])
    plan_heads = [weight for _, weight, _ in heads.values()]
    size = _parallel.planned_size(group_name, vocab_size)
    why = _parallel.WHOLE_ROWS if group_name else whole_rows
    _plan.check(_OP, size, plan_heads, workspace_bytes, whole_rows=why)
    inputs = Inputs(
        *heads["student"][:2],
        *(tensor.detach() for tensor in heads["teacher"][:2]),
        *(tensor.detach() for tensor in heads["reference"][:2])
        if "reference" in heads
        else (None, None),
        *lora,
    )
    with_statistics = bool(statistics) or bool(tolerance)
    if reduction == "sum":
        differentiable = (*inputs[:2], laws.student_bias, *lora)
        wanted = [
            torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
            for tensor in differentiable
        ]
        options = (group_name, tolerance, compact_tokens, chosen)
        if head_sum is None:
            loss, *_, named = torch.ops.opd.fused_linear_divergence_sum(
                *inputs, *laws, workspace_bytes, wanted, with_statistics, *options
            )
        else:
            loss, named = _sum_into(
                (head_sum, grad_scale),
                inputs,
                laws,
                wanted,
                (workspace_bytes, with_statistics, *options),
            )
    else:
        loss, named = torch.ops.opd.fused_linear_divergence_fwd(
            *inputs, *laws, workspace_bytes, with_statistics, group_name, compact_tokens, chosen
        )
    returned = {name: named[STATISTICS.index(name)] for name in statistics}
    if tolerance:
        returned[_laws.DROPPED] = named[-1]
    return FusedLinearDivergenceOutput(loss, returned)


def _sum_into(
    head_sum: tuple[Tensor, float],
    inputs: Inputs,
    laws: _laws.Laws,
    wanted: list[bool],
    options: tuple,
) -> tuple[Tensor, Tensor]:
    """(loss, statistics), dW added to the caller's sum, the other gradients attached."""
    workspace_bytes, *options = options
    is_graph = torch.is_grad_enabled()
    if is_graph:
        _grad_sums.not_in_backward(_OP)

    def detached(values):
        return [value.detach() if isinstance(value, Tensor) else value for value in values]

    loss, grad_hidden, _, *others, named = torch.ops.opd.fused_linear_divergence_sum_(
        *head_sum,
        *detached(inputs),
        *detached(laws),
        workspace_bytes,
        [wanted[0], is_graph, *wanted[2:]],
        *options,
    )
    if any(wanted):
        sources = (*inputs[:2], laws.student_bias, *inputs[6:])
        with_grads = [wanted[0], *wanted[2:]]
        loss = torch.ops.opd.fused_linear_divergence_attach(
            loss, *sources, grad_hidden, *others, with_grads, head_sum[1]
        )
    return loss, named


_NUM_INPUTS = len(Inputs._fields)
_NUM_LAWS = _laws.NUM_ARGUMENTS
# where the differentiable tensors are among the arguments: hidden, head, bias, A and B
_DIFFERENTIABLE = (0, 1, _NUM_INPUTS, 6, 7)


def _split(arguments: Sequence) -> tuple[Inputs, _laws.Laws, list]:
    laws = _NUM_INPUTS + _NUM_LAWS
    return (
        Inputs(*arguments[:_NUM_INPUTS]),
        _laws.Laws(*arguments[_NUM_INPUTS:laws]),
        list(arguments[laws:]),
    )


def _empty_statistics(inputs: Inputs, with_statistics: bool, tolerance: float) -> Tensor:
    num_tokens = inputs.student_hidden.shape[0]
    rows = _laws.NUM_STATISTICS + bool(tolerance and with_statistics)
    real = _checks.real_dtype(inputs.student_hidden)
    return inputs.student_hidden.new_empty((rows, num_tokens if with_statistics else 0), dtype=real)


def _sum(*arguments):
    inputs, laws, rest = _split(arguments)
    loss, gradients, statistics = run(inputs, laws, Options(*rest))
    # float64: a sum over 100k tokens in float32 would be the least accurate step of the op
    return loss.sum(dtype=torch.float64).to(loss.dtype), *gradients, statistics


def _sum_(head_sum, factor, *arguments):
    inputs, laws, rest = _split(arguments)
    loss, gradients, statistics = run(inputs, laws, Options(*rest), Sum(head_sum, factor))
    return loss.sum(dtype=torch.float64).to(loss.dtype), *gradients, statistics


def _sum_into_fake(head_sum, factor, *arguments):
    inputs, laws, (workspace_bytes, with_grads, *rest) = _split(arguments)
    hidden, _, *others = with_grads
    return _sum_fake(*inputs, *laws, workspace_bytes, [hidden, False, *others], *rest)


def _sum_fake(*arguments):
    inputs, laws, rest = _split(arguments)
    options = Options(*rest)
    real = _checks.real_dtype(inputs.student_hidden)
    return (
        inputs.student_hidden.new_empty((), dtype=real),
        *empty_gradients(inputs, laws, options.with_grads),
        _empty_statistics(inputs, options.with_statistics, options.gradient_tolerance),
    )


def _with_grads(inputs) -> list[bool]:
    return Options(*_split(inputs)[2]).with_grads


def _fwd(*arguments):
    inputs, laws, (workspace_bytes, with_statistics, group, *rest) = _split(arguments)
    wanted = [False] * len(_DIFFERENTIABLE)
    loss, _, statistics = run(
        inputs, laws, Options(workspace_bytes, wanted, with_statistics, group, 0.0, *rest)
    )
    return loss, statistics


def _fwd_fake(*arguments):
    inputs, _, (_, with_statistics, *_) = _split(arguments)
    real = _checks.real_dtype(inputs.student_hidden)
    return (
        inputs.student_hidden.new_empty(inputs.student_hidden.shape[0], dtype=real),
        _empty_statistics(inputs, with_statistics, 0.0),
    )


def _fwd_setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    _formed.save_inputs(ctx, inputs)


def _bwd(grad_loss, *arguments):
    inputs, laws, (workspace_bytes, with_grads, group, *rest) = _split(arguments)
    options = Options(workspace_bytes, with_grads, False, group, 0.0, *rest)
    weights = _formed.upstream_weights(grad_loss, laws.token_weights)
    _, gradients, _ = run(inputs, laws._replace(token_weights=weights), options)
    return _formed.in_dtypes(gradients, _sources(inputs, laws), with_grads)


def _sources(inputs: Inputs, laws: _laws.Laws) -> tuple[Tensor | None, ...]:
    return (*inputs[:2], laws.student_bias, *inputs[6:])


def _bwd_fake(grad_loss, *arguments):
    inputs, laws, (_, with_grads, *_) = _split(arguments)
    gradients: Gradients = empty_gradients(inputs, laws, with_grads)
    return _formed.in_dtypes(gradients, _sources(inputs, laws), with_grads, Tensor.to)


register(
    "fused_linear_divergence_sum",
    fake=_sum_fake,
    setup_context=_formed.sum_setup_context(_DIFFERENTIABLE, _with_grads),
    backward=_formed.sum_backward(_DIFFERENTIABLE),
    python=_sum,
)
register("fused_linear_divergence_sum_", fake=_sum_into_fake, python=_sum_)
register(
    "fused_linear_divergence_fwd",
    fake=_fwd_fake,
    setup_context=_fwd_setup_context,
    backward=_formed.backward_again(
        _OP, _DIFFERENTIABLE, lambda saved, wanted: [*saved[:-4], wanted, *saved[-3:]]
    ),
    python=_fwd,
)
register(
    "fused_linear_divergence_bwd",
    fake=_bwd_fake,
    backward=lambda _: _linear.no_double_backward,
    python=_bwd,
)
