# SPDX-License-Identifier: Apache-2.0
"""Eager torch for sorted_l1 and its fused twin, and how far their inputs are from a kink."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.cases import F32, F64

# |p - q| at a rank relative to the larger one, below which rounding may change its sign
CLOSEST = 1e-5


def laws_of(
    student_logits: Tensor, teacher_logits: Tensor, dtype: torch.dtype, options: dict
) -> tuple[Tensor, Tensor]:
    """(q, p): softmax of both sides' logits, times their scales."""
    temperature = options.get("temperature", 1.0)
    temperatures = temperature if isinstance(temperature, tuple) else (temperature,) * 2
    laws = []
    for side, logits, value in zip(
        ("student", "teacher"), (student_logits, teacher_logits), temperatures, strict=True
    ):
        z = logits[:, : options.get(f"{side}_vocab_size")].to(dtype)
        z = options.get(f"{side}_logit_scale", 1.0) * z
        cap = options.get(f"{side}_softcap")
        z = z if cap is None else cap * torch.tanh(z / cap)
        law = (z / (value.to(dtype).unsqueeze(1) if isinstance(value, Tensor) else value)).softmax(
            1
        )
        log_scales = options.get(f"{side}_log_scales")
        laws.append(law if log_scales is None else law * log_scales.to(dtype).exp().unsqueeze(1))
    return laws[0], laws[1].detach()


def eager_sorted_l1(student_logits: Tensor, teacher_logits: Tensor, **options) -> Tensor:
    """[T], as one would write it: softmax in float32 (float64), sort, pad, subtract."""
    q, p = laws_of(
        student_logits, teacher_logits, torch.promote_types(student_logits.dtype, F32), options
    )
    loss, pairs, beta = torch.zeros_like(q[:, 0]), options.get("pairs"), options.get("beta", 0.5)
    if pairs is not None:
        paired_q, paired_p = q[:, pairs[0].long()], p[:, pairs[1].long()]
        m = beta * paired_p + (1 - beta) * paired_q
        terms = beta * paired_p * (paired_p / m).log()
        terms = terms + (1 - beta) * paired_q * (paired_q / m).log()
        loss = loss + options.get("pair_weight", 0.0) * terms.sum(1)
    q, p = ranked(q, p, pairs)
    width = max(q.shape[1], p.shape[1])
    q, p = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (q, p))
    loss = loss + options.get("rest_weight", 1.0) * (p - q).abs().sum(1)
    weights = options.get("token_weights")
    return loss if weights is None else torch.where(weights == 0, 0.0, loss * weights)


def ranked(q: Tensor, p: Tensor, pairs: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Both laws from the largest down, without the pairs."""
    if pairs is not None:
        q, p = without(q, pairs[0]), without(p, pairs[1])
    return tuple(x.sort(dim=1, descending=True, stable=True).values for x in (q, p))


def without(law: Tensor, ids: Tensor) -> Tensor:
    """The columns that are not among the ids."""
    kept = torch.ones(law.shape[1], dtype=torch.bool)
    kept[ids.long()] = False
    return law[:, kept]


def assert_no_kinks(student_logits: Tensor, teacher_logits: Tensor, **options) -> None:
    """No |p - q| at a rank is so small that rounding changes its sign, and with it a gradient."""
    q, p = laws_of(student_logits.detach(), teacher_logits, F64, options)
    q, p = ranked(q.detach(), p, options.get("pairs"))
    both = min(q.shape[1], p.shape[1])
    q, p = q[:, :both], p[:, :both]
    gaps = ((p - q).abs() / torch.maximum(p, q))[torch.maximum(p, q) > 0]
    assert gaps.numel() == 0 or gaps.min() > CLOSEST, f"a gap of {gaps.min():.1e}: another seed"
