# SPDX-License-Identifier: Apache-2.0
"""Vocabulary-parallel heads: which columns a rank has, and what ranks exchange between phases.

The ranks of the group hold consecutive rows of every head, cut alike, as torch.chunk and DTensor's
Shard(0) do it. Ranks exchange their row counts once per call, a few float64 per token and phase,
and the gradient of the hidden states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks, _laws
from .divergence import LSE, ROW_SUMS, TERMS

WHOLE_ROWS = "a vocabulary-parallel call holds its shard's rows whole"
# student, teacher, reference
_MOST_HEADS = 3
# columns of a row of state, as in csrc/core/divergence_row.h
_LSE = slice(0, 2)
_LARGEST = slice(2, 4)
_ARGMAX = slice(4, 6)
_TERMS = slice(6, _laws.STATE)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One rank's part of the vocabulary."""

    group: dist.ProcessGroup
    first_column: int
    num_columns: int
    total_columns: int
    # of the rank that has most: all cut their tokens as it does, since each chunk is exchanged
    most_columns: int

    def combine(self, state: Tensor, phase: int, with_statistics: bool) -> None:
        """Makes the state of a phase that of the whole vocabulary, on every rank alike."""
        if phase == LSE:
            self._combine_lse(state, with_statistics)
            return
        components = state[:, _laws.STATE :].unflatten(1, (-1, _laws.STATE_PER_COMPONENT))
        # of a component: the sum of its terms, then the sums that its terms need
        parts = [components[:, :, 1:]] if phase == ROW_SUMS else [components[:, :, :1]]
        if phase == TERMS:
            parts.append(state[:, _TERMS])
        self._sum(*parts)

    def _combine_lse(self, state: Tensor, with_statistics: bool) -> None:
        own = state[:, _LARGEST].clone()
        largest = own.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        # a shard whose logits are all -inf adds nothing; NaN stays
        decay = torch.where(own == largest, torch.ones_like(own), (own - largest).exp())
        state[:, _LSE] *= decay
        state[:, _LARGEST] = largest
        self._sum(state[:, _LSE])
        if with_statistics:
            # of equal logits the first column counts, as on one rank
            nowhere = torch.full_like(own, torch.inf)
            first = torch.where(own == largest, state[:, _ARGMAX], nowhere)
            dist.all_reduce(first, dist.ReduceOp.MIN, self.group)
            state[:, _ARGMAX] = first

    def _sum(self, *views: Tensor) -> None:
        flat = [view.reshape(view.shape[0], -1) for view in views]
        packed = torch.cat(flat, dim=1)
        dist.all_reduce(packed, dist.ReduceOp.SUM, self.group)
        widths = [part.shape[1] for part in flat]
        for view, part in zip(views, packed.split(widths, dim=1), strict=True):
            view.copy_(part.view(view.shape))

    def sum_gradients(self, *gradients: Tensor) -> None:
        """Of what is replicated: every shard of the vocabulary has added its part."""
        for gradient in gradients:
            if gradient.numel():
                dist.all_reduce(gradient, dist.ReduceOp.SUM, self.group)


def resolve(name: str) -> Shard | None:
    """The shard of a call from its `process_group` argument, made by `describe`."""
    if not name:
        return None
    group_name, *numbers = name.rsplit("/", 4)
    group = dist.distributed_c10d._resolve_process_group(group_name)
    return Shard(group, *(int(number) for number in numbers))


def describe(shard: Shard) -> str:
    """A string that stands for the shard in an op's arguments."""
    numbers = (
        shard.first_column,
        shard.num_columns,
        shard.total_columns,
        shard.most_columns,
    )
    return "/".join([shard.group.group_name, *(str(number) for number in numbers)])


def planned_size(name: str, vocab_size: int) -> int:
    """Columns that a plan counts with, on every rank alike, from what `vocabulary` returned."""
    group = resolve(name)
    return vocab_size if group is None else group.most_columns


