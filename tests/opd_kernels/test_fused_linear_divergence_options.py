# SPDX-License-Identifier: Apache-2.0
"""Biases, low-rank heads, targets, sums, labels and statistics of the fused op; path A and B."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import divergences as D
from opd_kernels import targets
from tests.cases import BF16, F16, F32, F64, NAN, SPECS
from tests.checks import dtype_id, leaf
from tests.memory import peak_bytes

NUM_TOKENS, VOCAB, STUDENT, TEACHER = 23, 700, 16, 24
WORKSPACES = {"A": 1 << 30, "A_in_chunks": 400_000, "B": 30_000}
STATISTICS = opk._laws.STATISTICS
every_path = pytest.mark.parametrize("path", list(WORKSPACES))
every_reduction = pytest.mark.parametrize("reduction", ["sum", "none"])


def tensors(dtype=F64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=F64) * scale).to(dtype)

    weights = torch.rand(NUM_TOKENS, generator=generator, dtype=F64)
    weights[3] = weights[10] = 0.0
    topk_ids = torch.randint(VOCAB, (NUM_TOKENS, 5), generator=generator)
    topk_ids[0, 2] = -1
    return {
        "student_hidden": normal(NUM_TOKENS, STUDENT),
        "student_lm_head_weight": normal(VOCAB, STUDENT, scale=0.5),
        "student_bias": normal(VOCAB),
        "lora_a": normal(4, STUDENT, scale=0.3),
        "lora_b": normal(VOCAB, 4, scale=0.3),
        "teacher_hidden": normal(NUM_TOKENS, TEACHER),
        "teacher_lm_head_weight": normal(VOCAB, TEACHER, scale=0.4),
        "teacher_bias": normal(VOCAB),
        "reference_hidden": normal(NUM_TOKENS, TEACHER),
        "reference_lm_head_weight": normal(VOCAB, TEACHER, scale=0.4),
        "reference_bias": normal(VOCAB),
        "token_weights": weights,
        "token_ids": torch.randint(VOCAB, (NUM_TOKENS,), generator=generator),
        "topk_ids": topk_ids,
    }


TENSORS = tensors()
TRAINED = ("student_hidden", "student_lm_head_weight", "student_bias", "lora_a", "lora_b")
IDS = TENSORS["token_ids"]
WEIGHTS = TENSORS["token_weights"]
# name -> (further tensors that the call takes, its other keyword arguments)
CALLS = {
    "plain": ((), {}),
    "biases_and_low_rank": (
        ("student_bias", "teacher_bias", "lora", "token_weights"),
        {"student_softcap": 5.0, "teacher_logit_scale": 0.5},
    ),
    "live_target": (
        ("reference_hidden", "reference_lm_head_weight", "reference_bias"),
        {"target": targets.geometric(0.3, 0.5, 0.2, detach=False), "divergence": "jsd"},
    ),
    "live_mixture": (
        ("token_weights",),
        {"target": targets.mixture(WEIGHTS, detach=False), "divergence": "forward_kl"},
    ),
    "sum": (
        ("student_bias", "token_weights"),
        {
            "divergence": [
                (WEIGHTS, D.renyi(0.3)),
                (0.5, "cross_entropy"),
                (1.0, "concrete_score"),
                (0.3, D.skew_forward_kl(0.2)),
            ],
            "labels": IDS,
            "temperature": (WEIGHTS + 0.5, 2.0),
        },
    ),
}


def run(name: str, backend: str, reduction: str = "sum", frozen: tuple[str, ...] = (), **more):
    """(loss, statistics, gradients by name) of one of CALLS."""
    names, keywords = CALLS.get(name, ((), {}))
    data = {
        key: value.clone().requires_grad_(key in TRAINED and key not in frozen)
        for key, value in TENSORS.items()
    }
    optional = {key: data[key] for key in names if key != "lora"}
    if "lora" in names:
        optional["student_lora"] = (data["lora_a"], data["lora_b"], 0.7)
    out = opk.fused_linear_divergence(
        data["student_hidden"],
        data["student_lm_head_weight"],
        data["teacher_hidden"],
        data["teacher_lm_head_weight"],
        token_ids=IDS,
        topk_ids=data["topk_ids"],
        statistics=STATISTICS,
        reduction=reduction,
        backend=backend,
        **{**optional, **keywords, **more},
    )
    loss = out.loss
    upstream = torch.linspace(-1.0, 2.0, NUM_TOKENS, dtype=F64) if loss.dim() else 0.3
    (loss * upstream).sum().backward()
    gradients = {key: data[key].grad for key in TRAINED if data[key].grad is not None}
    return loss.detach(), out.statistics, gradients


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(
                ours[key], value, rtol=1e-11, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}"
            )


@every_path
@every_reduction
@pytest.mark.parametrize("name", list(CALLS))
def test_fused_linear_divergence_options_match_the_reference(name, reduction, path):
    actual = run(name, "cpu", reduction, workspace_bytes=WORKSPACES[path])
    assert_same(actual, run(name, "reference", reduction))


@every_reduction
@pytest.mark.parametrize("divergence", SPECS, ids=str)
def test_fused_linear_divergence_path_b_is_path_a(divergence, reduction):
    chosen = {"divergence": divergence.public()}
    whole = run("", "cpu", reduction, **chosen)
    tensors = list(TENSORS.values())
    text = opk.explain(
        "fused_linear_divergence", *tensors[:2], *tensors[5:7], workspace_bytes=30_000, **chosen
    )
    assert ("path A" if divergence.name == "adaptive_kl" else "path B") in text
    assert_same(run("", "cpu", reduction, workspace_bytes=30_000, **chosen), whole)


@every_path
@pytest.mark.parametrize(
    "frozen", [("student_lm_head_weight",), ("student_hidden",), TRAINED[:2], TRAINED[:3]], ids=str
)
def test_fused_linear_divergence_frozen_parts_get_no_gradient(frozen, path):
    name = "biases_and_low_rank"
    actual = run(name, "cpu", frozen=frozen, workspace_bytes=WORKSPACES[path])
    assert not set(frozen) & set(actual[2])
    assert_same(actual, run(name, "reference", frozen=frozen))


def test_fused_linear_divergence_low_rank_head_is_its_sum():
    down, up = TENSORS["lora_a"], TENSORS["lora_b"]
    merged = TENSORS["student_lm_head_weight"] + 0.7 * up @ down
    hidden, teacher = TENSORS["student_hidden"], TENSORS["teacher_hidden"]
    rest = (teacher, TENSORS["teacher_lm_head_weight"])
    whole = opk.fused_linear_divergence(hidden, merged, *rest).loss
    pair = opk.fused_linear_divergence(
        hidden, TENSORS["student_lm_head_weight"], *rest, student_lora=(down, up, 0.7)
    ).loss
    torch.testing.assert_close(pair, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
def test_fused_linear_divergence_low_rank_gradients_have_their_own_dtype(dtype):
    # PEFT keeps adapters in float32 beside a 16-bit head
    data = tensors(dtype)
    down, up = leaf(data["lora_a"].float()), leaf(data["lora_b"].float())
    hidden = leaf(data["student_hidden"])
    out = opk.fused_linear_divergence(
        hidden,
        data["student_lm_head_weight"],
        data["teacher_hidden"],
        data["teacher_lm_head_weight"],
        student_lora=(down, up, 2.0),
    )
    out.loss.backward()
    assert (hidden.grad.dtype, down.grad.dtype, up.grad.dtype) == (dtype, F32, F32)
    assert bool(down.grad.abs().sum() > 0)


@every_path
def test_fused_linear_divergence_low_rank_head_keeps_its_precision_under_autocast(path):
    data = tensors(F32)

    def run_under(enabled):
        leaves = [leaf(data[name]) for name in ("student_hidden", "lora_a", "lora_b")]
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            loss = opk.fused_linear_divergence(
                leaves[0],
                data["student_lm_head_weight"],
                data["teacher_hidden"],
                data["teacher_lm_head_weight"],
                student_lora=(*leaves[1:], 0.7),
                workspace_bytes=WORKSPACES[path],
            ).loss
            loss.backward()
        return loss, *(tensor.grad for tensor in leaves)

    for one, two in zip(run_under(True), run_under(False), strict=True):
        assert torch.equal(one, two)


def test_fused_linear_divergence_tied_head_adds_both_gradients():
    # the embedding is the head: one parameter, two uses
    generator = torch.Generator().manual_seed(0)
    embedding = leaf(torch.randn(VOCAB, STUDENT, generator=generator, dtype=F64) * 0.3)
    twin = leaf(embedding.detach())
    teacher = TENSORS["teacher_hidden"], TENSORS["teacher_lm_head_weight"]
    hidden = torch.tanh(embedding[IDS])
    opk.fused_linear_divergence(hidden, embedding, *teacher).loss.backward()
    logits = torch.tanh(twin[IDS]) @ twin.T
    opk.reference.divergence(logits, teacher[0] @ teacher[1].T).sum().backward()
    torch.testing.assert_close(embedding.grad, twin.grad, rtol=1e-11, atol=1e-12)


def test_fused_linear_divergence_takes_columns_and_strides():
    wide = torch.randn(STUDENT, NUM_TOKENS, dtype=F64)
    head = torch.randn(VOCAB, 2 * STUDENT, dtype=F64)[:, ::2]
    rest = TENSORS["teacher_hidden"], TENSORS["teacher_lm_head_weight"]
    actual = leaf(wide.t()), leaf(head)
    expected = leaf(wide.t().contiguous()), leaf(head.contiguous())
    for pair in (actual, expected):
        opk.fused_linear_divergence(*pair, *rest, divergence="jsd").loss.backward()
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
def test_fused_linear_divergence_under_autocast(dtype):
    # a float32 model under autocast: 16-bit hidden states, float32 head
    data = tensors(F32)
    hidden = leaf(data["student_hidden"].to(dtype))
    head = leaf(data["student_lm_head_weight"])
    rest = (data["teacher_hidden"].to(dtype), data["teacher_lm_head_weight"])
    with torch.autocast("cpu", dtype=dtype):
        loss = opk.fused_linear_divergence(hidden, head, *rest, divergence="jsd").loss
    loss.backward()
    exact_hidden, exact_head = leaf(hidden.detach().float()), leaf(head.detach())
    exact = opk.fused_linear_divergence(
        exact_hidden, exact_head, rest[0].float(), rest[1], divergence="jsd"
    ).loss
    exact.backward()
    assert torch.equal(loss, exact)
    assert torch.equal(head.grad, exact_head.grad)
    assert torch.equal(hidden.grad, exact_hidden.grad.to(dtype))
    with pytest.raises(TypeError, match="must have dtype"):
        opk.fused_linear_divergence(hidden, head, *rest)


@pytest.mark.parametrize("weights", [None, "zero"])
def test_fused_linear_divergence_of_nothing_with_every_option(weights):
    count = 0 if weights is None else 4
    data = {key: value[:count] for key, value in TENSORS.items() if value.shape[0] == NUM_TOKENS}
    spoiled = [torch.full_like(data[f"{side}_hidden"], NAN) for side in ("student", "teacher")]
    hidden = leaf(spoiled[0])
    head, bias = leaf(TENSORS["student_lm_head_weight"]), leaf(TENSORS["student_bias"])
    out = opk.fused_linear_divergence(
        hidden,
        head,
        spoiled[1],
        TENSORS["teacher_lm_head_weight"],
        divergence=[(1.0, "jsd"), (1.0, "cross_entropy")],
        labels=data["token_ids"],
        student_bias=bias,
        token_weights=torch.zeros(count, dtype=F64),
        token_ids=data["token_ids"],
        topk_ids=data["topk_ids"],
        statistics=STATISTICS,
    )
    out.loss.backward()
    assert out.loss.item() == 0.0
    for gradient in (hidden.grad, head.grad, bias.grad):
        assert bool((gradient == 0).all())
    assert all(bool((row == 0).all()) for row in out.statistics.values())


def test_fused_linear_divergence_path_b_stays_within_its_workspace():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 32, generator=generator)
    head = torch.randn(50_000, 32, generator=generator)
    workspace = 4 << 20
    arguments = hidden, head, hidden, head.roll(1, 0)

    def run() -> None:
        opk.fused_linear_divergence(*arguments, divergence="jsd", workspace_bytes=workspace)

    text = opk.explain("fused_linear_divergence", *arguments, workspace_bytes=workspace)
    assert "path B" in text
    run()
    assert peak_bytes(run) <= workspace * 1.25


def _call(**changes):
    names = ("student_hidden", "student_lm_head_weight", "teacher_hidden", "teacher_lm_head_weight")
    arguments = {**{name: TENSORS[name] for name in names}, **changes}
    head = [arguments.pop(name) for name in names]
    return opk.fused_linear_divergence(*head, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"reference_hidden": TENSORS["reference_hidden"]},
            ValueError,
            "must be given together, got only reference_hidden",
        ),
        (
            {"student_bias": TENSORS["student_bias"][:-1]},
            ValueError,
            r"student_bias must have one value per token of the vocabulary \(700\)",
        ),
        ({"teacher_bias": IDS.repeat(40)}, TypeError, "teacher_bias must be a floating tensor"),
        ({"student_lora": TENSORS["lora_a"]}, TypeError, r"must be \(A, B, scaling\)"),
        (
            {"student_lora": (TENSORS["lora_b"], TENSORS["lora_a"], 1.0)},
            ValueError,
            r"student_lora must be A \(r, 16\) and B \(700, r\)",
        ),
        (
            {"student_lora": (TENSORS["lora_a"], TENSORS["lora_b"], 0.0)},
            ValueError,
            "scaling of student_lora must be finite and not 0",
        ),
        (
            {"student_lora": (IDS.repeat(16)[:64].view(4, 16), TENSORS["lora_b"], 1.0)},
            TypeError,
            "A of student_lora must be a floating tensor",
        ),
        ({"statistics": ["student_logprobs"]}, ValueError, r"need token_ids \[T\], got none"),
        ({"statistics": ["teacher_topk_mass"]}, ValueError, r"need topk_ids \[T, K\], got none"),
        (
            {"topk_ids": TENSORS["topk_ids"].float()},
            TypeError,
            "topk_ids must be int64 or int32",
        ),
        (
            {"topk_ids": torch.full((NUM_TOKENS, 2), VOCAB)},
            ValueError,
            r"topk_ids must be below 700, got 700 at position \(0, 0\)",
        ),
        (
            {"token_ids": torch.full((NUM_TOKENS,), -100)},
            ValueError,
            r"token_ids must be in \[0, 700\), got -100 at position 0. Drop ignored",
        ),
        (
            {"temperature": torch.linspace(1.0, -0.1, NUM_TOKENS, dtype=F64)},
            ValueError,
            "student temperature must be positive and finite, got .* at position 20",
        ),
        (
            {"target": targets.mixture(torch.linspace(0, 1.1, NUM_TOKENS, dtype=F64))},
            ValueError,
            r"teacher_weight of the mixture must be in \[0, 1\], got .* at position 21",
        ),
        ({"gradient_tolerance": 0.0}, ValueError, "gradient_tolerance must be positive"),
        ({"workspace_bytes": 100}, ValueError, "workspace_bytes must be at least"),
        (
            {"workspace_bytes": 3000, "divergence": "adaptive_kl"},
            ValueError,
            "one token of this vocabulary; adaptive_kl sorts",
        ),
    ],
)
def test_fused_linear_divergence_options_reject_in_words(changes, error, message):
    with pytest.raises(error, match=message):
        _call(**changes)
