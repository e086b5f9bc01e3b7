# SPDX-License-Identifier: Apache-2.0
"""Does a server mean what the protocol says? A few short requests that catch those that do not.

Three questions, none of which needs the teacher's weights here:

* **Rows.** Row t must be the law of token t. That law does not depend on token t itself, and does
  depend on the token before it. So the last token of a text is changed: the best tokens of the last
  row must stay. Then the one before it: they must change. Rows shifted by one fail one of these.
* **Law.** What the client checks in every reply: probabilities sum to at most 1, and so on.
* **Temperature**, where the server takes one: at T, differences of log-probabilities must be those
  of temperature 1 divided by T.

With the teacher's own weights here (`local`) the rows are compared number by number: at the same
position, one before, one behind, and at other temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.batch import Trajectory, collate
from opd.clients.protocol import Client, Scores, TeacherError
from opd.model import LanguageModel

_TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.5, 2.0)
# nats: a law that should stay may move by so much, another order of sums in 16 bits
_DRIFT = 5e-3


class ProbeFailed(TeacherError):
    """A server that answers another question than the one asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What was found.

    Attributes:
        checked: one sentence per thing that held.
        skipped: one sentence per thing that nothing could check.
        max_error: largest difference from the local model's log-probabilities, nats, if there is
            a local model.
    """

    checked: tuple[str, ...]
    skipped: tuple[str, ...]
    max_error: float | None


def probe(
    client: Client,
    local: LanguageModel | None = None,
    *,
    vocab_size: int,
    sequence: Sequence[int] | None = None,
    num_topk: int = 8,
    tolerance: float | None = None,
) -> ProbeReport:
    """Ask a server what shows whether its rows, its law and its temperature are right.

    Args:
        client: of the server.
        local: the teacher's own weights, to compare with number by number; None: not at hand.
        vocab_size: ids to make texts of.
        sequence: a text of at least 6 tokens, best a natural one. Default: fixed ids.
        num_topk: of the requests; at most the server's limit.
        tolerance: of log-probabilities against `local`, nats. Default: by the dtype of `local`.

    Raises:
        ProbeFailed: what is wrong, and what it looks like.
        TeacherError: as `Client.score`.
    """
    ids = _text(sequence, vocab_size)
    start = 1
    original = _ask(client, ids, start, num_topk)
    checked = [_check_rows(client, ids, start, original, vocab_size, num_topk)]
    skipped = []
    if client.info().takes_temperature:
        found = _check_temperature(client, ids, start, original, num_topk)
        (checked if found[0] else skipped).append(found[1])
    else:
        skipped.append("temperature: the server has 1 only, and only that is asked for")
    max_error = None
    if local is None:
        skipped.append("numbers: the teacher's weights are not here to compare with")
    else:
        limit = tolerance or (2e-3 if local.lm_head_weight.dtype == torch.float32 else 0.15)
        max_error = _check_numbers(local, ids, start, original, limit)
        checked.append(f"numbers: within {max_error:.2g} nats of the same weights here")
    return ProbeReport(checked=tuple(checked), skipped=tuple(skipped), max_error=max_error)


def _text(sequence: Sequence[int] | None, vocab_size: int) -> Tensor:
    if sequence is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size // 8, max(2, vocab_size // 2), (12,), generator=generator)
    if len(sequence) < 6:
        raise ValueError(f"probe: sequence must have at least 6 tokens, got {len(sequence)}")
    return torch.as_tensor(sequence, dtype=torch.int64)


def _ask(
    client: Client, ids: Tensor, start: int, num_topk: int, temperature: float = 1.0
) -> Scores:
    return client.score([ids], [start], num_topk=num_topk, temperature=temperature)[0]


def _check_rows(
    client: Client, ids: Tensor, start: int, original: Scores, vocab_size: int, num_topk: int
) -> str:
    """Change the last token, then the one before it."""
    last = _ask(client, _changed(ids, -1, vocab_size), start, num_topk)
    # rows that come before the changed token and its neighbours: all that moves them is rounding
    rows = range(len(original.token_ids) - 2)
    noise = max(_apart(original, last, row) for row in rows)
    limit = max(10 * noise, _DRIFT)
    drift = _apart(original, last, -1)
    if drift > limit:
        raise ProbeFailed(
            f"the teacher's rows are shifted by one: the law of the last token changes with that "
            f"token, by {drift:.2g} nats, so row t is the law of token t + 1; a loss on these rows "
            "would train the wrong tokens"
        )
    before = _ask(client, _changed(ids, -2, vocab_size), start, num_topk)
    effect = _apart(original, before, -1)
    if effect <= max(noise, 1e-6):
        raise ProbeFailed(
            "the teacher's rows are shifted by one: the law of the last token does not change with "
            "the token before it, so row t is the law of token t - 1, or every reply is the same"
        )
    return "rows: row t is the law of token t given those before it"


def _changed(ids: Tensor, place: int, vocab_size: int) -> Tensor:
    other = ids.clone()
    other[place] = (other[place] + vocab_size // 3 + 1) % vocab_size
    return other


def _apart(one: Scores, other: Scores, row: int) -> float:
    """Largest difference of log-probabilities over the ids that both have; inf without any."""
    first, second = _law(one, row), _law(other, row)
    both = first.keys() & second.keys()
    if not both:
        return float("inf")
    return max(abs(first[token] - second[token]) for token in both)


def _law(scores: Scores, row: int) -> dict[int, float]:
    assert scores.ids is not None and scores.logprobs is not None
    ids, logprobs = scores.ids[row].tolist(), scores.logprobs[row].tolist()
    return {token: value for token, value in zip(ids, logprobs, strict=True) if token >= 0}


def _check_temperature(
    client: Client, ids: Tensor, start: int, original: Scores, num_topk: int
) -> tuple[bool, str]:
    try:
        hot = _ask(client, ids, start, num_topk, temperature=2.0)
    except TeacherError as error:
        return False, f"temperature: only 1 can be had ({error})"
    wanted, crossed = 0.0, 0.0
    for row in range(len(original.token_ids)):
        plain, flat = _law(original, row), _law(hot, row)
        both = sorted(plain.keys() & flat.keys(), key=plain.__getitem__)
        for token in both[:-1]:
            want = (plain[both[-1]] - plain[token]) / 2.0
            wanted += want * want
            crossed += want * (flat[both[-1]] - flat[token])
    if wanted < 1e-6:
        return False, "temperature: the laws of the text are too flat to see one"
    applied = 2.0 * wanted / crossed if crossed > 0 else float("inf")
    if not 1.7 < applied < 2.3:
        raise ProbeFailed(
            f"the teacher does not apply the temperature: asked for 2, its log-probabilities are "
            f"those of {applied:.2g}"
        )
    return True, "temperature: at 2, differences of log-probabilities are half of those at 1"


@torch.no_grad()
def _check_numbers(
    local: LanguageModel, ids: Tensor, start: int, scores: Scores, tolerance: float
) -> float:
    """Against the same weights here; if they differ, find what the numbers look like instead."""
    mask = torch.arange(len(ids)) >= 1
    trajectory = Trajectory(ids=ids, prompt_length=1, loss_mask=mask)
    hidden = local.hidden(collate([trajectory], pad_id=0, device=local.device))
    logits = local.head.logits(hidden)[:, : local.vocab_size].cpu()
    # row t of `logits` is of token t + 1; the server's first row is of token `start`
    rows = len(scores.token_ids)
    first = start - 1
    error = _error(logits[first : first + rows].log_softmax(-1), scores)
    if error <= tolerance:
        return error
    guesses = {}
    if rows > 2:
        law = logits[first : first + rows].log_softmax(-1)
        guesses["shifted by one: row t is the law of token t + 1"] = _error(
            law[1:], _rows(scores, slice(0, rows - 1))
        )
        guesses["shifted by one: row t is the law of token t - 1"] = _error(
            law[:-1], _rows(scores, slice(1, rows))
        )
    for temperature in _TEMPERATURES:
        law = (logits[first : first + rows] / temperature).log_softmax(-1)
        guesses[f"those of temperature {temperature}"] = _error(law, scores)
    guesses["logits, not log-probabilities"] = _error(logits[first : first + rows], scores)
    best = min(guesses, key=guesses.__getitem__)
    if guesses[best] <= tolerance:
        raise ProbeFailed(
            f"the teacher's numbers are {best}: they differ by up to {error:.3g} nats from the "
            f"same weights here, and so by {guesses[best]:.2g}"
        )
    raise ProbeFailed(
        f"the teacher's log-probabilities differ by up to {error:.3g} nats from the same weights "
        f"here, more than {tolerance:g}, and neither a shift nor a temperature explains it; is it "
        "the same checkpoint?"
    )


def _rows(scores: Scores, rows: slice) -> Scores:
    assert scores.ids is not None and scores.logprobs is not None
    return Scores(
        token_ids=scores.token_ids[rows], ids=scores.ids[rows], logprobs=scores.logprobs[rows]
    )


def _error(law: Tensor, scores: Scores) -> float:
    """Largest difference at the ids that the server reported."""
    assert scores.ids is not None and scores.logprobs is not None
    known = scores.ids >= 0
    expected = law.gather(1, scores.ids.long().clamp(min=0))
    apart = (expected - scores.logprobs).abs()[known]
    return float(apart.max()) if apart.numel() else float("inf")