def local_heads(
    op: str, heads: Mapping[str, Tensor], process_group: dist.ProcessGroup | None
) -> tuple[dict[str, Tensor], dist.ProcessGroup | None]:
    """Plain tensors of the heads, and the group that DTensor heads are sharded over."""
    if process_group is None and not any(type(head) is not Tensor for head in heads.values()):
        return dict(heads), None
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: process_group must be a torch.distributed.ProcessGroup, got "
            f"{type(process_group).__name__}."
        )
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as ShardPlacement

    plain = {}
    for side, head in heads.items():
        name = side if side.endswith("lm_head_weight") else f"{side}_lm_head_weight"
        if isinstance(head, DTensor):
            placements, mesh = head.placements, head.device_mesh
            if mesh.ndim != 1 or placements[0] != ShardPlacement(0):
                raise ValueError(
                    f"{op}: {name} must be a DTensor sharded in dimension 0 over a "
                    f"mesh of one dimension, got {placements} over {mesh.ndim}."
                )
            if process_group is not None and mesh.get_group() is not process_group:
                raise ValueError(
                    f"{op}: {name} must be sharded over process_group, got another mesh."
                )
            process_group = mesh.get_group()
            head = head.to_local()
        plain[side] = head
    return plain, process_group


def vocabulary(
    op: str,
    vocab_size: int | None,
    widths: Mapping[str, int],
    process_group: dist.ProcessGroup | None,
) -> tuple[int, str]:
    """(columns of the whole vocabulary that count, the shard as an op's argument or "").

    Ranks exchange the row counts of their heads, so that all of them refuse a bad cut alike.

    Raises:
        ValueError: the heads are cut at different rows, a rank has none that count, or ranks make
            different calls.
    """
    if process_group is None:
        return _checks.vocab_prefix(op, vocab_size, **widths), ""
    names = list(widths)
    counts = _exchanged(op, process_group, names, list(widths.values()), vocab_size)
    totals = {name: sum(rank[i] for rank in counts) for i, name in enumerate(names)}
    vocab_size = _checks.vocab_prefix(op, vocab_size, **totals)
    first = 0
    parts: list[tuple[int, int]] = []
    for rank, rows in enumerate(counts):
        # the end of this rank's rows, unless the columns that count end here
        ends = {min(vocab_size, first + count) for count in rows}
        if len(ends) > 1:
            found = ", ".join(f"{name} {count}" for name, count in zip(names, rows, strict=True))
            raise ValueError(
                f"{op}: {' and '.join(names)} must be cut at the same rows, got on rank {rank} "
                f"{found}. Pad the shorter head before it is sharded, and pass vocab_size."
            )
        end = ends.pop()
        if end == first:
            raise ValueError(
                f"{op}: every rank must hold at least one of the {vocab_size} columns that count, "
                f"got none on rank {rank} of {len(counts)}."
            )
        parts.append((first, end - first))
        first = end
    most = max(columns for _, columns in parts)
    return vocab_size, describe(
        Shard(process_group, *parts[process_group.rank()], vocab_size, most)
    )


def _exchanged(
    op: str, group: dist.ProcessGroup, names: list[str], own: list[int], vocab_size: int | None
) -> list[list[int]]:
    """Row counts of every rank, in its order, from one collective of a few numbers.

    In every call: a rank cannot know from its own counts that another's are as before, and ranks
    that disagreed about whether to ask would wait for each other for ever.
    """
    device = _device_of_counts(group)
    given = [len(names), -1 if vocab_size is None else int(vocab_size), *own]
    given += [0] * (2 + _MOST_HEADS - len(given))
    every = torch.empty(group.size() * len(given), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(every, torch.tensor(given, device=device), group)
    ranks = every.view(group.size(), -1).tolist()
    for rank, (heads, columns, *_) in enumerate(ranks):
        if heads != ranks[0][0] or columns != ranks[0][1]:
            first, other = (
                f"{count} heads and vocab_size={None if size < 0 else size}"
                for count, size, *_ in (ranks[0], ranks[rank])
            )
            raise ValueError(
                f"{op}: every rank must make the same call, got {first} on rank 0 and {other} on "
                f"rank {rank}."
            )
    return [counts[: len(names)] for _, _, *counts in ranks]


def _device_of_counts(group: dist.ProcessGroup) -> torch.device:
    """The CPU where the group has collectives there, so that nothing waits for a GPU."""
    if any(device.type == "cpu" for device in group._device_types):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
