# SPDX-License-Identifier: Apache-2.0
"""Accuracy by verifier, and KL to the teacher, on rows that are not trained on."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

import opd_kernels as opk
from opd.batch import Batch, Law, Prompt, Trajectory, Translation, collate
from opd.data import DataConfig, TaskConfig, read_rows, task_errors, tokenize_rows
from opd.rollouts import DatasetRollouts, Sampling, sample
from opd.schema import ConfigError, Section
from opd.sparse_law import SparseLaw
from opd.translation import Translator

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
        max_completion_length: of samples; held-out completions are read whole. Default: that of the
            rollouts.
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
    student_bytes: opk.TokenBytes | None = None,
    translator: Translator | None = None,
) -> Evaluation:
    """Sample, verify, compare. The same weights give the same numbers, and no training random
    number is used up.

    Args:
        student, teacher: the models; the teacher may be None.
        tokenizer: the student's.
        held_out: what to sample from and to read.
        config: how.
        max_completion_length: of samples, unless the config has its own.
        student_bytes: of the student's tokens; without them nothing is counted in bytes.
        translator: for a teacher with another tokenizer.

    Returns:
        `eval/accuracy/<temperature>[/n<length>]`, `eval/completions/*` of the first temperature,
        `eval/student_states/*` on what the student wrote at it, `eval/data_states/*` on the
        held-out completions; `<temperature>` reads t1, t0.7 or greedy. Nats per token.
        `eval/data_states/bits_per_byte` is the nats of all trained tokens, the end token among
        them, over ln 2 and the bytes of their text, in which special tokens with a role have none;
        so it compares models of any tokenizer: completions are read whole, those that with their
        prompts are beyond a model's positions are left out and counted as
        `eval/data_states/dropped_rows`. A teacher with other tokens has in place of entropies
        and KLs the `chunk_gap`, log p_student - log p_teacher of an aligned chunk, a mean in nats
        (on the student's own states a one-sample estimate of the reverse KL of a chunk), the mean
        `chunk_gap_abs` of its absolute values, and `teacher_bits_per_byte` over aligned chunks.
    """
    reader = _Reader(student, teacher, tokenizer, config.batch_size, student_bytes, translator)
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
                metrics |= reader.compare(written, "student_states")
        if held_out.with_completion:
            given = _whole(held_out.with_completion)
            read = [trajectory for trajectory in given if reader.has_room(trajectory)]
            metrics |= reader.compare(read, "data_states")
            if len(read) < len(given):
                metrics["eval/data_states/dropped_rows"] = float(len(given) - len(read))
    student.model.train(was_training)
    return Evaluation(metrics=metrics, samples=samples)


def _whole(prompts: Sequence[Prompt]) -> list[Trajectory]:
    """Completions of the data, uncut: a number of tokens is another text for every tokenizer."""
    longest = max(len(prompt.completion_ids) for prompt in prompts)
    return DatasetRollouts(longest).collect(prompts, 0)


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


@dataclass(frozen=True, slots=True)
class _Reader:
    """Both models' laws on trajectories, compared."""

    student: Any
    teacher: Any
    tokenizer: Any
    batch_size: int
    student_bytes: opk.TokenBytes | None
    translator: Translator | None

    @property
    def _crosses(self) -> bool:
        return self.translator is not None and not self.translator.has_one_vocabulary

    def has_room(self, trajectory: Trajectory) -> bool:
        """Whether the models that read these tokens have positions for all of them."""
        models = [self.student, None if self._crosses else self.teacher]
        limits = [getattr(model, "max_positions", None) for model in models]
        return all(limit is None or len(trajectory.ids) <= limit for limit in limits)

    def compare(self, trajectories: Sequence[Trajectory], states: str) -> dict[str, float]:
        """The student's negative log-likelihood, and how far it is from the teacher: means over
        tokens, chunks or bytes."""
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        for start in range(0, len(trajectories), self.batch_size):
            part = trajectories[start : start + self.batch_size]
            batch = collate(part, pad_id=self.tokenizer.pad_token_id, device=self.student.device)
            if batch.num_tokens == 0:
                continue
            for name, total, count in self._totals(batch, part, states == "data_states"):
                sums[name] += total
                counts[name] += count
        return {
            f"eval/{states}/{name}": total / counts[name]
            for name, total in sums.items()
            if counts[name]
        }

    def _totals(
        self, batch: Batch, trajectories: Sequence[Trajectory], in_bytes: bool
    ) -> Iterator[tuple[str, float, float]]:
        law = self.student.law(batch)
        logprobs = law.token_logprobs(batch.token_ids).logprobs
        yield "nll", -float(logprobs.sum()), batch.num_tokens
        in_bytes = in_bytes and self.student_bytes is not None
        bits = math.log(2) * self._num_bytes(batch) if in_bytes else 0.0
        if in_bytes:
            yield "bits_per_byte", -float(logprobs.sum()), bits
        if self.teacher is None or not self.teacher.judges_any_state:
            return
        if self._crosses:
            translated = self.translator(trajectories)
            translation = translated.part(0, len(trajectories), device=self.student.device)
            yield from self._gaps(logprobs, translation, in_bytes)
            return
        taught = self.teacher.law(batch)
        named = {"student_entropy": "entropy"}
        for name, values in _differences(law, taught).items():
            yield named.get(name, name), float(values.sum()), batch.num_tokens
        if in_bytes and isinstance(taught, Law):
            theirs = taught.token_logprobs(batch.token_ids).logprobs
            yield "teacher_bits_per_byte", -float(theirs.sum()), bits

    def _num_bytes(self, batch: Batch) -> int:
        sizes = self.student_bytes.offsets.diff()
        return int(sizes[batch.token_ids.cpu()].sum())

    def _gaps(
        self, logprobs: Tensor, translation: Translation, in_bytes: bool
    ) -> Iterator[tuple[str, float, float]]:
        aligned = translation.is_aligned
        if not bool(aligned.any()):
            return
        read = translation.batch
        theirs = self.teacher.law(read).token_logprobs(read.token_ids).logprobs
        ours = opk.chunk_logprobs(logprobs, translation.student_offsets)[aligned]
        theirs = opk.chunk_logprobs(theirs, translation.teacher_offsets)[aligned]
        count = len(ours)
        yield "chunk_gap", float((ours - theirs).sum()), count
        yield "chunk_gap_abs", float((ours - theirs).abs().sum()), count
        if in_bytes:
            num_bytes = float(translation.num_bytes[aligned].sum())
            yield "teacher_bits_per_byte", -float(theirs.sum()), math.log(2) * num_bytes


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
