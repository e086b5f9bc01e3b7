# SPDX-License-Identifier: Apache-2.0
"""Vocabulary-parallel heads: 2 and 4 gloo ranks against one, for every divergence and option."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
import torch.distributed as dist

import opd_kernels as opk
from opd_kernels import _parallel, targets
from opd_kernels import divergences as D
from tests.cases import F64, SPECS
from tests.ranks import run_ranks

NUM_TOKENS, VOCAB, STUDENT, TEACHER, RANK_OF_LORA = 9, 83, 6, 5, 3
STATISTICS = opk._laws.STATISTICS


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    weights = torch.rand(NUM_TOKENS, generator=generator, dtype=F64)
    weights[4] = 0.0
    return {
        "student_hidden": normal(NUM_TOKENS, STUDENT),
        "student_lm_head_weight": normal(VOCAB, STUDENT),
        "teacher_hidden": normal(NUM_TOKENS, TEACHER),
        "teacher_lm_head_weight": normal(VOCAB, TEACHER),
        "reference_hidden": normal(NUM_TOKENS, TEACHER),
        "reference_lm_head_weight": normal(VOCAB, TEACHER),
        "student_bias": normal(VOCAB),
        "teacher_bias": normal(VOCAB),
        "lora_a": normal(RANK_OF_LORA, STUDENT),
        "lora_b": normal(VOCAB, RANK_OF_LORA),
        "token_weights": weights,
        "labels": torch.randint(VOCAB, (NUM_TOKENS, 2), generator=generator),
        "token_ids": torch.randint(VOCAB, (NUM_TOKENS,), generator=generator),
        "topk_ids": torch.randint(VOCAB, (NUM_TOKENS, 4), generator=generator),
    }


SHARDED = (
    "student_lm_head_weight",
    "teacher_lm_head_weight",
    "reference_lm_head_weight",
    "student_bias",
    "teacher_bias",
    "lora_b",
)


def calls() -> dict[str, dict]:
    """Keyword arguments of a call by name; "everything" takes every tensor."""
    plain = {str(s): {"divergence": s.public()} for s in SPECS if s.name != "adaptive_kl"}
    everything = {
        "divergence": [(0.7, D.renyi(0.3)), (0.5, "cross_entropy"), (0.2, "concrete_score")],
        "target": targets.geometric(0.3, 0.5, 0.2, detach=False),
        "student_softcap": 5.0,
        "temperature": 1.3,
    }
    return {**plain, "everything": everything}


def run(data: dict, keywords: dict, everything: bool, reduction: str, **more):
    """(loss, statistics, gradients by name) of one call."""
    trained = ["student_hidden", "student_lm_head_weight"]
    if everything:
        trained += ["student_bias", "lora_a", "lora_b"]
    data = {**data, **{name: data[name].clone().requires_grad_() for name in trained}}
    names = ["token_weights", "token_ids", "topk_ids"]
    if everything:
        names += ["student_bias", "teacher_bias", "labels"]
        names += ["reference_hidden", "reference_lm_head_weight"]
        more["student_lora"] = (data["lora_a"], data["lora_b"], 0.5)
    out = opk.fused_linear_divergence(
        *list(data.values())[:4],
        **{name: data[name] for name in names},
        **keywords,
        reduction=reduction,
        statistics=STATISTICS,
        **more,
    )
    (out.loss * torch.arange(1, out.loss.numel() + 1)).sum().backward()
    return out.loss.detach(), out.statistics, {name: data[name].grad for name in trained}


def worker(rank: int, ranks: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        _compare(rank, ranks)
        _padded(rank, ranks)
        _uneven(rank, ranks)
        _as_dtensor(ranks)
        _other_shapes(rank, ranks)
        _explained(rank, ranks)
        _refusals(ranks)
    finally:
        dist.destroy_process_group()


def _compare(rank: int, ranks: int) -> None:
    group, whole = dist.group.WORLD, tensors()
    # 83 columns: the last rank has fewer
    shard = {
        name: value.chunk(ranks)[rank] if name in SHARDED else value
        for name, value in whole.items()
    }
    for name, keywords in calls().items():
        for reduction in ("sum", "none"):
            everything = name == "everything"
            loss, statistics, gradients = run(whole, keywords, everything, reduction)
            ours = run(
                shard, keywords, everything, reduction, process_group=group, vocab_size=VOCAB
            )
            close = {"rtol": 1e-11, "atol": 1e-12, "msg": lambda text, n=name: f"{n}: {text}"}
            torch.testing.assert_close(ours[0], loss, **close)
            for key, value in statistics.items():
                torch.testing.assert_close(ours[1][key], value, **close)
            for key, gradient in gradients.items():
                expected = gradient.chunk(ranks)[rank] if key in SHARDED else gradient
                torch.testing.assert_close(ours[2][key], expected, **close)


def _padded(rank: int, ranks: int) -> None:
    """Heads padded to different lengths but cut at the same rows: only the last ends differ."""
    whole, group = tensors(), dist.group.WORLD
    arguments = {"token_ids": whole["token_ids"], "statistics": ["student_logprobs"]}
    expected = opk.fused_linear_divergence(*list(whole.values())[:4], divergence="jsd", **arguments)
    rows = -(-VOCAB // ranks)
    heads = []
    for name, padding in (("student_lm_head_weight", 5), ("teacher_lm_head_weight", 9)):
        head = whole[name]
        padded = torch.cat([head, torch.full((padding, head.shape[1]), torch.nan, dtype=F64)])
        heads.append(padded[rank * rows : None if rank == ranks - 1 else (rank + 1) * rows])
    ours = opk.fused_linear_divergence(
        whole["student_hidden"],
        heads[0],
        whole["teacher_hidden"],
        heads[1],
        divergence="jsd",
        vocab_size=VOCAB,
        process_group=group,
        **arguments,
    )
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.statistics, expected.statistics)


def _uneven(rank: int, ranks: int) -> None:
    """Ranks with more rows than others, and a budget of a few tokens: all cut the tokens alike."""
    whole, total = tensors(), 83
    whole = {name: value[:total] if name in SHARDED else value for name, value in whole.items()}
    first = [0, 60, total] if ranks == 2 else [0, 40, 60, 70, total]
    rows = slice(first[rank], first[rank + 1])
    names = ("student_hidden", "student_lm_head_weight", "teacher_hidden", "teacher_lm_head_weight")
    expected = opk.fused_linear_divergence(*(whole[name] for name in names), divergence="jsd")
    heads = [whole[name][rows] if name in SHARDED else whole[name] for name in names]
    token_bytes = 8 * (2 * (first[1] - first[0]) + 2 * STUDENT + TEACHER)
    ours = opk.fused_linear_divergence(
        *heads,
        divergence="jsd",
        process_group=dist.group.WORLD,
        workspace_bytes=2 * token_bytes,
    )
    torch.testing.assert_close(ours.loss, expected.loss)


def _other_shapes(rank: int, ranks: int) -> None:
    """Calls in turn whose heads differ on all ranks, on the last, or in vocab_size alone."""
    whole, group = tensors(), dist.group.WORLD
    names = list(whole)[:4]
    rows = -(-VOCAB // ranks)
    begin, end = rank * rows, VOCAB if rank == ranks - 1 else (rank + 1) * rows
    short = [(7 * rank, 7 * (rank + 1)), 7 * ranks]
    # what the last rank has beyond the columns that count is padding, of one length or another
    padding = 4 if rank == ranks - 1 else 0
    calls = [((begin, end), VOCAB, 0), (*short, 0), ((begin, end), VOCAB, padding)]
    calls += [((begin, end), VOCAB - 2, 0), ((begin, end), VOCAB, 0), (*short, padding)] * 2
    with count_collectives() as counts:
        for number, ((first, last), vocab_size, more) in enumerate(calls):
            heads = [whole[name][:vocab_size] if name in SHARDED else whole[name] for name in names]
            expected = opk.fused_linear_divergence(*heads, divergence="jsd").loss
            shards = [
                padded(whole[name][first:last], more) if name in SHARDED else whole[name]
                for name in names
            ]
            ours = opk.fused_linear_divergence(
                *shards, divergence="jsd", vocab_size=vocab_size, process_group=group
            ).loss
            torch.testing.assert_close(ours, expected, msg=lambda text, n=number: f"{n}: {text}")
    assert counts == {"all_gather_into_tensor": len(calls), "all_gather_object": 0}


def padded(head: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([head, torch.full((rows, head.shape[1]), torch.nan, dtype=F64)])


@contextlib.contextmanager
def count_collectives():
    counts = {}

    def counted(name):
        function = getattr(dist, name)

        def call(*arguments, **keywords):
            counts[name] += 1
            return function(*arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_into_tensor", "all_gather_object"):
            counts[name] = 0
            patch.setattr(dist, name, counted(name))
        yield counts


def _explained(rank: int, ranks: int) -> None:
    whole = tensors()
    heads = [
        value.chunk(ranks)[rank] if name in SHARDED else value
        for name, value in list(whole.items())[:4]
    ]
    text = opk.explain("fused_linear_divergence", *heads, process_group=dist.group.WORLD)
    assert "path A: 1 chunk(s) of up to 9 of 9 tokens" in text


def _as_dtensor(ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    whole = tensors()
    heads = [
        distribute_tensor(whole[name], mesh, [Shard(0)]).requires_grad_(name.startswith("student"))
        for name in ("student_lm_head_weight", "teacher_lm_head_weight")
    ]
    hidden = whole["student_hidden"].clone().requires_grad_()
    out = opk.fused_linear_divergence(
        hidden, heads[0], whole["teacher_hidden"], heads[1], divergence="jsd"
    )
    out.loss.backward()
    loss, _, gradients = run(
        {**whole, "token_weights": torch.ones(NUM_TOKENS, dtype=F64)},
        {"divergence": "jsd"},
        False,
        "sum",
    )
    torch.testing.assert_close(out.loss.detach(), loss)
    torch.testing.assert_close(hidden.grad, gradients["student_hidden"])
    full = heads[0].grad.full_tensor()
    torch.testing.assert_close(full, gradients["student_lm_head_weight"])


def _refusals(ranks: int) -> None:
    group, whole = dist.group.WORLD, tensors()
    heads = list(whole.values())[:4]
    with pytest.raises(ValueError, match="adaptive_kl sorts the teacher's law"):
        opk.fused_linear_divergence(*heads, divergence="adaptive_kl", process_group=group)
    # 96 rows and 104 rows, each in equal parts: rank 0 would compare different tokens
    with pytest.raises(ValueError, match="must be cut at the same rows, got on rank 0"):
        opk.fused_linear_divergence(
            *heads[:3], heads[3][:-1], vocab_size=VOCAB * ranks - ranks, process_group=group
        )
    with pytest.raises(ValueError, match="pass vocab_size="):
        opk.fused_linear_divergence(*heads[:3], heads[3][:-1], process_group=group)
    with pytest.raises(ValueError, match="got none on rank 1"):
        opk.fused_linear_divergence(*heads, vocab_size=VOCAB, process_group=group)
    with pytest.raises(ValueError, match=r"vocab_size must be in \[1, "):
        opk.fused_linear_divergence(*heads, vocab_size=VOCAB * ranks * 2, process_group=group)
    rank = dist.get_rank()
    with pytest.raises(ValueError, match=r"got 2 heads and vocab_size=\d+ on rank 0 and 2 heads"):
        opk.fused_linear_divergence(*heads, vocab_size=VOCAB + rank, process_group=group)
    third = {"reference_hidden": heads[2], "reference_lm_head_weight": heads[3]}
    third["target"] = targets.geometric(0.3, 0.5, 0.2)
    with pytest.raises(ValueError, match=r"3 heads and vocab_size=None on rank 1"):
        opk.fused_linear_divergence(*heads, process_group=group, **(third if rank == 1 else {}))
    with pytest.raises(TypeError, match="process_group must be a torch"):
        opk.fused_linear_divergence(*heads, process_group="world")
    with pytest.raises(ValueError, match="it is exact and on one rank"):
        opk.fused_linear_divergence(*heads, process_group=group, backend="reference")


@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_parallel_is_one_rank(ranks):
    run_ranks(worker, ranks)


def test_no_group_is_no_shard():
    assert _parallel.resolve("") is None
    assert _parallel.planned_size("", 7) == 7
