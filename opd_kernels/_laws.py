# SPDX-License-Identifier: Apache-2.0
"""What the divergence ops share: how logits become laws, and what the loss is made of.

One place checks these keyword arguments and packs them in the order of OPD_LAWS in
csrc/torch/ops.cpp; the ops pass the pack on whole, cut to a chunk of tokens or a slice of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, targets
from .divergences import Divergence, parse_sum

MAX_COMPONENTS = 16
NUM_STATISTICS = 11
# doubles in a row of state, as in opd.h
STATE = 20
STATE_PER_COMPONENT = 4
STATISTICS = (
    "student_entropy",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
    "top1_agreement",
    "student_lse",
    "teacher_lse",
    "student_logprobs",
    "teacher_logprobs",
    "student_topk_mass",
    "teacher_topk_mass",
)
# of a gradient_tolerance: what each token has lost
DROPPED = "gradient_dropped_l1"
_TARGET_TEACHER, _TARGET_GEOMETRIC, _TARGET_MIXTURE = range(3)
_CROSS_ENTROPY = "cross_entropy"
# ids of the divergences whose terms need no sum over the row first (kRowSums of divergences.h)
_WITHOUT_ROW_SUMS = frozenset((0, 1, 2, 4, 5, 6, 12, 16))
Temperature = float | Tensor | Sequence[float | Tensor]
Loss = str | Divergence | Sequence[tuple[float | Tensor, str | Divergence]]
Target = targets.Geometric | targets.Mixture


class Laws(NamedTuple):
    """The arguments of OPD_LAWS. [T] and [T, K] tensors are one row per token."""

    student_bias: Tensor | None
    teacher_bias: Tensor | None
    reference_bias: Tensor | None
    student_temperatures: Tensor | None
    teacher_temperatures: Tensor | None
    token_weights: Tensor | None
    coefficients: Tensor | None
    mixture_weights: Tensor | None
    labels: Tensor | None
    label_weights: Tensor | None
    token_ids: Tensor | None
    topk_ids: Tensor | None
    divergences: list[int]
    params: list[float]
    numbers: list[float]
    target: int
    live_target: bool
    vocab_size: int

    @property
    def state_size(self) -> int:
        """Doubles in a row of state."""
        return STATE + STATE_PER_COMPONENT * len(self.divergences)

    def rows(self, rows: slice | Tensor) -> Laws:
        """The laws of some of the tokens."""

        def take(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return self._replace(
            student_temperatures=take(self.student_temperatures),
            teacher_temperatures=take(self.teacher_temperatures),
            token_weights=take(self.token_weights),
            coefficients=(
                None if self.coefficients is None else self.coefficients[:, rows].contiguous()
            ),
            mixture_weights=take(self.mixture_weights),
            labels=take(self.labels),
            label_weights=take(self.label_weights),
            token_ids=take(self.token_ids),
            topk_ids=take(self.topk_ids),
        )

    def columns(self, columns: slice) -> Laws:
        """The laws as a slice of the vocabulary sees them."""

        def take(bias: Tensor | None) -> Tensor | None:
            return None if bias is None else bias[columns]

        return self._replace(
            student_bias=take(self.student_bias),
            teacher_bias=take(self.teacher_bias),
            reference_bias=take(self.reference_bias),
            vocab_size=columns.stop - columns.start,
        )


# a Laws has this many arguments
NUM_ARGUMENTS = len(Laws._fields)


class Rows(NamedTuple):
    """What every per-token argument of a call has in common."""

    op: str
    num_tokens: int
    device: torch.device
    real: torch.dtype


def rows_of(op: str, values: Tensor) -> Rows:
    """From the hidden states or logits [T, ...] of the student."""
    return Rows(op, values.shape[0], values.device, _checks.real_dtype(values))


def pack(
    rows: Rows,
    vocab_size: int,
    *,
    divergence: Loss,
    temperature: Temperature,
    token_weights: Tensor | None,
    target: Target | None,
    has_reference: bool,
    softcaps: tuple[float | None, float | None, float | None],
    logit_scales: tuple[float, float, float],
    labels: Tensor | None,
    label_weights: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    bias_size: int | None = None,
    token_ids: Tensor | None = None,
    topk_ids: Tensor | None = None,
) -> Laws:
    """Checks the keyword arguments of a call and packs them; sides: student, teacher, reference.

    Raises:
        ValueError: shapes or ranges that do not fit.
        TypeError: a dtype or type that is not supported.
    """
    op = rows.op
    components = components_of(op, divergence)
    names = [component.name for _, component in components]
    labels, label_weights = _labels(rows, names, labels, label_weights)
    student_temperature, teacher_temperature = _checks.temperatures(op, temperature)
    temperatures = [
        _checks.per_token(rows, "temperature", value) if isinstance(value, Tensor) else None
        for value in (student_temperature, teacher_temperature)
    ]
    sides = ("student", "teacher", "reference")
    caps = [
        _checks.softcap(op, f"{side}_softcap", cap)
        for side, cap in zip(sides, softcaps, strict=True)
    ]
    scales = [
        _checks.logit_scale(op, f"{side}_logit_scale", scale)
        for side, scale in zip(sides, logit_scales, strict=True)
    ]
    kind, live, from_sides, mixture_weights = _target(rows, target, has_reference)
    return Laws(
        *(
            None
            if bias is None
            else _checks.bias(rows, f"{side}_bias", bias, bias_size or vocab_size)
            for side, bias in zip(sides, biases, strict=True)
        ),
        *temperatures,
        _checks.token_weights(op, token_weights, rows.num_tokens, rows.device, rows.real),
        coefficients(rows, [coefficient for coefficient, _ in components]),
        mixture_weights,
        labels,
        label_weights,
        None if token_ids is None else _checks.token_ids(op, token_ids, *rows[1:3]),
        None if topk_ids is None else _checks.id_table(rows, "topk_ids", topk_ids),
        [component.id for _, component in components],
        [value for _, component in components for value in component.kernel_params],
        [
            *(scales[0], caps[0], _number(student_temperature)),
            *(scales[1], caps[1], _number(teacher_temperature)),
            *(scales[2], caps[2]),
            *from_sides,
        ],
        kind,
        live,
        vocab_size,
    )


def components_of(op: str, divergence: Loss) -> tuple[tuple[float | Tensor, Divergence], ...]:
    """The summands of a loss and their coefficients.

    Raises:
        ValueError: more than the kernels take, or what `parse_sum` refuses.
    """
    components = parse_sum(divergence)
    if len(components) > MAX_COMPONENTS:
        raise ValueError(
            f"{op}: divergence must be a sum of at most {MAX_COMPONENTS}, got {len(components)}."
        )
    return components


def statistic_names(op: str, names: Sequence[str], laws: Laws, tolerance: float) -> tuple[str, ...]:
    """The names, checked; those of ids need the ids."""
    names = _checks.names(op, "statistics", names)
    if tolerance:
        # comes with the rest whether it is asked for or not
        names = tuple(name for name in names if name != DROPPED)
    for name in names:
        _checks.one_of(op, "statistics", name, STATISTICS)
        if name.endswith("_logprobs") and laws.token_ids is None:
            raise ValueError(f"{op}: statistics {name!r} need token_ids [T], got none.")
        if name.endswith("_topk_mass") and laws.topk_ids is None:
            raise ValueError(f"{op}: statistics {name!r} need topk_ids [T, K], got none.")
    return names


def needs_whole_rows(divergences: list[int]) -> str | None:
    """Why these (by id) cannot be computed from slices of the vocabulary, or None."""
    if parse_sum("adaptive_kl")[0][1].id in divergences:
        return "adaptive_kl sorts the teacher's law, which takes whole rows"
    return None


def has_row_sums(laws: Laws) -> bool:
    """Whether terms need sums over the row first."""
    return not _WITHOUT_ROW_SUMS.issuperset(laws.divergences)


def _number(temperature: float | Tensor) -> float:
    return 1.0 if isinstance(temperature, Tensor) else temperature


def _labels(
    rows: Rows, names: list[str], labels: Tensor | None, weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    wanted = _CROSS_ENTROPY in names
    if wanted != (labels is not None):
        raise ValueError(
            f"{rows.op}: labels must be given with cross_entropy and only then, got divergence "
            f"{names} and labels {'None' if labels is None else tuple(labels.shape)}."
        )
    if labels is None:
        if weights is not None:
            raise ValueError(f"{rows.op}: label_weights must come with labels, got no labels.")
        return None, None
    labels = _checks.id_table(rows, "labels", labels)
    if weights is not None:
        weights = _checks.label_weights(rows, weights, labels)
    return labels, weights


def coefficients(rows: Rows, values: list[float | Tensor]) -> Tensor | None:
    """[J, T], or None where every coefficient is 1."""
    if all(not isinstance(value, Tensor) and value == 1.0 for value in values):
        return None
    table = torch.empty(len(values), rows.num_tokens, dtype=rows.real, device=rows.device)
    for row, value in zip(table, values, strict=True):
        if isinstance(value, Tensor):
            row.copy_(_checks.per_token(rows, "coefficient of the divergence", value))
        else:
            row.fill_(value)
    return table


def _target(
    rows: Rows, target: Target | None, has_reference: bool
) -> tuple[int, bool, tuple[float, float, float], Tensor | None]:
    """(kind, live, coefficients of a geometric target, weights of a mixture)."""
    plain = (0.0, 1.0, 0.0)
    if target is not None and not isinstance(target, Target):
        raise TypeError(
            f"{rows.op}: target must be targets.geometric(...), targets.mixture(...) or None, "
            f"got {type(target).__name__}."
        )
    needs_reference = isinstance(target, targets.Geometric) and target.reference != 0.0
    if (needs_reference != has_reference and not isinstance(target, targets.Geometric)) or (
        needs_reference and not has_reference
    ):
        raise ValueError(
            f"{rows.op}: a reference model must be given with a geometric target that weighs it, "
            f"and only then, got target {target} and {'a' if has_reference else 'no'} reference."
        )
    if target is None:
        return _TARGET_TEACHER, False, plain, None
    if isinstance(target, targets.Geometric):
        from_sides = (target.student, target.teacher, target.reference)
        return _TARGET_GEOMETRIC, not target.detach, from_sides, None
    weight = target.teacher_weight
    if isinstance(weight, Tensor):
        weights = _checks.per_token(rows, "teacher_weight of the mixture", weight)
    else:
        weights = torch.full((rows.num_tokens,), weight, dtype=rows.real, device=rows.device)
    return _TARGET_MIXTURE, not target.detach, plain, weights
