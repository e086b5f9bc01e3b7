# SPDX-License-Identifier: Apache-2.0
"""The benchmarks compare equals: each peer computes our loss and our gradients."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from benchmarks import eager, peers

F32, BF16 = torch.float32, torch.bfloat16
KLS = ("forward_kl", "reverse_kl", "jsd")
LAWS_PAIRS = [name for name in opk.divergences.DIVERGENCES if name != "cross_entropy"]
NUM_TOKENS = 24
# of the loss, and of each gradient in the Frobenius norm
TOLERANCE = {F32: (1e-4, 1e-3), BF16: (1e-3, 1e-2)}
# logits rounded to bfloat16 move the loss itself
ROUNDED = (3e-2, 5e-2)


def problem(dtype: torch.dtype, trained: bool) -> tuple[torch.Tensor, ...]:
    """Hidden states and heads whose logits have a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(5)

    def gaussian(rows: int, columns: int, scale: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)

    hidden = gaussian(NUM_TOKENS, 64, 1.0).requires_grad_()
    head = gaussian(501, 64, 0.25).requires_grad_(trained)
    return hidden, head, gaussian(NUM_TOKENS, 96, 1.0), gaussian(501, 96, 0.2)


def loss_and_gradients(loss, dtype: torch.dtype, trained: bool, factor: float = 1.0):
    tensors = problem(dtype, trained)
    value = loss(*tensors) * factor
    value.backward()
    gradients = [tensor.grad.double() for tensor in tensors if tensor.requires_grad]
    return value.detach().double(), gradients


def assert_equal_to_ours(peer: peers.Peer, name: str, dtype: torch.dtype, trained: bool) -> None:
    def ours(*tensors):
        return opk.fused_linear_divergence(*tensors, divergence=name).loss

    expected, expected_gradients = loss_and_gradients(ours, dtype, trained)
    factor = NUM_TOKENS if peer.averages else 1.0
    value, gradients = loss_and_gradients(peer.loss, dtype, trained, factor)
    of_loss, of_gradient = ROUNDED if peer.rounds_logits else TOLERANCE[dtype]
    assert abs(value - expected) <= of_loss * abs(expected)
    assert len(gradients) == len(expected_gradients)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert (gradient - exact).norm() <= of_gradient * exact.norm()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", LAWS_PAIRS)
def test_eager_is_ours(name, dtype):
    found = {label: peer for label, peer in peers.peers_of(name, dtype).items() if "eager" in label}
    assert len(found) == (1 if dtype == F32 else 2)
    for peer in found.values():
        assert_equal_to_ours(peer, name, dtype, trained=True)


def test_eager_has_every_divergence_of_two_laws():
    assert list(eager.FORMULAS) == LAWS_PAIRS


def test_eager_cross_entropy_is_ours():
    logits, labels = torch.randn(NUM_TOKENS, 501), torch.arange(NUM_TOKENS)
    ours = opk.divergence(logits, logits, divergence="cross_entropy", labels=labels).sum()
    torch.testing.assert_close(eager.cross_entropy(logits, labels), ours)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS_PAIRS)
def test_compiled_is_ours_in_one_graph(name):
    torch.compiler.reset()
    # fullgraph=True: a graph break would raise
    assert_equal_to_ours(peers.peers_of(name, F32)["torch.compile"], name, F32, trained=True)


def package_peer(label: str, name: str, dtype: torch.dtype) -> peers.Peer:
    found = peers.peers_of(name, dtype)
    if label not in found:
        pytest.skip(f"the package of {label} is not installed (the `bench` extra)")
    return found[label]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("label", ["liger", "trl", "orda"])
def test_package_is_ours(label, name, dtype, trained):
    assert_equal_to_ours(package_peer(label, name, dtype), name, dtype, trained)


@pytest.mark.slow
@pytest.mark.parametrize("name", KLS)
def test_liger_compiled_is_ours(name):
    torch.compiler.reset()
    assert_equal_to_ours(package_peer("liger compiled", name, F32), name, F32, trained=True)
