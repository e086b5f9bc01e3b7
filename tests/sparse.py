# SPDX-License-Identifier: Apache-2.0
"""Sparse teachers to check topk_divergence with: cases, eager torch, and the comparison."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

import opd_kernels as opk
from opd_kernels import _cells, reference
from tests import eager
from tests.cases import BF16, F16, F32, F64, LIMIT_SPECS, SPECS, Spec
from tests.checks import assert_agree, dtype_id, leaf, public, upstream
from tests.eager_divergences import FORMULAS

TAILS = ("bucket", "renormalize_both", "renormalize_teacher", "drop")
INF = math.inf
INFINITE_OFF_THE_TEACHER = (
    "reverse_kl",
    "jeffreys",
    "neyman_chi2",
    "todi",
    "adaptive_kl",
    "concrete_score",
)


def is_refused(spec: Spec, tail: str) -> bool:
    """What the op says no to, by what the divergence is."""
    params = dict(spec.params)
    if tail == "drop":
        return spec.name in ("renyi", "adaptive_kl", "concrete_score")
    if tail != "renormalize_teacher":
        return False
    if spec.name == "alpha":
        return params["alpha"] < 0
    if spec.name == "alpha_beta":
        return params["alpha"] <= 0 or params["alpha"] + params["beta"] <= 0
    return spec.name in INFINITE_OFF_THE_TEACHER


PAIRS = tuple((spec, tail) for spec in SPECS for tail in TAILS if not is_refused(spec, tail))
LIMIT_PAIRS = tuple(
    (spec, tail) for spec in LIMIT_SPECS for tail in TAILS if not is_refused(spec, tail)
)


@dataclass(frozen=True)
class SparseCase:
    """Student logits [T, V], a teacher on K ids."""

    name: str
    num_tokens: int
    vocab_size: int
    num_ids: int
    dtypes: tuple[torch.dtype, ...] = (F64, F32, BF16, F16)
    std: float = 2.0
    gap: float = 1.0
    # repeated ids, missing ids and an id beyond the top k
    is_messy: bool = False
    # tail_logprob is given
    has_tail: bool = False
    weights: bool = False
    padding: int = 0
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    # ids the student prefers
    of_student: bool = False
    every_divergence: bool = False

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())


SPARSE_CASES = (
    SparseCase("no_tokens", 0, 17, 3),
    SparseCase("one_token", 1, 17, 3),
    SparseCase("one_word", 3, 1, 1),
    SparseCase("all_but_one", 5, 17, 16),
    SparseCase("every_id", 5, 17, 17),
    SparseCase("odd", 19, 1423, 33, is_messy=True, every_divergence=True),
    SparseCase("given_tail", 19, 700, 16, has_tail=True, every_divergence=True, dtypes=(F64, F32)),
    SparseCase("student_ids", 19, 700, 16, of_student=True, every_divergence=True, dtypes=(F32,)),
    SparseCase("masked", 11, 300, 8, weights=True, is_messy=True),
    SparseCase("padded", 7, 300, 8, padding=21),
    SparseCase("bent", 9, 600, 8, temperature=0.7, softcap=20.0, logit_scale=1.3),
    SparseCase("many_ids", 3, 5000, 4096, dtypes=(F64, F32)),
    SparseCase("close", 9, 2000, 64, gap=0.02, dtypes=(F64, F32), every_divergence=True),
    SparseCase("peaked", 9, 4000, 64, std=12.0, dtypes=(F64, F32)),
    SparseCase("unlike", 9, 4000, 64, std=6.0, gap=3.0, dtypes=(F64, F32)),
    SparseCase("vocab_32000", 3, 32000, 64, dtypes=(F32, BF16)),
    SparseCase("vocab_151936", 2, 151936, 64, dtypes=(F32,)),
)
BY_NAME = {case.name: case for case in SPARSE_CASES}


@dataclass(frozen=True)
class Sparse:
    student_logits: Tensor
    teacher_ids: Tensor
    teacher_logprobs: Tensor
    tail_logprob: Tensor | None
    token_weights: Tensor | None
    vocab_size: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.student_logits, self.teacher_ids, self.teacher_logprobs


def sparse_of(case: SparseCase, dtype: torch.dtype, max_tokens: int | None = None) -> Sparse:
    """The case's tensors; the teacher's numbers are float32 (float64 with float64 logits)."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.num_tokens, case.vocab_size)
    teacher = torch.randn(shape, generator=generator, dtype=F64) * case.std
    noise = torch.randn(shape, generator=generator, dtype=F64)
    student = teacher + noise * case.gap * min(case.std, 6.0) / 2 - 3.0
    law = teacher.log_softmax(-1)
    ids = (student if case.of_student else law).topk(case.num_ids, -1).indices
    tail = law.scatter(1, ids, -INF).logsumexp(-1) if case.has_tail else None
    if case.is_messy:
        ids[1::3, 2] = ids[1::3, 0]
        ids[::2, -1] = ids[::2, 1]
        ids[2::3, 1:3] = -1
        if case.num_tokens > 4:
            ids[4] = -1
        extra = torch.randint(case.vocab_size, (case.num_tokens, 1), generator=generator)
        ids = torch.cat([ids, extra], dim=1)
    real = torch.promote_types(dtype, F32)
    logprobs = law.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -INF).to(real)
    weights = None
    if case.weights:
        weights = torch.rand(case.num_tokens, generator=generator) + 0.1
        weights[1::3] = 0.0
        student[1::3] = math.nan
        logprobs[1::3] = math.nan
        ids[1::3] = case.vocab_size + 7
    logits = torch.full((case.num_tokens, case.vocab_size + case.padding), math.nan, dtype=dtype)
    logits[:, : case.vocab_size] = student
    cut = slice(max_tokens)
    return Sparse(
        logits[cut],
        ids[cut],
        logprobs[cut],
        None if tail is None else tail.to(real)[cut],
        None if weights is None else weights[cut],
        case.vocab_size,
    )


