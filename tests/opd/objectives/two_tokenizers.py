# SPDX-License-Identifier: Apache-2.0
"""Two small vocabularies, texts in both, and laws with random heads, built by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from opd.batch import Batch, Head, Law, Translation
from opd.objectives import Parts

F64 = torch.float64
STUDENT = [b"a", b"b", b"ab", b"c", b"bc", b"abd", b"q", b"c"]
TEACHER = [b"c", b"ab", b"a", b"cq", b"b", b"aa", b"d", b"abc", b"r", b"xyz"]
# the tokens of a chunk on both sides, and whether they are the same bytes
CHUNKS = {
    "one": (["a"], ["a"], True),
    "other": (["b"], ["b"], True),
    "merged": (["ab"], ["a", "b"], True),
    "split": (["a", "b", "c"], ["abc"], True),
    "both": (["abd", "c"], ["ab", "d", "c"], True),
    "differ": (["q"], ["r", "r"], False),
    "only_student": (["q"], [], False),
    "only_teacher": ([], ["r"], False),
}
MIXED = ("one", "merged", "differ", "split", "only_student", "other", "both", "only_teacher")


def _batch(token_ids: Tensor) -> Batch:
    num_tokens = len(token_ids)
    return Batch(
        input_ids=token_ids[None],
        attention_mask=torch.ones(1, num_tokens, dtype=torch.int64),
        position_ids=torch.arange(num_tokens)[None],
        token_idx=torch.arange(num_tokens),
        token_ids=token_ids,
        segment_ends=torch.tensor([num_tokens]),
        lengths=(num_tokens,),
        prompt_lengths=(0,),
        behaviour_logprobs=None,
        num_input_tokens=num_tokens,
    )


class Case:
    """A text of the named chunks, or one of `num_tokens` in one vocabulary.

    `leaves`: hidden states, head and bias of the student, to be differentiated; `student`,
    `teacher`: laws over the text's rows; `parts`, `batch`, `steps`: what an objective is given.
    """

    def __init__(self, chunks=MIXED, *, num_tokens=None, dtype=F64, bent=False, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def gaussian(*shape):
            return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

        self.chunks = [CHUNKS[name] for name in chunks]
        if num_tokens is None:
            ids = [
                torch.tensor(
                    [table.index(token.encode()) for chunk in self.chunks for token in chunk[side]],
                    dtype=torch.int64,
                )
                for side, table in enumerate((STUDENT, TEACHER))
            ]
            sizes = len(STUDENT), len(TEACHER)
        else:
            ids = [torch.randint(9, (num_tokens,), generator=generator)] * 2
            sizes = 9, 9
        widths = 5, 4
        self.leaves = [gaussian(len(ids[0]), widths[0]), gaussian(sizes[0], widths[0])]
        self.leaves.append(gaussian(sizes[0]) * 0.5)
        self.leaves = [leaf.requires_grad_() for leaf in self.leaves]
        self.taught = [gaussian(len(ids[1]), widths[1]), gaussian(sizes[1], widths[1])]
        bends = {"softcap": 6.0, "logit_scale": 0.7} if bent else {}
        heads = Head(self.leaves[1], self.leaves[2], **bends), Head(self.taught[1], **bends)
        self.student = Law(lambda: self.leaves[0], heads[0])
        self.teacher = Law(lambda: self.taught[0], heads[1])
        self.ids = ids
        self.batch = _batch(ids[0])
        bytes_of = [b"%d" % i for i in range(9)]
        tables = (STUDENT, TEACHER) if num_tokens is None else (bytes_of, bytes_of)
        self.parts = Parts(
            student=SimpleNamespace(head=heads[0]),
            teacher=SimpleNamespace(head=heads[1]),
            student_bytes=tables[0],
            teacher_bytes=tables[1],
        )
        lengths = [[len(chunk[side]) for chunk in self.chunks] for side in (0, 1)]
        if num_tokens is not None:
            lengths = [[1] * num_tokens] * 2
        self.offsets = [torch.tensor([0, *side]).cumsum(0) for side in lengths]
        aligned = [chunk[2] for chunk in self.chunks] if num_tokens is None else [True] * num_tokens
        self.aligned = [i for i, is_aligned in enumerate(aligned) if is_aligned]
        self.steps = max(1, len(self.aligned)) + 3
        self.translation = Translation(
            batch=_batch(ids[1]),
            student_offsets=self.offsets[0],
            teacher_offsets=self.offsets[1],
            is_aligned=torch.tensor(aligned, dtype=torch.bool),
            num_bytes=torch.tensor([len("".join(chunk[0])) for chunk in self.chunks] or lengths[0]),
            chunk_ends=torch.tensor([len(aligned)]),
            num_step_chunks=self.steps,
        )
        self.batch = replace(self.batch, translation=self.translation)

    def spans(self):
        """(chunk, its rows of the student, its rows of the teacher) of every aligned chunk."""
        for c in self.aligned:
            yield c, *(range(*side[c : c + 2].tolist()) for side in self.offsets)

    def rows(self):
        """Whole logits of both sides, [T, Vs] with gradient and [T', Vt] without, in float64."""
        taught = _whole(self.taught[0], self.teacher.head)
        return _whole(self.leaves[0], self.student.head), taught.detach()

    def run(self, objective, *, num_step_tokens=8):
        """(signal, gradients of the leaves), the objective bound to the parts.

        Weights are float32: the defaults here have an inverse that is one exactly.
        """
        for leaf in self.leaves:
            leaf.grad = None
        bound = objective.bind(self.parts)
        bound.ask(self.teacher, self.batch)
        signal = bound(self.student, self.teacher, self.batch, num_step_tokens)
        signal.loss.backward()
        return signal, [leaf.grad for leaf in self.leaves]

    def check(self, objective, loss, *, rtol=1e-9, **more):
        """The objective's loss and gradients are those of `loss`, a float64 scalar."""
        signal, gradients = self.run(objective, **more)
        expected = torch.autograd.grad(loss, self.leaves, materialize_grads=True)
        torch.testing.assert_close(signal.loss.double(), loss.detach(), rtol=rtol, atol=rtol)
        for got, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol)


def _whole(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = head.logit_scale * logits
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def check_hostile(objective) -> None:
    """No aligned chunk, one token, nothing at all: an exact zero or a finite number, no NaN."""
    for chunks in (("differ", "only_teacher", "only_student"), ("only_teacher",), ()):
        case = Case(chunks, dtype=torch.float32)
        signal, gradients = case.run(objective, num_step_tokens=0)
        assert signal.loss.item() == 0.0
        assert all(bool((gradient == 0).all()) for gradient in gradients if gradient is not None)
        assert all(not values.isnan().any() for values in signal.statistics.values())
    case = Case(("one",), dtype=torch.float32)
    signal, gradients = case.run(objective)
    assert bool(signal.loss.isfinite()) and signal.loss.item() != 0.0
    assert all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
