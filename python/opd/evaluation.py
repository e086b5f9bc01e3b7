# SPDX-License-Identifier: Apache-2.0
"""Accuracy by verifier, and KL to the teacher, on rows that are not trained on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

import opd_kernels as opk
from opd.batch import Law, Prompt, Trajectory, collate
from opd.data import DataConfig, TaskConfig, read_rows, task_errors, tokenize_rows
from opd.rollouts import DatasetRollouts, Sampling, sample
from opd.schema import ConfigError, Section
from opd.sparse_law import SparseLaw

# far from any training seed, so that the rows differ
_EVAL_SEED_OFFSET = 1_000_003
_KL_STATISTICS = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl")


class EvaluationConfig(Section):
    """Evaluation before the first step, every `eval_steps`, and after the last.

    Attributes:
        eval_steps: optimizer steps between evaluations; without it only the first and the last.
        num_prompts: held-out prompts of each length, or in all.
        lengths: difficulties of the task to report one by one.
        temperature: of sampling, each reported on its own; 0 is greedy.
        max_completion_length: default: that of the rollouts.
        batch_size: completions generated, or read, at a time.
        num_samples: completions of each temperature to keep for the report.
        seed: of the held-out rows and the sampling.
    """

    eval_steps: int | None = Field(None, ge=1)
    num_prompts: int = Field(128, ge=1)
    lengths: list[int] | None = None
    temperature: list[Annotated[float, Field(ge=0)]] = Field([1.0, 0.0], min_length=1)
    max_completion_length: int | None = Field(None, ge=1)
    batch_size: int = Field(256, ge=1)
    num_samples: int = Field(8, ge=0)
    seed: int = Field(0, ge=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Held-out prompts, the length each counts for (None for all), and a way to check answers."""

    prompts: list[Prompt]
    lengths: list[int | None]
    with_completion: list[Prompt]
    task: Any = None

    def verify(self, trajectory: Trajectory, text: str) -> bool | None:
        """The verdict on a completion; None when nobody knows the answer."""
        if self.task is not None:
            return self.task.verify(trajectory.row["prompt"], text)
        answer = trajectory.row.get("answer")
        return None if answer is None else ends_with_answer(text, str(answer))


def ends_with_answer(text: str, answer: str) -> bool | None:
    """Whether a text ends with an answer, final periods aside: 14 and -4 do not end with 4. None
    when the answer is empty."""
    text, answer = (part.strip().rstrip(".").rstrip() for part in (text, answer))
    if not answer:
        return None
    return re.search(rf"(?<![\w.\-]){re.escape(answer)}\Z", text) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Numbers under their names, and completions for people to read."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]] = field(default_factory=list)


def load_held_out(
    config: EvaluationConfig, task: TaskConfig | None, data: DataConfig, tokenizer: Any
) -> HeldOut:
    """The held-out rows, from `data.eval_file` or else from the task.

    Raises:
        ConfigError: there are none.
    """
    if data.eval_file is not None:
        rows = read_rows(data.eval_file, "data.eval_file")[: config.num_prompts]
        prompts = tokenize_rows(
            rows,
            tokenizer,
            add_special_tokens=task is None,
            max_prompt_length=data.max_prompt_length,
            source="data.eval_file",
        )
        with_completion = [prompt for prompt in prompts if prompt.completion_ids is not None]
        return HeldOut(
            prompts=prompts,
            lengths=[None] * len(prompts),
            with_completion=with_completion,
            task=task and task.load(),
        )
    if task is None:
        raise ConfigError("data.eval_file: is required by evaluation when there is no task")
    maker, seed = task.load(), config.seed + _EVAL_SEED_OFFSET
    rows: list[dict[str, Any]] = []
    expert: list[dict[str, Any]] = []
    lengths: list[int | None] = []
    wanted: list[int | None] = [*config.lengths] if config.lengths else [None]
    for length in wanted:
        # as far as the mixed rows go, the task's own lengths are drawn from
        among = task.lengths if length is None else [length]
        with task_errors("evaluation.lengths" if length is not None else "task.lengths"):
            rows += maker.rows(config.num_prompts, seed=seed, lengths=among)
            expert += maker.expert_rows(config.num_prompts, seed=seed + 1, lengths=among)
        lengths += [length] * config.num_prompts
    return HeldOut(
        prompts=tokenize_rows(rows, tokenizer, add_special_tokens=False),
        lengths=lengths,
        with_completion=tokenize_rows(expert, tokenizer, add_special_tokens=False),
        task=maker,
    )


