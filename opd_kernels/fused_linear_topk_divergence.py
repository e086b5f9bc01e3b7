# SPDX-License-Identifier: Apache-2.0
"""sum_t w[t] D(P_t on K ids, Q_t) from hidden states and a head; no [T, V] is ever formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _formed, _grad_sums, _laws, _linear, _parallel, _plan, reference
from . import _topk_divergence_path as _path
from ._divergence_paths import Sum
from ._registration import register
from .token_logprobs import Law, pack_law
from .topk_divergence import Target, pack_target

_OP = "fused_linear_topk_divergence"
STATISTICS = _path.STATISTICS


class FusedLinearTopkDivergenceOutput(NamedTuple):
    """`loss`: scalar ("sum") or [T] ("none"), nats. `statistics`: name -> [T], no gradient."""

    loss: Tensor
    statistics: dict[str, Tensor]


def fused_linear_topk_divergence(
    student_hidden: Tensor,
    student_lm_head_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    tail_logprob: Tensor | None = None,
    divergence: _laws.Loss = "forward_kl",
    support: str = "teacher",
    tail: str = "bucket",
    temperature: float | Tensor = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    statistics: Sequence[str] = (),
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    student_lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int = _checks.DEFAULT_WORKSPACE_BYTES,
    compact_tokens: bool | None = None,
    student_lm_head_weight_grad: Tensor | None = None,
    grad_scale: float = 1.0,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
) -> FusedLinearTopkDivergenceOutput:
    """Divergence of a teacher whose law is known on a few ids, and the student's, through its head.

    loss = sum_t w[t] sum_j c_j[t] D_j on the cells that `tail` makes of p and q, see
    `opd_kernels.topk_divergence`, q_t = softmax(z_t),
    z_t = cap(student_logit_scale * (student_hidden[t] @ W.T + bias)) / temperature[t].

    Args:
        student_hidden: [T, D], float32 | bfloat16 | float16 (float64 on CPU).
        student_lm_head_weight: [V, D] of the same dtype, one row per token.
        teacher_ids, teacher_logprobs, tail_logprob, divergence, support, tail: as
            `opd_kernels.topk_divergence` takes them.
        temperature: divides the student's logits; > 0. A number, or [T] without gradient.
        token_weights: [T], no gradient: mask x weight x 1/N. A token of weight 0 costs no FLOP and
            gives exactly 0, and nothing of its teacher is read. Default: ones.
        reduction: "sum": a scalar, gradients formed in forward. "none": [T], for weights that are
            known only later; backward recomputes the logits.
        statistics: of `student_mass` and `teacher_mass` (on the ids), `student_entropy` and
            `student_lse` (of the whole law), `forward_kl` and `reverse_kl` (of the cells); from the
            same pass, unweighted; 0 where the weight is 0.
        student_bias: [V] of the head, differentiable.
        student_softcap: c of cap(x) = c tanh(x / c); None: no cap.
        student_logit_scale: multiplies the logits before the cap; not 0.
        student_lora: (A [r, D], B [V, r], scaling): the head is W + scaling * B @ A, which is never
            formed. A and B are differentiable; freeze W and no gradient of it exists.
        vocab_size: the leading rows of the head that count.
        workspace_bytes: budget for logits and other temporaries; the gradients come on top.
        compact_tokens: gather the tokens of non-zero weight before the first GEMM, which waits for
            the device once. False: GEMMs run on all tokens, nothing waits. None: unless a CUDA
            graph is captured.
        student_lm_head_weight_grad: float32 (float64) [V, D], a main_grad: this forward, unless
            gradients are off, adds grad_scale * dW to it; the head gets no .grad, and no other dW
            exists. Only with "sum", for one backward, outside activation checkpointing.
        grad_scale: what the upstream gradient of that loss will be. Another one raises on CPU; on a
            GPU it is the caller's contract.
        process_group: head and bias are this rank's rows of the vocabulary; hidden states, the
            teacher's ids (of the whole vocabulary) and per-token arguments are the same on every
            rank. vocab_size is of the whole vocabulary then. A DTensor head sharded in dimension 0
            brings its group along. Ranks exchange K + 3 numbers per token, and dX.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one (`explain` says which).

    Returns:
        FusedLinearTopkDivergenceOutput(loss, statistics): float32 (float64 for float64), nats.

    Raises:
        ValueError: what `topk_divergence` refuses, and a workspace that holds no token.
        TypeError: a dtype or type that is not supported. UnsupportedBackendError.

    Notes:
        FLOPs 6TVD with both gradients, 4TVD with the head frozen ("none": 2TVD more), and two
        passes over a chunk's float32 logits: nothing of size V is there for the teacher.

    Source: sparse targets of docs/divergences.md; gradients in forward: arXiv:2410.10989.
    """
    weights, process_group = _parallel.local_heads(
        _OP, {"student_lm_head_weight": student_lm_head_weight}, process_group
    )
    hidden, head = _checks.autocast_pair(student_hidden, weights["student_lm_head_weight"])
    _checks.hidden_and_head(_OP, "student", hidden, head)
    _checks.floating(_OP, student_hidden=hidden)
    _checks.same_device(_OP, student_hidden=hidden, student_lm_head_weight=head)
    widths = {"student_lm_head_weight": head.shape[0]}
    vocab_size, group_name = _parallel.vocabulary(_OP, vocab_size, widths, process_group)
    rows = _laws.rows_of(_OP, hidden)
    if student_bias is not None:
        columns = head.shape[0] if group_name else vocab_size
        student_bias = _checks.bias(rows, "student_bias", student_bias, columns)
    law = pack_law(
        rows,
        vocab_size,
        temperature=temperature,
        softcap=student_softcap,
        logit_scale=student_logit_scale,
    )._replace(bias=student_bias)
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
    lora = _checks.lora(rows, student_lora, head)
    _checks.one_of(_OP, "reduction", reduction, ("sum", "none"))
    head_sum = _grad_sums.checked(
        _OP, "student_lm_head_weight_grad", student_lm_head_weight_grad, head
    )
    grad_scale = _grad_sums.grad_scale(_OP, grad_scale, reduction, head_sum is not None)
    _checks.optional_bool(_OP, "compact_tokens", compact_tokens)
    statistics = _checks.names(_OP, "statistics", statistics)
    for name in statistics:
        _checks.one_of(_OP, "statistics", name, STATISTICS)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(hidden), backend)
    if chosen == "reference":
        if group_name or head_sum is not None:
            raise ValueError(
                f"{_OP}: backend 'reference' must be used without process_group and "
                "student_lm_head_weight_grad: it is on one rank and its gradients are autograd's."
            )
        loss, named = reference.fused_linear_topk_divergence(
            student_hidden,
            student_lm_head_weight,
            teacher_ids,
            teacher_logprobs.detach(),
            tail_logprob=tail_logprob,
            divergence=divergence,
            support=support,
            tail=tail,
            temperature=temperature,
            token_weights=token_weights,
            reduction=reduction,
            statistics=statistics,
            student_bias=student_bias,
            student_softcap=student_softcap,
            student_logit_scale=student_logit_scale,
            student_lora=student_lora,
            vocab_size=vocab_size,
        )
        return FusedLinearTopkDivergenceOutput(
            loss.to(rows.real), {name: row.to(rows.real) for name, row in named.items()}
        )
    _checks.no_forward_mode(_OP, hidden, head)
    _plan.check(
        _OP,
        _parallel.planned_size(group_name, vocab_size),
        (head,),
        workspace_bytes,
        whole_rows=_parallel.WHOLE_ROWS if group_name else _plan.NO_PATH_B,
        per_token=_path.BYTES_PER_ID * teacher_ids.shape[1],
    )
    arguments = (*_path.Inputs(hidden, head, *lora), *target, *law)
    options = (bool(statistics), group_name, compact_tokens, chosen)
    if reduction == "none":
        loss, named = torch.ops.opd.fused_linear_topk_divergence_fwd(
            *arguments, workspace_bytes, *options
        )
    else:
        differentiable = (hidden, head, law.bias, *lora)
        wanted = [
            torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
            for tensor in differentiable
        ]
        if head_sum is None:
            loss, *_, named = torch.ops.opd.fused_linear_topk_divergence_sum(
                *arguments, workspace_bytes, wanted, *options
            )
        else:
            loss, named = _sum_into(
                (head_sum, grad_scale), arguments, differentiable, wanted, workspace_bytes, options
            )
    returned = {name: named[STATISTICS.index(name)] for name in statistics}
    return FusedLinearTopkDivergenceOutput(loss, returned)


def _sum_into(
    head_sum: tuple[Tensor, float],
    arguments: tuple,
    differentiable: tuple[Tensor | None, ...],
    wanted: list[bool],
    workspace_bytes: int,
    options: tuple,
) -> tuple[Tensor, Tensor]:
    """(loss, statistics), dW added to the caller's sum, the other gradients attached."""
    is_graph = torch.is_grad_enabled()
    if is_graph:
        _grad_sums.not_in_backward(_OP)
    loss, grad_hidden, _, *others, named = torch.ops.opd.fused_linear_topk_divergence_sum_(
        *head_sum,
        *(value.detach() if isinstance(value, Tensor) else value for value in arguments),
        workspace_bytes,
        [wanted[0], is_graph, *wanted[2:]],
        *options,
    )
    if any(wanted):
        with_grads = [wanted[0], *wanted[2:]]
        # this node knows gradients and a factor, and nothing of what the loss is
        loss = torch.ops.opd.fused_linear_divergence_attach(
            loss, *differentiable, grad_hidden, *others, with_grads, head_sum[1]
        )
    return loss, named


