# SPDX-License-Identifier: Apache-2.0
"""One list of inputs that correctness, gradients, opcheck and benchmarks draw from.

A case says shapes, the kind of law and what is wrong with the layout; `logits_of(case, dtype)`
builds it, the same numbers each time. H-numbers mark cases drawn from other libraries' suites.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ALL_DTYPES = (F64, F32, BF16, F16)
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Spec:
    """A divergence as the reference takes it: a name and its parameters by keyword."""

    name: str
    params: tuple[tuple[str, float | bool | tuple[str, str]], ...] = ()

    def __str__(self) -> str:
        parts = [f"{k}={'_'.join(v) if isinstance(v, tuple) else v}" for k, v in self.params]
        return "-".join([self.name, *parts])

    def public(self):
        """The same divergence as an object of the public API."""
        from opd_kernels import divergences

        return getattr(divergences, self.name)(**dict(self.params))


def spec(name: str, **params: float | bool | tuple[str, str]) -> Spec:
    """`spec("jsd", beta=0.3)`."""
    return Spec(name, tuple(params.items()))


# every divergence at its defaults, those with parameters at one more point
SPECS = (
    spec("forward_kl"),
    spec("reverse_kl"),
    spec("jsd", beta=0.5),
    spec("jsd", beta=0.1),
    spec("skew_forward_kl", alpha=0.1),
    spec("skew_reverse_kl", alpha=0.1),
    spec("skew_reverse_kl", alpha=0.3, detach_mixture=True),
    spec("total_variation"),
    spec("jeffreys", weight=0.5),
    spec("jeffreys", weight=0.3),
    spec("squared_hellinger"),
    spec("alpha", alpha=0.5),
    spec("alpha", alpha=1.5),
    spec("renyi", alpha=0.5),
    spec("renyi", alpha=0.7),
    spec("pearson_chi2"),
    spec("neyman_chi2"),
    spec("todi"),
    spec("adaptive_kl", head_mass=0.5),
    spec("adaptive_kl", head_mass=0.8),
    spec("alpha_beta", alpha=0.2, beta=0.7),
    spec("alpha_beta", alpha=-0.3, beta=0.8),
    spec("concrete_score", weights=("student", "student")),
    spec("concrete_score", weights=("teacher", "student")),
)

# the continuous limits of alpha_beta, and what else is checked on a few rows only
LIMIT_SPECS = (
    spec("alpha_beta", alpha=1.0, beta=0.0),
    spec("alpha_beta", alpha=0.0, beta=1.0),
    spec("alpha_beta", alpha=0.0, beta=0.7),
    spec("alpha_beta", alpha=0.4, beta=0.0),
    spec("alpha_beta", alpha=0.5, beta=-0.5),
    spec("alpha_beta", alpha=0.0, beta=0.0),
    spec("alpha", alpha=-0.5),
    spec("renyi", alpha=2.0),
    spec("concrete_score", weights=("uniform", "student")),
    spec("concrete_score", weights=("uniform", "uniform")),
)

# needs labels, so every check that draws from SPECS leaves it out
LABEL_SPECS = (spec("cross_entropy"),)


@dataclass(frozen=True)
class Case:
    """Logits [num_tokens, vocab_size + padding] of one kind; see `logits_of`."""

    name: str
    num_tokens: int
    vocab_size: int
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    # "gaussian": teacher N(-10, std), student = teacher + noise; "equal": the same logits twice;
    # "unrelated": both N(-10, std), laws that barely overlap at a large std;
    # "uniform": U(-.5, .5); "peaked": one logit at +3, the others at -15
    law: str = "gaussian"
    std: float = 2.0
    # size of the student's deviation from the teacher, in units of min(std, 6) / 2
    gap: float = 1.0
    temperature: float | tuple[float, float] = 1.0
    # None, "random", "some_zero" (those rows hold NaN) or "all_zero" (every row holds NaN)
    weights: str | None = None
    # columns beyond vocab_size, holding NaN and +30
    student_padding: int = 0
    teacher_padding: int = 0
    # elements between two rows that belong to neither, holding NaN
    row_gap: int = 0
    # columns at -inf: "student", "teacher", "both" (the same ones) or None
    minus_inf: str | None = None
    slow: bool = False

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    @property
    def has_padding(self) -> bool:
        return bool(self.student_padding or self.teacher_padding)


@dataclass(frozen=True)
class Logits:
    student: Tensor
    teacher: Tensor
    token_weights: Tensor | None
    temperature: float | tuple[float, float]
    # None unless the tensors are wider than the shared vocabulary
    vocab_size: int | None

    def keywords(self) -> dict:
        """The keyword arguments that a divergence op takes besides the divergence."""
        return {
            "temperature": self.temperature,
            "token_weights": self.token_weights,
            "vocab_size": self.vocab_size,
        }

    def first(self, num_tokens: int) -> Logits:
        """The same, cut to the first rows: for backends that take milliseconds per row."""
        weights = self.token_weights
        return replace(
            self,
            student=self.student[:num_tokens],
            teacher=self.teacher[:num_tokens],
            token_weights=None if weights is None else weights[:num_tokens],
        )

    def temperatures(self) -> tuple[float, float]:
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,) * 2


CASES = (
    # shapes
    Case("no_tokens", 0, 17),
    Case("one_token", 1, 17),
    Case("one_word", 3, 1),
    Case("two_words", 3, 2),
    Case("seventeen_words", 127, 17),
    Case("thousand_words", 127, 1000),
    Case("many_tokens", 512, 1000, dtypes=(F32, BF16)),
    Case("odd_width", 41, 1271, dtypes=(F32, F16)),  # H6
    Case("odd_both", 9, 1423, dtypes=(F32, BF16)),  # H2
    Case("vocab_32000", 3, 32000),
    Case("vocab_50257", 2, 50257, dtypes=(F32,)),
    Case("vocab_50264", 2, 50264, dtypes=(F32, BF16)),  # H10
    Case("vocab_100000", 2, 100000, dtypes=(F32, F16)),  # H11
    Case("vocab_128256", 2, 128256, dtypes=(F32,)),  # H7
    Case("vocab_151936", 3, 151936, dtypes=(F64, F32, BF16)),
    Case("vocab_262144", 1, 262144, dtypes=(F32,)),
    Case("tokens_by_32000", 127, 32000, dtypes=(F32, BF16), slow=True),
    # layouts: padded columns hold NaN and +30
    Case("strided_rows", 5, 257, row_gap=7),
    Case("padded_student", 5, 1000, student_padding=24),
    Case("padded_teacher", 5, 1000, teacher_padding=56),
    Case("padded_both_odd", 5, 1001, student_padding=3, teacher_padding=21, row_gap=5),
    Case("padded_real_sizes", 2, 151936, dtypes=(F32, BF16), teacher_padding=128),  # H20
    # weights
    Case("weighted", 17, 130, weights="random"),
    Case("some_rows_masked", 17, 130, weights="some_zero"),
    Case("all_rows_masked", 17, 130, weights="all_zero"),  # H3
    # temperatures
    Case("temperature_half", 9, 300, temperature=0.5),
    Case("temperature_two", 9, 300, temperature=2.0),
    Case("temperature_pair", 9, 300, temperature=(0.5, 2.0), weights="random"),
    # laws
    Case("equal_laws", 9, 1000, law="equal"),
    Case("uniform_logits", 7, 32256, dtypes=(F32, BF16), law="uniform", temperature=1.5),  # H13
    Case("peaked", 2, 152064, dtypes=(F32, BF16), law="peaked", temperature=1.5),  # H14
    Case("minus_inf_student", 5, 300, minus_inf="student"),
    Case("minus_inf_teacher", 5, 300, minus_inf="teacher"),
    Case("minus_inf_both", 5, 300, minus_inf="both"),
    *(
        Case(f"unrelated_{std}", 8, 1000, dtypes=(F64, F32), law="unrelated", std=std)
        for std in (6.0, 12.0, 30.0)
    ),
    # scale and closeness of the laws (H24)
    *(
        Case(f"scale_{std}_gap_{gap}", 8, 4000, dtypes=(F64, F32), std=std, gap=gap)
        for std in (2.0, 6.0, 12.0, 30.0)
        for gap in (0.1, 1.0)
    ),
)

# what Triton's interpreter runs, three rows of each: about 10 ms per row and block
INTERPRETED = frozenset(
    (
        "no_tokens",
        "one_token",
        "one_word",
        "two_words",
        "odd_both",
        "strided_rows",
        "padded_student",
        "padded_both_odd",
        "some_rows_masked",
        "all_rows_masked",
        "temperature_pair",
        "minus_inf_student",
        "minus_inf_teacher",
        "minus_inf_both",
        "equal_laws",
        "unrelated_12.0",
        "scale_2.0_gap_0.1",
        "scale_30.0_gap_1.0",
        "vocab_32000",
    )
)


def logits_of(case: Case, dtype: torch.dtype) -> Logits:
    """The case's tensors. 16-bit logits are rounded once, here: the truth starts from them too."""
    student, teacher, weights = _exact_logits(case)
    return Logits(
        student=_lay_out(student.to(dtype, copy=True), case.student_padding, case.row_gap),
        teacher=_lay_out(teacher.to(dtype, copy=True), case.teacher_padding, case.row_gap),
        token_weights=None if weights is None else weights.clone(),
        temperature=case.temperature,
        vocab_size=case.vocab_size if case.has_padding else None,
    )


