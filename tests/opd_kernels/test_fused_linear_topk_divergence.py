# SPDX-License-Identifier: Apache-2.0
"""opk.fused_linear_topk_divergence on CPU: truth, chunks, memory, frozen sides, ranks, errors."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import opd_kernels as opk
from opd_kernels import _cells, _checks, _gemms, _laws, reference
from opd_kernels import _topk_divergence_path as path
from opd_kernels import divergences as D
from opd_kernels.token_logprobs import Law
from opd_kernels.topk_divergence import pack_target
from tests.cases import BF16, F16, F32, F64, SPECS, FusedCase, fused_of
from tests.checks import dtype_id, leaf, upstream
from tests.eager import _logits
from tests.memory import peak_bytes
from tests.ranks import run_ranks
from tests.sparse import PAIRS, TAILS, eager_topk_divergence
from tests.tolerance import assert_within_eager

NAN, INF = float("nan"), float("inf")
SMALL = FusedCase("small", 37, 211, 16, 12, weights="some_zero", temperature=1.3)
CASES = (
    FusedCase("no_tokens", 0, 33, 8, 16),
    FusedCase("tiny_odd", 7, 41, 9, 41),
    FusedCase("odd", 57, 1423, 83, 167, weights="some_zero"),
    FusedCase("all_rows_masked", 9, 41, 7, 5, weights="all_zero"),
    FusedCase("close_models", 33, 2000, 64, 64, gap=0.05),
    FusedCase("padded", 19, 1000, 32, 48, student_padding=24, weights="random"),
)
STATISTICS = path.STATISTICS
every_reduction = pytest.mark.parametrize("reduction", ["sum", "none"])


def sparse_of(case: FusedCase, dtype: torch.dtype, num_ids: int = 8):
    """(hidden, head, ids, logprobs, tail_logprob, keywords): the teacher's top of its own head."""
    inputs = fused_of(case, dtype)
    logits = inputs.teacher_hidden.double() @ inputs.teacher_lm_head_weight.double().T
    law = logits[:, : case.vocab_size].log_softmax(-1)
    logprobs, ids = law.topk(min(num_ids, case.vocab_size - 1))
    tail = law.scatter(1, ids, -INF).logsumexp(-1)
    ids[2::5, 1] = ids[2::5, 0]
    ids[3::5, 2] = -1
    logprobs = logprobs.masked_fill(ids < 0, -INF)
    real = torch.promote_types(dtype, F32)
    keywords = {
        "token_weights": inputs.token_weights,
        "temperature": inputs.temperature,
        "vocab_size": inputs.vocab_size,
    }
    return *inputs.tensors()[:2], ids, logprobs.to(real), tail.to(real), keywords


def budget(case: FusedCase, num_tokens: int, num_ids: int = 8) -> int:
    """Bytes for chunks of about so many tokens."""
    size = case.student_hidden_size
    return num_tokens * (8 * (case.vocab_size + 2 * size) + 96 * num_ids) + 64 * size