_NUM_INPUTS = len(_path.Inputs._fields)
_LAW = _NUM_INPUTS + len(Target._fields)
_END = _LAW + len(Law._fields)
# where the differentiable tensors are among the arguments: hidden, head, bias, A and B
_DIFFERENTIABLE = (0, 1, _LAW, 2, 3)


def _split(arguments: Sequence) -> tuple[_path.Inputs, Target, Law, list]:
    return (
        _path.Inputs(*arguments[:_NUM_INPUTS]),
        Target(*arguments[_NUM_INPUTS:_LAW]),
        Law(*arguments[_LAW:_END]),
        list(arguments[_END:]),
    )


def _sum_with(head_sum: Sum | None, arguments: Sequence):
    inputs, target, law, rest = _split(arguments)
    options = _path.Options(*rest)
    loss, gradients, statistics = _path.run(inputs, target, law, options, head_sum)
    # float64: a sum over 100k tokens in float32 would be the least accurate step of the op
    return loss.sum(dtype=torch.float64).to(loss.dtype), *gradients, statistics


def _sum(*arguments):
    return _sum_with(None, arguments)


def _sum_(head_sum, factor, *arguments):
    return _sum_with(Sum(head_sum, factor), arguments)


def _empty_statistics(inputs: _path.Inputs, with_statistics: bool) -> Tensor:
    hidden = inputs.student_hidden
    shape = (len(STATISTICS), hidden.shape[0] if with_statistics else 0)
    return hidden.new_empty(shape, dtype=_checks.real_dtype(hidden))


