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
import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, gemm

# a 16-bit head is widened to float32 in slices on CPU, where the 16-bit GEMM is 10 to 100 times
# slower; they may take this share of the workspace
_HEAD_SLICE_SHARE = 8
_MAX_HEAD_SLICE_ROWS = 8192
# with fewer tokens than these in a chunk of whole rows, reading the heads costs more than cutting
# the vocabulary and forming its logits again
_FEWEST_TOKENS = {"cpu": 16, "cuda": 128}
_FEWEST_COLUMNS = 64
# on a CPU: buffers up to this size are kept between calls, and no plan asks for more than this of a
# larger budget
KEPT_BYTES = 256 << 20
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
    is_half = tensor.dtype in (torch.bfloat16, torch.float16)
    return is_half and tensor.device.type == "cpu" and not gemm.is_own(tensor)


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
    _checks.byte_count(op, workspace_bytes)
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
    # what a call that cannot cut the vocabulary needs at least
    one_token = 0 if whole_rows is None else token_bytes + row_bytes
    if heads[0].device.type == "cpu":
        workspace_bytes = min(workspace_bytes, max(KEPT_BYTES, one_token))
    reserved = 0
    if gemm.is_own(heads[0]):
        most_tokens = min(num_tokens, workspace_bytes // token_bytes)
        reserved = gemm.workspace_bytes(max(most_tokens, *hidden_sizes))
        # a budget of a few tokens is kept to but for this
        if workspace_bytes - reserved < max(reserved, one_token):
            reserved = 0
    workspace_bytes -= reserved
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
    used = chunk_tokens * token_bytes + slice_bytes + reserved
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
        gemm.gemm(out[:, columns], hidden, piece.t())
        # or two slices would be alive while the next one is widened
        del piece


def grad_hidden(grad_logits: Tensor, weight: Tensor, slice_rows: int) -> Tensor:
    """grad_logits @ weight[:V], [C, D] in float32 (float64)."""
    result = grad_logits.new_empty(grad_logits.shape[0], weight.shape[1])
    for columns, piece in _head_slices(weight, grad_logits.shape[1], slice_rows):
        gradient = grad_logits[:, columns]
        if not gemm.is_own(gradient):
            gradient = gradient.to(piece.dtype)
        gemm.gemm(result, gradient, piece, accumulate=columns.start > 0)
        del piece
    return result


def accumulate_grad_weight(
    target: Tensor, grad_logits: Tensor, hidden: Tensor, first: bool
) -> None:
    """target[:V] (+)= grad_logits.T @ hidden, in target's float32 (float64)."""
    gradient = grad_logits.t()
    if not gemm.is_own(grad_logits):
        gradient = gradient.to(hidden.dtype)
    gemm.gemm(target[: grad_logits.shape[1]], gradient, hidden, accumulate=not first)


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


class _Kept(threading.local):
    """The buffer that this thread's next call may take."""

    buffer: Tensor | None = None


_kept = _Kept()


@contextlib.contextmanager
def borrowed_buffer(like: Tensor, *shape: int) -> Iterator[Tensor]:
    """`new_buffer` for as long as the block runs.

    On a CPU its memory is kept for this thread's next call, up to KEPT_BYTES: the system hands out
    pages one fault at a time, which may cost a tenth of a whole loss. `release_workspace` frees it.
    """
    real, size = _checks.real_dtype(like), math.prod(shape)
    reusable = (
        like.device.type == "cpu"
        and real == torch.float32
        and size * real.itemsize <= KEPT_BYTES
        # tests fill new memory with NaN to see who reads it unwritten
        and not torch.are_deterministic_algorithms_enabled()
    )
    if not reusable:
        yield new_buffer(like, *shape)
        return
    # nobody else finds it until it is given back
    kept, _kept.buffer = _kept.buffer, None
    if kept is None or kept.numel() < size:
        kept = None
        # one of inference mode's could not be written to outside of it
        with torch.inference_mode(False):
            kept = new_buffer(like, size)
    try:
        yield kept[:size].view(shape)
    finally:
        _kept.buffer = kept


def release_workspace() -> None:
    """Frees what this thread keeps for its next call on a CPU, at most 256 MiB."""
    _kept.buffer = None


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