@pytest.mark.parametrize("chunks", ["one_chunk", "many_chunks"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fused_linear_topk_divergence_matches_reference(case, dtype, chunks):
    hidden, head, ids, logprobs, _, keywords = sparse_of(case, dtype)
    workspace = 1 << 30 if chunks == "one_chunk" else budget(case, 5)
    grad_loss = upstream(case.num_tokens)

    def eager(*tensors, token_weights=None, vocab_size=None, **rest):
        hidden, head, *teacher = tensors
        logits = _logits(hidden, head, token_weights, vocab_size)
        return eager_topk_divergence(logits, *teacher, token_weights=token_weights, **rest)

    for divergence, tail in (("forward_kl", "bucket"), ("reverse_kl", "renormalize_both")):
        spec = next(s for s in SPECS if s.name == divergence)

        def run(function, tensor_dtype, tail=tail, **more):
            leaves = leaf(hidden, tensor_dtype), leaf(head, tensor_dtype)
            loss = function(*leaves, ids, logprobs, tail=tail, **keywords, **more)
            loss.backward(grad_loss.to(loss.dtype))
            return loss.detach(), *(x.grad for x in leaves)

        truth = run(
            lambda *a, **k: reference.fused_linear_topk_divergence(*a, **k).loss,
            F64,
            divergence=spec,
            reduction="none",
        )
        baseline = run(eager, dtype, divergence=spec)
        actual = run(
            lambda *a, **k: opk.fused_linear_topk_divergence(*a, **k).loss,
            dtype,
            divergence=spec.public(),
            reduction="none",
            workspace_bytes=workspace,
            backend="cpu",
        )
        what = f"{case.name} {dtype_id(dtype)} {tail}"
        for got, plain, exact, name in zip(
            actual, baseline, truth, ("loss", "hidden", "head"), strict=True
        ):
            assert_within_eager(got, plain, exact, f"{what} {name}")


def bent(case: FusedCase, dtype: torch.dtype):
    """Hidden states, head, bias, A and B; ids, log-probs, tail; keywords with every option."""
    hidden, head, *teacher, keywords = sparse_of(case, dtype)
    generator = torch.Generator().manual_seed(case.seed)
    size, width = head.shape
    extra = [
        torch.randn(shape, generator=generator).to(dtype) * 0.5
        for shape in ((size,), (4, width), (size, 4))
    ]
    keywords["temperature"] = torch.rand(case.num_tokens, generator=generator) + 0.5
    keywords |= {"student_softcap": 9.0, "student_logit_scale": 1.1}
    return [hidden, head, *extra], teacher, keywords


def call(function, tensors, teacher, keywords, **more):
    hidden, head, bias, down, up = tensors
    return function(
        hidden,
        head,
        *teacher[:2],
        tail_logprob=teacher[2] if more.pop("with_tail", False) else None,
        student_bias=bias,
        student_lora=(down, up, 0.6),
        **keywords,
        **more,
    )


@pytest.mark.parametrize("compact", [None, False])
@every_reduction
@pytest.mark.parametrize("pair", [p for i, p in enumerate(PAIRS) if i % 5 == 0], ids=str)
def test_fused_linear_topk_divergence_of_a_bent_head_is_the_reference(pair, reduction, compact):
    spec, tail = pair
    tensors, teacher, keywords = bent(SMALL, F64)
    results = []
    for function, more in (
        (
            opk.fused_linear_topk_divergence,
            {
                "divergence": spec.public(),
                "workspace_bytes": budget(SMALL, 9),
                "compact_tokens": compact,
            },
        ),
        (reference.fused_linear_topk_divergence, {"divergence": spec}),
    ):
        leaves = [leaf(tensor) for tensor in tensors]
        more |= {"tail": tail, "reduction": reduction, "statistics": STATISTICS}
        out = call(function, leaves, teacher, keywords, **more)
        out.loss.backward(
            upstream(37).double() if reduction == "none" else torch.tensor(1.7).double()
        )
        results.append((out.loss.detach(), *(x.grad for x in leaves), *out.statistics.values()))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@every_reduction
@pytest.mark.parametrize("tail", TAILS)
def test_fused_linear_topk_divergence_gradcheck_float64(tail, reduction):
    case = FusedCase("gradcheck", 4, 9, 3, 2, weights="random")
    tensors, teacher, keywords = bent(case, F64)

    def loss(*leaves):
        return call(
            opk.fused_linear_topk_divergence,
            leaves,
            teacher,
            keywords,
            divergence=[(0.3, D.forward_kl()), (0.7, D.jsd(beta=0.3))],
            tail=tail,
            reduction=reduction,
            workspace_bytes=budget(case, 2),
        ).loss

    leaves = [leaf(tensor) for tensor in tensors]
    assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_fused_linear_topk_divergence_is_that_of_the_logits():
    hidden, head, ids, logprobs, _, keywords = sparse_of(SMALL, F64)
    hidden = hidden.masked_fill((keywords["token_weights"] == 0).unsqueeze(1), 0.0)
    for mode in TAILS:
        options = {"tail": mode, "tail_logprob": None, **keywords}
        fused = opk.fused_linear_topk_divergence(
            hidden, head, ids, logprobs, reduction="none", **options
        )
        plain = opk.topk_divergence(hidden @ head.T, ids, logprobs, **options)
        torch.testing.assert_close(fused.loss, plain, rtol=1e-12, atol=1e-14)


def test_fused_linear_topk_divergence_of_nearly_all_ids_is_the_fused_divergence():
    case = FusedCase("whole", 9, 60, 16, 12, weights="random")
    inputs = fused_of(case, F64)
    law = (inputs.teacher_hidden @ inputs.teacher_lm_head_weight.T).log_softmax(-1)
    logprobs, ids = law.topk(59)
    for divergence in ("reverse_kl", D.jsd(beta=0.3), D.renyi(0.7)):
        results = []
        for sparse in (True, False):
            leaves = [leaf(x) for x in inputs.tensors()[:2]]
            keywords = {"divergence": divergence, "token_weights": inputs.token_weights}
            if sparse:
                out = opk.fused_linear_topk_divergence(*leaves, ids, logprobs, **keywords)
            else:
                out = opk.fused_linear_divergence(*leaves, *inputs.tensors()[2:], **keywords)
            out.loss.backward()
            results.append((out.loss.detach(), *(x.grad for x in leaves)))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-11)


# -- chunks and memory ---------------------------------------------------------------------------


@every_reduction
@pytest.mark.parametrize("dtype", [F64, BF16], ids=dtype_id)
@pytest.mark.parametrize("chunk_tokens", [1, 5])
def test_fused_linear_topk_divergence_does_not_depend_on_the_workspace(
    chunk_tokens, dtype, reduction
):
    hidden, head, ids, logprobs, _, keywords = sparse_of(SMALL, dtype)

    def run(workspace_bytes):
        leaves = leaf(hidden), leaf(head)
        out = opk.fused_linear_topk_divergence(
            *leaves,
            ids,
            logprobs,
            reduction=reduction,
            statistics=STATISTICS,
            workspace_bytes=workspace_bytes,
            **keywords,
        )
        out.loss.sum().backward()
        return out.loss.detach(), out.statistics["forward_kl"], *(x.grad for x in leaves)

    for small, large in zip(run(budget(SMALL, chunk_tokens)), run(1 << 30), strict=True):
        real = torch.promote_types(dtype, F32)
        relative = 32 * torch.finfo(real).eps + (large.dtype != real) * torch.finfo(dtype).eps
        bound = relative * large.abs().max().item()
        torch.testing.assert_close(small, large, rtol=relative, atol=bound)


@every_reduction
@pytest.mark.parametrize("num_ids", [8, 1024])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_fused_linear_topk_divergence_stays_within_its_workspace(dtype, num_ids, reduction):
    case = FusedCase("memory", 512, 4000, 64, 96)
    hidden, head, ids, logprobs, *_ = sparse_of(case, dtype, num_ids)
    hidden, head = leaf(hidden), leaf(head)
    workspace = 4 << 20

    def step():
        opk.fused_linear_topk_divergence(
            hidden, head, ids, logprobs, reduction=reduction, workspace_bytes=workspace
        ).loss.sum().backward()

    step()
    hidden.grad = head.grad = None
    gradients = hidden.nbytes + head.nbytes + (dtype != F32) * 4 * head.numel()
    peak = peak_bytes(step)
    assert peak <= workspace + 1.05 * gradients + (64 << 10), f"{peak} bytes"
    assert peak < 4 * case.num_tokens * case.vocab_size


@pytest.mark.parametrize("trained", range(5), ids=["hidden", "head", "bias", "A", "B"])
@every_reduction
def test_fused_linear_topk_divergence_trains_one_tensor_alone(trained, reduction):
    tensors, teacher, keywords = bent(SMALL, F32)

    def run(*which):
        leaves = [leaf(x) if i in which else x for i, x in enumerate(tensors)]
        out = call(opk.fused_linear_topk_divergence, leaves, teacher, keywords, reduction=reduction)
        out.loss.sum().backward()
        return leaves

    assert torch.equal(run(trained)[trained].grad, run(*range(5))[trained].grad)


def test_fused_linear_topk_divergence_of_a_frozen_head_has_no_gradient_of_it():
    case = FusedCase("frozen", 64, 8000, 64, 32)
    hidden, head, ids, logprobs, *_ = sparse_of(case, F32)
    hidden, workspace = leaf(hidden), budget(case, 4)

    def step():
        opk.fused_linear_topk_divergence(
            hidden, head, ids, logprobs, workspace_bytes=workspace
        ).loss.backward()

    step()
    assert peak_bytes(step) < workspace + hidden.nbytes + (64 << 10) < head.nbytes


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_fused_linear_topk_divergence_adds_to_a_main_grad(factor):
    tensors, teacher, keywords = bent(SMALL, F32)
    leaves = [leaf(x) for x in tensors]
    (factor * call(opk.fused_linear_topk_divergence, leaves, teacher, keywords).loss).backward()
    again, total = [leaf(x) for x in tensors], torch.ones_like(tensors[1])
    out = call(
        opk.fused_linear_topk_divergence,
        again,
        teacher,
        keywords,
        student_lm_head_weight_grad=total,
        grad_scale=factor,
    )
    (factor * out.loss).backward()
    assert again[1].grad is None
    torch.testing.assert_close(total, 1 + leaves[1].grad, rtol=1e-5, atol=1e-6)
    for position in (0, 2, 3, 4):
        torch.testing.assert_close(again[position].grad, leaves[position].grad)
    with pytest.raises(RuntimeError, match="must be grad_scale"):
        call(
            opk.fused_linear_topk_divergence,
            [leaf(x) for x in tensors],
            teacher,
            keywords,
            student_lm_head_weight_grad=total,
        ).loss.mul(3.0).backward()


# -- what does not count -------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [None, False])
@every_reduction
def test_fused_linear_topk_divergence_reads_nothing_of_a_masked_token(reduction, compact):
    hidden, head, ids, logprobs, tail, keywords = sparse_of(SMALL, F32)
    masked = keywords["token_weights"] == 0
    ids[masked], logprobs[masked], tail[masked] = 10**9, NAN, NAN
    leaves = leaf(hidden), leaf(head)
    out = opk.fused_linear_topk_divergence(
        *leaves,
        ids,
        logprobs,
        reduction=reduction,
        statistics=STATISTICS,
        compact_tokens=compact,
        **keywords,
    )
    upstream = torch.where(masked, INF, 1.0) if reduction == "none" else torch.tensor(1.0)
    out.loss.backward(upstream)
    assert bool((leaves[0].grad[masked] == 0).all())
    assert all(bool(x.grad.isfinite().all()) for x in leaves)
    assert all(bool((row[masked] == 0).all()) for row in out.statistics.values())


@every_reduction
def test_fused_linear_topk_divergence_of_an_id_the_student_rules_out(reduction):
    # its loss is infinite, its gradient -p: as that of the logits
    case = FusedCase("ruled_out", 3, 40, 6, 5)
    hidden, head, ids, logprobs, *_ = sparse_of(case, F64)
    bias = torch.zeros(40, dtype=F64)
    bias[ids[0, 0]] = -INF
    results = []
    for function in (opk.fused_linear_topk_divergence, reference.fused_linear_topk_divergence):
        leaves = leaf(hidden), leaf(bias)
        out = function(leaves[0], head, ids, logprobs, student_bias=leaves[1], reduction=reduction)
        out.loss.sum().backward()
        results.append((out.loss.detach(), leaves[1].grad))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)
    assert results[0][1][ids[0, 0]].item() < -1e-3


