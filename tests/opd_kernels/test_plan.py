# SPDX-License-Identifier: Apache-2.0
"""How calls are cut on a GPU: within the budget, the documented examples, slices of dX."""

from __future__ import annotations

import random

import pytest
import torch

import opd_kernels as opk
from opd_kernels import _plan
from opd_kernels._gemms import split_width
from opd_kernels._plan import grad_hidden_splits, plan
from tests import cut_model

GIB = 1 << 30
QWEN, LLAMA = 151_936, 128_256


def heads_of(vocab_size, *hidden_sizes, dtype=torch.bfloat16):
    # a device that is not the CPU, and holds nothing
    return [torch.empty(vocab_size, size, dtype=dtype, device="meta") for size in hidden_sizes]


def cut(num_tokens, vocab_size, hidden_sizes, workspace_bytes, **options):
    heads = heads_of(vocab_size, *hidden_sizes)
    return plan("test", num_tokens, vocab_size, heads, workspace_bytes, **options)


def bytes_held(cut, hidden_sizes, itemsize=2, low_rank=0, packs_columns=False):
    """What the loops allocate for a cut at most, counted from scratch."""
    student, *others = hidden_sizes
    columns, tokens = cut.slice_columns, cut.chunk_tokens
    # column sums of dZ; which columns count, and their ids
    held = (4 + 9 * packs_columns) * cut.vocab_size
    # rows begin at a multiple of 8 elements
    held += 4 * -(-columns // 8) * 8 * (tokens + len(others) * cut.teacher_tokens)
    # hidden states of the chunk and of its part, gathered; dX of the chunk
    held += itemsize * (tokens * student + cut.teacher_tokens * sum(others)) + 4 * tokens * student
    partial = 4 * cut.grad_hidden_splits * tokens * student if cut.grad_hidden_splits > 1 else 0
    if others:
        assert partial <= 4 * columns * cut.teacher_tokens or cut.grad_hidden_splits == 1
    else:
        held += partial
    if not cut.whole_rows:
        # dX of a slice is added to that of the slices before, and a row of state
        held += 4 * tokens * student + 8 * 24 * tokens
    if low_rank:
        held += 4 * low_rank * (student + 2 * cut.vocab_size)
        # float32 hidden states; projected, its two halves, what comes back through B and its sum
        held += tokens * (4 * student + 4 * low_rank * (1 + 1 + 2 + 1))
    return held


@pytest.mark.parametrize(
    ("hidden_sizes", "vocab_size", "workspace_bytes", "expected"),
    [
        # tokens of a chunk, tokens of the teacher's part, chunks, slices of dX
        ((2048, 4096), QWEN, GIB, (1024, 512, 8, 2)),
        ((2048, 5120), QWEN, GIB, (1024, 512, 8, 2)),
        ((4096, 8192), QWEN, GIB, (1024, 512, 8, 1)),
        ((2048, 5120), LLAMA, GIB, (1280, 640, 7, 3)),
        ((4096, 8192), LLAMA, GIB, (1280, 640, 7, 3)),
        ((2048, 5120), QWEN, GIB // 2, (512, 256, 16, 4)),
        ((2048, 5120, 5120), QWEN, GIB, (1024, 256, 8, 2)),
        # all tokens at once need no parts
        ((2048, 5120), QWEN, 16 * GIB, (8192, 8192, 1, 1)),
    ],
)
def test_plan_of_documented_shapes(hidden_sizes, vocab_size, workspace_bytes, expected):
    found = cut(8192, vocab_size, hidden_sizes, workspace_bytes)
    assert found.whole_rows
    assert found.workspace_bytes <= workspace_bytes
    got = found.chunk_tokens, found.teacher_tokens, found.num_chunks, found.grad_hidden_splits
    assert got == expected


def test_plan_cuts_the_vocabulary_of_small_budgets():
    assert cut(8192, QWEN, (2048, 5120), GIB // 8).whole_rows
    found = cut(8192, QWEN, (2048, 5120), GIB // 16)
    assert not found.whole_rows
    assert found.slice_columns % 128 == 0 and found.chunk_tokens % 128 == 0
    assert found.teacher_tokens == found.chunk_tokens
    # where the vocabulary cannot be cut, chunks are short, and it says so
    short = cut(8192, QWEN, (2048, 5120), GIB // 16, whole_rows="adaptive_kl sorts")
    assert short.whole_rows and short.why == "short chunks: adaptive_kl sorts"


def test_plan_without_parts_gives_all_models_the_same_tokens():
    found = cut(8192, QWEN, (2048, 5120), GIB, in_parts=False)
    assert found.chunk_tokens == found.teacher_tokens == 768


@pytest.mark.parametrize("seed", range(8))
def test_plan_never_holds_more_than_the_workspace(seed):
    random.seed(seed)
    kinds = set()
    for _ in range(500):
        hidden_sizes = [random.choice((8, 96, 1024, 2048, 2560, 4096, 8192))]
        hidden_sizes += random.choices((8, 512, 4096, 5120, 8192), k=random.randint(0, 2))
        vocab_size = random.choice((33, 1000, 32_000, 50_257, LLAMA, QWEN, 262_144))
        num_tokens = random.choice((0, 1, 7, 100, 256, 1000, 1025, 8192, 32_768, 10**6))
        workspace_bytes = int(2 ** random.uniform(14, 34))
        low_rank = random.choice((0, 0, 16))
        options = {"low_rank": low_rank}
        options["in_parts"] = random.random() < 0.8
        options["packs_columns"] = not options["in_parts"] and random.random() < 0.5
        options["whole_rows"] = random.choice((None, "because")) if len(hidden_sizes) > 1 else "so"
        try:
            found = cut(num_tokens, vocab_size, hidden_sizes, workspace_bytes, **options)
        except ValueError as error:
            smallest = int(str(error).split("at least ")[1].split()[0])
            assert smallest > workspace_bytes
            cut(num_tokens, vocab_size, hidden_sizes, smallest, **options)
            continue
        packs_columns = options["packs_columns"]
        held = bytes_held(found, hidden_sizes, low_rank=low_rank, packs_columns=packs_columns)
        assert held <= found.workspace_bytes <= workspace_bytes, found
        pieces = list(found.chunks())
        assert sum(end - begin for begin, end in pieces) == num_tokens
        assert max((end - begin for begin, end in pieces), default=0) <= found.chunk_tokens
        for begin, end in pieces[-1:]:
            parts = list(found.parts(end - begin))
            assert [a for a, _ in parts[1:]] == [b for _, b in parts[:-1]]
            assert parts[0][0] == 0 and parts[-1][1] == end - begin
        assert max((b - a for a, b in found.parts(found.chunk_tokens))) <= found.teacher_tokens
        covered = found.slices()
        assert covered[0].start == 0 and covered[-1].stop == vocab_size
        if num_tokens > found.chunk_tokens >= 128:
            assert found.chunk_tokens % 128 == 0 or found.teacher_tokens < 128, found
        kinds.add((found.whole_rows, found.teacher_tokens < found.chunk_tokens))
    assert kinds == {(True, False), (True, True), (False, False)}


def test_plan_counts_what_aligns_the_rows_of_an_odd_vocabulary():
    odd, padded = (cut(8192, vocab_size, (2048, 4096), GIB) for vocab_size in (50_257, 50_264))
    assert (odd.chunk_tokens, odd.teacher_tokens) == (padded.chunk_tokens, padded.teacher_tokens)
    # but for the column sums of dZ
    assert odd.workspace_bytes == padded.workspace_bytes - 4 * 7


def test_plan_of_more_budget_has_no_shorter_chunks_until_they_are_long_enough():
    tokens = [
        min(1024, cut(10**6, QWEN, (2048, 5120), budget, whole_rows="so").chunk_tokens)
        for budget in range(GIB // 16, 3 * GIB, GIB // 16)
    ]
    assert tokens == sorted(tokens)


def test_plan_refuses_in_words():
    with pytest.raises(ValueError, match=r"^test: workspace_bytes must be at least \d+ .*got 9"):
        cut(10, QWEN, (2048, 5120), 9)


@pytest.mark.parametrize("whole_rows", [None, "because"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_plan_check_refuses_nothing_that_plan_takes(device, whole_rows):
    random.seed(1)
    for _ in range(300):
        vocab_size = random.choice((33, 1000, 32_000))
        heads = [torch.empty(vocab_size, random.choice((8, 96)), device=device) for _ in range(2)]
        budget = int(2 ** random.uniform(8, 20))
        try:
            plan("test", 100, vocab_size, heads, budget, whole_rows=whole_rows)
        except ValueError:
            continue
        _plan.check("test", vocab_size, heads, budget, whole_rows=whole_rows)


def test_explain_prints_the_cut(monkeypatch):
    monkeypatch.setattr("opd_kernels._gemms.on_gpu", lambda tensor: True)
    heads = heads_of(QWEN, 2048, 5120)
    hidden = heads_of(8192, 2048, 5120)
    monkeypatch.setattr("opd_kernels._dispatch.select", lambda *_: "triton")
    text = opk.explain("fused_linear_divergence", hidden[0], heads[0], hidden[1], heads[1])
    assert (
        "path A: 8 chunk(s) of up to 1024 of 8192 tokens, the teacher's logits 512 tokens at a "
        "time, dX from 2 slices, 908.1 MiB workspace" in text
    )
    text = opk.explain(
        "fused_linear_divergence",
        hidden[0],
        heads[0],
        hidden[1],
        heads[1],
        gradient_tolerance=1e-4,
    )
    assert "chunk(s) of up to 768 of 8192 tokens, dX" in text


MODELS = [
    (QWEN, 2048, 5120),
    (QWEN, 4096, 8192),
    (QWEN, 2048, 4096),
    (LLAMA, 4096, 4096),
    (LLAMA, 2048, 5120),
    (262_144, 2560, 5376),
    (32_000, 4096, 4096),
]


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize(("vocab_size", "width", "other"), MODELS)
def test_plan_takes_the_path_that_the_model_finds_quicker(
    monkeypatch, vocab_size, width, other, is_frozen
):
    def forced(fewest, budget):
        with monkeypatch.context() as patch:
            patch.setattr(_plan, "_FEWEST_TOKENS_GPU", fewest)
            patch.setattr(_plan, "_FEWEST_TOKENS_FROZEN", fewest)
            return cut(8192, vocab_size, (width, other), budget)

    def seconds(found):
        return cut_model.seconds(found, width, other, is_frozen=is_frozen)

    entered = []
    for mib in (48, 56, 64, 80, 88, 96, 112, 128, 150, 170, 200, 230, 260, 300, 400, 512, 1024):
        budget = mib << 20
        chosen = cut(8192, vocab_size, (width, other), budget, frozen_head=is_frozen)
        entered.append(chosen.whole_rows)
        rows, slices = forced(1, budget), forced(10**9, budget)
        best = min(seconds(rows), seconds(slices))
        # 256 tokens, as it once was, took up to twice as long, and thrice with a frozen head
        assert seconds(chosen) <= 1.2 * best, (mib, seconds(rows), seconds(slices), chosen)
    # no way back to path B with more memory
    assert entered == sorted(entered) and entered[-1]


@pytest.mark.parametrize(
    ("tokens", "hidden_size", "expected"),
    [
        (1024, 2048, 2),  # 64 tiles: two slices fill 128 of 132 multiprocessors
        (1024, 4096, 1),  # 128 tiles do
        (2048, 2048, 1),
        (1024, 2560, 3),  # 80
        (512, 2048, 4),  # 32
        (128, 2048, 8),  # 8: as many as are allowed
        (8192, 4096, 1),
    ],
)
def test_grad_hidden_splits_of_an_h200(tokens, hidden_size, expected):
    assert grad_hidden_splits(tokens, hidden_size, QWEN, 132) == expected


@pytest.mark.parametrize(
    ("vocab_size", "left_over"),
    [
        # of 2 .. 8 slices; 151,936 is 128 times a prime number
        (128_256, (0, 0, 0, 256, 0, 128, 0)),
        (QWEN, (0, 256, 0, 256, 640, 512, 0)),
        (152_064, (0, 0, 0, 384, 0, 640, 0)),
        (262_144, (0, 256, 0, 384, 256, 512, 0)),
        (32_000, (0, 128, 0, 0, 512, 640, 0)),
    ],
)
def test_slices_of_dx_leave_few_columns_over(vocab_size, left_over):
    for splits, left in zip(range(2, 9), left_over, strict=True):
        width = split_width(vocab_size, splits)
        assert width % 8 == 0
        assert vocab_size - splits * width == left < 128 * splits


@pytest.mark.parametrize("vocab_size", [32_000, LLAMA, QWEN, 152_064, 262_144])
def test_splits_that_leave_columns_over_are_worth_it(vocab_size):
    for tokens in range(128, 4097, 128):
        for hidden_size in (1024, 2048, 2560, 3584, 4096, 5120):
            splits = grad_hidden_splits(tokens, hidden_size, vocab_size, 132)
            if vocab_size % split_width(vocab_size, splits) == 0:
                continue
            # by a tenth at least, against every count that divides
            for other in range(1, 9):
                if vocab_size % split_width(vocab_size, other) == 0 and other < splits:
                    ours = _waves(tokens, hidden_size, splits) / splits
                    assert ours < _waves(tokens, hidden_size, other) / other


def _waves(tokens, hidden_size, splits):
    return -(-(-(-tokens // 128) * -(-hidden_size // 256) * splits) // 132)


def test_grad_hidden_splits_never_make_more_waves_per_slice():
    random.seed(2)
    for _ in range(2000):
        tokens, hidden_size = random.randint(1, 9000), random.randint(1, 9000)
        vocab_size, units = random.randint(1, 300_000), random.randint(1, 200)
        splits = grad_hidden_splits(tokens, hidden_size, vocab_size, units)
        assert 1 <= splits <= 8 and (splits == 1 or vocab_size // splits >= 2048)
        tiles = -(-tokens // 128) * -(-hidden_size // 256)
        assert -(-tiles * splits // units) <= splits * -(-tiles // units)


@pytest.mark.parametrize("mib", [48, 64, 90])
@pytest.mark.parametrize("hidden_sizes", [(2048, 4096), (4096, 8192)])
def test_path_b_does_not_shred_the_vocabulary(hidden_sizes, mib):
    found = cut(8192, QWEN, hidden_sizes, mib << 20)
    assert not found.whole_rows
    # each pair of a chunk and a slice is a handful of launches, thrice over
    assert found.num_chunks * len(found.slices()) < 600, found


# -- 16-bit heads on a CPU -----------------------------------------------------------------------


def cpu_cut(
    num_tokens, vocab_size, hidden_sizes, workspace_bytes=GIB, dtype=torch.bfloat16, **more
):
    # a head that takes no memory
    heads = [torch.empty(1, dtype=dtype).expand(vocab_size, size) for size in hidden_sizes]
    return plan("test", num_tokens, vocab_size, heads, workspace_bytes, **more)


def test_plan_of_16_bit_heads_on_a_cpu_is_small_beside_them_unless_asked():
    heads = 2 * 32_000 * (512 + 1024)
    trained = cpu_cut(512, 32_000, (512, 1024))
    assert trained.workspace_bytes <= heads / 3 and trained.chunk_tokens == 103
    frozen = cpu_cut(512, 32_000, (512, 1024), trained=False)
    assert heads / 3 < frozen.workspace_bytes <= heads and frozen.chunk_tokens == 256
    # a budget that the caller names is a budget, and float32 heads are as large as their dW
    assert cpu_cut(512, 32_000, (512, 1024), GIB // 4).chunk_tokens == 512
    assert cpu_cut(512, 32_000, (512, 1024), dtype=torch.float32).chunk_tokens == 512
    # small hidden sizes still get chunks that a GEMM is worth
    assert cpu_cut(10**4, QWEN, (64, 64)).chunk_tokens >= 64
    # and large ones what is kept between calls
    large = cpu_cut(10**4, QWEN, (2048, 4096))
    assert 0.9 * GIB / 4 < large.workspace_bytes <= GIB / 4


def test_plan_of_16_bit_heads_does_not_depend_on_the_rows_of_a_shard():
    shards = [
        [torch.empty(1, dtype=torch.bfloat16).expand(rows, 64) for _ in range(2)]
        for rows in (7000, 9000)
    ]
    first, second = (plan("test", 512, 9000, heads, GIB, whole_rows="ranks") for heads in shards)
    assert first == second
