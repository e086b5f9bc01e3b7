# SPDX-License-Identifier: Apache-2.0
"""Numbers off the wire become laws here, or are refused.

The checks that every reply goes through are numpy's: replies are read in several threads at once,
and torch would start a team of its own for each of them, which fight for the cores.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from opd.clients.protocol import BadReply

# servers write what JSON cannot say, -inf, as -9999
ZERO_LOGPROB = -9999.0
# of a sum of probabilities above 1, and of a log-probability above 0: float32 sums over 262k tokens
TOLERANCE = 1e-3


def finite_logprobs(logprobs: Tensor, where: str, *, zero: float = ZERO_LOGPROB) -> Tensor:
    """Log-probabilities in float32, with those up to `zero` as -inf.

    Raises:
        BadReply: NaN, +inf, or above 0.
    """
    logprobs = logprobs.float()
    if not logprobs.numel():
        return logprobs
    values = logprobs.numpy()
    # a NaN is both the least and the most
    least, worst = float(values.min()), float(values.max())
    if math.isnan(worst):
        raise BadReply(f"{where}: a log-probability is NaN; the teacher's forward pass is broken")
    if worst > TOLERANCE:
        raise BadReply(
            f"{where}: a log-probability is {worst:.4g}, above 0: the server sends logits; "
            "start it with raw_logprobs (vLLM: --logprobs-mode raw_logprobs)"
        )
    return logprobs.masked_fill(logprobs <= zero, -torch.inf) if least <= zero else logprobs


def canonical_topk(
    ids: Tensor, logprobs: Tensor, *, num_topk: int, vocab_size: int | None, where: str
) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities as the protocol has them, from what a server sent.

    Args:
        ids: [C, n] ints, -1: no id. Of equal ids in a row the first counts.
        logprobs: [C, n].
        num_topk: columns of the result; the best of the n.
        vocab_size: of the student; larger ids are refused. None: unknown.
        where: the server, for errors.

    Returns:
        [C, num_topk] int32 and float32: best first, ties by smaller id, zero probabilities and
        missing entries as -1 and -inf.

    Raises:
        BadReply: NaN, positive log-probabilities, probabilities that sum to more than 1, ids
            outside the vocabulary.
    """
    ids = ids.long()
    logprobs = finite_logprobs(logprobs, where).masked_fill(ids == -1, -torch.inf)
    check_ids(ids, vocab_size=vocab_size, where=where)
    # before repetitions are looked for: TRL pads with id 0
    ids = ids.masked_fill(logprobs == -torch.inf, -1)
    repeated = _repeated(ids)
    logprobs = logprobs.masked_fill(repeated, -torch.inf)
    ids = ids.masked_fill(logprobs == -torch.inf, -1)
    # two stable sorts: by id, then by value
    by_id = ids.argsort(dim=1, stable=True)
    ids, logprobs = ids.gather(1, by_id), logprobs.gather(1, by_id)
    by_value = logprobs.argsort(dim=1, descending=True, stable=True)[:, :num_topk]
    ids, logprobs = ids.gather(1, by_value), logprobs.gather(1, by_value)
    missing = num_topk - ids.shape[1]
    if missing > 0:
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        logprobs = torch.nn.functional.pad(logprobs, (0, missing), value=-torch.inf)
    check_mass(logprobs, where)
    check_best(logprobs, vocab_size, where)
    return ids.int(), logprobs


def check_ids(ids: Tensor, *, vocab_size: int | None, where: str) -> None:
    """Refuse ids that are neither -1 nor in the student's vocabulary."""
    if not ids.numel():
        return
    values = ids.numpy()
    low, high = int(values.min()), int(values.max())
    if low < -1:
        raise BadReply(f"{where}: a token id is {low}, below 0")
    if vocab_size is not None and high >= vocab_size:
        raise BadReply(
            f"{where}: a token id is {high}, and the student has {vocab_size} tokens; student and "
            "teacher must have one vocabulary"
        )


def check_mass(logprobs: Tensor, where: str) -> None:
    """Refuse rows whose probabilities sum to more than 1."""
    if not logprobs.numel():
        return
    mass = float(logprobs.double().exp().sum(1).max())
    if mass > 1 + TOLERANCE:
        raise BadReply(
            f"{where}: the probabilities of a position sum to {mass:.4g}, above 1: the server "
            "sends logits or another law's numbers; start it with raw_logprobs (vLLM: "
            "--logprobs-mode raw_logprobs)"
        )


def check_best(logprobs: Tensor, vocab_size: int | None, where: str) -> None:
    """Refuse rows whose best token is less likely than all of a uniform law."""
    if not logprobs.numel():
        return
    least = float(logprobs[:, 0].min())
    # twice: the teacher's head may be padded to more tokens
    if least == -math.inf or (vocab_size is not None and least < -math.log(2 * vocab_size)):
        raise BadReply(
            f"{where}: the best log-probability of a position is {least:.4g}, which no law over "
            f"{vocab_size or 'any number of'} tokens has: the server sends logits, or had NaN"
        )


def check_complete(logprobs: Tensor, tail_logprob: Tensor, where: str) -> None:
    """Refuse rows whose ids and tail do not sum to 1, which the ids alone do not exceed then."""
    if not tail_logprob.numel():
        return
    # in float32, which is wrong by 4096 * 2^-24 at most: a quarter of the tolerance
    total = np.exp(logprobs.numpy()).sum(1) + np.exp(tail_logprob.numpy())
    worst = float(np.abs(total - 1).max())
    if not worst <= TOLERANCE:
        raise BadReply(
            f"{where}: the probabilities of a position and its tail sum to 1 with an error of "
            f"{worst:.4g}, above {TOLERANCE}"
        )


def tail_of(logprobs: Tensor) -> Tensor:
    """[C] log of the mass outside: log(1 - sum_k exp logprobs[:, k]), in float64, as float32.

    The subtraction cancels: below 1e-7 nothing of it is known, as the log-probabilities are
    float32. Where they sum to 1, or round to more, the tail is taken to be that 1e-7: with none at
    all a reverse KL would be infinite.
    """
    if not logprobs.shape[1]:
        return torch.zeros(len(logprobs))
    rest = -torch.expm1(logprobs.double().logsumexp(1))
    return torch.where(rest > 0, rest, torch.finfo(torch.float32).eps).log().float()


def _repeated(ids: Tensor) -> Tensor:
    """True where an id has come before in its row."""
    order = ids.argsort(dim=1, stable=True)
    ordered = ids.gather(1, order)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != -1)
    return torch.zeros_like(again).scatter(1, order, again)
