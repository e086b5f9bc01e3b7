# SPDX-License-Identifier: Apache-2.0
"""fused_linear_topk over a vocabulary cut over ranks: 2 and 3 gloo ranks against one."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

import opd_kernels as opk
from opd_kernels import _topk_shards, reference
from tests.cases import F32, F64, INF, NAN
from tests.ranks import run_ranks

NUM_TOKENS, VOCAB, HIDDEN = 9, 83, 6


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    ids = torch.randint(-1, VOCAB, (NUM_TOKENS, 5), generator=generator)
    return {
        "hidden": normal(NUM_TOKENS, HIDDEN),
        "lm_head_weight": normal(VOCAB, HIDDEN) * 2,
        "bias": normal(VOCAB),
        "down": normal(3, HIDDEN),
        "up": normal(VOCAB, 3),
        "token_ids": ids,
        "temperature": torch.rand(NUM_TOKENS, generator=generator).to(dtype) + 0.5,
    }


def worker(rank: int, ranks: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        # the last has fewer rows, then one that has most of them
        even = -(-VOCAB // ranks)
        _compare(rank, [min(VOCAB, i * even) for i in range(ranks + 1)])
        _compare(rank, [0, 70, 80, VOCAB] if ranks == 3 else [0, 80, VOCAB])
        _hostile(rank, ranks)
        _as_dtensor(ranks)
        _refusals(ranks)
    finally:
        dist.destroy_process_group()


def _compare(rank: int, ends: list[int]) -> None:
    rows, group = slice(ends[rank], ends[rank + 1]), dist.group.WORLD
    for dtype in (F64, F32):
        all_of = tensors(dtype)
        hidden, head, bias, down, up, ids, temperature = all_of.values()
        close = {"rtol": 1e-11, "atol": 1e-12} if dtype == F64 else {"rtol": 2e-5, "atol": 2e-5}
        options = {"temperature": temperature, "softcap": 7.0, "logit_scale": -0.5}
        for num_topk in (1, 4, 40, VOCAB):
            for more in ({}, options):
                whole = opk.fused_linear_topk(
                    hidden, head, num_topk=num_topk, token_ids=ids, bias=bias,
                    lora=(down, up, 0.7), **more,
                )  # fmt: skip
                ours = opk.fused_linear_topk(
                    hidden, head[rows], num_topk=num_topk, token_ids=ids, bias=bias[rows],
                    lora=(down, up[rows], 0.7), process_group=group, workspace_bytes=5000, **more,
                )  # fmt: skip
                if dtype == F64:
                    assert torch.equal(ours.ids, whole.ids)
                for one, two in zip(ours[1:], whole[1:], strict=True):
                    assert one.dtype == dtype
                    torch.testing.assert_close(one, two, **close)
        none = opk.fused_linear_topk(hidden[:0], head[rows], num_topk=3, process_group=group)
        assert none.ids.shape == (0, 3) and none.token_logprobs is None
        column = opk.fused_linear_topk(
            hidden, head[rows], num_topk=3, token_ids=ids[:, 0], process_group=group
        )
        assert column.token_logprobs.shape == (NUM_TOKENS,)


def _hostile(rank: int, ranks: int) -> None:
    """Ties over ranks, a rank without a possible token, NaN on one rank alone."""
    group, size = dist.group.WORLD, 10 * ranks
    # a hidden size of 1: the logits are the head's rows
    head = torch.zeros(size, 1)
    head[::7] = 1.0
    head[:10] = -INF
    hidden = torch.tensor([[1.0], [2.0]])
    own = slice(10 * rank, 10 * rank + 10)
    ids = torch.tensor([[0, 14], [-1, size - 1]])
    truth = reference.fused_linear_topk(hidden, head, num_topk=size, token_ids=ids)
    ours = opk.fused_linear_topk(
        hidden, head[own], num_topk=size, token_ids=ids, process_group=group
    )
    assert torch.equal(ours.ids, truth.ids)
    for one, two in zip(ours[1:], truth[1:], strict=True):
        torch.testing.assert_close(one, two.float(), rtol=1e-5, atol=1e-6)
    head[-1] = NAN
    bad = opk.fused_linear_topk(hidden, head[own], num_topk=4, token_ids=ids, process_group=group)
    assert bad.ids.unique().tolist() == [-1]
    assert all(bool(values.isnan().all()) for values in bad[1:])


def _as_dtensor(ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    hidden, head, *_ = tensors(F64).values()
    expected = opk.fused_linear_topk(hidden, head, num_topk=6)
    ours = opk.fused_linear_topk(hidden, distribute_tensor(head, mesh, [Shard(0)]), num_topk=6)
    assert torch.equal(ours.ids, expected.ids)
    torch.testing.assert_close(ours.tail_logprob, expected.tail_logprob)
    text = opk.explain(
        "fused_linear_topk", hidden, distribute_tensor(head, mesh, [Shard(0)]), num_topk=6
    )
    assert "path A" in text
    with pytest.raises(ValueError, match=": lm_head_weight must be a DTensor sharded in dim"):
        replicated = distribute_tensor(head, mesh, [Replicate()])
        opk.fused_linear_topk(hidden, replicated, num_topk=6)


def _refusals(ranks: int) -> None:
    group = dist.group.WORLD
    hidden, head, *_ = tensors(F64).values()
    with pytest.raises(ValueError, match=rf"num_topk must be in \[1, {VOCAB * ranks}\]"):
        opk.fused_linear_topk(hidden, head, num_topk=VOCAB * ranks + 1, process_group=group)
    with pytest.raises(ValueError, match=f"token_ids must be below {VOCAB * ranks}"):
        opk.fused_linear_topk(
            hidden,
            head,
            num_topk=1,
            token_ids=torch.full((NUM_TOKENS,), VOCAB * ranks),
            process_group=group,
        )
    with pytest.raises(ValueError, match="without process_group"):
        opk.fused_linear_topk(hidden, head, num_topk=1, process_group=group, backend="reference")


@pytest.mark.parametrize("ranks", [2, 3])
def test_vocabulary_parallel_topk_is_one_rank(ranks):
    run_ranks(worker, ranks)


@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_combine_is_the_law_of_all_parts(num_parts):
    logits = torch.randn(7, 60, dtype=F64) * 4
    logits[3, 12:24] = -INF
    parts = logits.chunk(num_parts, dim=1)
    first, best, ids, sums = 0, [], [], []
    for part in parts:
        law = opk.topk_logprobs(part, 6)
        best.append(part.gather(1, law.ids.clamp(min=0).long()).masked_fill(law.ids < 0, -INF))
        ids.append(torch.where(law.ids >= 0, law.ids + first, -1).double())
        sums.append((law.lse, law.tail_logprob, law.entropy))
        first += part.shape[1]
    got = _topk_shards.combine(
        torch.cat(best, 1),
        torch.cat(ids, 1),
        logits[:, :2],
        *(torch.stack(values) for values in zip(*sums, strict=True)),
        6,
    )
    truth = reference.topk_logprobs(logits, 6, token_ids=torch.tensor([[0, 1]] * 7))
    assert torch.equal(got[0].int(), truth.ids)
    for one, two in zip(got[1:], truth[1:], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)
