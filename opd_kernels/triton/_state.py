# SPDX-License-Identifier: Apache-2.0
"""A row of state: what the forward leaves for the backward, and a phase for the next.

The layout is that of csrc/core/divergence_row.h, so that either may go on from the other's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _components
from ._components import NUM_ROW_SUMS

STATE = tl.constexpr(_components.STATE)
STATE_PER_COMPONENT = tl.constexpr(_components.STATE_PER_COMPONENT)
STUDENT_LSE = tl.constexpr(0)
TEACHER_LSE = tl.constexpr(1)
STUDENT_LARGEST = tl.constexpr(2)
TEACHER_LARGEST = tl.constexpr(3)
STUDENT_ARGMAX = tl.constexpr(4)
TEACHER_ARGMAX = tl.constexpr(5)
GRAD_SUM = tl.constexpr(6)
TEACHER_GRAD_SUM = tl.constexpr(7)
# entropies, KLs, log-probabilities and masses, in the order of the statistics; cross-entropy
STATISTICS = tl.constexpr(8)
CROSS_ENTROPY_SUM = tl.constexpr(16)
# of a component: the sum of its terms, its row sums, and its threshold after two of them
ROW_SUM = tl.constexpr(1)
THRESHOLD = tl.constexpr(3)


@triton.jit
def state_row(state_ptr, row, COMPONENTS: tl.constexpr):
    return state_ptr + row * (STATE + STATE_PER_COMPONENT * len(COMPONENTS))


@triton.jit
def zero_state(state_row_ptr, COMPONENTS: tl.constexpr):
    lanes = tl.arange(0, 128)
    inside = lanes < STATE + STATE_PER_COMPONENT * len(COMPONENTS)
    tl.store(state_row_ptr + lanes, tl.zeros((128,), tl.float64), mask=inside)


@triton.jit
def component_row(state_row_ptr, j: tl.constexpr):
    return state_row_ptr + STATE + STATE_PER_COMPONENT * j


@triton.jit
def _load(ptr, N: tl.constexpr):
    out = ()
    for k in tl.static_range(N):
        out = out + (tl.load(ptr + k),)
    return out


@triton.jit
def load_row_sums(state_row_ptr, COMPONENTS: tl.constexpr):
    """The row sums of each component."""
    out = ()
    for j in tl.static_range(len(COMPONENTS)):
        sums_ptr = component_row(state_row_ptr, j) + ROW_SUM
        out = out + (_load(sums_ptr, NUM_ROW_SUMS[COMPONENTS[j]]),)
    return out


@triton.jit
def load_terms(state_row_ptr, COMPONENTS: tl.constexpr):
    """The sum of terms of each component."""
    out = ()
    for j in tl.static_range(len(COMPONENTS)):
        out = out + (tl.load(component_row(state_row_ptr, j)),)
    return out


@triton.jit
def put(ptr, value, ADD: tl.constexpr):
    """Stores a scalar, or adds it to what is there."""
    if ADD:
        value = tl.load(ptr) + value
    tl.store(ptr, value)


@triton.jit
def put_row_sums(state_row_ptr, sums, COMPONENTS: tl.constexpr, ADD: tl.constexpr):
    for j in tl.static_range(len(COMPONENTS)):
        for k in tl.static_range(len(sums[j])):
            put(component_row(state_row_ptr, j) + ROW_SUM + k, sums[j][k], ADD)


@triton.jit
def put_statistics(state_row_ptr, statistics, cross_entropy, ADD: tl.constexpr):
    """Eight scalars or none, and what the labels have."""
    for k in tl.static_range(len(statistics)):
        put(state_row_ptr + STATISTICS + k, statistics[k], ADD)
    put(state_row_ptr + CROSS_ENTROPY_SUM, cross_entropy, ADD)


@triton.jit
def put_terms(
    state_row_ptr, terms, grad_sum, teacher_grad_sum, COMPONENTS: tl.constexpr, ADD: tl.constexpr
):
    for j in tl.static_range(len(COMPONENTS)):
        put(component_row(state_row_ptr, j), terms[j], ADD)
    put(state_row_ptr + GRAD_SUM, grad_sum, ADD)
    put(state_row_ptr + TEACHER_GRAD_SUM, teacher_grad_sum, ADD)
