# SPDX-License-Identifier: Apache-2.0
"""How a fused_linear call is cut so that all that it holds at one time fits into a byte budget.

Path A: a chunk of C tokens has its student logits formed in a buffer of C x V float32, which a row
kernel turns into dZ in place; the other models' logits are formed for C_t <= C of these tokens at a
time. Path B cuts the vocabulary too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import _buffers, _checks, _gemms, gemm

# a 16-bit head is widened to float32 in slices on CPU, where the 16-bit GEMM is 10 to 100 times
# slower; they may take this share of the workspace
_HEAD_SLICE_SHARE = 8
_MAX_HEAD_SLICE_ROWS = 8192
# with fewer tokens than these in a chunk of whole rows, reading the heads costs more than cutting
# the vocabulary and forming its logits again. On a GPU that is where 5S + 3T of path B, in GEMMs of
# full speed, takes as long as 3S + T in chunks that mostly read the heads and the float32 sum of
# dW, or the heads alone if the student's is frozen: tests/cut_model.py counts both
_FEWEST_TOKENS, _FEWEST_TOKENS_GPU, _FEWEST_TOKENS_FROZEN = 16, 104, 48
_FEWEST_COLUMNS = 64
# on a CPU the default budget buys 16-bit heads this share of their own size, and so many tokens at
# least: longer chunks are a tenth to a quarter quicker, which workspace_bytes may ask for. dW of a
# head that is trained is float32, twice its head, and counts as room that is taken
_SHARE_OF_TRAINED_HEADS, _SHARE_OF_FROZEN_HEADS, _TOKENS_OF_16_BITS = 3, 1, 64
NO_PATH_B = "this op needs whole rows"
# a GPU multiplies tiles of this many tokens (or columns of path B)
_TILE = 128
# from here on the float32 sum of dW is read and written in less time than its GEMM takes
_ENOUGH_TOKENS = 1024
# parts that a chunk's tokens are cut into for the other models, at most; path A is not entered for
# more than two, whose teacher GEMM would mostly read the head
_MOST_PARTS, _MOST_PARTS_OF_SHORT_CHUNKS = 4, 2
# per token of a chunk: what is gathered of its laws, its loss and statistics; its row of state
_LAW_BYTES = 256
_STATE_BYTES = 8 * (20 + 4 * 16)
# per column, of a tolerance: its mark, its id
_COLUMN_BYTES = 1 + 8
# a product tile of the GEMM, the fewest columns that are worth a slice, and an H200's rates
_TILE_TOKENS, _TILE_HIDDEN = 128, 256
_FEWEST_SPLIT_COLUMNS = 2048
_MOST_SPLITS = 8
# of the fastest count's time: what a smaller count may take instead
_WORTH_A_SPLIT = 1.1
_FLOPS, _BYTES_PER_SECOND, _LAUNCH_SECONDS = 790e12, 4.3e12, 4e-6
_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut.

    Tokens per chunk and, of these, per part of the other models; columns per slice; head rows
    widened at a time; slices that dX is added up from.
    """

    num_tokens: int
    chunk_tokens: int
    vocab_size: int
    slice_columns: int
    head_slice_rows: int
    workspace_bytes: int
    why: str = ""
    teacher_tokens: int = 0
    grad_hidden_splits: int = 1

    @property
    def num_chunks(self) -> int:
        return -(-self.num_tokens // self.chunk_tokens) if self.num_tokens else 0

    @property
    def whole_rows(self) -> bool:
        """Path A: a chunk's logits exist whole."""
        return self.slice_columns == self.vocab_size

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(begin, end) of each chunk of tokens."""
        yield from _pieces(self.num_tokens, self.chunk_tokens)

    def parts(self, num_tokens: int) -> Iterator[tuple[int, int]]:
        """(begin, end), in a chunk of so many tokens, of what the other models see at a time."""
        yield from _pieces(num_tokens, self.teacher_tokens or self.chunk_tokens)

    def slices(self) -> list[slice]:
        """The columns of each slice of the vocabulary."""
        return [slice(*ends) for ends in _pieces(self.vocab_size, self.slice_columns)]

    def __str__(self) -> str:
        notes = []
        if self.head_slice_rows:
            notes.append(f", heads widened {self.head_slice_rows} rows at a time")
        if 0 < self.teacher_tokens < self.chunk_tokens:
            notes.append(f", the teacher's logits {self.teacher_tokens} tokens at a time")
        if self.grad_hidden_splits > 1:
            notes.append(f", dX from {self.grad_hidden_splits} slices")
        sliced = "" if self.whole_rows else f" x {len(self.slices())} slices of the vocabulary"
        return (
            f"path {'A' if self.whole_rows else 'B'}: {self.num_chunks} chunk(s) of up to "
            f"{self.chunk_tokens} of {self.num_tokens} tokens{sliced}{''.join(notes)}, "
            f"{self.workspace_bytes / 2**20:.1f} MiB workspace" + f" ({self.why})" * bool(self.why)
        )


def _pieces(total: int, step: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, total, step):
        yield begin, min(begin + step, total)


def plan(
    op: str,
    num_tokens: int,
    vocab_size: int,
    heads: Sequence[Tensor],
    workspace_bytes: int,
    *,
    whole_rows: str | None = None,
    in_parts: bool = True,
    low_rank: int = 0,
    per_token: int = 0,
    packs_columns: bool = False,
    per_call: int = 0,
    frozen_head: bool = False,
    trained: bool = True,
) -> Plan:
    """The cut whose buffers fit into `workspace_bytes`.

    Per token: one float32 (float64) row of logits per head, the gathered hidden states (twice
    where a 16-bit copy is widened) and the gradient of the first. Where that leaves chunks too
    short for a GEMM, the vocabulary is cut as well, unless `whole_rows` says why it cannot be.

    Args:
        heads: student's first; only their shapes, dtypes and device are read.
        in_parts: on a GPU, the other models may have fewer tokens at a time than the student.
        low_rank: r of a low-rank pair; counted on a GPU.
        per_token: bytes that the caller holds per token of a chunk besides.
        per_call: bytes that it holds whatever the chunk; the default budget is beside them.
        frozen_head: gradients are formed, but not the student head's.
        packs_columns: a gradient_tolerance lists the columns that count; counted on a GPU.
        trained: a gradient of the first head is formed; counted on a CPU.

    Raises:
        ValueError: the workspace does not even hold one token.
    """
    if workspace_bytes == _checks.DEFAULT_WORKSPACE_BYTES:
        per_call = 0
    if _gemms.on_gpu(heads[0]):
        costs = _costs(vocab_size, heads, low_rank, per_token, packs_columns)
        costs = dataclasses.replace(costs, call=costs.call + per_call)
        fewest = _FEWEST_TOKENS_FROZEN if frozen_head else _FEWEST_TOKENS_GPU
        return _gpu_plan(op, num_tokens, costs, workspace_bytes, whole_rows, in_parts, fewest)
    _checks.byte_count(op, workspace_bytes)
    itemsize = _checks.real_dtype(heads[0]).itemsize
    fixed_bytes, row_bytes = _cpu_bytes(heads)
    fixed_bytes += per_token
    column_bytes = itemsize * len(heads)
    token_bytes = fixed_bytes + column_bytes * vocab_size
    fewest = min(num_tokens, _FEWEST_TOKENS)
    if workspace_bytes == _checks.DEFAULT_WORKSPACE_BYTES:
        workspace_bytes = _default_on_cpu(vocab_size, heads, token_bytes + row_bytes, trained)
    # what a call that cannot cut the vocabulary needs at least
    one_token = 0 if whole_rows is None else token_bytes + row_bytes
    workspace_bytes = min(workspace_bytes, per_call + max(_buffers.KEPT_BYTES, one_token))
    workspace_bytes -= per_call
    reserved = 0
    if gemm.is_own(heads[0]):
        most_tokens = min(num_tokens, workspace_bytes // token_bytes)
        reserved = gemm.workspace_bytes(max(most_tokens, *(head.shape[1] for head in heads)))
        # a budget of a few tokens is kept to but for this
        if workspace_bytes - reserved < max(reserved, one_token):
            reserved = 0
    workspace_bytes -= reserved
    fits = (workspace_bytes - row_bytes) // token_bytes
    if whole_rows is not None or fits >= max(1, fewest):
        _checks.workspace(
            op, per_call + workspace_bytes, per_call + token_bytes + row_bytes, whole_rows
        )
        columns = vocab_size
        why = "" if fits >= max(1, fewest) else f"short chunks: {whole_rows}"
    else:
        least = min(vocab_size, _FEWEST_COLUMNS)
        smallest = per_call + fixed_bytes + column_bytes * least + row_bytes
        _checks.workspace(op, per_call + workspace_bytes, smallest)
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
    used = per_call + chunk_tokens * token_bytes + slice_bytes + reserved
    return Plan(num_tokens, chunk_tokens, vocab_size, columns, slice_rows, used, why, chunk_tokens)


def check(
    op: str,
    vocab_size: int,
    heads: Sequence[Tensor],
    workspace_bytes: int,
    *,
    whole_rows: str | None = None,
    per_token: int = 0,
    per_call: int = 0,
) -> None:
    """Of `plan`, what can be refused before the op runs, for any number of tokens.

    Raises:
        ValueError: the workspace does not even hold one token.
    """
    _checks.byte_count(op, workspace_bytes)
    columns = vocab_size if whole_rows is not None else min(vocab_size, _FEWEST_COLUMNS)
    fixed_bytes, row_bytes = _cpu_bytes(heads)
    if _gemms.on_gpu(heads[0]):
        fixed_bytes, row_bytes = sum(head.dtype.itemsize * head.shape[1] for head in heads), 0
    row_of_logits = _checks.real_dtype(heads[0]).itemsize * _buffers.row_stride(heads[0], columns)
    smallest = fixed_bytes + per_token + len(heads) * row_of_logits
    if workspace_bytes == _checks.DEFAULT_WORKSPACE_BYTES:
        per_call = 0
    _checks.workspace(op, workspace_bytes, per_call + smallest + row_bytes, whole_rows)


def _cpu_bytes(heads: Sequence[Tensor]) -> tuple[int, int]:
    """(per token beside its logits, per row of a head that is widened)."""
    itemsize = _checks.real_dtype(heads[0]).itemsize
    hidden_sizes = [head.shape[1] for head in heads]
    fixed_bytes = itemsize * (sum(hidden_sizes) + hidden_sizes[0])
    if not any(_gemms.widens(head) for head in heads):
        return fixed_bytes, 0
    return fixed_bytes + 2 * max(hidden_sizes), itemsize * max(hidden_sizes)


def _default_on_cpu(
    vocab_size: int, heads: Sequence[Tensor], token_bytes: int, trained: bool
) -> int:
    """The budget where the caller has not asked for less than a GPU gets.

    From `vocab_size`, not from the rows of the heads, which differ between ranks.
    """
    if heads[0].dtype == _checks.real_dtype(heads[0]):
        return _checks.DEFAULT_WORKSPACE_BYTES
    hidden_sizes = [head.shape[1] for head in heads]
    share = _SHARE_OF_TRAINED_HEADS if trained else _SHARE_OF_FROZEN_HEADS
    of_heads = heads[0].dtype.itemsize * sum(hidden_sizes) * vocab_size // share
    fewest = gemm.workspace_bytes(max(hidden_sizes)) + _TOKENS_OF_16_BITS * token_bytes
    return max(fewest, of_heads)


def _slice_columns(
    num_tokens: int, vocab_size: int, least: int, budget: int, fixed_bytes: int, column_bytes: int
) -> int:
    """Columns of a slice such that a chunk is about as many tokens as a slice is columns.

    Every chunk reads the heads again and every slice the hidden states: a square wastes least.
    """
    # what a token takes beside its logits may be most of it: no more than half of the budget
    square, most = int((budget / column_bytes) ** 0.5), budget // (2 * max(1, fixed_bytes))
    tokens = max(1, min(num_tokens, square, most))
    columns = (budget // tokens - fixed_bytes) // column_bytes
    columns = max(least, min(vocab_size, columns))
    # equal slices
    return -(-vocab_size // -(-vocab_size // columns))


# -- on a GPU ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Costs:
    """Bytes: of the call; per token and per logit, of the student and of the other models."""

    vocab_size: int
    hidden_size: int
    num_others: int
    itemsize: int
    call: int
    student_token: int
    other_token: int
    multiprocessors: int
    # where the buffers are
    like: Tensor

    def student(self, columns: int, *, is_slice: bool = False) -> int:
        """Per token of a chunk. Slices add dX up, on a copy of its rows, and keep a state."""
        more = self.itemsize * self.hidden_size + _STATE_BYTES if is_slice else 0
        return self.student_token + self.row_of_logits(columns) + more

    def other(self, columns: int) -> int:
        """Per token of a part, all other models together."""
        return self.other_token + self.num_others * self.row_of_logits(columns)

    def row_of_logits(self, columns: int) -> int:
        """With what it takes that the next row is aligned."""
        return self.itemsize * _buffers.row_stride(self.like, columns)

    def splits(self, tokens: int, part: int, columns: int) -> int:
        """Slices of dX; their sums take the place of a teacher's logits, which dZ has used up."""
        wanted = grad_hidden_splits(tokens, self.hidden_size, columns, self.multiprocessors)
        if self.num_others == 0:
            return wanted
        return max(1, min(wanted, part * columns // (max(1, tokens) * self.hidden_size)))


def _costs(
    vocab_size: int,
    heads: Sequence[Tensor],
    low_rank: int,
    per_token: int,
    packs_columns: bool,
) -> _Costs:
    real = _checks.real_dtype(heads[0]).itemsize
    hidden_sizes = [head.shape[1] for head in heads]
    sizes = [head.dtype.itemsize * head.shape[1] for head in heads]
    # dX of the chunk beside the gathered hidden states
    student = sizes[0] + real * hidden_sizes[0] + _LAW_BYTES + per_token
    # the column sums of dZ, for a bias
    call = (real + _COLUMN_BYTES * packs_columns) * vocab_size
    if low_rank:
        # float32 hidden states, their projection and its halves, and what comes back through B
        student += real * hidden_sizes[0] + 6 * real * low_rank
        # float32 copies of A and B, and B as two halves
        call += real * low_rank * (hidden_sizes[0] + 2 * vocab_size)
    return _Costs(
        vocab_size=vocab_size,
        hidden_size=hidden_sizes[0],
        num_others=len(heads) - 1,
        itemsize=real,
        call=call,
        student_token=student,
        other_token=sum(sizes[1:]),
        multiprocessors=multiprocessors(heads[0].device),
        like=heads[0],
    )


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; an H200's where there is none."""
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _gpu_plan(
    op: str,
    num_tokens: int,
    costs: _Costs,
    workspace_bytes: int,
    whole_rows: str | None,
    in_parts: bool,
    fewest: int,
) -> Plan:
    vocab_size = costs.vocab_size
    budget = workspace_bytes - costs.call
    student, other = costs.student(vocab_size), costs.other(vocab_size)
    if not in_parts:
        student += _STATE_BYTES
    if costs.num_others == 0:
        student += _partial_bytes(costs, max(1, budget // student), vocab_size)
    counts = range(1, (_MOST_PARTS if in_parts and costs.num_others else 1) + 1)
    of_short = [m for m in counts if m <= _MOST_PARTS_OF_SHORT_CHUNKS]
    fits = max(m * (budget // (m * student + other)) for m in of_short)
    is_long = fits >= max(1, min(num_tokens, fewest))
    if whole_rows is None and not is_long:
        return _gpu_slices(op, num_tokens, costs, workspace_bytes, fits)
    _checks.workspace(op, workspace_bytes, costs.call + student + other, whole_rows)
    tokens, part = _cut_tokens(num_tokens, student, other, budget, counts)
    splits = costs.splits(tokens, part, vocab_size)
    used = costs.call + tokens * student + part * other
    why = "" if is_long else f"short chunks: {whole_rows}"
    return Plan(num_tokens, tokens, vocab_size, vocab_size, 0, used, why, part, splits)


def _partial_bytes(costs: _Costs, tokens: int, columns: int) -> int:
    """Of the partial sums of dX per token, where there is no teacher's buffer to hold them.

    For the longest chunk and for those that are shorter, which have more of them.
    """
    splits = 1
    while tokens >= 1:
        splits = max(splits, costs.splits(tokens, 0, columns))
        tokens //= 2
    return splits * costs.itemsize * costs.hidden_size if splits > 1 else 0


def _cut_tokens(
    num_tokens: int, student: int, other: int, budget: int, counts: Sequence[int]
) -> tuple[int, int]:
    """(tokens of a chunk, tokens of a part of it) such that both fit."""
    tokens, part = 1, 1
    for count in counts:
        fits = _aligned(budget // (count * student + other))
        if count > 1 and fits < _TILE:
            break
        if count * fits > tokens:
            tokens, part = count * fits, fits
        if tokens >= min(max(1, num_tokens), _ENOUGH_TOKENS):
            break
    if num_tokens <= tokens:
        tokens = max(1, num_tokens)
    else:
        # equal chunks, as far as whole tiles allow
        even = -(-num_tokens // -(-num_tokens // tokens))
        tokens = min(tokens, _aligned_up(even) if tokens % _TILE == 0 else even)
    # a chunk that has become shorter may need fewer parts
    for count in counts:
        even = -(-tokens // count)
        even = min(tokens, _aligned_up(even) if even > _TILE else even)
        if tokens * student + even * other <= budget:
            return tokens, even
    return tokens, min(tokens, part)


def _gpu_slices(op: str, num_tokens: int, costs: _Costs, workspace_bytes: int, fits: int) -> Plan:
    """Path B: all models have the tokens of a chunk and the columns of a slice."""

    def token_bytes(columns: int) -> int:
        partial = 0
        if costs.num_others == 0:
            partial = _partial_bytes(costs, max(1, num_tokens), columns)
        return costs.student(columns, is_slice=True) + costs.other(columns) + partial

    vocab_size, budget = costs.vocab_size, workspace_bytes - costs.call
    least = min(vocab_size, _FEWEST_COLUMNS)
    _checks.workspace(op, workspace_bytes, costs.call + token_bytes(least))
    column_bytes = costs.itemsize * (1 + costs.num_others)
    columns = _slice_columns(num_tokens, vocab_size, least, budget, token_bytes(0), column_bytes)
    aligned = min(vocab_size, _aligned_up(columns))
    if token_bytes(aligned) <= budget:
        columns = aligned
    elif token_bytes(columns) > budget:
        # what rows are aligned to was not in the count
        columns -= columns % _buffers.ROW_ALIGNMENT
    tokens = max(1, min(num_tokens, _aligned(budget // token_bytes(columns))))
    if num_tokens > tokens:
        even = -(-num_tokens // -(-num_tokens // tokens))
        tokens = min(tokens, _aligned_up(even) if tokens % _TILE == 0 else even)
    why = f"whole rows of {fits} tokens would make GEMMs too short"
    used = costs.call + tokens * token_bytes(columns)
    splits = costs.splits(tokens, tokens, columns)
    return Plan(num_tokens, tokens, vocab_size, columns, 0, used, why, tokens, splits)


def _aligned(count: int) -> int:
    return count // _TILE * _TILE if count >= _TILE else count


def _aligned_up(count: int) -> int:
    return -(-count // _TILE) * _TILE


def grad_hidden_splits(tokens: int, hidden_size: int, vocab_size: int, multiprocessors: int) -> int:
    """Slices of the vocabulary that dX = dZ W is added up from, so that its tiles fill the GPU.

    dX has tokens x hidden_size / (128 x 256) tiles, each a sum over the whole vocabulary: 64 for
    1,024 tokens and a hidden size of 2,048, on 132 multiprocessors. k slices make k times as many,
    each 1/k as long; writing and reading the partial sums is what they cost, and one more product
    where k does not divide the columns. 1 is a plain GEMM.
    """
    tiles = -(-tokens // _TILE_TOKENS) * -(-hidden_size // _TILE_HIDDEN)
    tile_flops = 2 * _TILE_TOKENS * _TILE_HIDDEN * vocab_size
    tile_seconds = tile_flops / (_FLOPS / multiprocessors)
    partial_seconds = 2 * 4 * tokens * hidden_size / _BYTES_PER_SECOND

    def seconds(splits: int) -> float:
        waves = -(-tiles * splits // multiprocessors)
        if splits == 1:
            return waves * tile_seconds
        width = _gemms.split_width(vocab_size, splits)
        left = vocab_size - splits * width
        extra = splits * partial_seconds
        if left:
            whole_waves = -(-tiles // multiprocessors)
            extra += whole_waves * tile_seconds * left / vocab_size
            extra += partial_seconds + _LAUNCH_SECONDS
        return waves * tile_seconds * width / vocab_size + extra

    most = max(1, min(_MOST_SPLITS, vocab_size // _FEWEST_SPLIT_COLUMNS))
    times = [seconds(splits) for splits in range(1, most + 1)]
    enough = _WORTH_A_SPLIT * min(times)
    return next(splits for splits, time in enumerate(times, 1) if time <= enough)