@every_reduction
def test_fused_linear_topk_divergence_of_no_tokens(reduction):
    hidden, head = torch.empty(0, 8, requires_grad=True), leaf(torch.randn(40, 8))
    out = opk.fused_linear_topk_divergence(
        hidden, head, torch.empty(0, 3).long(), torch.empty(0, 3), reduction=reduction
    )
    out.loss.sum().backward()
    assert out.loss.shape == (() if reduction == "sum" else (0,))
    assert bool((head.grad == 0).all()) and hidden.grad.shape == (0, 8)


def test_fused_linear_topk_divergence_under_autocast():
    hidden, head, ids, logprobs, _, keywords = sparse_of(SMALL, BF16)
    expected = opk.fused_linear_topk_divergence(hidden, head, ids, logprobs, **keywords).loss
    with torch.autocast("cpu", dtype=BF16):
        got = opk.fused_linear_topk_divergence(hidden.float(), head, ids, logprobs, **keywords).loss
    assert torch.equal(got, expected)


@every_reduction
@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_fused_linear_topk_divergence_compiles_without_a_graph_break(tail, reduction):
    hidden, head, ids, logprobs, _, keywords = sparse_of(SMALL, F32)

    def loss(hidden, head):
        return opk.fused_linear_topk_divergence(
            hidden * 1.5,
            head,
            ids,
            logprobs,
            tail=tail,
            reduction=reduction,
            statistics=("student_mass",),
            **keywords,
        ).loss.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = (leaf(hidden), leaf(head)), (leaf(hidden), leaf(head))
    (3.0 * loss(*expected)).backward()
    (3.0 * compiled(*actual)).backward()
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_fused_linear_topk_divergence_opcheck(dtype):
    case = FusedCase("opcheck", 37, 211, 16, 12)
    hidden, head, ids, logprobs, *_ = sparse_of(case, dtype)
    pair = torch.randn(2, 16), torch.randn(211, 2)
    target = (ids, logprobs, None, torch.rand(37), None, [0], [0.0, 0.0], 0)
    numbers = (None, [1.0, 0.0, 1.0], 211)
    bias, workspace, ops = torch.randn(211), 1 << 20, torch.ops.opd
    trained = (*(leaf(x) for x in (hidden, head, *pair)), *target, leaf(bias), *numbers)
    plain = (hidden, head, *pair, *target, bias, *numbers)
    wanted = [True] * 5
    torch.library.opcheck(
        ops.fused_linear_topk_divergence_sum, (*trained, workspace, wanted, True, "", None, "cpu")
    )
    torch.library.opcheck(
        ops.fused_linear_topk_divergence_fwd, (*trained, workspace, True, "", None, "cpu")
    )
    torch.library.opcheck(
        ops.fused_linear_topk_divergence_bwd,
        (torch.ones(37), *plain, workspace, wanted, "", None, "cpu"),
    )
    torch.library.opcheck(
        ops.fused_linear_topk_divergence_sum_,
        (torch.zeros(211, 16), 1.0, *plain, workspace, wanted, True, "", None, "cpu"),
    )


