# SPDX-License-Identifier: Apache-2.0
"""What is run: shapes of real models, tiny ones for a dry run, their inputs and bare GEMMs."""

from __future__ import annotations

import copy
import re
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.device import Device, Run
from benchmarks.shapes import Shape

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
TOLERANCES = (1e-3, 1e-4, 1e-5)
HEADS = ("trained", "frozen")
# parts that K of dX is cut into: a chunk of dX has too few tiles to fill the machine
SPLITS = (1, 2, 4, 8)
# what a chunk's buffers may take: the op's default, and a dry run's, which makes several chunks
WORKSPACE_BYTES = 1 << 30
DRY_WORKSPACE_BYTES = 1 << 17

# the one that matters most first, for a run that is cut short
SHAPES = tuple(
    Shape(8192, vocab_size, *sizes)
    for vocab_size in (151_936, 128_256)
    for sizes in ((2048, 5120), (2048, 4096), (4096, 8192))
)
DRY_SHAPES = (Shape(48, 512, 24, 40), Shape(48, 256, 32, 40))
PRECISION_SHAPE = Shape(256, 32_000, 1024, 2048)
DRY_PRECISION_SHAPE = Shape(16, 301, 24, 40)


class Sizes(NamedTuple):
    """Everything whose size a dry run changes."""

    shapes: tuple[Shape, ...]
    precision: Shape
    workspace_bytes: int
    dtype: torch.dtype
    copy_bytes: int
    square: int
    row_tokens: int
    rounds: int


REAL = Sizes(SHAPES, PRECISION_SHAPE, WORKSPACE_BYTES, torch.bfloat16, 4 << 30, 8192, 1024, 7)
DRY = Sizes(DRY_SHAPES, DRY_PRECISION_SHAPE, DRY_WORKSPACE_BYTES, torch.bfloat16, 1 << 16, 64, 8, 2)


class Inputs(NamedTuple):
    """As `fused_linear_divergence` takes them."""

    student_hidden: Tensor
    student_lm_head_weight: Tensor
    teacher_hidden: Tensor
    teacher_lm_head_weight: Tensor

    def with_head(self, head: str) -> Inputs:
        """The student's head trained or frozen; its hidden states always have a gradient."""
        self.student_hidden.requires_grad_()
        weight = self.student_lm_head_weight.detach()
        return self._replace(
            student_lm_head_weight=weight.requires_grad_() if head == "trained" else weight
        )


