# SPDX-License-Identifier: Apache-2.0
"""opk.fused_linear_speculative_verify on CPU: truth, steps, memory, compile, errors."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from tests.cases import BF16, F16, F32, F64, NAN
from tests.checks import dtype_id, leaf
from tests.memory import peak_bytes
from tests.verification import MODES, same


def models_of(
    num_sequences: int, num_drafts: int, vocab_size: int, dtype: torch.dtype = F64, width: int = 12
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """(drafts, student's hidden states and head, the teacher's) of near models, and uniforms."""
    generator = torch.Generator().manual_seed(num_sequences)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    head, hidden = normal(vocab_size, width), normal(num_sequences, num_drafts + 1, width)
    teacher_head = torch.cat([head, 0.2 * normal(vocab_size, 4)], 1)
    teacher_hidden = torch.cat([hidden, normal(num_sequences, num_drafts + 1, 4)], 2)
    student_hidden = hidden[:, :-1]
    laws = (student_hidden @ head.t()).flatten(0, 1).softmax(-1)
    drafts = laws.multinomial(1, generator=generator).view(num_sequences, num_drafts)
    uniforms = torch.rand(num_sequences, num_drafts + 1, generator=generator, dtype=F64)
    tensors = (student_hidden, head, teacher_hidden, teacher_head)
    return (drafts, *(tensor.to(dtype) for tensor in tensors)), uniforms


def options_of(mode: str, uniforms: torch.Tensor, **options) -> dict:
    if mode == "threshold":
        options = {"threshold": 1.1, **options}
    return {"uniforms": uniforms, "mode": mode, **options}


@pytest.mark.parametrize("mode", MODES)
def test_fused_linear_speculative_verify_matches_reference(mode):
    tensors, uniforms = models_of(9, 4, 301)
    bias = torch.randn(301, dtype=F64)
    options = options_of(
        mode,
        uniforms,
        num_draft=torch.tensor([4, 4, 0, 3, 4, 1, 4, 2, 4]),
        num_topk=3,
        top_p=0.98,
        student_bias=bias,
        teacher_bias=bias + 0.1,
        teacher_softcap=20.0,
        student_logit_scale=0.9,
        vocab_size=290,
        with_acceptance=True,
    )
    tensors = (tensors[0] % 290, *tensors[1:])
    truth = opk.fused_linear_speculative_verify(*tensors, backend="reference", **options)
    assert truth.num_accepted.unique().numel() > 1
    # one place at a time, a few, two sequences, all at once
    for budget in (30_000, 60_000, 140_000, 1 << 30):
        got = opk.fused_linear_speculative_verify(*tensors, workspace_bytes=budget, **options)
        same(got, truth, rtol=1e-10, atol=1e-10, what=f"{mode} {budget}")


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
def test_fused_linear_speculative_verify_is_that_of_its_logits(dtype):
    tensors, uniforms = models_of(6, 3, 130, dtype)
    drafts, student, head, teacher, teacher_head = tensors
    logits = [
        (hidden.float() @ weight.float().t()).contiguous()
        for hidden, weight in ((student, head), (teacher, teacher_head))
    ]
    for mode in MODES:
        options = options_of(mode, uniforms, top_k=40)
        got = opk.fused_linear_speculative_verify(*tensors, **options)
        expected = opk.speculative_verify(drafts, *logits, **options)
        same(got, expected, rtol=2e-5, atol=2e-5, what=mode)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=dtype_id)
def test_fused_linear_speculative_verify_adds_a_low_rank_pair_to_the_student(dtype):
    tensors, uniforms = models_of(6, 3, 130, dtype)
    down, up = torch.randn(2, 12, dtype=dtype), torch.randn(130, 2, dtype=dtype)
    # as one matrix where that rounds nothing
    head = tensors[2].double() + 0.5 * up.double() @ down.double()
    tensors = (tensors[0] % 128, *tensors[1:])
    whole = [tensors[0], *(tensor.double() for tensor in tensors[1:])]
    whole[2] = head
    tolerance = 1e-10 if dtype == F64 else 2e-5
    for mode in MODES:
        options = options_of(mode, uniforms, vocab_size=128)
        expected = opk.fused_linear_speculative_verify(*whole, backend="reference", **options)
        pair = {"student_lora": (leaf(down), leaf(up), 0.5)}
        # a place at a time, where rows of the student are formed again, and all at once
        for more in ({"backend": "reference"}, {}, {"workspace_bytes": 30_000}):
            if "workspace_bytes" in more and mode in ("block", "threshold"):
                continue
            got = opk.fused_linear_speculative_verify(*tensors, **options, **pair, **more)
            same(got, expected, rtol=tolerance, atol=tolerance, what=f"{mode} {more}")
    with pytest.raises(ValueError, match="student_lora must be A"):
        opk.fused_linear_speculative_verify(
            *tensors, uniforms=uniforms, student_lora=(down, up[:-1], 1.0)
        )
    with pytest.raises(ValueError, match="student_lora must be None without"):
        opk.fused_linear_speculative_verify(
            tensors[0], None, None, *tensors[3:], mode="greedy", student_lora=(down, up, 1.0)
        )


def test_fused_linear_speculative_verify_without_a_student():
    tensors, uniforms = models_of(5, 3, 90)
    for mode in ("topk", "greedy"):
        expected = opk.fused_linear_speculative_verify(*tensors, uniforms=uniforms, mode=mode)
        got = opk.fused_linear_speculative_verify(
            tensors[0], None, None, *tensors[3:], uniforms=uniforms, mode=mode
        )
        assert bool(got.student_logprobs.isnan().all())
        same(got._replace(student_logprobs=expected.student_logprobs), expected, what=mode)


@pytest.mark.parametrize("mode", MODES)
def test_fused_linear_speculative_verify_of_nothing_and_without_gradient(mode):
    for num_sequences, num_drafts in ((0, 2), (3, 0)):
        tensors, uniforms = models_of(num_sequences, max(1, num_drafts), 40)
        tensors = (tensors[0][:, :num_drafts], tensors[1][:, :num_drafts], *tensors[2:])
        tensors = (*tensors[:3], tensors[3][:, : num_drafts + 1], tensors[4])
        options = options_of(mode, uniforms[:, : num_drafts + 1])
        got = opk.fused_linear_speculative_verify(*tensors, **options)
        truth = opk.fused_linear_speculative_verify(*tensors, backend="reference", **options)
        same(got, truth, rtol=1e-11, atol=1e-11)
    leaves = [leaf(tensor) for tensor in tensors[1:]]
    got = opk.fused_linear_speculative_verify(tensors[0], *leaves, **options)
    assert not any(value.requires_grad for value in got if value is not None)


def test_fused_linear_speculative_verify_reads_any_strides_and_nothing_after_a_refusal():
    tensors, uniforms = models_of(4, 3, 150, F32)
    expected = opk.fused_linear_speculative_verify(*tensors, uniforms=uniforms)
    drafts, student, head, teacher, teacher_head = tensors
    strided = (
        drafts.to(torch.int32),
        student.transpose(0, 1).contiguous().transpose(0, 1),
        head.t().contiguous().t(),
        teacher.clone(),
        torch.cat([teacher_head, torch.full((7, 16), NAN)]),
    )
    for row, last in enumerate(expected.num_accepted.tolist()):
        strided[3][row, last + 1 :] = NAN
    got = opk.fused_linear_speculative_verify(*strided, uniforms=uniforms, vocab_size=150)
    same(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rejection", "block"])
def test_fused_linear_speculative_verify_holds_less_than_64_mib(mode):
    # V = 152k, 8 sequences of 8 drafts; the hidden size only makes it slower
    tensors, uniforms = models_of(8, 8, 151_936, F32, width=28)

    def call():
        opk.fused_linear_speculative_verify(*tensors, uniforms=uniforms, mode=mode)

    opk.release_workspace()
    peak = peak_bytes(call)
    opk.release_workspace()
    assert 16 << 20 < peak < 64 << 20, f"{peak / 2**20:.1f} MiB"


@pytest.mark.parametrize("mode", ["rejection", "block"])
def test_fused_linear_speculative_verify_stays_within_its_workspace(mode):
    tensors, uniforms = models_of(16, 6, 5000, F32)
    budget = 1 << 20

    def call():
        opk.fused_linear_speculative_verify(
            *tensors, uniforms=uniforms, mode=mode, workspace_bytes=budget
        )

    opk.release_workspace()
    peak = peak_bytes(call)
    assert peak < budget + (96 << 10), f"{peak} bytes"


def test_fused_linear_speculative_verify_compiles_without_a_graph_break():
    tensors, uniforms = models_of(3, 2, 60, F32)

    def call(student, head, teacher, teacher_head):
        got = opk.fused_linear_speculative_verify(
            tensors[0], student * 1.1, head, teacher, teacher_head, uniforms=uniforms, top_k=9
        )
        return tuple(value for value in got if value is not None)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, two in zip(compiled(*tensors[1:]), call(*tensors[1:]), strict=True):
        assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))


def test_fused_linear_speculative_verify_opcheck_and_explain():
    tensors, uniforms = models_of(3, 2, 40, F32)
    # equal models keep all, and leave no NaN, which opcheck takes for another one
    tensors = (tensors[0], tensors[3][:, :-1].contiguous(), tensors[4], *tensors[3:])
    down, up = torch.randn(2, 16), torch.zeros(40, 2)
    law = (None, None, [1.0, 0.0, 1.0] * 2, 40)
    decision = (uniforms, None, None, [0, 0], [1.0, 1.0], "rejection", 25, 1.0, True)
    torch.library.opcheck(
        torch.ops.opd.fused_linear_speculative_verify_fwd,
        (*tensors[:3], down, up, *tensors[3:], *law, *decision, 1 << 20, "cpu"),
    )
    text = opk.explain("fused_linear_speculative_verify", *tensors, student_lora=(down, up, 1.0))
    assert "backend 'cpu'" in text and "of up to 9 of 9 tokens" in text
    text = opk.explain(
        "fused_linear_speculative_verify", tensors[0], None, None, *tensors[3:], mode="topk"
    )
    assert "path A" in text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_hidden": None}, ValueError, "must be given in mode 'rejection'"),
        ({"student_hidden": None, "mode": "topk"}, ValueError, "must be given together"),
        ({"teacher_hidden": torch.zeros(2, 3, 16)}, ValueError, "one place more than drafts"),
        ({"teacher_hidden": torch.zeros(8, 16)}, ValueError, "teacher_hidden must have 3 dim"),
        (
            {"student_hidden": torch.zeros(2, 3, 5)},
            ValueError,
            r"must have shape \(vocab_size, 5\)",
        ),
        ({"student_bias": torch.zeros(7)}, ValueError, "student_bias|bias must have one value per"),
        ({"workspace_bytes": 100}, ValueError, "workspace_bytes must be at least"),
        (
            {"workspace_bytes": 1500, "mode": "block"},
            ValueError,
            "all 4 places of a sequence at a time",
        ),
        ({"draft_token_ids": torch.full((2, 3), 50)}, ValueError, r"in \[0, 50\), got 50 at"),
        ({"uniforms": torch.ones(2, 4)}, ValueError, r"uniforms must be in \[0, 1\), got 1.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_fused_linear_speculative_verify_rejects_in_words(changes, error, message):
    names = "draft_token_ids student_hidden student_lm_head_weight teacher_hidden"
    tensors, uniforms = models_of(2, 3, 50, F32)
    arguments = dict(
        zip([*names.split(), "teacher_lm_head_weight"], tensors, strict=True), uniforms=uniforms
    )
    with pytest.raises(error, match=message) as raised:
        opk.fused_linear_speculative_verify(**{**arguments, **changes})
    assert str(raised.value).startswith("fused_linear_speculative_verify: ")


def test_fused_linear_speculative_verify_is_the_same_for_any_threads():
    tensors, uniforms = models_of(8, 4, 3000, F32)
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        results.append(opk.fused_linear_speculative_verify(*tensors, uniforms=uniforms, top_p=0.9))
    same(*results)
    assert results[0].next_token.dtype == torch.int32
