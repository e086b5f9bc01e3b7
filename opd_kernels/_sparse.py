# SPDX-License-Identifier: Apache-2.0
"""dX and dW on the columns of dZ that some token of the chunk needs; what is dropped is counted."""

from __future__ import annotations

import torch
from torch import Tensor


def backproject(
    rows,
    grad_logits: Tensor,
    token_weights: Tensor | None,
    tolerance: float,
    hidden: Tensor,
    head: Tensor,
    grad_weight: Tensor | None,
    *,
    with_grad_hidden: bool,
) -> tuple[Tensor | None, Tensor]:
    """(dX [C, D], L1 of dZ dropped per token, before its weight); adds to grad_weight [V, D].

    A column is kept when |dZ| of any token exceeds tolerance times the size of its weight.
    """
    real = grad_logits.dtype
    sizes = grad_logits.abs()
    if token_weights is not None:
        sizes /= token_weights.abs().unsqueeze(1)
    kept = (sizes > tolerance).any(0)
    dropped = sizes[:, ~kept].sum(1)
    columns = torch.nonzero(kept).squeeze(1)
    packed = grad_logits[:, columns]
    hidden = hidden.to(real)
    grad_hidden = torch.mm(packed, head[columns].to(real)) if with_grad_hidden else None
    if grad_weight is not None:
        grad_weight.index_add_(0, columns, torch.mm(packed.t(), hidden))
    return grad_hidden, dropped