def inputs_of(device: Device, shape: Shape, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random hidden states and heads; logits of standard deviation about 2."""
    generator = device.generator(seed)

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device.kind, dtype=dtype)
        return values.mul_(scale)

    num_tokens, vocab_size, student, teacher = shape
    return Inputs(
        normal(num_tokens, student, 1.0),
        normal(vocab_size, student, 2.0 / student**0.5),
        normal(num_tokens, teacher, 1.0),
        normal(vocab_size, teacher, 2.0 / teacher**0.5),
    )


def close_inputs_of(device: Device, shape: Shape, dtype: torch.dtype, gap: float = 0.1) -> Inputs:
    """The same, the teacher being the student plus noise of standard deviation `gap`.

    That is where rounded logits do harm: what counts is the small difference of large numbers.
    """
    far = inputs_of(device, shape, dtype)
    size = shape.student_hidden_size
    hidden, head = far.teacher_hidden.clone(), far.teacher_lm_head_weight.clone()
    hidden[:, :size], head[:, :size] = far.student_hidden, far.student_lm_head_weight
    # a unit variance from the hidden state, and this much from the head's rows
    own = head[:, size:]
    own.normal_(generator=device.generator(1)).mul_(gap / own.shape[1] ** 0.5)
    return far._replace(teacher_hidden=hidden, teacher_lm_head_weight=head)


def whole_chunk_bytes(shape: Shape) -> int:
    """A workspace that all tokens fit into as one chunk, widened heads included."""
    row_bytes = 8 * shape.vocab_size + 12 * (shape.student_hidden_size + shape.teacher_hidden_size)
    return 2 * shape.num_tokens * row_bytes


class Cut(NamedTuple):
    """Tokens of a chunk of path A, and of what the teacher's GEMM sees at a time."""

    chunk: int
    teacher: int

    def __str__(self) -> str:
        teacher = "" if self.teacher == self.chunk else f", teacher {self.teacher}"
        return f"M = {self.chunk}{teacher}"


def cut_of(inputs: Inputs, workspace_bytes: int, backend: str) -> Cut:
    """As the op itself says."""
    import opd_kernels as opk

    text = opk.explain(
        "fused_linear_divergence", *inputs, workspace_bytes=workspace_bytes, backend=backend
    )
    found = re.search(r"path A: \d+ chunk\(s\) of up to (\d+)", text)
    if found is None:
        raise RuntimeError(f"expected 'path A: N chunk(s) of up to C' from explain, got:\n{text}")
    parts = re.search(r"the teacher's logits (\d+) tokens at a time", text)
    return Cut(int(found[1]), int((parts or found)[1]))


class Gemms:
    """The GEMMs that the loss cannot do without, chunk by chunk as the op runs them.

    Operands are 16-bit and results float32, in buffers that exist already. `split` cuts K of dX.
    """

    def __init__(self, device: Device, inputs: Inputs, cut: Cut) -> None:
        self.device = device
        self.inputs = Inputs(*(tensor.detach() for tensor in inputs))
        hidden, head, _, _ = self.inputs
        self.num_tokens, self.vocab_size = hidden.shape[0], head.shape[0]
        self.chunk = min(cut.chunk, self.num_tokens)
        self.teacher_tokens = min(cut.teacher, self.chunk)
        real = {"dtype": torch.float32, "device": hidden.device}
        self.logits = torch.empty(self.chunk, self.vocab_size, **real)
        # dZ as the op has it: random, so that no multiplication is spared its power
        generator = device.generator(7)
        self.grad_logits = torch.empty_like(self.logits, dtype=hidden.dtype)
        self.grad_logits.normal_(generator=generator).mul_(1e-3)
        self.grad_hidden = torch.empty(self.chunk, hidden.shape[1], **real)
        self.grad_weight = torch.zeros(head.shape, **real)

    def in_place(self) -> Gemms:
        """The same with dZ where the op has it: in the rows of the float32 logits, so that a row
        begins where two rows of 16 bits would."""
        found = copy.copy(self)
        rows = torch.empty_like(self.logits).view(self.grad_logits.dtype)
        found.grad_logits = rows[:, : self.vocab_size]
        found.grad_logits.copy_(self.grad_logits)
        return found

    def chunks(self) -> list[slice]:
        return _slices(0, self.num_tokens, self.chunk)

    def student(self, rows: slice) -> None:
        self._logits(self.inputs.student_hidden[rows], self.inputs.student_lm_head_weight)

    def teacher(self, rows: slice) -> None:
        for part in _slices(rows.start, rows.stop, self.teacher_tokens):
            self._logits(self.inputs.teacher_hidden[part], self.inputs.teacher_lm_head_weight)

    def _logits(self, hidden: Tensor, weight: Tensor) -> None:
        # a vocabulary may be smaller than the student's
        size = hidden.shape[0] * weight.shape[0]
        logits = self.logits.view(-1)[:size].view(hidden.shape[0], weight.shape[0])
        self.device.mm(hidden, weight.t(), logits)

    def grad_of_hidden(self, rows: slice, split: int = 1) -> None:
        count = rows.stop - rows.start
        gradient, weight = self.grad_logits[:count], self.inputs.student_lm_head_weight
        if split == 1:
            self.device.mm(gradient, weight, self.grad_hidden[:count])
            return
        columns = self.vocab_size // split
        parts = gradient.view(count, split, columns).transpose(0, 1)
        products = self.device.bmm(parts, weight.view(split, columns, -1))
        torch.sum(products, 0, out=self.grad_hidden[:count])

    def grad_of_weight(self, rows: slice) -> None:
        count = rows.stop - rows.start
        gradient, hidden = self.grad_logits[:count].t(), self.inputs.student_hidden[rows]
        if rows.start == 0:
            self.device.mm(gradient, hidden, self.grad_weight)
        else:
            self.device.addmm(self.grad_weight, gradient, hidden)

    def splits(self) -> list[int]:
        """Those of SPLITS that the vocabulary can be cut into."""
        return [split for split in SPLITS if self.vocab_size % split == 0]

    def best_split(self, rounds: int = 3) -> int:
        """The quickest cut of dX here."""
        (first, *_) = self.chunks()
        variants = {
            str(split): lambda split=split: self.grad_of_hidden(first, split)
            for split in self.splits()
        }
        times = self.device.turns(variants, rounds)
        return int(min(times, key=lambda name: times[name].median))

    def all_of(self, head: str, split: int) -> Run:
        """All chunks' GEMMs, one after another; three a chunk if the head is frozen."""

        def run() -> None:
            for rows in self.chunks():
                self.student(rows)
                self.teacher(rows)
                self.grad_of_hidden(rows, split)
                if head == "trained":
                    self.grad_of_weight(rows)

        return run


def _slices(begin: int, end: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, end)) for start in range(begin, end, step)]


def flops(shape: Shape, head: str) -> int:
    """Of the bare GEMMs: 3S + T, or 2S + T."""
    num_tokens, vocab_size, student, teacher = shape
    return 2 * num_tokens * vocab_size * ((3 if head == "trained" else 2) * student + teacher)


def gradient_bytes(shape: Shape, head: str) -> int:
    """float32 accumulators of dX and, if the head is trained, dW."""
    rows = shape.num_tokens + (shape.vocab_size if head == "trained" else 0)
    return 4 * rows * shape.student_hidden_size


def loss_of(name: str, **options):
    """`fused_linear_divergence` as a loss of the four tensors."""
    import opd_kernels as opk

    return lambda *tensors: opk.fused_linear_divergence(*tensors, divergence=name, **options).loss


def step(loss, inputs: Inputs) -> Run:
    """Forward and backward from fresh gradients, which it leaves in .grad."""

    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        loss(*inputs).backward()

    return run
