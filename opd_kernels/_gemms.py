# SPDX-License-Identifier: Apache-2.0
"""The LM-head GEMMs of the fused_linear ops: float32 (float64) results from operands of any width.

On a GPU 16-bit heads multiply as they are, and dZ is 16 bits wide too. On CPU, where the library's
16-bit GEMM may be 10 to 100 times slower, heads are widened in slices, or as our own GEMM packs
them. Every product has an out=, which also keeps autocast from rounding its operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _pages
from .gemm import gemm, is_own

# opd_dtype_t of the 16-bit dtypes, and that of dZ in the dtype of its logits
_NARROW = {torch.bfloat16: 2, torch.float16: 3}
AS_LOGITS = -1
# columns of a slice of a split sum are a multiple of the first of these that leaves none over: the
# GEMMs read 64 columns of 16 bits at a time, and 16 bytes at an address
_ALIGNMENTS = (128, 64, 32, 16, 8)


def on_gpu(tensor: Tensor) -> bool:
    """Whether a call on this tensor takes the paths of a GPU; tests switch it."""
    return tensor.device.type != "cpu"


def widens(tensor: Tensor) -> bool:
    """Whether GEMMs with this operand run on float32 copies of it."""
    return not on_gpu(tensor) and tensor.dtype in _NARROW and not is_own(tensor)


def grad_dtype(head: Tensor) -> int:
    """grad_dtype of the row kernels: dZ has the width of the head's GEMMs."""
    return _NARROW.get(head.dtype, AS_LOGITS) if on_gpu(head) else AS_LOGITS


def gradient_of(logits: Tensor, head: Tensor, number: int) -> Tensor:
    """dZ [C, V] where a row kernel called with grad_dtype `number` has left it."""
    if number == AS_LOGITS:
        return logits
    return logits.view(head.dtype)[:, : logits.shape[1]]


def _multiply_batches_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype != out.dtype and not left.is_cuda:
        left, right = left.to(out.dtype), right.to(out.dtype)
    if left.dtype != out.dtype:
        torch.ops.aten.bmm.dtype_out(left, right, out.dtype, out=out)
    else:
        torch.bmm(left, right, out=out)


def _head_slices(weight: Tensor, vocab_size: int, rows: int) -> Iterator[tuple[slice, Tensor]]:
    step = rows if widens(weight) else vocab_size
    for begin in range(0, vocab_size, step):
        end = min(begin + step, vocab_size)
        piece = weight[begin:end]
        yield slice(begin, end), piece.float() if widens(weight) else piece


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor, slice_rows: int) -> None:
    """out = hidden @ weight[:V].T with float32 (float64) accumulation and result, out [C, V]."""
    for columns, piece in _head_slices(weight, out.shape[1], slice_rows):
        gemm(out[:, columns], hidden, piece.t())
        # or two slices would be alive while the next one is widened
        del piece


