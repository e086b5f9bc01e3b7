# SPDX-License-Identifier: Apache-2.0
"""What the fused_linear ops share: a plan, and LM-head GEMMs with float32 logits.

Path A: a chunk of C tokens has its logits formed in a buffer of C x V float32 per head, a row
kernel turns the student's buffer into dZ in place, and two GEMMs take dX and dW from it. Path B
cuts the vocabulary too. C follows from the byte budget, so that nothing of size [T, V] exists
unless it fits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks

# a 16-bit head is widened to float32 in slices on CPU, where the 16-bit GEMM is 10 to 100 times
# slower; they may take this share of the workspace
_HEAD_SLICE_SHARE = 8
_MAX_HEAD_SLICE_ROWS = 8192
# with fewer tokens than these in a chunk of whole rows, reading the heads costs more than cutting
# the vocabulary and forming its logits again
_FEWEST_TOKENS = {"cpu": 16, "cuda": 128}
_FEWEST_COLUMNS = 64
NO_PATH_B = "this op needs whole rows"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut: tokens per chunk, columns per slice, head rows widened at a time."""

    num_tokens: int
    chunk_tokens: int
    vocab_size: int
    slice_columns: int
    head_slice_rows: int
    workspace_bytes: int
    why: str = ""

    @property
    def num_chunks(self) -> int:
        return -(-self.num_tokens // self.chunk_tokens) if self.num_tokens else 0

    @property
    def whole_rows(self) -> bool:
        """Path A: a chunk's logits exist whole."""
        return self.slice_columns == self.vocab_size

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(begin, end) of each chunk of tokens."""
        for begin in range(0, self.num_tokens, self.chunk_tokens):
            yield begin, min(begin + self.chunk_tokens, self.num_tokens)

    def slices(self) -> list[slice]:
        """The columns of each slice of the vocabulary."""
        starts = range(0, self.vocab_size, self.slice_columns)
        return [slice(b, min(b + self.slice_columns, self.vocab_size)) for b in starts]

    def __str__(self) -> str:
        widened = f", heads widened {self.head_slice_rows} rows at a time" * bool(
            self.head_slice_rows
        )
        sliced = "" if self.whole_rows else f" x {len(self.slices())} slices of the vocabulary"
        return (
            f"path {'A' if self.whole_rows else 'B'}: {self.num_chunks} chunk(s) of up to "
            f"{self.chunk_tokens} of {self.num_tokens} tokens{sliced}{widened}, "
            f"{self.workspace_bytes / 2**20:.1f} MiB workspace" + f" ({self.why})" * bool(self.why)
        )


def widens(tensor: Tensor) -> bool:
    """Whether GEMMs with this operand run on float32 copies of it."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)


def plan(
    op: str,
    num_tokens: int,
    vocab_size: int,
    heads: Sequence[Tensor],
    workspace_bytes: int,
    *,
    whole_rows: str | None = None,
) -> Plan:
    """The largest chunk whose buffers fit into `workspace_bytes`.

    Per token: one float32 (float64) row of logits per head, the gathered hidden states (twice
    where a 16-bit copy is widened) and the gradient of the first. Where that leaves chunks too
    short for a GEMM, the vocabulary is cut as well, unless `whole_rows` says why it cannot be.

    Raises:
        ValueError: the workspace does not even hold one token.
    """
    itemsize = _checks.real_dtype(heads[0]).itemsize
    hidden_sizes = [head.shape[1] for head in heads]
    fixed_bytes = itemsize * (sum(hidden_sizes) + hidden_sizes[0])
    row_bytes = 0
    if any(widens(head) for head in heads):
        row_bytes = itemsize * max(hidden_sizes)
        fixed_bytes += 2 * max(hidden_sizes)
    column_bytes = itemsize * len(heads)
    token_bytes = fixed_bytes + column_bytes * vocab_size
    fewest = min(num_tokens, _FEWEST_TOKENS.get(heads[0].device.type, _FEWEST_TOKENS["cuda"]))
    fits = (workspace_bytes - row_bytes) // token_bytes
    if whole_rows is not None or fits >= max(1, fewest):
        _checks.workspace(op, workspace_bytes, token_bytes + row_bytes, whole_rows)
        columns = vocab_size
        why = "" if fits >= max(1, fewest) else f"short chunks: {whole_rows}"
    else:
        least = min(vocab_size, _FEWEST_COLUMNS)
        _checks.workspace(op, workspace_bytes, fixed_bytes + column_bytes * least + row_bytes)
        columns = _slice_columns(
            num_tokens, vocab_size, least, workspace_bytes - row_bytes, fixed_bytes, column_bytes
        )
        why = f"whole rows of {fits} tokens would make GEMMs too short"
    token_bytes = fixed_bytes + column_bytes * columns
    slice_rows = 0
    if row_bytes:
        share = min(workspace_bytes // _HEAD_SLICE_SHARE, workspace_bytes - token_bytes)
        slice_rows = min(columns, _MAX_HEAD_SLICE_ROWS, max(1, share // row_bytes))
    slice_bytes = slice_rows * row_bytes
    chunk_tokens = max(1, min(num_tokens, (workspace_bytes - slice_bytes) // token_bytes))
    if num_tokens:
        # equal chunks: a short last one would run its GEMMs at a worse shape
        chunk_tokens = -(-num_tokens // -(-num_tokens // chunk_tokens))
    used = chunk_tokens * token_bytes + slice_bytes
    return Plan(num_tokens, chunk_tokens, vocab_size, columns, slice_rows, used, why)


def _slice_columns(
    num_tokens: int, vocab_size: int, least: int, budget: int, fixed_bytes: int, column_bytes: int
) -> int:
    """Columns of a slice such that a chunk is about as many tokens as a slice is columns.

    Every chunk reads the heads again and every slice the hidden states: a square wastes least.
    """
    tokens = max(1, min(num_tokens, int((budget / column_bytes) ** 0.5)))
    columns = (budget // tokens - fixed_bytes) // column_bytes
    columns = max(least, min(vocab_size, columns))
    # equal slices
    return -(-vocab_size // -(-vocab_size // columns))


def active_tokens(token_weights: Tensor | None) -> Tensor | None:
    """Indices of the tokens of non-zero weight; None if there are no weights.

    On a GPU this is a host sync: with weights, and in the backward of reduction "none", where the
    upstream gradient is one.
    """
    return None if token_weights is None else torch.nonzero(token_weights).squeeze(1)


def take(values: Tensor, token_idx: Tensor | None, begin: int, end: int) -> Tensor:
    """Rows [begin, end) of the active tokens, widened where the GEMM wants it."""
    rows = values[begin:end] if token_idx is None else values[token_idx[begin:end]]
    return rows.float() if widens(rows) else rows


def put(target: Tensor, token_idx: Tensor | None, begin: int, end: int, rows: Tensor) -> None:
    """Writes rows of the active tokens back to their places in dimension 0 of `target`."""
    if token_idx is None:
        target[begin:end] = rows
    else:
        target[token_idx[begin:end]] = rows.to(target.dtype)


def _head_slices(weight: Tensor, vocab_size: int, rows: int) -> Iterator[tuple[slice, Tensor]]:
    step = rows if widens(weight) else vocab_size
    for begin in range(0, vocab_size, step):
        end = min(begin + step, vocab_size)
        piece = weight[begin:end]
        yield slice(begin, end), piece.float() if widens(weight) else piece


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor, slice_rows: int) -> None:
    """out = hidden @ weight[:V].T with float32 (float64) accumulation and result, out [C, V]."""
    for columns, piece in _head_slices(weight, out.shape[1], slice_rows):
        target = out[:, columns]
        if piece.dtype == out.dtype:
            torch.mm(hidden, piece.t(), out=target)
        else:
            torch.ops.aten.mm.dtype_out(hidden, piece.t(), out.dtype, out=target)
        # or two slices would be alive while the next one is widened
        del piece


def grad_hidden(grad_logits: Tensor, weight: Tensor, slice_rows: int) -> Tensor:
    """grad_logits @ weight[:V], [C, D] in float32 (float64)."""
    result = grad_logits.new_empty(grad_logits.shape[0], weight.shape[1])
    for columns, piece in _head_slices(weight, grad_logits.shape[1], slice_rows):
        gradient = grad_logits[:, columns]
        if piece.dtype != gradient.dtype:
            gradient = gradient.to(piece.dtype)
            torch.ops.aten.mm.dtype_out(gradient, piece, result.dtype, out=result)
        elif columns.start == 0:
            # out= also keeps autocast from rounding the operands
            torch.mm(gradient, piece, out=result)
        else:
            result.addmm_(gradient, piece)
        del piece
    return result


def accumulate_grad_weight(
    target: Tensor, grad_logits: Tensor, hidden: Tensor, first: bool
) -> None:
    """target[:V] (+)= grad_logits.T @ hidden, in target's float32 (float64)."""
    target = target[: grad_logits.shape[1]]
    gradient = grad_logits.t()
    if hidden.dtype != target.dtype:
        gradient = gradient.to(hidden.dtype)
        if first:
            torch.ops.aten.mm.dtype_out(gradient, hidden, target.dtype, out=target)
        else:
            torch.ops.aten.addmm.dtype_out(target, gradient, hidden, target.dtype, out=target)
    elif first:
        torch.mm(gradient, hidden, out=target)
    else:
        target.addmm_(gradient, hidden)


class LowRank(NamedTuple):
    """The pair that adds up @ down to a head, in float32 (float64): small beside the head itself.

    Every product has an out=, which also keeps autocast from rounding its operands.
    """

    down: Tensor  # [r, D]
    up: Tensor  # [V, r]

    def columns(self, columns: slice) -> LowRank:
        """What a slice of the vocabulary sees of it."""
        return self._replace(up=self.up[columns])

    def project(self, hidden: Tensor) -> Tensor:
        """hidden @ down.T, [C, r]."""
        out = self.down.new_empty(hidden.shape[0], self.down.shape[0])
        return torch.mm(hidden.to(out.dtype), self.down.t(), out=out)

    def add_logits(self, logits: Tensor, projected: Tensor) -> None:
        """logits += hidden @ (up @ down)[:V].T, from `project`."""
        logits.addmm_(projected, self.up[: logits.shape[1]].t())

    def backproject(
        self,
        grad_logits: Tensor,
        hidden: Tensor,
        projected: Tensor,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> None:
        """Adds to the gradients of hidden states [C, D], down and up; None for what is frozen."""
        grad_hidden, grad_down, grad_up = grads
        vocab_size = grad_logits.shape[1]
        through = torch.mm(grad_logits, self.up[:vocab_size], out=torch.empty_like(projected))
        if grad_hidden is not None:
            grad_hidden.addmm_(through, self.down)
        if grad_down is not None:
            grad_down.addmm_(through.t(), hidden.to(through.dtype))
        if grad_up is not None:
            grad_up[:vocab_size].addmm_(grad_logits.t(), projected)


def new_buffer(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32 (float64) buffer on the device of `like`, for a GEMM to fill."""
    return like.new_empty(shape, dtype=_checks.real_dtype(like))


def new_grad_weight(weight: Tensor, vocab_size: int, num_tokens: int) -> Tensor:
    """Accumulator for dW: float32 (float64) [V_head, D], zero where no chunk will write."""
    buffer = new_buffer(weight, *weight.shape)
    buffer[vocab_size if num_tokens else 0 :].zero_()
    return buffer


def no_double_backward(*_: object) -> None:
    """The ops have first derivatives only, and say so.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "opd_kernels: the gradients of these losses have no derivative (create_graph=True). "
        "Use backend='reference' for second derivatives."
    )


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor, in place when the graph is not kept for another backward.

    In place, because a second copy of dW is the largest thing that the op would ever hold.

    Raises:
        RuntimeError: the backward is itself to be differentiated.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        no_double_backward()
    kept = torch.compiler.is_compiling() or type(gradient) is not Tensor
    if kept or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * factor.to(gradient.dtype)
    if factor.device.type == "cpu" and bool(factor == 1):
        # the usual case; the scalar is at hand on CPU, and dW is not worth a pass for nothing
        return gradient
    return gradient.mul_(factor.to(gradient.dtype))


def phase(tensor: Tensor, op: str, name: str) -> contextlib.AbstractContextManager:
    """Range `opd::<op>::<phase>` for profilers: NVTX on CUDA, torch's while it runs."""
    label = f"opd::{op}::{name}"
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(label)
    return torch.cuda.nvtx.range(label) if tensor.is_cuda else contextlib.nullcontext()