@torch.no_grad()
def evaluate(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    held_out: HeldOut,
    config: EvaluationConfig,
    *,
    max_completion_length: int,
) -> Evaluation:
    """Sample, verify, compare. The same weights give the same numbers, and no training random
    number is used up.

    Returns:
        `eval/accuracy/<temperature>[/n<length>]`, `eval/completions/*` of the first temperature,
        `eval/student_states/*` on what the student wrote at it, `eval/data_states/*` on the
        held-out completions; `<temperature>` reads t1, t0.7 or greedy. Nats per token.
    """
    metrics: dict[str, float] = {}
    samples: list[dict[str, Any]] = []
    devices = [student.device] if student.device.type == "cuda" else []
    length_limit = config.max_completion_length or max_completion_length
    was_training = student.model.training
    student.model.eval()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed)
        for number, temperature in enumerate(config.temperature):
            sampling = Sampling(
                temperature=temperature,
                max_completion_length=length_limit,
                generation_batch_size=config.batch_size,
            )
            written = sample(student, tokenizer, held_out.prompts, sampling)
            tag = "greedy" if temperature == 0 else f"t{temperature:g}"
            verdicts, kept = _verify(written, tokenizer, held_out, tag, config.num_samples)
            samples += kept
            metrics |= _accuracies(verdicts, held_out.lengths, tag)
            if number == 0:
                metrics |= _lengths(written)
                metrics |= _compare(student, teacher, written, tokenizer, config, "student_states")
        if held_out.with_completion:
            given = DatasetRollouts(length_limit).collect(held_out.with_completion, 0)
            metrics |= _compare(student, teacher, given, tokenizer, config, "data_states")
    student.model.train(was_training)
    return Evaluation(metrics=metrics, samples=samples)


def _verify(
    written: Sequence[Trajectory], tokenizer: Any, held_out: HeldOut, tag: str, num_samples: int
) -> tuple[list[bool | None], list[dict[str, Any]]]:
    """The verdicts, and samples spread evenly over the rows."""
    with_specials = held_out.task is not None
    verdicts: list[bool | None] = []
    samples: list[dict[str, Any]] = []
    every = max(1, len(written) // num_samples) if num_samples else 0
    for number, trajectory in enumerate(written):
        text = tokenizer.decode(
            trajectory.completion_ids.tolist(), skip_special_tokens=not with_specials
        )
        verdict = held_out.verify(trajectory, text)
        verdicts.append(verdict)
        # the last of each stretch: rows go from short to long
        if every and (number + 1) % every == 0 and len(samples) < num_samples:
            prompt = tokenizer.decode(trajectory.ids[: trajectory.prompt_length].tolist())
            answer = trajectory.row.get("answer")
            samples.append(
                {
                    "sampling": tag,
                    "prompt": prompt,
                    "completion": text,
                    "answer": answer,
                    "is_correct": verdict,
                }
            )
    return verdicts, samples


def _accuracies(
    verdicts: Sequence[bool | None], lengths: Sequence[int | None], tag: str
) -> dict[str, float]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for verdict, length in zip(verdicts, lengths, strict=True):
        if verdict is None:
            continue
        groups[f"eval/accuracy/{tag}"].append(verdict)
        if length is not None:
            groups[f"eval/accuracy/{tag}/n{length}"].append(verdict)
    return {name: sum(group) / len(group) for name, group in groups.items()}


def _lengths(written: Sequence[Trajectory]) -> dict[str, float]:
    num_tokens = sum(trajectory.completion_length for trajectory in written)
    num_clipped = sum(not trajectory.is_terminated for trajectory in written)
    return {
        "eval/completions/mean_length": num_tokens / len(written),
        "eval/completions/clipped_ratio": num_clipped / len(written),
    }


def _compare(
    student: Any,
    teacher: Any,
    trajectories: Sequence[Trajectory],
    tokenizer: Any,
    config: EvaluationConfig,
    states: str,
) -> dict[str, float]:
    """Token means of the student's negative log-likelihood and of both KLs, on given states."""
    sums: dict[str, float] = defaultdict(float)
    num_tokens = 0
    for start in range(0, len(trajectories), config.batch_size):
        batch = collate(
            trajectories[start : start + config.batch_size],
            pad_id=tokenizer.pad_token_id,
            device=student.device,
        )
        if batch.num_tokens == 0:
            continue
        law = student.law(batch)
        num_tokens += batch.num_tokens
        sums["nll"] -= float(law.token_logprobs(batch.token_ids).logprobs.sum())
        if teacher is None or not teacher.judges_any_state:
            continue
        for name, values in _differences(law, teacher.law(batch)).items():
            sums[name] += float(values.sum())
    named = {"student_entropy": "entropy"}
    return {
        f"eval/{states}/{named.get(name, name)}": total / max(1, num_tokens)
        for name, total in sums.items()
    }


def _differences(law: Law, taught: Law | SparseLaw) -> dict[str, Tensor]:
    """Both KLs and entropies, [T] each; lower bounds under names of their own where all that is
    known of the teacher is its likeliest tokens."""
    if isinstance(taught, SparseLaw):
        known = taught.topk(taught.num_topk)
        statistics = opk.fused_linear_topk_divergence(
            law.hidden(),
            law.head.weight,
            known.ids,
            known.logprobs,
            tail_logprob=known.tail_logprob,
            **law.head.options("student"),
            statistics=("student_entropy", "forward_kl", "reverse_kl"),
            vocab_size=law.vocab_size,
            workspace_bytes=law.workspace_bytes,
        ).statistics
        return {
            "student_entropy": statistics["student_entropy"],
            "forward_kl_topk": statistics["forward_kl"],
            "reverse_kl_topk": statistics["reverse_kl"],
        }
    return opk.fused_linear_divergence(
        law.hidden(),
        law.head.weight,
        taught.hidden(),
        taught.head.weight,
        **law.head.options("student"),
        **taught.head.options("teacher"),
        statistics=_KL_STATISTICS,
        vocab_size=law.vocab_size,
        workspace_bytes=law.workspace_bytes,
    ).statistics