class NothingWaits(TorchDispatchMode):
    """Fails on what reads a value from the device, or makes a shape of one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "item"), function
        return function(*args, **(kwargs or {}))


class Opaque:
    """Row kernels that the dispatch mode does not look into: on a GPU they only launch."""

    def __getattr__(self, name):
        def call(*arguments):
            with torch.utils._python_dispatch._disable_current_modes():
                return getattr(torch.ops.opd, name)(*arguments)

        return call


@pytest.mark.parametrize("tail", TAILS)
def test_the_loop_waits_for_nothing(tail, monkeypatch):
    # what looks at values on a CPU alone returns at once elsewhere
    monkeypatch.setattr(_gemms, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(_checks, "token_ids_in_range", lambda *_, **__: None)
    monkeypatch.setattr(path, "values_in_range", lambda *_, **__: None)
    for name in ("_check_mass", "_check_whole"):
        monkeypatch.setattr(_cells, name, lambda *_: None)
    monkeypatch.setattr("opd_kernels._dispatch.row_ops", lambda backend: Opaque())
    tensors, teacher, keywords = bent(SMALL, F32)
    hidden, head, bias, down, up = tensors
    rows = _laws.rows_of("test", hidden)
    target = pack_target(
        rows,
        *teacher[:2],
        None,
        divergence="jsd" if tail != "drop" else "forward_kl",
        support="teacher",
        tail=tail,
        token_weights=keywords["token_weights"],
    )
    law = Law(bias, torch.ones(37), [1.0, 0.0, 1.0], 211)
    inputs = path.Inputs(hidden, head, down, up)
    options = path.Options(budget(SMALL, 40), [True] * 5, True, "", False, "cpu")
    with NothingWaits():
        loss, gradients, statistics = path.run(inputs, target, law, options)
    for value in (loss, *gradients):
        assert value.numel() and bool(value.isfinite().all())
    # reverse_kl of a teacher without a tail is infinite
    assert statistics.shape == (6, 37) and not bool(statistics.isnan().any())
    with NothingWaits(), pytest.raises(AssertionError, match="nonzero"):
        path.run(inputs, target, law, options._replace(compact_tokens=True))


def test_explain_knows_fused_linear_topk_divergence():
    hidden, head, ids, logprobs, *_ = sparse_of(SMALL, F32)
    text = opk.explain(
        "fused_linear_topk_divergence",
        hidden,
        head,
        ids,
        logprobs,
        workspace_bytes=budget(SMALL, 5),
    )
    assert "path A:" in text and "of 37 tokens" in text
    assert "topk_divergence: backend 'cpu'" in opk.explain("topk_divergence", hidden)


# -- ranks ---------------------------------------------------------------------------------------


def worker(rank: int, ranks: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        _compare(rank, ranks)
        _shard_without_mass(rank, ranks)
    finally:
        dist.destroy_process_group()


def _compare(rank: int, ranks: int) -> None:
    tensors, teacher, keywords = bent(SMALL, F64)
    cut = [0, 150, 211] if ranks == 2 else [0, 30, 130, 211]
    rows = slice(cut[rank], cut[rank + 1])
    sharded = (1, 2, 4)
    for tail in TAILS:
        for reduction in ("sum", "none"):
            results = []
            for own in (False, True):
                mine = own and dist.group.WORLD
                leaves = [
                    leaf(x[rows] if own and i in sharded else x) for i, x in enumerate(tensors)
                ]
                out = call(
                    opk.fused_linear_topk_divergence,
                    leaves,
                    teacher,
                    keywords,
                    divergence=[(0.4, "forward_kl"), (0.6, "jsd")],
                    tail=tail,
                    reduction=reduction,
                    statistics=STATISTICS,
                    workspace_bytes=budget(SMALL, 7),
                    process_group=mine or None,
                )
                out.loss.sum().backward()
                gradients = [
                    x.grad[rows] if not own and i in sharded else x.grad
                    for i, x in enumerate(leaves)
                ]
                results.append((out.loss.detach(), *gradients, *out.statistics.values()))
            for one, whole in zip(results[1], results[0], strict=True):
                torch.testing.assert_close(one, whole, rtol=1e-11, atol=1e-12)


def _shard_without_mass(rank: int, ranks: int) -> None:
    # a rank whose logits are all -inf, through its bias
    hidden, head, ids, logprobs, *_ = sparse_of(FusedCase("empty", 5, 40, 6, 5), F64)
    bias = torch.zeros(40, dtype=F64)
    bias[:10] = -INF
    cut = [0, 10, 40] if ranks == 2 else [0, 10, 25, 40]
    rows = slice(cut[rank], cut[rank + 1])
    keywords = {"divergence": "jsd", "reduction": "none", "statistics": STATISTICS}
    whole = opk.fused_linear_topk_divergence(
        hidden, head, ids, logprobs, student_bias=bias, **keywords
    )
    ours = opk.fused_linear_topk_divergence(
        hidden,
        head[rows],
        ids,
        logprobs,
        student_bias=bias[rows],
        process_group=dist.group.WORLD,
        **keywords,
    )
    torch.testing.assert_close(ours.loss, whole.loss)
    torch.testing.assert_close(ours.statistics, whole.statistics)
    assert bool(ours.loss.isfinite().all())


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_fused_linear_topk_divergence_of_ranks_is_that_of_one(ranks):
    run_ranks(worker, ranks)


# -- errors --------------------------------------------------------------------------------------


def _call(**changes):
    arguments = {
        "student_hidden": torch.randn(4, 8),
        "student_lm_head_weight": torch.randn(20, 8),
        "teacher_ids": torch.arange(3).repeat(4, 1),
        "teacher_logprobs": torch.full((4, 3), -2.0),
        **changes,
    }
    names = ("student_hidden", "student_lm_head_weight", "teacher_ids", "teacher_logprobs")
    tensors = [arguments.pop(name) for name in names]
    return opk.fused_linear_topk_divergence(*tensors, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_hidden": torch.zeros(2, 4, 8)}, ValueError, "Flatten batch and sequence"),
        ({"student_lm_head_weight": torch.zeros(8, 20)}, ValueError, "One row is one token"),
        ({"teacher_ids": torch.zeros(5, 3).long()}, ValueError, "teacher_ids must have 4 rows"),
        ({"teacher_ids": torch.full((4, 3), 20)}, ValueError, "teacher_ids must be below 20"),
        ({"teacher_logprobs": torch.ones(4, 3)}, ValueError, "must be log-probabilities"),
        ({"reduction": "mean"}, ValueError, "reduction must be one of 'sum', 'none', got 'mean'"),
        ({"statistics": ("entropy",)}, ValueError, "statistics must be one of 'student_mass'"),
        ({"statistics": "forward_kl"}, TypeError, "must be a sequence of names, got 'forward_kl'"),
        ({"workspace_bytes": 10}, ValueError, "workspace_bytes must be at least .* got 10"),
        ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
        (
            {"temperature": torch.tensor([1.0, 1.0, -1.0, 1.0])},
            ValueError,
            "temperature must be positive and finite, got -1.0 at position 2",
        ),
        ({"student_bias": torch.zeros(19)}, ValueError, "student_bias must have one value per"),
        ({"student_lora": 3}, TypeError, r"student_lora must be \(A, B, scaling\), got 3"),
        ({"vocab_size": 21}, ValueError, r"vocab_size must be in \[1, 20\], got 21"),
        ({"grad_scale": 2.0}, ValueError, "grad_scale must be 1 without"),
        ({"process_group": "world"}, TypeError, "process_group must be a torch"),
        (
            {"student_lm_head_weight_grad": torch.zeros(20, 8), "backend": "reference"},
            ValueError,
            "backend 'reference' must be used without",
        ),
        ({"backend": "cuda"}, opk.UnsupportedBackendError, "backend 'cuda' was requested but"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_fused_linear_topk_divergence_rejects_in_words(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        _call(**changes)
    assert "topk_divergence: " in str(raised.value)


def test_fused_linear_topk_divergence_by_the_reference_backend():
    hidden, head, ids, logprobs, _, keywords = sparse_of(SMALL, F32)
    options = {"statistics": STATISTICS, "divergence": "jsd", **keywords}
    one = opk.fused_linear_topk_divergence(hidden, head, ids, logprobs, **options)
    two = opk.fused_linear_topk_divergence(
        hidden, head, ids, logprobs, backend="reference", **options
    )
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
