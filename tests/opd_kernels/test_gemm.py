# SPDX-License-Identifier: Apache-2.0
"""out (+)= a @ b in our own kernel and in the library's, against float64."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import _buffers, _gemms, _plan, env, gemm
from tests.tolerance import assert_within_eager

WAYS = ("own", "library")
# logits, dX and dW of an LM head, and one of each with lines left over
SHAPES = ((24, 300, 64), (24, 64, 300), (300, 64, 24), (5, 33, 513), (37, 2, 1), (1100, 1030, 4))


@pytest.fixture
def way(request, monkeypatch):
    monkeypatch.setattr(gemm, "OWN", request.param == "own")
    return request.param


def operands(m, n, k, dtype, transposed):
    torch.manual_seed(m + n + k)
    a = torch.randn(k, m).t() if transposed else torch.randn(m, k)
    b = torch.randn(k, n) if transposed else torch.randn(n, k).t()
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gemm_is_right_to_float32(way, shape, transposed, accumulate):
    m, n, k = shape
    a, b = operands(m, n, k, torch.float32, transposed)
    out = torch.randn(m, n + 2)[:, :n]
    exact = a.double() @ b.double() + (out.double() if accumulate else 0)
    size = a.double().abs() @ b.double().abs() + 1
    result = gemm.gemm(out, a, b, accumulate=accumulate)
    assert result.data_ptr() == out.data_ptr()
    assert ((out - exact).abs() / size).max() < 1e-6


@pytest.mark.parametrize("way", ["own"], indirect=True)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
)
def test_own_gemm_widens_16_bits_exactly(way, dtypes):
    a, b = operands(24, 300, 700, torch.float32, False)
    a, b = a.to(dtypes[0]), b.to(dtypes[1])
    assert not _gemms.widens(b)
    out, widened = torch.empty(24, 300), torch.empty(24, 300)
    gemm.gemm(out, a, b)
    gemm.gemm(widened, a.float(), b.float())
    assert torch.equal(out, widened)


@pytest.mark.parametrize("way", ["own"], indirect=True)
@pytest.mark.parametrize("k", [2, 700, 701, 3000])
def test_own_gemm_of_bfloat16_is_as_exact_as_of_float32(way, k):
    a, b = (operand.bfloat16() for operand in operands(24, 300, k, torch.float32, False))
    exact = a.double() @ b.double()
    out, widened = torch.empty(24, 300), torch.empty(24, 300)
    gemm.gemm(out, a, b)
    gemm.gemm(widened, a.float(), b.float())
    error, of_float32 = ((x - exact).norm() / exact.norm() for x in (out, widened))
    assert error <= 2 * of_float32 + 1e-8


@pytest.mark.parametrize("way", ["own"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_size", [512, 2048])
def test_own_gemm_is_as_exact_as_the_library(way, dtype, hidden_size):
    """Products of one sign, whose rounding errors add up the more of them are in one sum."""
    hidden, head = torch.rand(48, hidden_size).to(dtype), torch.rand(96, hidden_size).to(dtype)
    alike = hidden[:, :1].expand(-1, hidden_size), head[:, :1].expand(-1, hidden_size)
    for a, b in ((hidden, head.t()), (alike[0].contiguous(), alike[1].contiguous().t())):
        eager = torch.mm(a.float(), b.float())
        own = gemm.gemm(torch.empty(48, 96), a, b)
        assert_within_eager(own, eager, a.double() @ b.double(), f"{hidden_size} products")


@pytest.mark.parametrize("way", ["own"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_own_gemm_of_a_row_does_not_depend_on_the_others(way, dtype):
    a, b = (matrix.to(dtype) for matrix in operands(100, 500, 1500, torch.float32, False))
    start = torch.randn(100, 500)
    together = gemm.gemm(start.clone(), a, b, accumulate=True)
    rows, columns = slice(5, 42), slice(3, 77)
    alone = gemm.gemm(start[rows, columns].clone(), a[rows], b[:, columns], accumulate=True)
    assert torch.equal(alone, together[rows, columns])


@pytest.mark.parametrize("way", ["own"], indirect=True)
def test_own_gemm_does_not_depend_on_the_threads(way):
    a, b = operands(100, 500, 1500, torch.float32, False)
    results = []
    for threads in (1, 2):
        # conftest.py sets it back
        torch.set_num_threads(threads)
        results.append(gemm.gemm(torch.empty(100, 500), a, b))
    assert torch.equal(*results)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_gemm_is_out_of_autocasts_reach(way):
    a, b = operands(8, 16, 32, torch.float32, False)
    plain = gemm.gemm(torch.empty(8, 16), a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gemm.gemm(torch.empty(8, 16), a, b), plain)


def test_gemm_copies_an_operand_without_a_unit_stride(monkeypatch):
    monkeypatch.setattr(gemm, "OWN", True)
    a, b = torch.randn(6, 40)[:, ::2], torch.randn(20, 5)
    torch.testing.assert_close(gemm.gemm(torch.empty(6, 5), a, b), a @ b)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_gemm_of_no_products_is_zero(way):
    a, b, out = torch.empty(3, 0), torch.empty(0, 5), torch.ones(3, 5)
    assert torch.equal(gemm.gemm(out, a, b, accumulate=True), torch.ones(3, 5))
    assert torch.equal(gemm.gemm(out, a, b), torch.zeros(3, 5))


def test_gemm_op_refuses_what_does_not_fit():
    a, b, out = torch.randn(3, 4), torch.randn(4, 5), torch.empty(3, 5)
    for arguments, words in (
        ((out, a, b[:3]), "takes out"),
        ((out.double(), a, b), "out must be float32"),
        ((out.t().contiguous().t(), a, b), "contiguous along its rows"),
        ((out, a.double(), b), "float32, bfloat16 or float16"),
        ((out, torch.randn(3, 8)[:, ::2], b), "contiguous along its rows or its columns"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.opd.gemm_(*arguments, False)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_losses_agree_between_the_ways(way, dtype):
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 16), torch.randn(50, 16)
    teacher_hidden, teacher_head = torch.randn(9, 24), torch.randn(50, 24)
    tensors = [x.to(dtype) for x in (hidden, head, teacher_hidden, teacher_head)]
    tensors[0].requires_grad_(), tensors[1].requires_grad_()
    opk.fused_linear_divergence(*tensors).loss.backward()
    exact = [x.detach().double() for x in tensors]
    exact[0].requires_grad_(), exact[1].requires_grad_()
    opk.fused_linear_divergence(*exact).loss.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for got, want in zip(tensors[:2], exact[:2], strict=True):
        difference = (got.grad.double() - want.grad).norm() / want.grad.norm()
        assert difference < tolerance


def test_cpu_gemm_of_the_environment(monkeypatch):
    monkeypatch.setenv("OPD_CPU_GEMM", "mkl")
    with pytest.raises(ValueError, match="'own' or 'library', got 'mkl'"):
        env.cpu_gemm()
    monkeypatch.setenv("OPD_CPU_GEMM", "")
    assert env.cpu_gemm() is None


def test_cpu_buffers_are_kept_for_the_next_call_and_released(monkeypatch):
    torch.use_deterministic_algorithms(False)
    like = torch.empty(1)
    opk.release_workspace()
    shapes = [(4, 5)]
    with (
        _buffers.borrowed_buffers(like, shapes) as (first,),
        _buffers.borrowed_buffers(like, shapes) as (other,),
    ):
        assert first.shape == (20,) and first.data_ptr() != other.data_ptr()
        address = first.data_ptr()
    with _buffers.borrowed_buffers(like, [(2, 3)]) as (smaller,):
        assert smaller.data_ptr() == address and smaller.is_contiguous()
    with _buffers.borrowed_buffers(like, [(100, 100)]) as (larger,):
        assert larger.shape == (10_000,)
    monkeypatch.setattr(_buffers, "KEPT_BYTES", 100)
    with _buffers.borrowed_buffers(like, [(10, 10)]) as (beyond,):
        assert beyond.data_ptr() != larger.data_ptr()
    opk.release_workspace()
    assert _buffers._kept.buffer is None


def test_cpu_plan_asks_for_no_more_than_is_kept():
    plan = _plan.plan("op", 100_000, 32_000, [torch.empty(32_000, 1)] * 2, 1 << 30)
    assert 0.9 * _buffers.KEPT_BYTES < plan.workspace_bytes <= _buffers.KEPT_BYTES


def test_cpu_plan_holds_one_token_wherever_the_budget_does(monkeypatch):
    monkeypatch.setattr(gemm, "OWN", True)
    whole_rows = _plan.NO_PATH_B
    # 3 MiB a token; the packed operand would take 2 more
    head = torch.empty(1).expand(750_000, 2048)
    plan = _plan.plan("op", 5, 750_000, [head], 4 << 20, whole_rows=whole_rows)
    assert plan.chunk_tokens == 1 and plan.workspace_bytes <= 4 << 20
    with pytest.raises(ValueError, match=f"got {2 << 20}"):
        _plan.plan("op", 5, 750_000, [head], 2 << 20, whole_rows=whole_rows)
    # a token beyond what is kept is not refused to a budget that has room for it
    head = torch.empty(1).expand(80_000_000, 1)
    plan = _plan.plan("op", 5, 80_000_000, [head], 1 << 30, whole_rows=whole_rows)
    assert plan.chunk_tokens == 1 and plan.workspace_bytes > _buffers.KEPT_BYTES


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_buffer_kept_by_inference_mode_serves_training(way):
    torch.use_deterministic_algorithms(False)
    opk.release_workspace()
    hidden, head, token_ids = torch.randn(9, 16), torch.randn(50, 16), torch.arange(9)
    lora = (torch.randn(2, 16), torch.randn(50, 2), 0.5)
    with torch.inference_mode():
        evaluated = opk.fused_linear_token_logprobs(hidden, head, token_ids, lora=lora).logprobs
    hidden.requires_grad_()
    trained = opk.fused_linear_token_logprobs(hidden, head, token_ids, lora=lora).logprobs
    trained.sum().backward()
    opk.release_workspace()
    assert torch.equal(trained, evaluated) and hidden.grad.isfinite().all()


def test_a_loss_in_a_kept_buffer_is_that_in_a_new_one():
    torch.use_deterministic_algorithms(False)
    tensors = [torch.randn(9, 16), torch.randn(50, 16), torch.randn(9, 24), torch.randn(50, 24)]
    tensors[0].requires_grad_()
    results = []
    for _ in range(3):
        tensors[0].grad = None
        loss = opk.fused_linear_divergence(*tensors, divergence="jsd").loss
        loss.backward()
        results.append((loss.detach(), tensors[0].grad))
    opk.release_workspace()
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])