# the same ones are wanted for each divergence in turn, and drawing them is a good part of a test
@functools.lru_cache(maxsize=1)
def _exact_logits(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """(student, teacher, token_weights), the logits in float64."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.num_tokens, case.vocab_size)
    if case.law == "uniform":
        teacher = torch.rand(shape, generator=generator, dtype=F64) - 0.5
        student = torch.rand(shape, generator=generator, dtype=F64) - 0.5
    elif case.law == "peaked":
        teacher = torch.full(shape, -15.0, dtype=F64)
        teacher[:, case.vocab_size // 2] = 3.0
        student = teacher.roll(1, dims=1) if case.num_tokens % 2 else teacher.clone()
        student[0] = student[0].roll(1)
    else:
        teacher = torch.randn(shape, generator=generator, dtype=F64) * case.std - 10.0
        noise = torch.randn(shape, generator=generator, dtype=F64)
        student = teacher + noise * case.gap * min(case.std, 6.0) / 2
        if case.law == "equal":
            student = teacher.clone()
        elif case.law == "unrelated":
            student = noise * case.std - 10.0
    if case.minus_inf is not None:
        # column 0 stays, so that every row keeps a finite logit
        hidden = torch.rand(shape, generator=generator) < 0.4
        hidden[:, 0] = False
        if case.minus_inf in ("student", "both"):
            student[hidden] = -INF
        if case.minus_inf in ("teacher", "both"):
            teacher[hidden] = -INF
    weights = _weights(case, generator)
    if weights is not None:
        student[weights == 0], teacher[weights == 0] = NAN, NAN
    return student, teacher, weights


def _weights(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.weights is None:
        return None
    weights = torch.rand(case.num_tokens, generator=generator) + 0.1
    if case.weights == "some_zero":
        weights[1::3] = 0.0
    elif case.weights == "all_zero":
        weights[:] = 0.0
    return weights


def _lay_out(logits: Tensor, padding: int, row_gap: int) -> Tensor:
    """The same values in rows that are wider (NaN and +30) and further apart (NaN)."""
    if not padding and not row_gap:
        return logits
    num_tokens, vocab_size = logits.shape
    width = vocab_size + padding
    storage = torch.full((num_tokens, width + row_gap), NAN, dtype=logits.dtype)
    storage[:, :vocab_size] = logits
    storage[:, vocab_size:width:2] = 30.0
    return storage[:, :width]


@dataclass(frozen=True)
class FusedCase:
    """Hidden states [num_tokens, D] and LM heads [vocab_size + padding, D] of both sides."""

    name: str
    num_tokens: int
    vocab_size: int
    student_hidden_size: int
    teacher_hidden_size: int
    dtypes: tuple[torch.dtype, ...] = (F32, BF16, F16)
    std: float = 2.0
    # None: two unrelated models. A number: the teacher is the student plus noise of that size
    gap: float | None = None
    temperature: float | tuple[float, float] = 1.0
    # as in Case; rows of weight 0 hold NaN in both hidden states
    weights: str | None = None
    student_padding: int = 0
    teacher_padding: int = 0
    # run with each divergence, or with one
    every_divergence: bool = False

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    @property
    def has_padding(self) -> bool:
        return bool(self.student_padding or self.teacher_padding)


@dataclass(frozen=True)
class Fused:
    student_hidden: Tensor
    student_lm_head_weight: Tensor
    teacher_hidden: Tensor
    teacher_lm_head_weight: Tensor
    token_weights: Tensor | None
    temperature: float | tuple[float, float]
    vocab_size: int | None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            self.student_hidden,
            self.student_lm_head_weight,
            self.teacher_hidden,
            self.teacher_lm_head_weight,
        )

    def keywords(self) -> dict:
        return {
            "temperature": self.temperature,
            "token_weights": self.token_weights,
            "vocab_size": self.vocab_size,
        }


FUSED_CASES = (
    FusedCase("no_tokens", 0, 33, 8, 16),
    FusedCase("one_token", 1, 33, 8, 16),
    FusedCase("tiny_odd", 7, 41, 9, 41, every_divergence=True),  # H3
    FusedCase("odd", 57, 1423, 83, 167, weights="some_zero"),  # H2
    FusedCase("cce", 252, 507, 123, 64, weights="some_zero"),  # H9
    FusedCase("all_rows_masked", 9, 41, 7, 5, weights="all_zero"),  # H3
    FusedCase("weighted_pair", 33, 300, 32, 48, weights="random", temperature=(2.0, 0.5)),
    FusedCase("close_models", 64, 2000, 64, 64, gap=0.05, every_divergence=True),
    FusedCase("padded", 19, 1000, 32, 48, student_padding=24, teacher_padding=56, weights="random"),
    FusedCase("wide_logits", 32, 999, 64, 64, std=12.0, gap=0.1),
    FusedCase("vocab_32000", 16, 32000, 64, 96, dtypes=(F32, BF16)),
)


def fused_of(case: FusedCase, dtype: torch.dtype) -> Fused:
    """The case's tensors: N(0, 1) hidden states, heads such that logits have deviation `std`."""
    generator = torch.Generator().manual_seed(case.seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    student_hidden = gaussian(case.num_tokens, case.student_hidden_size)
    student_head = gaussian(case.vocab_size, case.student_hidden_size)
    student_head *= case.std / case.student_hidden_size**0.5
    if case.gap is None:
        teacher_hidden = gaussian(case.num_tokens, case.teacher_hidden_size)
        teacher_head = gaussian(case.vocab_size, case.teacher_hidden_size)
        teacher_head *= case.std / case.teacher_hidden_size**0.5
    else:
        teacher_hidden = student_hidden.clone()
        noise = gaussian(case.vocab_size, case.teacher_hidden_size)
        teacher_head = student_head + noise * case.gap * case.std / case.teacher_hidden_size**0.5
    weights = _weights(case, generator)  # type: ignore[arg-type]
    if weights is not None:
        student_hidden[weights == 0], teacher_hidden[weights == 0] = NAN, NAN
    return Fused(
        student_hidden.to(dtype),
        _pad_rows(student_head.to(dtype), case.student_padding),
        teacher_hidden.to(dtype),
        _pad_rows(teacher_head.to(dtype), case.teacher_padding),
        weights,
        case.temperature,
        case.vocab_size if case.has_padding else None,
    )


def _pad_rows(head: Tensor, padding: int) -> Tensor:
    if not padding:
        return head
    rows = torch.full((padding, head.shape[1]), NAN, dtype=head.dtype)
    rows[::2] = 30.0
    return torch.cat([head, rows])


def token_ids_of(num_tokens: int, vocab_size: int, seed: int) -> Tensor:
    """[T] int64 in [0, V), first and last id included where there is room."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (num_tokens,), generator=generator)
    ids[:1], ids[1:2] = 0, vocab_size - 1
    return ids
