# SPDX-License-Identifier: Apache-2.0
"""The same loss by other means: eager torch, torch.compile, and public packages where installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor


def eager_divergence(
    student_logits: Tensor, teacher_logits: Tensor, name: str, param: float
) -> Tensor:
    """The textbook loss on float32 logits, summed over tokens; what autograd differentiates."""
    log_q = torch.log_softmax(student_logits.float(), -1)
    log_p = torch.log_softmax(teacher_logits.float(), -1)
    if name == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum()
    if name == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum()
    if name == "total_variation":
        return (log_p.exp() - log_q.exp()).abs().sum() / 2
    p, q = log_p.exp(), log_q.exp()
    if name == "jsd":
        log_m = (param * p + (1 - param) * q).log()
        return param * (p * (log_p - log_m)).sum() + (1 - param) * (q * (log_q - log_m)).sum()
    if name == "skew_forward_kl":
        return (p * (log_p - (param * p + (1 - param) * q).log())).sum()
    return (q * (log_q - ((1 - param) * p + param * q).log())).sum()


def liger_fused_linear_jsd(beta: float, chunk: int, compiled: bool) -> Callable | None:
    """Liger-Kernel's chunked JSD (its CPU-capable one); None if the package is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # no hard-label term; its loss is a mean over tokens
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled, chunk_size=chunk
    )

    def run(student_hidden, student_weight, teacher_hidden, teacher_weight, token_ids):
        return loss(student_hidden, student_weight, teacher_hidden, teacher_weight, token_ids)

    return run


def trl_chunked_jsd(beta: float) -> Callable | None:
    """TRL's chunked divergence (its torch path, on CPU); None if the package is not installed."""
    if importlib.util.find_spec("trl") is None:
        return None
    try:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss
    except ImportError:
        return None

    def run(student_hidden, student_weight, teacher_hidden, teacher_weight):
        mask = torch.ones(1, student_hidden.shape[0], dtype=torch.bool)
        hidden = (student_hidden[None], teacher_hidden[None])
        loss, *_ = _chunked_divergence_loss(
            *hidden, student_weight, teacher_weight, mask, beta, num_items_in_batch=1
        )
        return loss

    return run
