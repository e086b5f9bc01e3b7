# SPDX-License-Identifier: Apache-2.0
"""The loop of fused_linear_topk_divergence: LM-head GEMMs and row kernels over chunks of tokens.

Per chunk: the student's logits, one pass that reads them for the log-masses of the cells, the
divergence of the cells with its gradient, one pass that turns the logits into dZ in place, dX and
dW. Ranks of a vocabulary-parallel call have their own columns of a chunk, and exchange its
log-masses.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _buffers, _cells, _dispatch, _gemms, _linear, _parallel, _plan
from ._checks import real_dtype, values_in_range
from ._divergence_paths import Gradients, Sum
from ._laws import STATISTICS as _ROWS
from .token_logprobs import Law
from .topk_divergence import Target

OP = "fused_linear_topk_divergence"
STATISTICS = (
    "student_mass",
    "teacher_mass",
    "student_entropy",
    "student_lse",
    "forward_kl",
    "reverse_kl",
)
# what is held of an id at one time: its cells of both sides in float64 and as the kernels take
# them, ids in their order and in the given one
BYTES_PER_ID = 96
_FORWARD_KL, _REVERSE_KL = _ROWS.index("forward_kl"), _ROWS.index("reverse_kl")


class Inputs(NamedTuple):
    """The student's tensors; the low-rank pair carries its scale in A."""

    student_hidden: Tensor
    student_lm_head_weight: Tensor
    student_lora_a: Tensor | None
    student_lora_b: Tensor | None


class Options(NamedTuple):
    """What does not change the result beyond its rounding."""

    workspace_bytes: int
    with_grads: list[bool]
    with_statistics: bool
    process_group: str
    compact_tokens: bool | None
    backend: str


def sources(inputs: Inputs, law: Law) -> tuple[Tensor | None, ...]:
    """What has a gradient, in the order of `Gradients`."""
    return (*inputs[:2], law.bias, *inputs[2:])


def empty_gradients(inputs: Inputs, law: Law, with_grads: list[bool]) -> Gradients:
    """Fake or real outputs of the right shapes, uninitialised."""
    hidden, real = inputs.student_hidden, real_dtype(inputs.student_hidden)
    return Gradients(
        *(
            hidden.new_empty(source.shape if wanted else 0, dtype=real)
            for source, wanted in zip(sources(inputs, law), with_grads, strict=True)
        )
    )


def plan_of(
    num_tokens: int, inputs: Inputs, num_ids: int, law: Law, options: Options
) -> _plan.Plan:
    """How a call with so many tokens that count is cut; vocab_size of the law is of all ranks."""
    group = _parallel.resolve(options.process_group)
    plan = _plan.plan(
        OP,
        num_tokens,
        _parallel.planned_size(options.process_group, law.vocab_size),
        (inputs.student_lm_head_weight,),
        options.workspace_bytes,
        whole_rows=_plan.NO_PATH_B if group is None else _parallel.WHOLE_ROWS,
        in_parts=False,
        low_rank=0 if inputs.student_lora_a is None else inputs.student_lora_a.shape[0],
        per_token=BYTES_PER_ID * num_ids,
        # ranks must cut alike
        trained=options.with_grads[1] or bool(options.process_group),
    )
    if group is None:
        return plan
    return dataclasses.replace(plan, vocab_size=group.num_columns, slice_columns=group.num_columns)


class _Masses(NamedTuple):
    """What topk_divergence_fwd returns."""

    logprobs: Tensor
    tail_logprob: Tensor
    lse: Tensor
    entropy: Tensor


def combine(group: _parallel.Shard, own: _Masses) -> _Masses:
    """The log-masses of the whole vocabulary from those of each rank's columns.

    An id is on one rank and -inf on the others. Masses are added up as log-sum-exps of what is at
    the ids and of what is off them, so that neither is 1 minus the other.
    """
    nothing = own.lse == -torch.inf
    at_ids = own.logprobs.to(torch.float64) + own.lse.unsqueeze(1)
    # a shard without a finite logit has no law of its own, and adds nothing
    at_ids = at_ids.masked_fill(nothing.unsqueeze(1), -torch.inf)
    dist.all_reduce(at_ids, dist.ReduceOp.MAX, group.group)
    part = torch.stack([own.lse, own.tail_logprob, own.entropy.to(torch.float64)])
    part[1:, :] = part[1:, :].masked_fill(nothing, 0.0)
    parts = part.new_empty(group.group.size(), *part.shape)
    dist.all_gather(list(parts.unbind()), part, group.group)
    lse, tail, entropy = parts.unbind(1)
    on = (lse + _cells.log_complement(tail)).logsumexp(0)
    off = (lse + tail).logsumexp(0)
    total = torch.logaddexp(on, off)
    share = lse - total
    weight = share.exp()
    entropy = torch.where(weight == 0, 0.0, weight * (entropy - share)).sum(0)
    return _Masses(
        (at_ids - total.unsqueeze(1)).to(own.logprobs.dtype),
        -torch.logaddexp(torch.zeros_like(on), on - off),
        total,
        entropy.to(own.entropy.dtype),
    )


