# SPDX-License-Identifier: Apache-2.0
"""Models that draw tokens, and what the verification kernel says of one's drafts to the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import opd_kernels as opk
from opd.model import LanguageModel
from opd.rollouts.cached_reader import CachedReader, can_take_back

_JUDGED_TOGETHER = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """A model, and the law that it draws from: softmax(z / temperature), cut to top_k and top_p."""

    model: LanguageModel
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    keeps_cache: bool = True

    def reader(self, num_rows: int) -> CachedReader:
        """Of that many new sequences."""
        return CachedReader(self.model, num_rows, keeps_cache=self.keeps_cache)


def verify(
    student: Writer,
    teacher: Writer,
    draft_ids: Tensor,
    student_hidden: Tensor | None,
    teacher_hidden: Tensor,
    uniforms: Tensor | None,
    *,
    mode: str,
    **settings: Any,
) -> opk.SpeculativeVerification:
    """What the kernel says of drafts [B, G], from hidden states [B, G, Ds] and [B, G + 1, Dt].

    Without the student's (`topk` and `greedy` alone can) nothing is told of its law.
    """
    return opk.fused_linear_speculative_verify(
        draft_ids,
        student_hidden,
        None if student_hidden is None else student.model.head.weight,
        teacher_hidden,
        teacher.model.head.weight,
        uniforms=uniforms,
        temperature=teacher.temperature,
        student_temperature=student.temperature,
        top_k=teacher.top_k,
        student_top_k=student.top_k,
        top_p=teacher.top_p,
        student_top_p=student.top_p,
        **student.model.head.options("student"),
        **teacher.model.head.options("teacher"),
        vocab_size=student.model.sampled_size,
        workspace_bytes=student.model.workspace_bytes,
        mode=mode,
        **settings,
    )


def draw(
    writer: Writer, hidden: Tensor, uniforms: Tensor | None, *, is_greedy: bool = False
) -> tuple[Tensor, Tensor]:
    """One token [B] int64 for each hidden state [B, D], and its log-probability [B].

    The id is -1 where the law is broken. The token after no draft at all is drawn from the law of
    its place, so that drafts are drawn from bit for bit the law that they are verified with.
    """
    told = verify(
        writer,
        writer,
        torch.empty(len(hidden), 0, dtype=torch.int64, device=hidden.device),
        None if is_greedy else hidden[:, None][:, :0],
        hidden[:, None],
        None if is_greedy else uniforms[:, None],
        mode="greedy" if is_greedy else "rejection",
    )
    return told.next_token.long(), told.teacher_logprobs[:, 0]


def judge(writer: Writer, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probabilities [N] of tokens [N] under the laws at hidden states [N, D].

    -inf for what a law never draws. A broken law gives NaN, also to others of the call.
    """
    size = writer.model.sampled_size or len(writer.model.lm_head_weight)
    # tokens as drafts of a few sequences, as each takes one more place, and the heads' rows are
    # what is dear; not of one, as a GPU has the logits of a whole sequence at a time
    num_rows = max(1, math.ceil(len(token_ids) / _JUDGED_TOGETHER))
    width = math.ceil(len(token_ids) / num_rows)
    spare = num_rows * width - len(token_ids)
    ids = torch.cat([token_ids, token_ids.new_zeros(spare)]).view(num_rows, width)
    states = torch.cat([hidden, hidden[-1:].expand(spare, -1)]).view(num_rows, width, -1)
    told = verify(
        writer,
        writer,
        ids,
        None,
        # the place after the drafts is not looked at
        torch.cat([states, states[:, :1]], dim=1),
        torch.zeros(num_rows, width + 1, dtype=torch.float64, device=ids.device),
        mode="topk",
        # every token is among all of them, so it is kept, and told of
        num_topk=size,
    )
    return told.teacher_logprobs[:, :-1].flatten()[: len(token_ids)]


def make_writer(model: LanguageModel, **law: Any) -> Writer:
    """A writer; whether its cache can forget is tried on the model."""
    return Writer(model=model, keeps_cache=can_take_back(model), **law)


def refuse_broken(is_broken: bool, *writers: Writer) -> None:
    """Raises FloatingPointError if so."""
    if is_broken:
        names = " or ".join(writer.model.name for writer in writers)
        raise FloatingPointError(
            f"{names}: its logits are not finite, so nothing can be sampled; a lower "
            "learning_rate or max_grad_norm may help"
        )
