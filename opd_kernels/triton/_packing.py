# SPDX-License-Identifier: Apache-2.0
"""The arguments of OPD_LOGITS and OPD_LAWS (csrc/torch/ops.cpp) as the kernels take them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import triton
from torch import Tensor

from ._components import Loss
from ._divergence_rows import ADAPTIVE_KL, NUM_ROW_SUMS, constants
from ._ids import Ids
from ._laws import GEOMETRIC, MIXTURE, TEACHER, Laws, Side
from ._rows import tile

NUM_STATISTICS = 11
STATE = 20
STATE_PER_COMPONENT = 4


class Packed(NamedTuple):
    """A call: three tuples of runtime values, its counts, and what its kernels are compiled for."""

    laws: Laws
    loss: Loss
    ids: Ids
    num_tokens: int
    num_labels: int
    num_topk_ids: int
    constants: dict[str, object]
    num_warps: int

    @property
    def components(self) -> tuple[int, ...]:
        return self.constants["COMPONENTS"]

    @property
    def state_size(self) -> int:
        return STATE + STATE_PER_COMPONENT * len(self.components)

    @property
    def max_registers(self) -> int | None:
        """Two programs on an SM, for a plain divergence: unasked, the assembler may try three and
        spill. With more options than fit, one program with all its values in registers."""
        is_plain = len(self.components) == 1 and self.constants["TARGET"] == TEACHER.value
        sides = self.laws.student, self.laws.teacher
        has_softcap = any(side.softcap is not None for side in sides)
        # 65,536 registers per SM, 32 threads per warp, at most 255 registers for each
        half = 65536 // (2 * 32 * self.num_warps)
        return half if is_plain and not has_softcap and half < 256 else None

    @property
    def needs_whole_rows(self) -> bool:
        return ADAPTIVE_KL in self.components

    @property
    def overwrites_twice(self) -> bool:
        """Whether the gradient is the product of dterm, q and their sum alone."""
        live_geometric = self.constants["LIVE"] and self.constants["TARGET"] == GEOMETRIC.value
        return not live_geometric and self.laws.student.softcap is None


def pack(
    student_logits: Tensor,
    teacher_logits: Tensor,
    reference_logits: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    reference_bias: Tensor | None,
    student_temperatures: Tensor | None,
    teacher_temperatures: Tensor | None,
    token_weights: Tensor | None,
    coefficients: Tensor | None,
    mixture_weights: Tensor | None,
    labels: Tensor | None,
    label_weights: Tensor | None,
    token_ids: Tensor | None,
    topk_ids: Tensor | None,
    divergences: list[int],
    params: list[float],
    numbers: list[float],
    target: int,
    live_target: bool,
    vocab_size: int,
) -> Packed:
    """Options at their neutral values become None, which the kernels are compiled without."""
    student = _side(student_logits, student_bias, numbers[0:3], student_temperatures)
    teacher = _side(teacher_logits, teacher_bias, numbers[3:6], teacher_temperatures)
    from_student = from_teacher = from_reference = reference = None
    if target == GEOMETRIC.value:
        from_student, from_teacher, from_reference = (value or None for value in numbers[8:11])
    if from_reference is not None:
        # its temperature is the teacher's
        reference_numbers = (*numbers[6:8], numbers[5])
        reference = _side(reference_logits, reference_bias, reference_numbers, teacher_temperatures)
    is_live = live_target and (target == MIXTURE.value or from_student is not None)
    components = tuple(divergences)
    num_labels = 0 if labels is None else labels.shape[1]
    num_topk_ids = 0 if topk_ids is None else topk_ids.shape[1]
    block_v, num_warps = tile(vocab_size)
    return Packed(
        Laws(
            student, teacher, reference, from_student, from_teacher, from_reference,
            mixture_weights if target == MIXTURE.value else None, vocab_size,
        ),
        Loss(
            tuple(
                constants(divergence, *params[2 * j : 2 * j + 2])
                for j, divergence in enumerate(components)
            ),
            coefficients, token_weights, labels if num_labels else None, label_weights,
        ),
        Ids(token_ids, topk_ids if num_topk_ids else None),
        student_logits.shape[0],
        num_labels,
        num_topk_ids,
        {
            "COMPONENTS": components,
            "TARGET": target,
            "LIVE": is_live,
            "BLOCK_V": block_v,
            "BLOCK_LABELS": triton.next_power_of_2(max(num_labels, 1)),
            "BLOCK_TOPK": triton.next_power_of_2(max(num_topk_ids, 1)),
        },
        num_warps,
    )  # fmt: skip


def takes_laws(launcher: Callable) -> Callable:
    """`launcher(..., packed, ...)` called with the arguments of `pack` in the place of `packed`.

    The signature says so too: it is that of the op's schema.
    """
    own = list(inspect.signature(launcher).parameters.values())
    packed = [parameter.name for parameter in own].index("packed")
    expanded = list(inspect.signature(pack).parameters.values())
    after = packed + len(expanded)

    @functools.wraps(launcher)
    def launch(*arguments: object) -> object:
        laws = pack(*arguments[packed:after])
        return launcher(*arguments[:packed], laws, *arguments[after:])

    parameters = [*own[:packed], *expanded, *own[packed + 1 :]]
    launch.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return launch


def has_row_sums(components: tuple[int, ...]) -> bool:
    """Whether terms need sums over the row first."""
    return any(NUM_ROW_SUMS[component] for component in components)


def _side(
    logits: Tensor, bias: Tensor | None, numbers: list[float], temperatures: Tensor | None
) -> Side:
    scale, softcap, temperature = numbers
    return Side(
        logits,
        logits.stride(0),
        bias,
        None if scale == 1 else scale,
        None if softcap == 0 else softcap,
        None if temperature == 1 or temperatures is not None else temperature,
        temperatures,
    )
