# SPDX-License-Identifier: Apache-2.0
"""Who else computes the loss on a GPU: what benchmarks/peers.py has, and what needs Triton."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import peers
from opd_kernels import divergences

# module that must import -> distribution, and the first word of its labels
PACKAGES = {
    "liger_kernel.chunked_loss": ("liger-kernel", "liger"),
    "trl.kernels.chunked_divergence": ("trl", "trl"),
    "orda_kernel": ("orda-kernel", "orda"),
    "fla.modules.fused_kl_div": ("fla-core", "fla"),
    "flashinfer.sampling": ("flashinfer-python", "flashinfer"),
}
COMPILED = "compile"


def importable(only: Sequence[str] = ()) -> tuple[dict[str, str], dict[str, str]]:
    """(version by distribution that can be imported, reason by one that cannot)."""
    found: dict[str, str] = {}
    missing: dict[str, str] = {}
    for module, (distribution, word) in PACKAGES.items():
        if only and word not in only:
            missing[distribution] = "not asked for"
            continue
        try:
            importlib.import_module(module)
            found[distribution] = importlib.metadata.version(distribution)
        except Exception as error:
            missing[distribution] = f"{type(error).__name__}: {error}"
    return found, missing


def losses_of(
    name: str, dtype: torch.dtype, device: str, here: Sequence[str]
) -> dict[str, peers.Peer]:
    """Peer by label, the quick ones first, `torch.compile` last: its first call takes longest.

    On a GPU bfloat16 GEMMs are the quick ones, so a peer that rounds its logits is no straw man.
    """
    known = peers.peers_of(name, dtype)
    words = {word for distribution, word in PACKAGES.values() if distribution in here}
    found = {
        label: peer
        for label, peer in known.items()
        if label.startswith(("eager", "torch.compile")) or label.split()[0] in words
    }
    if device == "cuda":
        found |= _of_triton(name, words)
    return dict(sorted(found.items(), key=lambda item: COMPILED in item[0]))


def _of_triton(name: str, words: set[str]) -> dict[str, peers.Peer]:
    found: dict[str, peers.Peer] = {}
    params = dict(divergences.parse(name).params)
    teacher_weight = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": params.get("beta")}.get(name)
    if "liger" in words and teacher_weight is not None:
        found["liger triton"] = peers.Peer(liger_triton(teacher_weight), averages=True)
    if "fla" in words and name == "forward_kl":
        found["fla"] = peers.Peer(fla, averages=True, rounds_logits=True)
    return found


def liger_triton(beta: float) -> peers.Loss:
    """Liger-Kernel's fused_linear_jsd."""

    def loss(student_hidden, student_weight, teacher_hidden, teacher_weight):
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        return LigerFusedLinearJSD(jsd_beta=beta)(
            student_hidden, student_weight, teacher_hidden, teacher_weight, None
        )

    return loss


def fla(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> Tensor:
    """flash-linear-attention's fused_kl_div, which is the forward KL."""
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return fused_kl_div_loss(student_hidden, teacher_hidden, student_weight, teacher_weight)
