# SPDX-License-Identifier: Apache-2.0
"""Fills a store: completions of the data or of the student, scored once by the teacher."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as Remaining
from torch import Tensor

from opd import checkpoint as ckpt
from opd.assembly import (
    check_positions,
    load_run_tokenizer,
    load_student,
    load_teacher,
    prepare_process,
)
from opd.batch import Law, Prompt, Trajectory, collate
from opd.config import TrainConfig, config_hash
from opd.data import PromptStream, tokenize_rows, training_rows
from opd.schema import ConfigError
from opd.store.files import write_atomically
from opd.store.fingerprint import fingerprint_of
from opd.store.forms import DrawsForm
from opd.store.teacher_store import TeacherStore
from opd.store.writer import SHARD_BYTES, StoreWriter

# how much work a kill may cost
_SECONDS_BETWEEN_SHARDS = 60.0
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What a build did.

    Attributes:
        path: of the store.
        num_new: completions that the teacher scored.
        num_known: completions that the store had.
        num_tokens: laws of the new ones.
        seconds: of all of it.
    """

    path: Path
    num_new: int
    num_known: int
    num_tokens: int
    seconds: float


def build(
    config: TrainConfig,
    path: str | Path,
    *,
    num_topk: int = 64,
    bits: int = 10,
    draws: DrawsForm | None = None,
    shard_bytes: int = SHARD_BYTES,
    quiet: bool = False,
) -> Built:
    """Score completions with the teacher and keep its laws; run it again to go on after a stop.

    With rollouts of kind `dataset` the completions are the data's, all of them once. Otherwise they
    are what the rollouts sample in `max_steps` steps, with the student as it is at the start.

    Args:
        config: of a run with this teacher; `objective.temperature` divides its logits.
        path: of the store, which is made if it is not there.
        num_topk: entries of a law.
        bits: of each log-prob.
        draws: keep tokens drawn from the law, in the place of the likeliest.
        shard_bytes: a shard is written when there is so much for it, and every minute.
        quiet: show no progress.

    Raises:
        ConfigError: parts that do not fit, or a store of another teacher.
    """
    begin = time.monotonic()
    _check(config)
    prepare_process(config)
    tokenizer = load_run_tokenizer(config)
    student = load_student(config, tokenizer)
    teacher = load_teacher(config, tokenizer, student)
    assert config.teacher is not None
    vocab_size = teacher.vocab_size or teacher.lm_head_weight.shape[0]
    if draws is None and not 1 <= num_topk <= vocab_size:
        raise ConfigError(
            f"--num-topk: must be in [1, {vocab_size}], the size of the vocabulary, got {num_topk}"
        )
    temperature = getattr(config.objective, "temperature", 1.0)
    store = TeacherStore.create(
        path,
        fingerprint=fingerprint_of(
            teacher.model,
            tokenizer,
            name=config.teacher.model_name_or_path or "random weights",
            temperature=temperature,
            vocab_size=vocab_size,
        ),
        vocab_size=vocab_size,
        num_topk=num_topk,
        bits=bits,
        draws=draws,
    )
    steps = _Steps(config, student, teacher, tokenizer)
    progress_file = store.path / f"build-{config_hash(config)}.json"
    num_known = 0
    with _bar(steps.num_steps, quiet) as advance, store.writer(shard_bytes=shard_bytes) as writer:
        written_at = time.monotonic()
        first = 0
        # the data's own completions are looked up, not counted: the file may have changed
        if not steps.is_data:
            first = min(_steps_done(store, progress_file), steps.num_steps)
        for step in range(first, steps.num_steps):
            known = _score_step(steps.collect(step), teacher, store, writer, config, temperature)
            num_known += known
            advance(step + 1, writer.num_records, num_known, writer.num_tokens)
            is_due = time.monotonic() - written_at > _SECONDS_BETWEEN_SHARDS
            if is_due or writer.pending_bytes > shard_bytes // 2:
                _write(store, writer, progress_file, step + 1)
                written_at = time.monotonic()
        _write(store, writer, progress_file, steps.num_steps)
    return Built(
        path=store.path,
        num_new=writer.num_records,
        num_known=num_known,
        num_tokens=writer.num_tokens,
        seconds=time.monotonic() - begin,
    )


