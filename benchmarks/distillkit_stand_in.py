# SPDX-License-Identifier: Apache-2.0
"""What DistillKit does to a top-k law, written anew: arcee-ai/DistillKit at a61c2e7 can't be
installed beside us. Facts from its `distillkit/compression`: the log-probs of the `exact_k` best
are kept in a 16-bit float; the rest are a least-squares polynomial (by an SVD of the terms) plus
residuals that are quantised symmetrically in bins and packed bit by bit, every bit a uint8 of its
own on the way; ids are packed with ceil(log2 V) bits in the same way. All of it is torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scheme:
    """One of DistillKit's: K, kept exactly, powers of the terms, (bits, count) of bins."""

    num_topk: int
    exact_k: int
    terms: tuple[float, ...]
    bins: tuple[tuple[int, int], ...] = ()

    def row_bytes(self, vocab_size: int) -> int:
        """Bytes per token."""
        bits = sum(16 + 8 * math.ceil(size * count / 8) for size, count in self.bins)
        id_bits = math.ceil(math.log2(vocab_size))
        parts = (16 * self.exact_k + 32 * len(self.terms) + bits, id_bits * self.num_topk)
        return sum(math.ceil(part / 8) for part in parts)


def pack(values: Tensor, num_bits: int) -> Tensor:
    """[..., N] integers as [..., ceil(N num_bits / 8)] bytes, the highest bit first."""
    shifts = torch.arange(num_bits - 1, -1, -1)
    bits = (values.unsqueeze(-1).bitwise_right_shift(shifts) & 1).to(torch.uint8).flatten(-2)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    weights = torch.tensor([1 << i for i in range(7, -1, -1)], dtype=torch.uint8)
    return (bits.unflatten(-1, (-1, 8)) * weights).sum(-1).to(torch.uint8)


def unpack(data: Tensor, num_bits: int, count: int) -> Tensor:
    """The inverse of `pack`."""
    shifts = torch.arange(7, -1, -1)
    bits = (data.unsqueeze(-1).bitwise_right_shift(shifts) & 1).to(torch.uint8).flatten(-2)
    groups = bits[..., : num_bits * count].unflatten(-1, (count, num_bits))
    return (groups * (1 << torch.arange(num_bits - 1, -1, -1))).sum(-1)


def _terms(scheme: Scheme) -> Tensor:
    places = torch.arange(scheme.num_topk - scheme.exact_k, dtype=torch.float32)
    return torch.stack([places**power for power in scheme.terms], -1)


def encode(ids: Tensor, logprobs: Tensor, scheme: Scheme, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(bytes of the log-probs, bytes of the ids)."""
    order = logprobs.argsort(-1, descending=True)
    logprobs, ids = logprobs.gather(-1, order), ids.gather(-1, order)
    parts = [logprobs[:, : scheme.exact_k].to(torch.bfloat16).contiguous().view(torch.uint8)]
    rest = logprobs[:, scheme.exact_k :].float()
    if scheme.terms:
        terms = _terms(scheme).expand(len(rest), -1, -1)
        left, sizes, right = torch.linalg.svd(terms, full_matrices=False)
        inverse = torch.where(sizes > 1e-5, 1 / sizes, 0.0)
        projected = left.transpose(-1, -2) @ rest.unsqueeze(-1)
        coefficients = (right.transpose(-1, -2) @ (inverse.unsqueeze(-1) * projected)).squeeze(-1)
        parts.append(coefficients.contiguous().view(torch.uint8))
        rest = rest - (terms * coefficients.unsqueeze(-2)).sum(-1)
    begin = 0
    for size, count in scheme.bins:
        values, half = rest[:, begin : begin + count], 2 ** (size - 1)
        largest = values.abs().amax(-1, keepdim=True)
        scale = torch.where(largest == 0, 1.0, largest / half).to(torch.float16)
        codes = (values / scale.float()).round().clamp(-half, half - 1) + half
        parts += [scale.view(torch.uint8), pack(codes.long(), size)]
        begin += count
    return torch.cat(parts, -1), pack(ids.long(), math.ceil(math.log2(vocab_size)))


def decode(
    data: Tensor, packed_ids: Tensor, scheme: Scheme, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """(ids [T, K], log-probs [T, K])."""
    begin = 2 * scheme.exact_k
    exact = data[:, :begin].contiguous().view(torch.bfloat16).float()
    rest = torch.zeros(len(data), scheme.num_topk - scheme.exact_k)
    if scheme.terms:
        end = begin + 4 * len(scheme.terms)
        coefficients = data[:, begin:end].contiguous().view(torch.float32)
        rest = (_terms(scheme) * coefficients.unsqueeze(-2)).sum(-1)
        begin = end
    residuals = []
    for size, count in scheme.bins:
        end = begin + 2 + -(-size * count // 8)
        scale = data[:, begin : begin + 2].contiguous().view(torch.float16).float()
        codes = unpack(data[:, begin + 2 : end], size, count)
        residuals.append((codes - 2 ** (size - 1)).float() * scale)
        begin = end
    if residuals:
        residual = torch.cat(residuals, -1)
        rest = rest + torch.nn.functional.pad(residual, (0, rest.shape[-1] - residual.shape[-1]))
    ids = unpack(packed_ids, math.ceil(math.log2(vocab_size)), scheme.num_topk)
    return ids, torch.cat([exact, rest], -1)