def _sum_fake(*arguments):
    inputs, _, law, rest = _split(arguments)
    options = _path.Options(*rest)
    hidden = inputs.student_hidden
    return (
        hidden.new_empty((), dtype=_checks.real_dtype(hidden)),
        *_path.empty_gradients(inputs, law, options.with_grads),
        _empty_statistics(inputs, options.with_statistics),
    )


def _sum_into_fake(_, __, *arguments):
    *kept, workspace_bytes, with_grads, a, b, c, d = arguments
    hidden, _, *others = with_grads
    return _sum_fake(*kept, workspace_bytes, [hidden, False, *others], a, b, c, d)


def _with_grads(inputs) -> list[bool]:
    return _path.Options(*inputs[_END:]).with_grads


def _fwd(*arguments):
    inputs, target, law, (workspace_bytes, *rest) = _split(arguments)
    options = _path.Options(workspace_bytes, [False] * len(_DIFFERENTIABLE), *rest)
    loss, _, statistics = _path.run(inputs, target, law, options)
    return loss, statistics


def _fwd_fake(*arguments):
    inputs, _, _, (_, with_statistics, *_) = _split(arguments)
    hidden = inputs.student_hidden
    loss = hidden.new_empty(hidden.shape[0], dtype=_checks.real_dtype(hidden))
    return loss, _empty_statistics(inputs, with_statistics)


def _fwd_setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    _formed.save_inputs(ctx, inputs)


def _bwd(grad_loss, *arguments):
    inputs, target, law, (workspace_bytes, with_grads, *rest) = _split(arguments)
    options = _path.Options(workspace_bytes, with_grads, False, *rest)
    weights = _formed.upstream_weights(grad_loss, target.token_weights)
    _, gradients, _ = _path.run(inputs, target._replace(token_weights=weights), law, options)
    return _formed.in_dtypes(gradients, _path.sources(inputs, law), with_grads)


def _bwd_fake(_, *arguments):
    inputs, _, law, (_, with_grads, *_) = _split(arguments)
    gradients = _path.empty_gradients(inputs, law, with_grads)
    return _formed.in_dtypes(gradients, _path.sources(inputs, law), with_grads, Tensor.to)


register(
    "fused_linear_topk_divergence_sum",
    fake=_sum_fake,
    setup_context=_formed.sum_setup_context(_DIFFERENTIABLE, _with_grads),
    backward=_formed.sum_backward(_DIFFERENTIABLE),
    python=_sum,
)
register("fused_linear_topk_divergence_sum_", fake=_sum_into_fake, python=_sum_)
register(
    "fused_linear_topk_divergence_fwd",
    fake=_fwd_fake,
    setup_context=_fwd_setup_context,
    backward=_formed.backward_again(
        _OP, _DIFFERENTIABLE, lambda saved, wanted: [*saved[:-4], wanted, *saved[-3:]]
    ),
    python=_fwd,
)
register(
    "fused_linear_topk_divergence_bwd",
    fake=_bwd_fake,
    backward=lambda _: _linear.no_double_backward,
    python=_bwd,
)
