# SPDX-License-Identifier: Apache-2.0
"""Vocabulary-parallel heads: which columns a rank has, and what ranks exchange between phases.

Each rank of the group holds rows [rank * n, (rank + 1) * n) of every head, n = ceil(V / ranks), as
torch.chunk and DTensor's Shard(0) cut them. Ranks exchange a few float64 per token and phase, and
the gradient of the hidden states.
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
    group_name, total = name.rsplit("/", 1)
    group = dist.distributed_c10d._resolve_process_group(group_name)
    return shard(group, int(total))


def describe(group: dist.ProcessGroup, total_columns: int) -> str:
    """A string that stands for the group and the vocabulary in an op's arguments."""
    return f"{group.group_name}/{total_columns}"


def shard(group: dist.ProcessGroup, total_columns: int) -> Shard:
    """This rank's part of `total_columns`."""
    size = -(-total_columns // group.size())
    first = min(total_columns, group.rank() * size)
    return Shard(group, first, min(size, total_columns - first), total_columns)


def local_size(name: str, vocab_size: int) -> int:
    """Columns of this rank, from what `vocabulary` returned."""
    group = resolve(name)
    return vocab_size if group is None else group.num_columns


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
        if isinstance(head, DTensor):
            placements, mesh = head.placements, head.device_mesh
            if mesh.ndim != 1 or placements[0] != ShardPlacement(0):
                raise ValueError(
                    f"{op}: {side}_lm_head_weight must be a DTensor sharded in dimension 0 over a "
                    f"mesh of one dimension, got {placements} over {mesh.ndim}."
                )
            if process_group is not None and mesh.get_group() is not process_group:
                raise ValueError(
                    f"{op}: {side}_lm_head_weight must be sharded over process_group, got another "
                    "mesh."
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
    """(columns of the whole vocabulary that count, the group as an op's argument or "")."""
    if process_group is None:
        return _checks.vocab_prefix(op, vocab_size, **widths), ""
    ranks = process_group.size()
    names, rows = list(widths), set(widths.values())
    if vocab_size is None:
        if len(rows) > 1:
            raise ValueError(
                f"{op}: {' and '.join(names)} must be cut at the same rows, got {dict(widths)}."
            )
        # the last ranks may have fewer rows: pass vocab_size where they do
        vocab_size = rows.pop() * ranks
    elif isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < ranks:
        raise ValueError(
            f"{op}: vocab_size must be an int of at least one column per rank ({ranks}), got "
            f"{vocab_size!r}."
        )
    own = shard(process_group, vocab_size)
    for name, width in widths.items():
        if width < own.num_columns or own.num_columns == 0:
            raise ValueError(
                f"{op}: {name} must hold rows [{own.first_column}, "
                f"{own.first_column + own.num_columns}) of {vocab_size} on rank "
                f"{process_group.rank()} of {ranks}, got {width} rows. Shards are cut as "
                "torch.chunk does, every head at the same rows."
            )
    return vocab_size, describe(process_group, vocab_size)
