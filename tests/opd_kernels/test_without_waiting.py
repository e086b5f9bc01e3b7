# SPDX-License-Identifier: Apache-2.0
"""compact_tokens=False: the same results, and nothing that waits for a device."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import opd_kernels as opk
from opd_kernels import _checks, _divergence_paths, _gemms, _linear
from opd_kernels._divergence_paths import Inputs, Options
from tests.cases import BF16, F16, F32, F64, FusedCase, fused_of, token_ids_of
from tests.checks import dtype_id, laws_of, leaf, upstream, workspace_for

CASE = FusedCase("waiting", 23, 301, 16, 24, weights="some_zero")
BUDGET = workspace_for(CASE, 5)
# the package gives the function this name
token_ops = importlib.import_module("opd_kernels.fused_linear_token_logprobs")
every_reduction = pytest.mark.parametrize("reduction", ["sum", "none"])
# what reads a value from the device, or makes a shape of one
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "is_nonzero")


class NothingWaits(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0]
        assert name not in WAITS, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


def run(dtype, compact, reduction, budget=BUDGET, **more):
    inputs = fused_of(CASE, dtype)
    hidden, head = (leaf(x) for x in inputs.tensors()[:2])
    bias = leaf(torch.linspace(-1, 1, 301).to(dtype))
    generator = torch.Generator().manual_seed(5)
    low_rank = [
        leaf((torch.randn(shape, generator=generator) / 3).to(dtype))
        for shape in ((2, 16), (301, 2))
    ]
    out = opk.fused_linear_divergence(
        hidden,
        head,
        *inputs.tensors()[2:],
        divergence="jsd",
        student_bias=bias,
        student_lora=(*low_rank, 0.5),
        reduction=reduction,
        statistics=("student_entropy", "top1_agreement"),
        workspace_bytes=budget,
        compact_tokens=compact,
        **(inputs.keywords() | more),
    )
    out.loss.sum().backward()
    leaves = (hidden, head, bias, *low_rank)
    return out.loss.detach(), *out.statistics.values(), *(x.grad for x in leaves)


@every_reduction
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_results_are_those_of_compacted_tokens(dtype, reduction):
    # rows of weight 0 hold NaN in both hidden states
    compacted, whole = (run(dtype, compact, reduction) for compact in (True, False))
    for one, two in zip(whole, compacted, strict=True):
        assert bool(one.isfinite().all())
        relative = 32 * torch.finfo(torch.promote_types(dtype, F32)).eps
        relative += (one.dtype in (BF16, F16)) * torch.finfo(dtype).eps
        torch.testing.assert_close(one, two, rtol=relative, atol=relative * two.abs().max().item())
    masked = fused_of(CASE, dtype).token_weights == 0
    assert bool((whole[3][masked] == 0).all())
    if reduction == "none":
        assert bool((whole[0][masked] == 0).all())


@every_reduction
def test_results_in_slices_are_those_of_compacted_tokens(reduction):
    compacted, whole = (run(F64, compact, reduction, 12_000) for compact in (True, False))
    for one, two in zip(whole, compacted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@every_reduction
def test_all_tokens_masked(reduction):
    zeros = {"token_weights": torch.zeros(CASE.num_tokens)}
    for value in run(F32, False, reduction, **zeros):
        assert bool((value == 0).all())


def test_token_logprobs_are_those_of_compacted_tokens():
    inputs = fused_of(FusedCase("waiting_ids", 11, 301, 16, 8), F32)
    ids = token_ids_of(11, 301, 2)
    mask = torch.arange(11) % 3 != 1
    inputs.student_hidden[4] = torch.nan

    def run(compact):
        hidden, head = (leaf(x) for x in inputs.tensors()[:2])
        out = opk.fused_linear_token_logprobs(
            hidden, head, ids, compact_tokens=compact, workspace_bytes=20_000
        )
        torch.where(mask, out.logprobs - out.entropy, 0.0).sum().backward()
        return hidden.grad, head.grad

    for one, two in zip(run(False), run(True), strict=True):
        assert bool(one.isfinite().all())
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


# -- nothing waits -------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch, interpreted_triton):
    """The loops' own calls: what looks at values on CPU alone, and returns at once elsewhere, is
    out of them."""
    monkeypatch.setattr(_gemms, "on_gpu", lambda tensor: True)
    for name in ("token_ids_in_range", "distinct_ids"):
        monkeypatch.setattr(_checks, name, lambda *_, **__: None)
    for name in ("token_ids_in_range", "values_in_range"):
        monkeypatch.setattr(_divergence_paths, name, lambda *_, **__: None)
    # a launch under the interpreter reads its pointers
    monkeypatch.setattr("opd_kernels._dispatch.row_ops", lambda backend: Opaque())


class Opaque:
    """Row kernels that the dispatch mode does not look into: they only launch."""

    def __getattr__(self, name):
        kernel = getattr(torch.ops.opd_triton, name)

        def call(*arguments):
            with torch.utils._python_dispatch._disable_current_modes():
                return kernel(*arguments)

        return call


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("budget", [BUDGET, 12_000])
def test_the_loop_of_the_divergence_waits_for_nothing(as_on_a_gpu, dtype, budget):
    inputs = fused_of(CASE, dtype)
    pair = torch.randn(2, 16), torch.randn(301, 2)
    laws = laws_of(
        inputs.student_hidden,
        301,
        divergence="jsd",
        token_weights=inputs.token_weights,
        biases=(torch.randn(301), None, None),
        temperature=(torch.ones(23), 1.0),
        token_ids=token_ids_of(23, 301, 1),
    )
    tensors = Inputs(*inputs.tensors(), None, None, *pair)
    options = Options(budget, [True] * 5, True, "", 0.0, False, "triton")
    with NothingWaits():
        loss, gradients, statistics = _divergence_paths.run(tensors, laws, options)
    for value in (loss, *gradients, statistics):
        assert value.numel() and bool(value.isfinite().all())
    with NothingWaits(), pytest.raises(AssertionError, match=r"nonzero.* waits for the device"):
        _divergence_paths.run(tensors, laws, options._replace(compact_tokens=True))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
def test_the_loops_of_the_token_logprobs_wait_for_nothing(as_on_a_gpu, dtype):
    inputs = fused_of(FusedCase("waiting_ids", 11, 301, 16, 8), dtype)
    ids, law = token_ids_of(11, 301, 1), (None, None, [1.0, 0.0, 1.0], 301)
    tensors = (*inputs.tensors()[:2], None, None, ids)
    grads = upstream(11), upstream(11).double(), upstream(11)
    with NothingWaits():
        _, lse, entropy = token_ops._fwd(*tensors, *law, None, 40_000, False, "triton")
        formed = token_ops._bwd(
            *grads, *tensors, lse, entropy, *law, 40_000, [True, True, False, False, False],
            False, "triton",
        )  # fmt: skip
    assert bool((formed[1] != 0).any())


# -- CUDA graphs ---------------------------------------------------------------------------------


@pytest.fixture
def captured(monkeypatch):
    monkeypatch.setattr(_linear, "is_captured", lambda tensor: True)


def test_a_captured_call_gathers_no_tokens(captured):
    weights = torch.tensor([1.0, 0.0])
    assert _linear.active_tokens(weights, None) is None
    assert _linear.active_tokens(weights, False) is None
    with pytest.raises(RuntimeError, match="compact_tokens must be False or None while a CUDA"):
        _linear.active_tokens(weights, True)


def test_a_captured_call_refuses_a_tolerance(captured):
    inputs = fused_of(CASE, F32)
    with pytest.raises(RuntimeError, match="gradient_tolerance must be None while a CUDA graph"):
        opk.fused_linear_divergence(
            leaf(inputs.student_hidden),
            *inputs.tensors()[1:],
            gradient_tolerance=1e-3,
            **inputs.keywords(),
        )


def test_outside_a_graph_tokens_are_gathered():
    weights = torch.tensor([1.0, 0.0, 2.0])
    for compact in (None, True):
        assert _linear.active_tokens(weights, compact).tolist() == [0, 2]
    assert _linear.active_tokens(None, None) is None
    assert not _linear.is_captured(weights)