def eager_topk_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    tail_logprob: Tensor | None = None,
    divergence: Spec,
    tail: str,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """[T] in float32 (float64): log_softmax, gather, a masked log-sum-exp for the tail."""
    dtype = torch.promote_types(student_logits.dtype, F32)
    skipped = torch.zeros(len(student_logits), dtype=torch.bool)
    if token_weights is not None:
        skipped = token_weights == 0
    scaled = eager._scaled(
        student_logits, softcap, logit_scale, temperature, skipped, dtype, vocab_size
    )
    law = torch.log_softmax(scaled, -1)
    index = _cells.TAILS.index(tail)
    # the teacher's cells are data: they come as right as they can be
    ids, cells = _cells.teacher_cells(
        teacher_ids,
        teacher_logprobs,
        tail_logprob,
        token_weights,
        scaled.shape[1],
        index,
        dtype,
    )
    student = law.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -INF)
    if _cells.has_tail_cell(index):
        inside = torch.zeros(law.shape[0], law.shape[1] + 1, dtype=torch.bool)
        inside = inside.scatter(1, ids.masked_fill(ids < 0, law.shape[1]), True)[:, :-1]
        rest = law.masked_fill(inside, -INF)
        rest = torch.where(inside.all(-1), -INF, rest.logsumexp(-1))
        student = torch.cat([student, rest.unsqueeze(1)], 1)
    if tail == "renormalize_both":
        student = torch.log_softmax(student.masked_fill(skipped.unsqueeze(1), 0.0), -1)
    if tail != "drop":
        cells = torch.log_softmax(cells.masked_fill(skipped.unsqueeze(1), 0.0), -1)
    value = FORMULAS[divergence.name](cells, student, **dict(divergence.params))
    if tail == "drop":
        value = value + _constant_of_drop(divergence, cells.exp().sum(-1), student.exp().sum(-1))
    weights = 1.0 if token_weights is None else token_weights.to(dtype)
    return torch.where(skipped, 0.0, weights * value.masked_fill(skipped, 0.0))


def _constant_of_drop(divergence: Spec, p: Tensor, q: Tensor) -> Tensor | float:
    """The formulas' constants, which stand for sums over whole laws, as sums over the entries."""
    if divergence.name == "alpha":
        order = dict(divergence.params)["alpha"]
        return (1 - p) / (order * (order - 1))
    if divergence.name == "pearson_chi2":
        return 1 - 2 * p + q
    if divergence.name == "neyman_chi2":
        return 1 - 2 * q + p
    return 0.0


def check_topk_divergence(
    case: SparseCase,
    dtype: torch.dtype,
    divergence: Spec,
    tail: str,
    backend: str,
    max_tokens: int | None = None,
) -> None:
    """Loss and gradient on one case, by the tolerance rule."""
    data = sparse_of(case, dtype, max_tokens)
    keywords = {
        "tail_logprob": data.tail_logprob,
        "divergence": divergence,
        "tail": tail,
        "temperature": case.temperature,
        "softcap": case.softcap,
        "logit_scale": case.logit_scale,
        "token_weights": data.token_weights,
        "vocab_size": data.vocab_size,
    }
    grad_loss = upstream(len(data.student_logits)).to(torch.promote_types(dtype, F32))
    what = f"{backend} {divergence} {tail} {case.name} {dtype_id(dtype)}"

    def run(function, student_dtype: torch.dtype, **changes) -> tuple[Tensor, Tensor]:
        student = leaf(data.student_logits, student_dtype)
        loss = function(student, *data.tensors()[1:], **(keywords | changes))
        loss.backward(grad_loss.to(loss.dtype))
        return loss.detach(), student.grad

    truth = run(reference.topk_divergence, F64)
    baseline = run(eager_topk_divergence, dtype)
    asked = {"divergence": public(divergence), "backend": backend}
    loss, gradient = actual = run(opk.topk_divergence, dtype, **asked)
    assert loss.dtype == torch.promote_types(dtype, F32), what
    assert gradient.dtype == dtype, what
    assert bool((gradient[:, data.vocab_size :] == 0).all()), what
    if data.token_weights is not None:
        masked = data.token_weights == 0
        assert bool((loss[masked] == 0).all()) and bool((gradient[masked] == 0).all()), what
    assert_agree(actual, baseline, truth, {divergence.name}, what)


def logits_with_tail(mass: float, vocab_size: int, num_ids: int, dtype, seed=7) -> torch.Tensor:
    """One row whose entries from num_ids on hold this mass together."""
    shape = torch.Generator().manual_seed(seed)
    on = torch.randn(num_ids, generator=shape, dtype=F64).log_softmax(0)
    off = torch.randn(vocab_size - num_ids, generator=shape, dtype=F64).log_softmax(0)
    row = torch.cat([on + math.log1p(-mass), off + math.log(mass)])
    return (row + 11.0).unsqueeze(0).to(dtype)


MASSES = [1e-12, 1e-9, 1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6, 1 - 1e-9, 1 - 1e-12]
