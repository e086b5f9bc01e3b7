# SPDX-License-Identifier: Apache-2.0
"""What a chain_repair model does on its own states and on its teacher's.

Every function takes models that map `input_ids` to `.logits` (and `.past_key_values` for `sample`),
as Hugging Face causal LMs do, and leaves them as they were. A state is a prefix of prompt +
completion.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from opd.tasks.chain_repair import END, PROMPT_LENGTH, REPAIR, VALUES, VOCABULARY, ChainRepair

_TOKEN_ID = {token: i for i, token in enumerate(VOCABULARY)}
_PAD_ID, _END_ID, _REPAIR_ID = 0, _TOKEN_ID[END], _TOKEN_ID[REPAIR]

Rows = Sequence[Mapping[str, Any]]


@torch.no_grad()
def sample(
    model: Any,
    task: ChainRepair,
    rows: Rows,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 1024,
) -> list[str]:
    """One completion per row, as text up to and including E.

    Args:
        model: the writer.
        task: says how long a completion may get; a longer one is cut and has no E.
        rows: with `prompt`.
        temperature: divides the logits; 0 takes the likeliest token.
        seed: of the draws; no global random state is touched.
        batch_size: rows sampled together.
    """
    if temperature < 0.0:
        raise ValueError(f"sample: temperature must be >= 0, got {temperature}")
    generator = torch.Generator().manual_seed(seed)
    completions: list[str] = []
    for start in range(0, len(rows), batch_size):
        prompts = [row["prompt"].split() for row in rows[start : start + batch_size]]
        new_ids = torch.tensor([[_TOKEN_ID[token] for token in prompt] for prompt in prompts])
        finished = torch.zeros(len(prompts), dtype=torch.bool)
        written: list[torch.Tensor] = []
        cache = None
        for _ in range(task.max_completion_length):
            output = model(input_ids=new_ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[:, -1].float()
            if temperature == 0.0:
                drawn = logits.argmax(dim=-1)
            else:
                law = torch.softmax(logits / temperature, dim=-1)
                drawn = torch.multinomial(law, 1, generator=generator)[:, 0]
            drawn = drawn.masked_fill(finished, _PAD_ID)
            written.append(drawn)
            finished |= drawn == _END_ID
            if finished.all():
                break
            new_ids = drawn[:, None]
        completions += [_text(ids) for ids in torch.stack(written, dim=1).tolist()]
    return completions


def accuracy_by_length(
    task: ChainRepair, rows: Rows, completions: Sequence[str]
) -> dict[int, float]:
    """Share of right answers among the rows of each length n, in order of n."""
    verdicts: dict[int, list[bool]] = defaultdict(list)
    for row, completion in zip(rows, completions, strict=True):
        num_steps = int(row["prompt"].split()[-1])
        verdicts[num_steps].append(task.verify(row["prompt"], completion))
    return {n: sum(verdicts[n]) / len(verdicts[n]) for n in sorted(verdicts)}


def log_accuracy_slope(accuracy: Mapping[int, float]) -> float:
    """Least-squares slope of log accuracy over n: nearly minus the chance of a fatal slip a step.

    Lengths with no right answer have no logarithm and are left out; NaN if fewer than two are left.
    """
    points = [(n, math.log(share)) for n, share in accuracy.items() if share > 0.0]
    if len(points) < 2:
        return math.nan
    mean_n = sum(n for n, _ in points) / len(points)
    mean_log = sum(log for _, log in points) / len(points)
    spread = sum((n - mean_n) ** 2 for n, _ in points)
    return sum((n - mean_n) * (log - mean_log) for n, log in points) / spread


def repairs_per_sequence(completions: Sequence[str]) -> float:
    """Mean number of R tokens in a completion."""
    return sum(text.split().count(REPAIR) for text in completions) / max(1, len(completions))


@torch.no_grad()
def repair_rate(
    model: Any, task: ChainRepair, *, num_rows: int = 512, seed: int = 0, batch_size: int = 1024
) -> float:
    """P(R, then the right value | a wrong value was just injected), averaged over right chains.

    The chain is right up to a random step, then a wrong value is put in. The two probabilities are
    read from the model's law, so that the only noise is in which states were drawn.
    """
    prefixes, right_ids = _injected(task, num_rows, seed)
    total = 0.0
    for picked, ids, _ in _batches(prefixes, batch_size):
        logprobs = torch.log_softmax(model(input_ids=ids).logits.float(), dim=-1)
        row_idx = torch.arange(len(picked))
        last = torch.tensor([len(prefixes[i]) - 1 for i in picked])
        right = torch.tensor([right_ids[i] for i in picked])
        # each prefix ends in R: the place before it predicts R, the place of R predicts the value
        repaired = logprobs[row_idx, last - 1, _REPAIR_ID] + logprobs[row_idx, last, right]
        total += float(repaired.exp().sum())
    return total / num_rows


@torch.no_grad()
def kl_on_states(
    student: Any,
    teacher: Any,
    rows: Rows,
    completions: Sequence[str],
    *,
    batch_size: int = 1024,
) -> dict[str, float]:
    """Mean KL in nats per token, over every state that these completions went through.

    Returns:
        `forward_kl`, KL(teacher || student), and `reverse_kl`, KL(student || teacher).
    """
    forward_kl, reverse_kl, num_states = 0.0, 0.0, 0
    for _, ids, is_state in _batches(_encoded(rows, completions), batch_size):
        student_logprobs = torch.log_softmax(student(input_ids=ids).logits[is_state].double(), -1)
        teacher_logprobs = torch.log_softmax(teacher(input_ids=ids).logits[is_state].double(), -1)
        gap = teacher_logprobs - student_logprobs
        forward_kl += float((teacher_logprobs.exp() * gap).sum())
        reverse_kl -= float((student_logprobs.exp() * gap).sum())
        num_states += int(is_state.sum())
    return {
        "forward_kl": forward_kl / max(1, num_states),
        "reverse_kl": reverse_kl / max(1, num_states),
    }


@torch.no_grad()
def slip_rate(
    model: Any,
    task: ChainRepair,
    rows: Rows,
    completions: Sequence[str],
    *,
    batch_size: int = 1024,
) -> float:
    """Chance that the next token breaks the task's rules, averaged over these completions' states.

    States for which the rules name no next token (`ChainRepair.right_tokens`) are left out.
    """
    sequences = _encoded(rows, completions)
    slips, num_states = 0.0, 0
    for picked, ids, is_state in _batches(sequences, batch_size):
        law = torch.softmax(model(input_ids=ids).logits.float(), dim=-1)
        right = torch.full_like(ids, -1)
        for row, i in enumerate(picked):
            expected = task.right_tokens([VOCABULARY[t] for t in sequences[i]])[:-1]
            first = PROMPT_LENGTH - 1
            right[row, first : first + len(expected)] = torch.tensor(
                [-1 if token is None else _TOKEN_ID[token] for token in expected]
            )
        counted = is_state & (right >= 0)
        chance_right = law.gather(-1, right.clamp_min(0)[..., None])[..., 0]
        slips += float((1.0 - chance_right[counted]).sum())
        num_states += int(counted.sum())
    return slips / max(1, num_states)


def measure(
    student: Any,
    teacher: Any,
    task: ChainRepair,
    *,
    num_samples: int = 2,
    num_samples_longest: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Every gauge of one student, from one set of its samples and one of its teacher's.

    Args:
        student: the model under test; pass the teacher to measure the teacher itself.
        teacher: the law it is compared with.
        task: the task.
        num_samples: completions for each of the 128 prompts of a length.
        num_samples_longest: the same for the longest length, which is the headline; not fewer.
        seed: of the draws.

    Returns:
        `accuracy` (temperature 1) and `greedy_accuracy` {n: share}, `log_accuracy_slope`,
        `repairs_per_sequence`, `repair_rate`,
        `{teacher,student}_states/{forward_kl,reverse_kl,slip_rate}`, and `dagger_ratio`: the slip
        rate on the student's states over the one on the teacher's states. KLs and slip rates are
        means over states, so long chains weigh most.
    """
    prompts = task.every_row()
    longest = task.every_row(lengths=[task.max_length_n])
    # the first completion of every prompt comes first: these are the states that KLs and slips see
    rows = prompts * num_samples + longest * (num_samples_longest - num_samples)
    completions = sample(student, task, rows, seed=seed)
    greedy_completions = sample(student, task, prompts, temperature=0.0)
    accuracy = accuracy_by_length(task, rows, completions)
    measured: dict[str, Any] = {
        "accuracy": accuracy,
        "greedy_accuracy": accuracy_by_length(task, prompts, greedy_completions),
        "log_accuracy_slope": log_accuracy_slope(accuracy),
        "repairs_per_sequence": repairs_per_sequence(completions),
        "repair_rate": repair_rate(student, task, seed=seed),
    }
    states = {
        "teacher": sample(teacher, task, prompts, seed=seed),
        "student": completions[: len(prompts)],
    }
    for whose, texts in states.items():
        kl = kl_on_states(student, teacher, prompts, texts)
        measured |= {f"{whose}_states/{name}": value for name, value in kl.items()}
        measured[f"{whose}_states/slip_rate"] = slip_rate(student, task, prompts, texts)
    measured["dagger_ratio"] = (
        measured["student_states/slip_rate"] / measured["teacher_states/slip_rate"]
        if measured["teacher_states/slip_rate"] > 0.0
        else math.nan
    )
    return measured