def grad_hidden(
    grad_logits: Tensor,
    weight: Tensor,
    slice_rows: int,
    splits: int = 1,
    spare: Tensor | None = None,
) -> Tensor:
    """grad_logits @ weight[:V], [C, D] in float32 (float64).

    Args:
        slice_rows: of the head, widened at a time, where they must be.
        splits: slices of the vocabulary whose products run side by side and are then added up, in
            their order: for a chunk too short to fill a GPU.
        spare: memory for these partial products; fewer slices where it holds fewer.
    """
    num_tokens, vocab_size = grad_logits.shape
    result = new_buffer(weight, num_tokens, weight.shape[1])
    if spare is not None:
        splits = min(splits, spare.numel() // max(1, result.numel()))
    width = split_width(vocab_size, splits)
    if splits > 1 and width > 0 and not widens(weight):
        _add_up_slices(result, grad_logits, weight, splits, width, spare)
        return result
    for columns, piece in _head_slices(weight, vocab_size, slice_rows):
        gemm(result, grad_logits[:, columns], piece, accumulate=columns.start > 0)
        del piece
    return result


def split_width(vocab_size: int, splits: int) -> int:
    """Columns of each of so many slices; what they leave over is a GEMM more.

    All columns where an alignment allows it, else all but fewer than 128 for each slice.
    """
    splits = max(1, splits)
    for alignment in _ALIGNMENTS:
        if vocab_size % (splits * alignment) == 0:
            return vocab_size // splits
    return vocab_size // splits // _ALIGNMENTS[0] * _ALIGNMENTS[0]


def _add_up_slices(
    result: Tensor,
    grad_logits: Tensor,
    weight: Tensor,
    splits: int,
    width: int,
    spare: Tensor | None,
) -> None:
    vocab_size, cut = grad_logits.shape[1], splits * width
    shape = (splits, *result.shape)
    if spare is None:
        partial = result.new_empty(shape)
    else:
        partial = spare.view(-1)[: splits * result.numel()].view(shape)
    left = grad_logits[:, :cut].unflatten(1, (splits, width)).transpose(0, 1)
    _multiply_batches_into(partial, left, weight[:cut].unflatten(0, (splits, width)))
    torch.sum(partial, 0, out=result)
    if cut < vocab_size:
        gemm(result, grad_logits[:, cut:], weight[cut:vocab_size], accumulate=True)


def accumulate_grad_weight(
    target: Tensor, grad_logits: Tensor, hidden: Tensor, first: bool, factor: float = 1.0
) -> None:
    """target[:V] (+)= factor * grad_logits.T @ hidden, in target's float32 (float64)."""
    target = target[: grad_logits.shape[1]]
    gemm(target, grad_logits.t(), hidden, accumulate=not first, factor=factor)


def halves(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Float32 values as the sum of two of 16 bits: what rounding to one would have lost is kept."""
    high = values.to(dtype)
    return high, (values - high).to(dtype)


class LowRank(NamedTuple):
    """The pair that adds up @ down to a head, in float32 (float64): small beside the head itself.

    Where dZ has 16 bits, `up` is there a second time as two halves side by side, so that its
    products stay as accurate as float32 ones and still read dZ as it is.
    """

    down: Tensor  # [r, D]
    up: Tensor  # [V, r]
    up_halves: Tensor | None = None  # [V, 2 r]

    @classmethod
    def of(cls, down: Tensor, up: Tensor, head: Tensor, number: int) -> LowRank:
        """From A and B of a call whose row kernels get grad_dtype `number`."""
        real = _checks.real_dtype(head)
        up = up.to(real)
        both = None if number == AS_LOGITS else torch.cat(halves(up, head.dtype), dim=1)
        return cls(down.to(real), up, both)

    def columns(self, columns: slice) -> LowRank:
        """What a slice of the vocabulary sees of it."""
        both = None if self.up_halves is None else self.up_halves[columns]
        return self._replace(up=self.up[columns], up_halves=both)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden @ down.T, [C, r]."""
        out = self.down.new_empty(hidden.shape[0], self.down.shape[0])
        gemm(out, hidden.to(out.dtype), self.down.t(), thin=True)
        return out

    def add_logits(self, logits: Tensor, projected: Tensor) -> None:
        """logits += hidden @ (up @ down)[:V].T, from `project`."""
        gemm(logits, projected, self.up[: logits.shape[1]].t(), accumulate=True, thin=True)

    def backproject(
        self,
        grad_logits: Tensor,
        hidden: Tensor,
        projected: Tensor,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> None:
        """Adds to the gradients of hidden states [C, D], down and up; None for what is frozen."""
        grad_hidden, grad_down, grad_up = grads
        vocab_size, rank = grad_logits.shape[1], self.down.shape[0]
        is_narrow = grad_logits.dtype != self.up.dtype
        if is_narrow:
            both = projected.new_empty(projected.shape[0], 2 * rank)
            gemm(both, grad_logits, self.up_halves[:vocab_size], thin=True)
            through = both[:, :rank] + both[:, rank:]
        else:
            through = torch.empty_like(projected)
            gemm(through, grad_logits, self.up[:vocab_size], thin=True)
        if grad_hidden is not None:
            gemm(grad_hidden, through, self.down, accumulate=True, thin=True)
        if grad_down is not None:
            gemm(grad_down, through.t(), hidden.to(through.dtype), accumulate=True, thin=True)
        if grad_up is not None:
            parts = halves(projected, grad_logits.dtype) if is_narrow else (projected,)
            for part in parts:
                gemm(grad_up[:vocab_size], grad_logits.t(), part, accumulate=True, thin=True)


def new_buffer(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32 (float64) buffer on the device of `like`, for a GEMM to fill."""
    return like.new_empty(shape, dtype=_checks.real_dtype(like))


def new_grad_weight(weight: Tensor, vocab_size: int, num_tokens: int) -> Tensor:
    """Accumulator for dW: float32 (float64) [V_head, D], zero where no chunk will write."""
    buffer = new_buffer(weight, *weight.shape)
    if buffer.dtype == weight.dtype:
        # the sum of a 16-bit head goes back in small pieces, and its edges would count
        _pages.ask_for_huge(buffer)
    buffer[vocab_size if num_tokens else 0 :].zero_()
    return buffer
