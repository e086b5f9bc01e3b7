# SPDX-License-Identifier: Apache-2.0
"""opk.fused_linear_topk on CPU: truth, chunks, memory, bent heads, compile, errors."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from tests import eager
from tests.cases import BF16, F16, F32, F64, FUSED_CASES, FusedCase, fused_of
from tests.checks import dtype_id, leaf, workspace_for
from tests.memory import peak_bytes
from tests.options import LAW_OPTIONS, law_options_of
from tests.tolerance import assert_within_eager
from tests.topk import check_ids, compare_values, eager_topk_logprobs

RELEVANT = [
    case
    for case in FUSED_CASES
    if case.weights in (None, "random") and not isinstance(case.temperature, tuple)
]
EVERY = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype_id(dtype)}")
    for case in RELEVANT
    for dtype in case.dtypes
]
SMALL = FusedCase("small", 23, 301, 16, 8)


def inputs_of(case: FusedCase, dtype: torch.dtype):
    """Hidden states, head, ids with a -1 among them, vocab_size."""
    inputs = fused_of(case, dtype)
    generator = torch.Generator().manual_seed(case.seed)
    ids = torch.randint(-1, case.vocab_size, (case.num_tokens, 4), generator=generator)
    return inputs.student_hidden, inputs.student_lm_head_weight, ids, inputs.vocab_size


def eager_fused(hidden, head, *, num_topk, bias=None, lora=None, vocab_size=None, **keywords):
    logits = eager._logits(hidden, head, None, vocab_size, bias, lora)
    return eager_topk_logprobs(logits, num_topk, **keywords)


def check(hidden, head, what: str, **keywords) -> None:
    """The op against the reference and eager torch; ids by what they stand for."""
    got = opk.fused_linear_topk(hidden, head, backend="cpu", **keywords)
    keywords.pop("workspace_bytes", None)
    truth = reference.fused_linear_topk(hidden, head, **keywords)
    baseline = eager_fused(hidden, head, **keywords)
    compare_values(got, truth, baseline, what)
    check_ids(got, what)
    # float32 sums may swap neighbours: the truth of the ids that came is what their places ask for
    real = {**keywords, "token_ids": got.ids}
    stands_for = reference.fused_linear_topk(hidden, head, **real).token_logprobs
    assert_within_eager(got.logprobs, baseline["logprobs"], stands_for, f"{what} ids")


@pytest.mark.parametrize("chunks", ["one_chunk", "many_chunks"])
@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_fused_linear_topk_matches_reference(case, dtype, chunks):
    hidden, head, ids, vocab_size = inputs_of(case, dtype)
    budget = 1 << 30 if chunks == "one_chunk" else workspace_for(case, 5)
    check(
        hidden,
        head,
        f"cpu {case.name} {dtype_id(dtype)} {chunks}",
        num_topk=min(33, case.vocab_size),
        token_ids=ids,
        vocab_size=vocab_size,
        workspace_bytes=budget,
    )


def bent_tensors(case: FusedCase, dtype: torch.dtype) -> list[torch.Tensor]:
    """Hidden states, head, bias, A and B."""
    hidden, head, *_ = inputs_of(case, dtype)
    generator = torch.Generator().manual_seed(case.seed)
    size, width = head.shape
    shapes = (size,), (4, width), (size, 4)
    extra = [torch.randn(shape, generator=generator).to(dtype) * 0.5 for shape in shapes]
    return [hidden, head, *extra]


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=dtype_id)
@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_fused_linear_topk_of_a_bent_head_matches_reference(option, dtype):
    hidden, head, bias, down, up = bent_tensors(SMALL, dtype)
    check(
        hidden,
        head,
        f"cpu {option} {dtype_id(dtype)}",
        num_topk=17,
        token_ids=torch.arange(23) % 11,
        bias=bias,
        lora=(down, up, 0.6),
        vocab_size=290,
        workspace_bytes=20_000,
        **law_options_of(option, SMALL.num_tokens),
    )


def test_fused_linear_topk_of_a_low_rank_pair_is_that_of_the_merged_head():
    hidden, head, _, down, up = bent_tensors(SMALL, F64)
    out = opk.fused_linear_topk(hidden, head, num_topk=9, lora=(down, up, 0.6))
    merged = opk.fused_linear_topk(hidden, head + 0.6 * up @ down, num_topk=9)
    assert torch.equal(out.ids, merged.ids)
    for one, two in zip(out[1:5], merged[1:5], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_fused_linear_topk_equals_topk_logprobs_of_the_logits(dtype):
    hidden, head, ids, _ = inputs_of(SMALL, dtype)
    real = torch.promote_types(dtype, F32)
    fused = opk.fused_linear_topk(hidden, head, num_topk=9, token_ids=ids, temperature=0.6)
    logits = hidden.to(real) @ head.to(real).T
    plain = opk.topk_logprobs(logits, 9, token_ids=ids, temperature=0.6)
    for one, two in zip(fused[1:], plain[1:], strict=True):
        assert one.dtype == real
        torch.testing.assert_close(one, two)


def test_fused_linear_topk_has_no_gradient_and_takes_what_requires_one():
    hidden, head, bias, down, up = (leaf(x) for x in bent_tensors(SMALL, F32))
    ids = torch.zeros(23, dtype=torch.int64)
    keywords = {"num_topk": 3, "bias": bias, "lora": (down, up, 2.0), "token_ids": ids}
    for backend in ("cpu", "reference"):
        out = opk.fused_linear_topk(hidden, head, **keywords, backend=backend)
        assert not any(values.requires_grad for values in out)


def test_fused_linear_topk_of_no_tokens():
    out = opk.fused_linear_topk(torch.empty(0, 8), torch.randn(30, 8), num_topk=5)
    assert [x.shape for x in out[:5]] == [(0, 5), (0, 5), (0,), (0,), (0,)]
    assert out.token_logprobs is None


def test_fused_linear_topk_garbage_in_the_padding_of_the_head_is_not_read():
    hidden, head, _, _ = inputs_of(SMALL, F32)
    padded = torch.cat([head, torch.full((7, 16), torch.nan)])
    expected = opk.fused_linear_topk(hidden, head, num_topk=301)
    out = opk.fused_linear_topk(hidden, padded, num_topk=301, vocab_size=301)
    for one, two in zip(out[:5], expected[:5], strict=True):
        assert torch.equal(one, two)


def test_fused_linear_topk_nan_stays_in_its_token():
    hidden, head, _, _ = inputs_of(SMALL, F32)
    hidden[4, 3] = torch.nan
    out = opk.fused_linear_topk(hidden, head, num_topk=3)
    assert out.lse.isnan().nonzero().flatten().tolist() == [4]
    assert out.ids[4].tolist() == [-1] * 3 and bool((out.ids[5:] >= 0).all())


def test_fused_linear_topk_is_deterministic_across_threads():
    hidden, head, ids, _ = inputs_of(FusedCase("threads", 40, 3000, 32, 8), F32)
    for budget in (1 << 30, 200_000):
        results = []
        for num_threads in (1, 2, 2):
            torch.set_num_threads(num_threads)
            results.append(
                opk.fused_linear_topk(
                    hidden, head, num_topk=20, token_ids=ids, workspace_bytes=budget
                )
            )
        for other in results[1:]:
            assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_fused_linear_topk_keeps_its_precision_under_autocast():
    hidden, head, _, _ = inputs_of(SMALL, F32)
    plain = opk.fused_linear_topk(hidden, head, num_topk=5)
    with torch.autocast("cpu", dtype=BF16):
        cast = opk.fused_linear_topk(hidden, head, num_topk=5)
        mixed = opk.fused_linear_topk(hidden.bfloat16(), head, num_topk=5)
    assert all(torch.equal(one, two) for one, two in zip(plain[:5], cast[:5], strict=True))
    assert mixed.logprobs.dtype == F32


def test_fused_linear_topk_stays_within_its_workspace():
    hidden, head, ids, _ = inputs_of(FusedCase("memory", 512, 4000, 64, 8), F32)
    budget = 1 << 20

    def step():
        opk.fused_linear_topk(hidden, head, num_topk=64, token_ids=ids, workspace_bytes=budget)

    step()
    outputs = 512 * (64 * 8 + 32)
    peak = peak_bytes(step)
    assert peak <= budget + 1.1 * outputs + (64 << 10), f"{peak} bytes"


def test_fused_linear_topk_compiles_without_a_graph_break():
    hidden, head, bias, down, up = bent_tensors(SMALL, F32)
    options = law_options_of("law_everything", SMALL.num_tokens)

    def call(hidden, head, bias, down, up):
        out = opk.fused_linear_topk(
            hidden * 1.5, head, num_topk=6, bias=bias, lora=(down, up, 0.5), **options
        )
        return out.ids * 2, out.logprobs, out.lse, out.tail_logprob, out.entropy

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    tensors = (hidden, head, bias, down, up)
    for one, two in zip(compiled(*tensors), call(*tensors), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_fused_linear_topk_opcheck(dtype):
    hidden, head, bias, down, up = bent_tensors(SMALL, dtype)
    ids = torch.randint(-1, 301, (SMALL.num_tokens, 2))
    law = (bias.float(), torch.linspace(0.5, 2, SMALL.num_tokens), [0.5, 9.0, 1.0], 301)
    for low_rank, table in (((down.float(), up), ids), ((None, None), None)):
        torch.library.opcheck(
            torch.ops.opd.fused_linear_topk_fwd,
            (hidden, head, *low_rank, table, *law, 5, 1 << 20, "", "cpu"),
        )


def test_fused_linear_topk_explains_its_plan():
    hidden, head, _, _ = inputs_of(SMALL, F32)
    text = opk.explain("fused_linear_topk", hidden, head, num_topk=3, workspace_bytes=20_000)
    assert "backend 'cpu'" in text and "path A" in text and "of 23 tokens" in text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 4, 8)}, ValueError, "hidden must have 2 dim.*Flatten"),
        ({"lm_head_weight": torch.zeros(8, 20)}, ValueError, r"must have shape \(vocab_size, 8\)"),
        (
            {"lm_head_weight": torch.zeros(20, 8).half()},
            TypeError,
            "lm_head_weight must have dtype",
        ),
        ({"num_topk": 21}, ValueError, r"num_topk must be in \[1, 20\]"),
        ({"num_topk": 0}, ValueError, r"num_topk must be in \[1, 20\]"),
        ({"num_topk": "3"}, TypeError, "num_topk must be an int, got str"),
        ({"token_ids": torch.zeros(3).long()}, ValueError, "token_ids must have 4 rows"),
        ({"token_ids": torch.full((4,), 20)}, ValueError, "token_ids must be below 20, got 20"),
        ({"workspace_bytes": 1}, ValueError, "workspace_bytes must be at least .* got 1"),
        ({"workspace_bytes": 1.5}, TypeError, "workspace_bytes must be an int"),
        ({"temperature": -2}, ValueError, "temperature must be positive and finite, got -2"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive and finite, got -1.0"),
        ({"bias": torch.zeros(19)}, ValueError, "bias must have one value per token"),
        ({"lora": torch.zeros(2, 8)}, TypeError, r": lora must be \(A, B, scaling\)"),
        ({"process_group": "tp"}, TypeError, "process_group must be a torch.distributed"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_fused_linear_topk_rejects_in_words(changes, error, message):
    arguments = {
        "hidden": torch.randn(4, 8),
        "lm_head_weight": torch.randn(20, 8),
        "num_topk": 3,
        **changes,
    }
    tensors = [arguments.pop(name) for name in ("hidden", "lm_head_weight")]
    with pytest.raises(error, match=message) as raised:
        opk.fused_linear_topk(*tensors, **arguments)
    assert str(raised.value).startswith("fused_linear_topk: ")
