# SPDX-License-Identifier: Apache-2.0
"""A law of which a few tokens per position are known, the likeliest or drawn ones: a server's, or a
store's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from opd.schema import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TopkRows:
    """The best tokens of a law at T positions, and the mass of all others.

    Attributes:
        ids: [T, K] int32, the likeliest first; -1 where there is no further one.
        logprobs: [T, K] float32, nats; -inf beside -1.
        tail_logprob: [T] float32, the log of the mass outside the ids.
        token_logprobs: [T, J] float32 of the ids that were asked for, or None.
        entropy: [T] float32 of the whole law, or None where nobody knows it.
    """

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor
    token_logprobs: Tensor | None = None
    entropy: Tensor | None = None

    def best(self, num_topk: int) -> TopkRows:
        """Those with the first `num_topk` ids; the tail takes in the rest.

        Raises:
            ValueError: fewer are known.
        """
        known = self.ids.shape[1]
        if num_topk > known:
            raise ValueError(f"num_topk must be at most the {known} that are known, got {num_topk}")
        if num_topk == known:
            return self
        rest = torch.cat([self.tail_logprob[:, None], self.logprobs[:, num_topk:]], 1)
        return TopkRows(
            ids=self.ids[:, :num_topk],
            logprobs=self.logprobs[:, :num_topk],
            tail_logprob=rest.logsumexp(1),
            token_logprobs=self.token_logprobs,
            entropy=self.entropy,
        )

    def to(self, device: torch.device) -> TopkRows:
        """The same on a device."""
        return _on(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnRows:
    """Tokens drawn from a law at T positions, with weights that are the law on average.

    Attributes:
        ids: [T, M] int32, each once per row; -1 where there is no further one.
        weights: [T, M] float32, not normalised; 0 beside -1.
        entropy: [T] float32, nats, -sum weight log p: the law's on average. None: nobody knows.
    """

    ids: Tensor
    weights: Tensor
    entropy: Tensor | None = None

    def to(self, device: torch.device) -> DrawnRows:
        """The same on a device."""
        return _on(self, device)


def _on(rows: Any, device: torch.device) -> Any:
    """Every tensor of a dataclass on a device."""
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return replace(
        rows, **{name: value.to(device) for name, value in values.items() if value is not None}
    )


def gather_rows(
    found: Sequence[Any], kept: Sequence[Tensor], names: Sequence[str]
) -> dict[str, Any]:
    """Of each completion's values of these names [C, ...] the rows that are kept, behind each
    other; None for a name that one of them has not."""

    def rows(name: str) -> Tensor | None:
        values = [getattr(one, name) for one in found]
        if any(value is None for value in values):
            return None
        return torch.cat([value[k] for value, k in zip(values, kept, strict=True)])

    return {name: rows(name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Of one token per position: as `Law.token_logprobs` has them, all [T] float32, nats."""

    logprobs: Tensor
    entropy: Tensor | None = None


class SparseLaw:
    """A law as someone else reports it.

    Args:
        ask: (number of best ids, further ids [T, J] or None, temperature) -> TopkRows; waits for
            the answer.
        source: who reports it, for errors: "the store at ...", "the server at ...".
        num_topk: how many likeliest tokens it has been set up to report.
        temperature: that it reports its law at; None: at any.
    """

    def __init__(
        self,
        ask: Callable[[int, Tensor | None, float], TopkRows],
        *,
        source: str,
        num_topk: int,
        temperature: float | None = 1.0,
    ) -> None:
        self.num_topk = num_topk
        self._ask = ask
        self._source = source
        self._temperature = temperature
        self._known: dict[float, TopkRows] = {}
        self._chosen: tuple[Tensor, float, TopkRows] | None = None

    def prefetch(
        self, *, num_topk: int = 0, token_ids: Tensor | None = None, temperature: float = 1.0
    ) -> None:
        """Ask now for what will be asked later."""
        if token_ids is not None:
            found = self.topk(1, token_ids=token_ids[:, None], temperature=temperature)
            self._chosen = (token_ids, temperature, found)
        elif num_topk:
            self.topk(num_topk, temperature=temperature)

    def hidden(self) -> NoReturn:
        """There are none.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self._source} reports log-probabilities of a few tokens and no hidden states; "
            "objective.kind must be 'topk' or 'sampled_token'"
        )

    def topk(
        self, num_topk: int, *, token_ids: Tensor | None = None, temperature: float = 1.0
    ) -> TopkRows:
        """The `num_topk` likeliest tokens, and the log-probabilities of `token_ids` [T, J].

        Raises:
            ValueError: a temperature other than 1, where that needs the whole law.
        """
        if self._temperature not in (None, temperature):
            raise ValueError(
                f"{self._source} reports its law at temperature {self._temperature:g}, got "
                f"temperature {temperature:g}"
            )
        if token_ids is not None:
            return self._ask(num_topk, token_ids, temperature)
        known = self._known.get(temperature)
        if known is None or known.ids.shape[1] < num_topk:
            known = self._known[temperature] = self._ask(num_topk, None, temperature)
        return known.best(num_topk)

    def token_logprobs(self, token_ids: Tensor, *, temperature: float = 1.0) -> Any:
        """Log-probabilities of one token per position, `.logprobs` [T], and `.entropy` or None."""
        chosen = self._chosen
        if chosen is not None and chosen[0] is token_ids and chosen[1] == temperature:
            found = chosen[2]
        else:
            found = self.topk(1, token_ids=token_ids[:, None], temperature=temperature)
        if found.token_logprobs is None:
            raise ValueError(f"{self._source} has no log-probabilities of chosen tokens")
        return TokenRows(logprobs=found.token_logprobs[:, 0], entropy=found.entropy)


class DrawnLaw:
    """A law as tokens that were drawn from it once.

    Args:
        read: the draws, when they are first asked for.
        source: who has them, for errors.
        num_draws, proposal_temperature, temperature: with which they were drawn.
    """

    def __init__(
        self,
        read: Callable[[], DrawnRows],
        *,
        source: str,
        num_draws: int,
        proposal_temperature: float,
        temperature: float,
    ) -> None:
        self._read = read
        self._source = source
        self._drawn_with = {
            "objective.num_draws": num_draws,
            "objective.proposal_temperature": proposal_temperature,
            "objective.temperature": temperature,
        }

    @cached_property
    def _rows(self) -> DrawnRows:
        return self._read()

    def prefetch(self, **_: Any) -> None:
        """Read now what will be asked later."""
        _ = self._rows

    def samples(
        self, num_draws: int, *, proposal_temperature: float = 1.0, temperature: float = 1.0
    ) -> DrawnRows:
        """The draws.

        Raises:
            ConfigError: others are asked for.
        """
        asked = (num_draws, proposal_temperature, temperature)
        for (key, there), here in zip(self._drawn_with.items(), asked, strict=True):
            if here != there:
                raise ConfigError(
                    f"{key}: must be {there:g}, with which {self._source} was filled, got {here:g}"
                )
        return self._rows
