# SPDX-License-Identifier: Apache-2.0
"""The head on its leading singular directions: shorter hidden states, with a bound of the error.

With W = U S V' and P the leading `rank` columns of V, logits of h are W h; those of the projected
(P'h, W P) differ by W (I - P P') h, so no logit is off by more than

    |h - P P'h|  max_v |w_v - P P'w_v|      (lengths; Cauchy and Schwarz)

plus what rounding P'h to the dtype on the wire can do. A soft cap only lessens it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd.batch import Head

# float32 sums of D products
_ROUNDING = 4e-6


@dataclass(frozen=True, slots=True)
class Projection:
    """A head on `rank` directions.

    Attributes:
        basis: [D, rank] float32, orthonormal columns.
        head: with a weight of [V, rank] float32.
        residual: the longest row of what the head loses.
        longest: the longest row of the projected head.
    """

    basis: Tensor
    head: Head
    residual: float
    longest: float

    @property
    def rank(self) -> int:
        """Directions that are kept."""
        return self.basis.shape[1]

    def project(self, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[R, rank] in a dtype, and [R] float32: no logit is off by more than this."""
        exact = hidden.float()
        inside = exact @ self.basis
        sent = inside.to(dtype)
        lost = (exact - inside @ self.basis.T).norm(dim=1) * self.residual
        rounded = (inside - sent.float()).norm(dim=1) * self.longest
        slack = _ROUNDING * exact.norm(dim=1) * (self.longest + self.residual)
        return sent, (lost + rounded + slack) * abs(self.head.logit_scale)


@torch.no_grad()
def project_head(head: Head, rank: int, *, rows: int = 1 << 14) -> Projection:
    """The best `rank` directions of a head, by the eigenvectors of W'W in float64.

    Raises:
        ValueError: a rank that is not in [1, D].
    """
    weight = head.weight
    size = weight.shape[1]
    if not 1 <= rank <= size:
        raise ValueError(f"must be in [1, {size}], the head's width, got {rank}")
    gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    for part in weight.split(rows):
        part = part.double()
        gram += part.T @ part
    # ascending eigenvalues
    basis = torch.linalg.eigh(gram).eigenvectors[:, size - rank :].flip(1).float().contiguous()
    projected = weight.float() @ basis
    residual = max(
        float((part.float() - inside @ basis.T).norm(dim=1).max())
        for part, inside in zip(weight.split(rows), projected.split(rows), strict=True)
    )
    bias = None if head.bias is None else head.bias.float()
    longest = float(projected.norm(dim=1).max())
    return Projection(basis, replace(head, weight=projected, bias=bias), residual, longest)
