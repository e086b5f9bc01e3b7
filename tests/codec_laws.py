# SPDX-License-Identifier: Apache-2.0
"""Laws for the tests and the benchmark of the codec, and what their codes lose."""

from __future__ import annotations

import torch
from torch import Tensor

import opd_kernels as opk


def laws_of(num_tokens, num_topk, vocab_size, *, seed=0, size=20.0):
    """ids [T, K] int64, logprobs [T, K], tail [T], best first.

    Some rows have equal entries, entries of probability 0, fewer entries, or none; some no tail.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = max(1, vocab_size // max(num_topk, 1))
    gaps = torch.randint(0, spread, (num_tokens, num_topk), generator=generator)
    first = spread * torch.arange(num_topk) + gaps
    shuffled = torch.rand(num_tokens, num_topk, generator=generator).argsort(1)
    ids = first.gather(1, shuffled)
    depths = size * torch.rand(num_tokens, num_topk, generator=generator)
    logprobs = (-depths - 0.01).sort(1, descending=True).values
    tail = -3 * torch.rand(num_tokens, generator=generator)
    half = num_topk // 2
    for row in range(num_tokens):
        if row % 6 == 1 and half:
            logprobs[row, half:] = logprobs[row, half]
            tail[row] = -torch.inf
        if row % 6 == 2 and half:
            logprobs[row, half:] = -torch.inf
        if row % 6 == 3 and half:
            ids[row, half:], logprobs[row, half:] = -1, -torch.inf
        if row % 6 == 4:
            ids[row], logprobs[row], tail[row] = -1, -torch.inf, 0.0
    return ids, logprobs, tail


def peaked(num_tokens, vocab_size, width, *, seed=0):
    """Log-probs [T, V] of laws with a few likely entries: a bulk of noise and 1 to 20 above it."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_tokens, vocab_size, generator=generator)
    for row in range(num_tokens):
        few = 1 + 19 * row // max(num_tokens - 1, 1)
        heights = width + torch.randn(few, generator=generator)
        logits[row, torch.randperm(vocab_size, generator=generator)[:few]] += heights
    return torch.log_softmax(logits.double(), 1)


def kl_of_codes(logprobs: Tensor, num_topk: int, bits: int) -> tuple[Tensor, Tensor]:
    """KL(P, decoded P) over the K entries and the rest, [T] float64, nats: decoded laws divided by
    their mass, and as they are, where it is sum p (log p - log q)."""
    best, ids = logprobs.topk(num_topk)
    tail = torch.log(torch.clamp(1 - best.double().exp().sum(1), min=1e-300))
    codes = opk.encode_topk(
        ids, best, vocab_size=logprobs.shape[1], tail_logprob=tail.float(), bits=bits
    )
    laws = opk.decode_topk(codes)
    given = torch.full(logprobs.shape, -torch.inf, dtype=torch.float64)
    given.scatter_(1, laws.ids.long(), laws.logprobs.double())
    one = torch.cat([best.double(), tail[:, None]], 1)
    two = torch.cat([given.gather(1, ids), laws.tail_logprob.double()[:, None]], 1)
    mass = two.logsumexp(1)
    raw = (one.exp() * (one - two)).sum(1)
    return raw + mass * one.exp().sum(1), raw


def entropy_of(logprobs: Tensor) -> Tensor:
    """[T], nats."""
    return -(logprobs.exp() * logprobs).sum(1)


def main() -> None:
    """The table of docs/topk_codec.md."""
    flat = torch.log_softmax(torch.randn(48, 151_936, dtype=torch.float64), 1)
    for num_topk in (64, 128):
        for bits in (7, 8, 10, 12, 16):
            found = [
                kl_of_codes(peaked(48, 151_936, float(width)), num_topk, bits)
                for width in (0, 5, 8, 12, 15, 20, 30)
            ]
            largest = max(float(kl.max()) for kl, _ in found)
            mass = max(float(raw.abs().max()) for _, raw in found)
            row = opk.topk_row_bytes(num_topk, 151_936, bits)
            of_flat = float(kl_of_codes(flat, num_topk, bits)[0].max())
            print(
                f"K={num_topk} bits={bits} bytes={row} KL={largest:.1e} flat={of_flat:.1e} "
                f"mass={mass:.1e}"
            )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
