# SPDX-License-Identifier: Apache-2.0
"""What the fused ops of one model share: its tensors, how a call is cut, the loop over logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from . import _buffers, _gemms, _linear, _plan
from .token_logprobs import Law


class Inputs(NamedTuple):
    """The tensors of a schema in csrc/torch/ops.cpp; the low-rank pair carries its scale in A.

    per_token: what the op is given of each token beside its hidden state, [T] or [T, n]; or None.
    """

    hidden: Tensor
    lm_head_weight: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    per_token: Tensor | None

    def low_rank(self, grad_dtype: int = _gemms.AS_LOGITS) -> _gemms.LowRank | None:
        if self.lora_a is None:
            return None
        return _gemms.LowRank.of(self.lora_a, self.lora_b, self.lm_head_weight, grad_dtype)

    def plan(
        self,
        op: str,
        vocab_size: int,
        workspace_bytes: int,
        num_tokens: int | None = None,
        *,
        trained: bool = False,
    ) -> _plan.Plan:
        """How a call is cut, of whose tokens so many count (None: all of them)."""
        return _plan.plan(
            op,
            self.hidden.shape[0] if num_tokens is None else num_tokens,
            vocab_size,
            (self.lm_head_weight,),
            workspace_bytes,
            whole_rows=_plan.NO_PATH_B,
            low_rank=0 if self.lora_a is None else self.lora_a.shape[0],
            trained=trained,
        )


NUM_INPUTS, NUM_LAW = len(Inputs._fields), len(Law._fields)


def split(arguments: Sequence) -> tuple[Inputs, Law, list]:
    """The arguments of an op: its tensors, its law, and the rest."""
    law = NUM_INPUTS + NUM_LAW
    return (
        Inputs(*arguments[:NUM_INPUTS]),
        Law(*arguments[NUM_INPUTS:law]),
        list(arguments[law:]),
    )


def fill(
    op: str,
    outputs: Sequence[Tensor],
    inputs: Inputs,
    law: Law,
    plan: _plan.Plan,
    rows: Callable[[Tensor, slice], Sequence[Tensor]],
) -> None:
    """Writes what `rows` makes of the logits [C, V] of a chunk, and its place among the tokens,
    into the outputs, chunk by chunk."""
    low_rank = inputs.low_rank()

    def run_chunk(buffer: Tensor, begin: int, end: int) -> None:
        here = slice(begin, end)
        chunk = _linear.take(inputs.hidden, None, begin, end)
        logits = _buffers.rows_of(buffer, end - begin, law.vocab_size)
        _linear.form_logits(
            op, logits, chunk, inputs.lm_head_weight, low_rank, plan.head_slice_rows
        )
        with _linear.phase(chunk, op, "rows"):
            values = rows(logits, here)
        for output, value in zip(outputs, values, strict=True):
            output[here] = value

    shapes = [(plan.chunk_tokens, law.vocab_size)]
    with _buffers.borrowed_buffers(inputs.hidden, shapes) as (buffer,):
        for begin, end in plan.chunks():
            run_chunk(buffer, begin, end)
