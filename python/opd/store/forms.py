# SPDX-License-Identifier: Apache-2.0
"""What a store keeps of a law: its likeliest tokens, or tokens drawn from it with their weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import opd_kernels as opk
from opd.identity import hash_parts

MAX_DRAWS = 4096
# a weight that is no multiple of 1 / N is kept as round(log(weight) * 2^10) in 16 bits
_LOG_STEPS, _LOG_ZERO, _LOG_BITS = 1024, 1 << 15, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TopkForm:
    """The likeliest tokens and the mass of all others, by `opd_kernels.encode_topk`.

    Attributes:
        num_topk: entries of a law, at most 4096.
        bits: of each log-prob, 4 to 16.
    """

    words: ClassVar[dict[str, str]] = {
        "num_topk": "the number of entries",
        "bits": "the bits of a log-prob",
    }
    tells: ClassVar[str] = "topk"

    num_topk: int = 64
    bits: int = 10

    def check(self, vocab_size: int) -> None:
        """Refuse numbers that make no law.

        Raises:
            ValueError, TypeError: they do not.
        """
        self.row_bytes(vocab_size)

    def row_bytes(self, vocab_size: int) -> int:
        """Bytes of a law."""
        return opk.topk_row_bytes(self.num_topk, vocab_size, self.bits)

    def in_words(self) -> str:
        """For people."""
        return f"the {self.num_topk:,} likeliest tokens, {self.bits} bits each"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawsForm:
    """Tokens drawn from the law, whose weights are the law on average: `opd_kernels.sample_tokens`.

    A token of the vocabulary costs id bits and weight bits, rounded up to bytes: with a proposal
    temperature of 1 the weight is count / N and the count is kept, exactly; otherwise its logarithm
    is, in steps of 2^-10: a relative error of 4.9e-4 at most above 1.3e-14.

    Attributes:
        num_draws: N per law, 1 to 4096.
        proposal_temperature: as `sample_tokens` takes it.
        seed: of the random numbers, see `uniforms`.

    Source: random-sampling knowledge distillation, arXiv:2503.16870.
    """

    words: ClassVar[dict[str, str]] = {
        "num_draws": "the number of draws",
        "proposal_temperature": "the proposal's temperature",
        "seed": "the seed of the draws",
    }
    tells: ClassVar[str] = "samples"

    num_draws: int = 50
    proposal_temperature: float = 1.0
    seed: int = 0

    def check(self, vocab_size: int) -> None:
        """Refuse numbers that make no law.

        Raises:
            ValueError, TypeError: they do not.
        """
        for name in ("num_draws", "seed"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
        if not 1 <= self.num_draws <= MAX_DRAWS:
            raise ValueError(f"num_draws must be in [1, {MAX_DRAWS}], got {self.num_draws}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        if type(self.proposal_temperature) is not float or not (
            1e-30 <= self.proposal_temperature <= 1e30
        ):
            raise ValueError(
                "proposal_temperature must be a number in [1e-30, 1e30], got "
                f"{self.proposal_temperature!r}"
            )
        if not 1 <= vocab_size < 1 << 31:
            raise ValueError(f"vocab_size must be in [1, 2^31), got {vocab_size}")

    def in_words(self) -> str:
        """For people."""
        return (
            f"{self.num_draws:,} draws at proposal temperature {self.proposal_temperature:g}, "
            f"seed {self.seed}"
        )

    def uniforms(self, key: bytes, num_tokens: int) -> Tensor:
        """[num_tokens, N] float64 in [0, 1) that follow from the seed and a record's key alone, so
        that whoever draws for a completion, and when, draws the same."""
        digest = hash_parts(b"draws", self.seed.to_bytes(8, "little"), key)
        # keyed by all 128 bits; torch's generator on CPU takes 32 of a seed
        philox = np.random.Philox(key=int.from_bytes(digest, "little"))
        # numpy keeps a bit generator's stream from release to release, not that of a Generator
        words = philox.random_raw(num_tokens * self.num_draws) >> np.uint64(11)
        return torch.from_numpy(words * 2.0**-53).view(num_tokens, self.num_draws)

    @property
    def is_counted(self) -> bool:
        """Whether weights are counts over N."""
        return self.proposal_temperature == 1.0

    def entry_bytes(self, vocab_size: int) -> int:
        """Bytes of a token of the vocabulary that was drawn."""
        return -(-(self._id_bits(vocab_size) + self._weight_bits) // 8)

    def encode(self, ids: Tensor, weights: Tensor, vocab_size: int) -> np.ndarray:
        """The draws of T laws as bytes: T numbers of distinct tokens in 2 bytes each, then for each
        of them the id and above it the weight, little-endian.

        Args:
            ids: [T, M] integers, each once per row, negative: none.
            weights: [T, M] floating, as `sample_tokens` has them.
            vocab_size: ids are below it.

        Raises:
            ValueError: ids or weights that are none of N draws.
        """
        wanted, values = ids.numpy().astype(np.int64), weights.double().numpy()
        wanted = np.where(wanted < 0, -1, wanted)
        order = np.argsort(wanted, axis=1, kind="stable")
        wanted, values = (np.take_along_axis(x, order, axis=1) for x in (wanted, values))
        is_drawn = wanted >= 0
        counts = is_drawn.sum(1)
        rows = np.nonzero(is_drawn)[0]
        flat, values = wanted[is_drawn], values[is_drawn]
        bits = self._id_bits(vocab_size)
        if (flat >= vocab_size).any() or not self._ascend(flat, rows):
            raise ValueError(
                f"ids must be different in each row and below {vocab_size}, or -1 for none"
            )
        if counts.size and not (counts.min() >= 1 and counts.max() <= self.num_draws):
            raise ValueError(
                f"ids must be 1 to {self.num_draws} in each row, one for each draw at most"
            )
        high = self._coded(values, rows, len(counts))
        entries = (flat | (high << bits)).astype("<u8")
        table = entries.view(np.uint8).reshape(-1, 8)[:, : self.entry_bytes(vocab_size)]
        return np.concatenate([counts.astype("<u2").view(np.uint8), table.reshape(-1)])

    def decode(self, codes: np.ndarray, num_tokens: int, vocab_size: int) -> tuple[Tensor, Tensor]:
        """(ids [T, M] int32, then -1; weights [T, M] float32, 0 there), M the most of a row.

        Raises:
            ValueError: bytes that `encode` does not write.
        """
        width, bits = self.entry_bytes(vocab_size), self._id_bits(vocab_size)
        counts = codes[: 2 * num_tokens].copy().view("<u2").astype(np.int64)
        body = codes[2 * num_tokens :]
        if len(counts) != num_tokens or len(body) != width * counts.sum():
            raise ValueError(f"{len(codes)} bytes are no draws of {num_tokens} tokens")
        words = np.zeros((len(body) // width, 8), dtype=np.uint8)
        words[:, :width] = body.reshape(-1, width)
        entries = words.view("<u8").reshape(-1).astype(np.int64)
        flat, high = entries & ((1 << bits) - 1), entries >> bits
        rows = np.repeat(np.arange(num_tokens), counts)
        if (flat >= vocab_size).any() or not self._ascend(flat, rows):
            raise ValueError("ids that do not ascend, or beyond the vocabulary")
        if self.is_counted:
            drawn = np.bincount(rows, weights=high + 1, minlength=num_tokens)
            if (drawn != self.num_draws).any():
                raise ValueError(f"counts that do not sum to {self.num_draws}")
            values = (high + 1) / self.num_draws
        else:
            if (high >> _LOG_BITS).any():
                raise ValueError("bits above a weight")
            values = np.exp((high - _LOG_ZERO) / _LOG_STEPS)
        most = int(counts.max(initial=0))
        ids = np.full((num_tokens, most), -1, dtype=np.int32)
        weights = np.zeros((num_tokens, most), dtype=np.float32)
        begin = np.cumsum(counts) - counts
        places = np.arange(len(rows)) - begin[rows]
        ids[rows, places], weights[rows, places] = flat, values
        return torch.from_numpy(ids), torch.from_numpy(weights)

    def _coded(self, values: np.ndarray, rows: np.ndarray, num_tokens: int) -> np.ndarray:
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError("weights must be finite and not negative beside an id")
        if self.is_counted:
            counts = np.rint(values * self.num_draws).astype(np.int64)
            is_one = np.abs(values * self.num_draws - counts) < 1e-3
            sums = np.bincount(rows, weights=counts, minlength=num_tokens)
            if not (is_one.all() and (counts > 0).all() and (sums == self.num_draws).all()):
                raise ValueError(
                    f"weights must be counts over the {self.num_draws} draws, which they are with "
                    "a proposal temperature of 1"
                )
            return counts - 1
        least = np.exp(-_LOG_ZERO / _LOG_STEPS)
        logs = np.log(np.maximum(values, least)) * _LOG_STEPS
        logs = np.rint(logs).astype(np.int64) + _LOG_ZERO
        if logs.size and logs.max() >= 1 << _LOG_BITS:
            raise ValueError(f"weights must be below e^32, got {values.max():.3g}")
        return logs

    @staticmethod
    def _ascend(ids: np.ndarray, rows: np.ndarray) -> bool:
        return bool(((ids[1:] > ids[:-1]) | (rows[1:] != rows[:-1])).all())

    @staticmethod
    def _id_bits(vocab_size: int) -> int:
        return max(1, (vocab_size - 1).bit_length())

    @property
    def _weight_bits(self) -> int:
        return (self.num_draws - 1).bit_length() if self.is_counted else _LOG_BITS


Form = TopkForm | DrawsForm


def parse_form(values: dict[str, Any]) -> Form:
    """The form that store.json says.

    Raises:
        KeyError: it says none. TypeError, ValueError: not one that there is.
    """
    kind = DrawsForm if "num_draws" in values else TopkForm
    return kind(**{field.name: values[field.name] for field in fields(kind)})
