# SPDX-License-Identifier: Apache-2.0
"""The best entries of a law whose vocabulary is cut over ranks, from the best of each part.

Of a part P, Z_P = e^lse_P is the sum, H_P the entropy and R_P the share of Z_P beyond its K best.
lse = log sum_P Z_P, entropy = sum_P w_P (H_P + lse - lse_P) with w_P = Z_P e^-lse, and the tail is
sum_P w_P R_P plus what the merge of the K best of all parts leaves out. Every term is positive.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.distributed as dist
from torch import Tensor

from .token_logprobs import Law


@dataclasses.dataclass(frozen=True)
class Part:
    """What a rank knows beyond the outputs of its row kernel: z, which ranks can compare.

    z at its best ids [T, K] and at the token_ids that are its own [T, J], float64; -inf elsewhere.
    """

    first_column: int
    token_ids: Tensor | None
    best: Tensor
    at_ids: Tensor

    @classmethod
    def of(cls, hidden: Tensor, token_ids: Tensor | None, num_topk: int, first_column: int) -> Part:
        """For the rows of `hidden`, still empty."""
        num_tokens, num_ids = hidden.shape[0], 0 if token_ids is None else token_ids.shape[1]
        return cls(
            first_column,
            token_ids,
            hidden.new_empty(num_tokens, num_topk, dtype=torch.float64),
            hidden.new_empty(num_tokens, num_ids, dtype=torch.float64),
        )

    def read(self, logits: Tensor, ids: Tensor, law: Law, rows: slice) -> None:
        """Fills in some rows from their logits, before these are overwritten."""
        self.best[rows] = _logits_of_law(logits, ids.to(torch.int64), law)
        if self.token_ids is not None:
            local = self.token_ids[rows] - self.first_column
            # an id of another rank is none here
            is_own = (self.token_ids[rows] >= 0) & (local < law.vocab_size)
            self.at_ids[rows] = _logits_of_law(logits, torch.where(is_own, local, -1), law)


def _logits_of_law(logits: Tensor, columns: Tensor, law: Law) -> Tensor:
    """z at some columns, rounded where the row kernels round; -inf at negative ones. float64."""
    scale, softcap, temperature = law.numbers
    inside = columns.clamp(min=0)
    values = logits.gather(1, inside)
    if law.bias is not None:
        values = values + law.bias[inside]
    if scale != 1.0:
        values = values * scale
    if softcap:
        values = softcap * torch.tanh(values / softcap)
    if law.temperatures is not None:
        values = values / law.temperatures.unsqueeze(1)
    elif temperature != 1.0:
        values = values / temperature
    return values.to(torch.float64).masked_fill(columns < 0, -math.inf)


def merge(
    part: Part, outputs: tuple[Tensor, ...], group: dist.ProcessGroup, num_topk: int
) -> tuple[Tensor, ...]:
    """The outputs for the whole vocabulary, on every rank alike, from one exchange.

    Ranks may have fewer than num_topk columns; what they lack counts as -inf.
    """
    ids, _, lse, tail_logprob, entropy, _ = outputs
    num_tokens, here = ids.shape
    real, ids = tail_logprob.dtype, ids.to(torch.float64)
    ids = torch.where(ids >= 0, ids + part.first_column, ids)
    padding = (0, num_topk - here)
    columns = [
        torch.nn.functional.pad(part.best, padding, value=-math.inf),
        torch.nn.functional.pad(ids, padding, value=-1.0),
        part.at_ids,
        torch.stack([lse, tail_logprob.to(lse.dtype), entropy.to(lse.dtype)], dim=1),
    ]
    own = torch.cat(columns, dim=1)
    if num_tokens == 0:
        everyone = own.new_empty(group.size(), *own.shape)
    else:
        gathered = own.new_empty(group.size() * num_tokens, own.shape[1])
        dist.all_gather_into_tensor(gathered, own, group)
        everyone = gathered.unflatten(0, (group.size(), num_tokens))
    widths = [num_topk, num_topk, part.at_ids.shape[1], 3]
    best, ids, at_ids, sums = everyone.split(widths, dim=2)
    best, ids = (values.transpose(0, 1).flatten(1) for values in (best, ids))
    merged = combine(best, ids, at_ids.amax(0), *sums.unbind(2), num_topk)
    ids, logprobs, lse, *rest = merged
    return (ids.to(torch.int32), logprobs.to(real), lse, *(values.to(real) for values in rest))


def combine(
    best: Tensor,
    ids: Tensor,
    at_ids: Tensor,
    lse_of: Tensor,
    tail_of: Tensor,
    entropy_of: Tensor,
    num_topk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(ids, logprobs, lse, tail_logprob, entropy, token_logprobs) of all parts together, float64.

    Args:
        best, ids: [T, P K], the parts' one after another, best first inside a part.
        at_ids: [T, J], z of token_ids.
        lse_of, tail_of, entropy_of: [P, T].
    """
    lse = torch.logsumexp(lse_of, 0)
    # parts in the order of their ids, a stable sort: of equal z the smaller id comes first
    ordered, order = best.sort(dim=1, descending=True, stable=True)
    kept, dropped = ordered[:, :num_topk], ordered[:, num_topk:]
    kept_ids = ids.gather(1, order)[:, :num_topk].masked_fill(kept == -math.inf, -1.0)
    # a part of nothing but -inf has no law of its own, and no weight
    is_empty = lse_of == -math.inf
    parts = torch.cat([(lse_of + tail_of).masked_fill(is_empty, -math.inf), dropped.T])
    tail = torch.logsumexp(parts, 0) - lse
    weight = (lse_of - lse).exp()
    share = weight * (entropy_of + (lse - lse_of))
    entropy = share.masked_fill(is_empty, 0.0).sum(0)
    is_lawless = ~lse.isfinite()
    rows = is_lawless.unsqueeze(1)
    return (
        kept_ids.masked_fill(rows, -1.0),
        (kept - lse.unsqueeze(1)).masked_fill(rows, math.nan),
        lse,
        tail.masked_fill(is_lawless, math.nan),
        entropy.masked_fill(is_lawless, math.nan),
        (at_ids - lse.unsqueeze(1)).masked_fill(rows, math.nan),
    )
