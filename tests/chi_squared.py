# SPDX-License-Identifier: Apache-2.0
"""How likely it is that counts came from a law."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping

import torch

# cells that expect fewer are one cell, for the approximation to hold
_SMALL = 5.0


def chi_squared_p(counts: Mapping[Hashable, int], law: Mapping[Hashable, float]) -> float:
    """P(X >= sum (n - e)^2 / e) for X of chi-squared with cells - 1 degrees of freedom.

    e = probability * total. 0 where something came that the law never gives.
    """
    return chi_squared_p_of_all([(counts, law)])


def chi_squared_p_of_all(
    tables: Iterable[tuple[Mapping[Hashable, int], Mapping[Hashable, float]]],
) -> float:
    """The same of independent counts, a law each: statistics and degrees of freedom add up.

    1 where no law leaves a choice.
    """
    terms, freedom = [], 0
    for counts, law in tables:
        if any(law.get(key, 0.0) == 0.0 for key in counts):
            return 0.0
        cells = _cells(counts, law)
        terms += [(found - expected) ** 2 / expected for found, expected in cells]
        freedom += max(0, len(cells) - 1)
    if freedom == 0:
        return 1.0
    half = torch.tensor([freedom / 2, math.fsum(terms) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*half))


def _cells(counts, law) -> list[tuple[float, float]]:
    """(found, expected) of each key of the law; the rare ones as one."""
    total = sum(counts.values())
    cells: list[tuple[float, float]] = []
    small = [0.0, 0.0]
    for key, probability in law.items():
        cell = (float(counts.get(key, 0)), probability * total)
        if cell[1] >= _SMALL:
            cells.append(cell)
        else:
            small = [a + b for a, b in zip(small, cell, strict=True)]
    if small[1] > 0:
        cells.append((small[0], small[1]))
    return cells