def run(
    inputs: Inputs, target: Target, law: Law, options: Options, head_sum: Sum | None = None
) -> tuple[Tensor, Gradients, Tensor]:
    """(loss [T], gradients, statistics), float32 (float64).

    Gradients are rounded to the inputs' dtype once, after the upstream gradient has been applied.
    With `head_sum`, the head's is added there.
    """
    if law.temperatures is not None:
        info = torch.finfo(torch.float32)
        bounds = (info.tiny, info.max, "positive and finite")
        values_in_range(OP, "temperature", law.temperatures, target.token_weights, *bounds)
    return _Run(inputs, target, law, options, head_sum).run()


class _Run:
    def __init__(
        self, inputs: Inputs, target: Target, law: Law, options: Options, head_sum: Sum | None
    ) -> None:
        self.inputs, self.options, self.head_sum = inputs, options, head_sum
        self.rows = _dispatch.row_ops(options.backend)
        self.group = _parallel.resolve(options.process_group)
        self.total_columns = law.vocab_size
        student, head = inputs.student_hidden, inputs.student_lm_head_weight
        real, num_tokens = real_dtype(student), student.shape[0]
        weights = target.token_weights
        self.token_idx = _linear.active_tokens(weights, options.compact_tokens)
        num_active = num_tokens if self.token_idx is None else self.token_idx.shape[0]
        num_ids = target.teacher_ids.shape[1]
        self.plan = plan_of(num_active, inputs, num_ids, law, options)
        # from here on the vocabulary is this rank's part of it
        if self.group is not None:
            law = law._replace(vocab_size=self.group.num_columns)
        self.law = law
        self.with_grad = any(options.with_grads)
        self.grad_dtype = _gemms.grad_dtype(head)
        self.unit = None
        if self.with_grad:
            self.unit = _linear.gradient_unit(head, weights, times=target.coefficients)
        # tokens of weight 0 take part, and their hidden states may hold anything
        self.has_masked = self.token_idx is None and weights is not None
        weights = _linear.in_units(weights, self.unit, num_tokens)
        self.target = target._replace(token_weights=weights)
        self.new = student.new_zeros if self.token_idx is not None else student.new_empty
        self.loss = self.new(num_tokens, dtype=real)
        self.statistics = self.new(
            (len(STATISTICS), num_tokens if options.with_statistics else 0), dtype=real
        )
        self.low_rank = None
        if inputs.student_lora_a is not None:
            self.low_rank = _gemms.LowRank.of(
                inputs.student_lora_a, inputs.student_lora_b, head, self.grad_dtype
            )
        self.gradients = self._new_gradients(num_active)

    def _new_gradients(self, num_active: int) -> Gradients:
        inputs, law, wanted = self.inputs, self.law, self.options.with_grads
        named = empty_gradients(inputs, law, [False] * len(wanted))._asdict()
        real = self.loss.dtype
        if wanted[0]:
            named["student_hidden"] = self.new(inputs.student_hidden.shape, dtype=real)
        if wanted[1] and self.head_sum is None:
            named["student_lm_head_weight"] = _gemms.new_grad_weight(
                inputs.student_lm_head_weight, law.vocab_size, num_active
            )
        for name, source, wants in zip(
            Gradients._fields[2:], sources(inputs, law)[2:], wanted[2:], strict=True
        ):
            if wants:
                named[name] = torch.zeros_like(source, dtype=real)
        return Gradients(**named)

    def run(self) -> tuple[Tensor, Gradients, Tensor]:
        head_sum = None if self.head_sum is None else self.head_sum.grad
        shapes = [(self.plan.chunk_tokens, self.law.vocab_size)]
        with (
            _linear.summed_in_units(head_sum, self.unit),
            _buffers.borrowed_buffers(self.inputs.student_hidden, shapes) as (buffer,),
        ):
            for begin, end in self.plan.chunks():
                # a function, so that its gathered rows are gone before the next chunk's exist
                logits = _buffers.rows_of(buffer, end - begin, self.law.vocab_size)
                self._run_chunk(logits, begin, end)
        gradients = self.gradients
        if self.unit is not None:
            for value in (self.loss, *gradients):
                value.mul_(self.unit)
        if self.group is not None:
            self.group.sum_gradients(gradients.student_hidden, gradients.student_lora_a)
        return self.loss, gradients, self.statistics

    def _run_chunk(self, logits: Tensor, begin: int, end: int) -> None:
        hidden, head = self.inputs[:2]
        here = slice(begin, end) if self.token_idx is None else self.token_idx[begin:end]
        with _linear.phase(hidden, OP, "take"):
            target, law = self.target.rows(here), self.law.rows(here)
            weights = target.token_weights if self.has_masked else None
            chunk = _linear.take(hidden, self.token_idx, begin, end, weights)
        with _linear.phase(chunk, OP, "logits"):
            _gemms.logits_into(logits, chunk, head, self.plan.head_slice_rows)
        projected = None
        if self.low_rank is not None:
            with _linear.phase(chunk, OP, "low_rank"):
                projected = self.low_rank.project(chunk)
                self.low_rank.add_logits(logits, projected)
        with _linear.phase(chunk, OP, "cells"):
            table, cells = target.cells(self.total_columns, self.loss.dtype)
            ids = self._own(table)
        with _linear.phase(chunk, OP, "rows"):
            masses = _Masses(*self.rows.topk_divergence_fwd(logits, ids, *law))
        if self.group is not None:
            with _linear.phase(chunk, OP, "combine"):
                masses = combine(self.group, masses)
        with _linear.phase(chunk, OP, "cells"):
            loss, gradient, statistics = self._divergence(target, cells, masses)
        _linear.put(self.loss, self.token_idx, begin, end, loss)
        if statistics is not None:
            _linear.put(self.statistics.t(), self.token_idx, begin, end, statistics.t())
        if not self.with_grad:
            return
        with _linear.phase(chunk, OP, "rows"):
            num_ids = ids.shape[1]
            tail = gradient[:, num_ids] if gradient.shape[1] > num_ids else None
            # what there is no id for has no logit
            at_ids = gradient[:, :num_ids].masked_fill(table < 0, 0.0)
            self.rows.topk_divergence_bwd_(
                logits,
                ids,
                *_cells.logit_gradients(
                    at_ids,
                    tail,
                    *masses[:3],
                    only_ratios=target.tail == _cells.RENORMALIZE_BOTH,
                ),
                *law,
                self.grad_dtype,
            )
        self._backproject(
            _gemms.gradient_of(logits, head, self.grad_dtype), chunk, projected, begin
        )

    def _own(self, ids: Tensor) -> Tensor:
        """Ids as the columns of this rank, -1 for those of others."""
        if self.group is None:
            return ids
        ids = ids - self.group.first_column
        return ids.masked_fill((ids < 0) | (ids >= self.group.num_columns), -1)

    def _divergence(
        self, target: Target, cells: Tensor, masses: _Masses
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(loss, d loss / d log-mass of each cell, statistics)."""
        num_ids = masses.logprobs.shape[1]
        wants = self.options.with_statistics
        teacher_mass = cells[:, :num_ids].to(torch.float64).exp().sum(1) if wants else None
        student = _cells.student_cells(masses.logprobs, masses.tail_logprob, target.tail)
        if target.tail == _cells.DROP:
            drop = torch.ops.opd.topk_divergence_drop
            loss, gradient = drop(cells, student, *target.summands)
            if not wants:
                return loss, gradient, None
            kls = [drop(cells, student, None, None, [number], [0.0, 0.0])[0] for number in (0, 1)]
        else:
            laws = target.laws(student.shape[1])
            if self.with_grad:
                # in place, and the log-masses are still needed
                gradient = student.clone() if student is masses.logprobs else student
                loss, rows = self.rows.divergence_fwd_grad_(
                    gradient, cells, None, *laws, wants, _gemms.AS_LOGITS
                )
            else:
                gradient = None
                loss, _, rows = self.rows.divergence_fwd(student, cells, None, *laws, wants)
            if not wants:
                return loss, gradient, None
            kls = [rows[_FORWARD_KL], rows[_REVERSE_KL]]
        statistics = torch.stack(
            [
                -torch.expm1(masses.tail_logprob).to(loss.dtype),
                teacher_mass.to(loss.dtype),
                masses.entropy,
                masses.lse.to(loss.dtype),
                *kls,
            ]
        )
        if self.has_masked:
            statistics = statistics.masked_fill(target.token_weights == 0, 0.0)
        return loss, gradient, statistics

    def _backproject(
        self, grad_logits: Tensor, chunk: Tensor, projected: Tensor | None, begin: int
    ) -> None:
        """Adds what dZ of these tokens gives to each gradient."""
        head, wanted, gradients = (
            self.inputs.student_lm_head_weight,
            self.options.with_grads,
            self.gradients,
        )
        grad_hidden = None
        if wanted[0]:
            with _linear.phase(chunk, OP, "grad_hidden"):
                grad_hidden = _gemms.grad_hidden(
                    grad_logits, head, self.plan.head_slice_rows, self.plan.grad_hidden_splits
                )
        if wanted[1]:
            with _linear.phase(chunk, OP, "grad_weight"):
                total, factor, first = gradients.student_lm_head_weight, 1.0, begin == 0
                if self.head_sum is not None:
                    (total, factor), first = self.head_sum, False
                _gemms.accumulate_grad_weight(total, grad_logits, chunk, first, factor)
        if wanted[2]:
            with _linear.phase(chunk, OP, "grad_bias"):
                bias = gradients.student_bias
                bias[: self.law.vocab_size] += grad_logits.sum(0, dtype=bias.dtype)
        if projected is not None:
            down = gradients.student_lora_a if wanted[3] else None
            up = gradients.student_lora_b if wanted[4] else None
            with _linear.phase(chunk, OP, "grad_low_rank"):
                self.low_rank.backproject(grad_logits, chunk, projected, (grad_hidden, down, up))
        if wanted[0]:
            end = begin + chunk.shape[0]
            _linear.put(gradients.student_hidden, self.token_idx, begin, end, grad_hidden)