class _Steps:
    """The completions, a step at a time; a step can be made again after a stop."""

    def __init__(self, config: TrainConfig, student: Any, teacher: Any, tokenizer: Any) -> None:
        self._config = config
        rows = training_rows(
            config.task, config.data, with_completions=config.rollouts.needs_completions
        )
        self._prompts = tokenize_rows(
            rows,
            tokenizer,
            add_special_tokens=config.task is None,
            max_prompt_length=config.data.max_prompt_length,
        )
        check_positions(config, student, teacher, prompts=self._prompts)
        self._stream = PromptStream(self._prompts, seed=config.seed, shuffle=config.data.shuffle)
        self._rollouts = config.rollouts.build(
            student, teacher, tokenizer, seed=config.seed, max_steps=config.max_steps
        )
        # the data's own completions are there once, whatever the length of a run
        self.is_data = config.rollouts.kind == "dataset" and not config.rollouts.needs_teacher
        self.num_steps = config.max_steps
        if self.is_data:
            self.num_steps = -(-len(self._prompts) // config.num_trajectories)

    def collect(self, step: int) -> list[Trajectory]:
        """The completions of a step, the same ones each time."""
        # of every generator, so that a resumed build samples what an uninterrupted one does
        ckpt.seed_everything(self._config.seed + 1_000_003 * (step + 1))
        return self._rollouts.collect(self._take(step), step)

    def _take(self, step: int) -> Sequence[Prompt]:
        if not self.is_data:
            return self._stream.take(step, self._config.num_prompts)
        size = self._config.num_trajectories
        return self._prompts[step * size : (step + 1) * size]


def _score_step(
    trajectories: list[Trajectory],
    teacher: Any,
    store: TeacherStore,
    writer: StoreWriter,
    config: TrainConfig,
    temperature: float,
) -> int:
    """Append what the store does not have; how many it had."""
    wanted = []
    seen: set[tuple[bytes, bytes]] = set()
    for trajectory in trajectories:
        pair = trajectory.ids[: trajectory.prompt_length], trajectory.completion_ids
        twice = tuple(part.numpy().tobytes() for part in pair)
        if twice in seen or pair in store or writer.has_pending(*pair):
            continue
        seen.add(twice)
        # every token of the completion has a law, also those that this run does not train
        is_completion = torch.arange(len(trajectory.ids)) >= trajectory.prompt_length
        wanted.append(replace(trajectory, loss_mask=is_completion))
    size, form = config.per_device_train_batch_size, store.manifest.form
    for start in range(0, len(wanted), size):
        chunk = wanted[start : start + size]
        law = teacher.law(collate(chunk, pad_id=0, device=teacher.device))
        pairs = [(t.ids[: t.prompt_length], t.completion_ids) for t in chunk]
        if isinstance(form, DrawsForm):
            append, found = writer.append_draws, _draw(law, pairs, store, form, temperature)
        else:
            topk = law.topk(form.num_topk, temperature=temperature)
            append, found = (
                writer.append,
                (topk.ids, topk.logprobs, topk.tail_logprob, topk.entropy),
            )
        lengths = [len(completion) for _, completion in pairs]
        for pair, *rows in zip(
            pairs, *(value.cpu().split(lengths) for value in found), strict=True
        ):
            append(*pair, *rows)
    return len(trajectories) - len(wanted)


def _draw(
    law: Law,
    pairs: Sequence[tuple[Tensor, Tensor]],
    store: TeacherStore,
    form: DrawsForm,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, weights and entropy of all tokens of the completions, the same ones whoever asks."""
    uniforms = torch.cat([form.uniforms(store.key(*pair), len(pair[1])) for pair in pairs])
    drawn = law.samples(
        form.num_draws,
        proposal_temperature=form.proposal_temperature,
        temperature=temperature,
        uniforms=uniforms.to(law.head.weight.device),
    )
    assert drawn.entropy is not None
    return drawn.ids, drawn.weights, drawn.entropy


def _check(config: TrainConfig) -> None:
    if config.teacher is None:
        raise ConfigError("teacher: is required to build a store of its laws")
    if config.teacher.kind != "local":
        raise ConfigError(
            f"teacher.kind: must be 'local' to build a store, got {config.teacher.kind!r}"
        )
    if config.rollouts.needs_evaluation:
        raise ConfigError(
            f"rollouts.kind: {config.rollouts.kind!r} follows a student that trains, and none does "
            "here; take 'dataset' or 'hf'"
        )


def _write(store: TeacherStore, writer: StoreWriter, progress_file: Path, steps_done: int) -> None:
    writer.flush()
    # after the shard: a kill in between scores some completions again, and finds them there
    values = {"steps_done": steps_done, "num_records": len(store)}
    write_atomically(progress_file, json.dumps(values).encode())


def _steps_done(store: TeacherStore, progress_file: Path) -> int:
    """Of an earlier build with this configuration; 0 if it cannot be told, or if records have gone
    since, with a damaged shard that somebody removed."""
    try:
        values = json.loads(progress_file.read_bytes())
        done, num_records = values["steps_done"], values["num_records"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    is_whole = isinstance(num_records, int) and len(store) >= num_records
    return done if isinstance(done, int) and done >= 0 and is_whole else 0


@contextmanager
def _bar(num_steps: int, quiet: bool) -> Iterator[Any]:
    """A function that shows (steps done, completions scored, known ones, laws)."""
    console = Console(file=sys.stderr, quiet=quiet, highlight=False)
    is_live = console.is_terminal and not quiet
    bar = Progress(
        TextColumn("score"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        Remaining(),
        TextColumn("{task.fields[numbers]}", markup=False),
        console=console,
        disable=not is_live,
        refresh_per_second=4,
    )
    task = bar.add_task("score", total=num_steps, numbers="")
    begin = last = time.monotonic()

    def advance(step: int, num_new: int, num_known: int, num_tokens: int) -> None:
        nonlocal last
        now = time.monotonic()
        rate = num_tokens / max(now - begin, 1e-9)
        numbers = f"{num_new:,} new  {num_known:,} known  {rate:,.0f} tok/s"
        if is_live:
            bar.update(task, completed=step, numbers=numbers)
        elif now - last >= _SECONDS_BETWEEN_LINES or step == num_steps:
            last = now
            console.print(f"step {step}/{num_steps}  {numbers}", markup=False, soft_wrap=True)

    with bar:
        yield advance