def _injected(task: ChainRepair, num_rows: int, seed: int) -> tuple[list[list[int]], list[int]]:
    rng = random.Random(f"chain_repair injected {seed}")
    prefixes, right_ids = [], []
    for row in task.expert_rows(num_rows, seed=seed, error_rate=0.0):
        tokens = row["completion"].split()
        cut = 2 * int(rng.random() * (len(tokens) // 2))
        right = tokens[cut]
        others = [value for value in VALUES if value != right]
        wrong = others[int(rng.random() * len(others))]
        prefix = [*row["prompt"].split(), *tokens[:cut], wrong, REPAIR]
        prefixes.append([_TOKEN_ID[token] for token in prefix])
        right_ids.append(_TOKEN_ID[right])
    return prefixes, right_ids


def _encoded(rows: Rows, completions: Sequence[str]) -> list[list[int]]:
    return [
        [_TOKEN_ID[token] for token in f"{row['prompt']} {text}".split()]
        for row, text in zip(rows, completions, strict=True)
    ]


def _batches(
    sequences: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    # sorted by length, so that little is padded; right padding needs no mask under causal attention
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        width = max(len(sequences[i]) for i in picked)
        ids = torch.full((len(picked), width), _PAD_ID)
        is_state = torch.zeros(len(picked), width, dtype=torch.bool)
        for row, i in enumerate(picked):
            ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
            is_state[row, PROMPT_LENGTH - 1 : len(sequences[i]) - 1] = True
        yield picked, ids, is_state


def _text(ids: Sequence[int]) -> str:
    end = ids.index(_END_ID) + 1 if _END_ID in ids else len(ids)
    return " ".join(VOCABULARY[i] for i in ids[:end])
