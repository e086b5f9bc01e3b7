# SPDX-License-Identifier: Apache-2.0
"""The loop: the student writes, the teacher judges every token, the student takes a step."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.assembly import Run, claim_output_dir, open_run
from opd.batch import Batch, Law, Signal, Trajectory, collate_step
from opd.clients import TeacherError
from opd.config import TrainConfig
from opd.evaluation import evaluate
from opd.metrics import Clock, Meter, MetricsWriter, last_evaluation, memory_metrics
from opd.optim import apply_gradients, learning_rate, num_weights
from opd.progress import Display
from opd.teachers import ServerTeacher
from opd.translation import LEAST_ALIGNED, Translated

_log = logging.getLogger(__name__)
# after a signal a teacher has so long to answer, so that the step can be finished
_GRACE_S = 0.5


class Interrupted(Exception):
    """A signal asked the run to stop; it is saved as of `step`, unless that is 0."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(signum, step)
        self.signum = signum
        self.step = step


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What is left of a run: its last checkpoint, and the numbers of its last evaluation."""

    output_dir: Path
    checkpoint: Path
    step: int
    metrics: dict[str, float]
    ledger: dict[str, Any]


def train(config: TrainConfig, *, quiet: bool = False) -> TrainResult:
    """Run a configuration to its `max_steps`, from the newest checkpoint if there is one.

    Args:
        config: the run.
        quiet: show no progress.

    Raises:
        ConfigError: the parts of the configuration do not fit what is on the disk.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
        FloatingPointError: the gradient is not finite.
    """
    with ExitStack() as stack:
        display = stack.enter_context(Display(config.max_steps, quiet=quiet))
        display.phase("load")
        stack.enter_context(claim_output_dir(config))
        run = open_run(config)
        stack.callback(run.close)
        display.step(run.step, {})
        writer = MetricsWriter(run.output_dir, config.report_to, step=run.step)
        stack.callback(writer.close)
        clock, meter = Clock(run.student.device), Meter()
        # from here on a signal waits for the end of the step
        stop = stack.enter_context(_stop_signals())
        if isinstance(run.teacher, ServerTeacher):
            run.teacher.on_wait = stop.check
            stack.enter_context(_steps_kept(run, display))
        if run.step:
            display.say(f"resuming {run.output_dir} at step {run.step}")
            evaluated = last_evaluation(run.output_dir)
        if run.step == 0 or run.owes_evaluation:
            run.mark()
            evaluated = _evaluate(run, writer, display)
            if run.step:
                # or a death before the next checkpoint would bring it again
                run.save()
        saved_step, has_told = run.step, False
        run.mark()
        while run.step < config.max_steps and not stop:
            with clock("rollout"):
                prompts = run.data.take(run.step, config.num_prompts)
                trajectories = run.rollouts.collect(prompts, run.step)
            translated = None
            if run.translator is not None and config.objective.crosses_tokenizers:
                with clock("translate"):
                    translated = run.translator(trajectories)
                meter.add(translated.metrics())
                if not has_told:
                    has_told = _tell_of_alignment(run.step, translated)
            batches, num_step_tokens = collate_step(
                trajectories,
                batch_size=config.per_device_train_batch_size,
                pad_id=run.tokenizer.pad_token_id,
                device=run.student.device,
                translated=translated,
            )
            signals: list[Signal] = []
            for batch in batches:
                with clock("teacher"):
                    taught = _judge(run, batch)
                with clock("student"):
                    law = run.student.law(batch)
                    signals.append(run.objective(law, taught, batch, max(1, num_step_tokens)))
                    signals[-1].loss.backward()
            with clock("optim"):
                grad_norm = apply_gradients(run.optimizer, run.step, config)
            meter.add_signals(signals)
            meter.add_trajectories(trajectories, run.step)
            meter.add({"grad_norm": grad_norm, "learning_rate": learning_rate(run.step, config)})
            _account(run, trajectories, batches, clock, meter)
            run.step += 1
            is_last = run.step == config.max_steps
            every = config.evaluation and config.evaluation.eval_steps
            run.owes_evaluation = is_last or _is_due(run.step, every)
            run.mark()

            is_logged = is_last or _is_due(run.step, config.logging_steps)
            display.step(run.step, _write(run, writer, meter) if is_logged else {})
            if run.owes_evaluation:
                evaluated = _evaluate(run, writer, display)
                # rollouts may follow what was found, and nobody evaluates this step twice
                run.mark()
            if is_last or stop or _is_due(run.step, config.save_steps):
                display.phase("save")
                run.save()
                saved_step = run.step
                display.phase("train")
        # a signal may have come after the last look at it, and a run may have gone on from the
        # checkpoint of another directory with no step left to do
        path = run.output_dir / f"checkpoint-{run.step}"
        if run.step > saved_step or (run.step and not path.is_dir()):
            run.save()
    if stop:
        raise Interrupted(stop.signum, run.step)
    if "html" in config.report_to:
        from opd.report import write_report

        write_report([run.output_dir])
    return TrainResult(
        output_dir=run.output_dir,
        checkpoint=path,
        step=run.step,
        metrics=evaluated,
        ledger=run.ledger.state_dict(),
    )


def _tell_of_alignment(step: int, translated: Translated) -> bool:
    """Whether a line was due: of text outside of aligned chunks nothing is learned."""
    ratio = translated.metrics()["chunks/aligned_ratio"]
    if not len(translated.is_aligned) or ratio >= LEAST_ALIGNED:
        return False
    _log.warning(
        "step %d: only %.1f%% of the chunks are aligned, the rest has no loss; see "
        "chunks/aligned_ratio, and what `opd check` says",
        step + 1,
        100 * ratio,
    )
    return True


@contextmanager
def _steps_kept(run: Run, display: Display) -> Iterator[None]:
    """A teacher that fails, or is silent after a signal, costs the step that asked it and no other.

    What a rerun then does is, bit for bit, what it would have done; an evaluation that was cut off
    is the first of it.
    """
    try:
        yield
    except (_GivenUp, TeacherError) as error:
        if run.step and not (run.output_dir / f"checkpoint-{run.step}").is_dir():
            run.save(as_marked=True)
        kept = f"it is kept as of the end of step {run.step}" if run.step else "no step was done"
        display.say(f"without the teacher the run cannot go on; {kept}")
        if isinstance(error, TeacherError):
            raise


class _GivenUp(Exception):
    """A signal came, and what is waited for does not."""


def _judge(run: Run, batch: Batch) -> Law | None:
    if not run.objective.needs_teacher:
        return None
    law = run.teacher.law(batch.for_teacher)
    # asked here, so that the time is booked on the teacher
    run.objective.ask(law, batch)
    return law


def _account(
    run: Run,
    trajectories: Sequence[Trajectory],
    batches: Sequence[Batch],
    clock: Clock,
    meter: Meter,
) -> None:
    """Book one step: tokens and operations in the ledger, seconds in both."""
    num_read = run.ledger.student_tokens_forward
    run.ledger.record(
        trajectories,
        batches,
        step=run.step,
        student_size=run.student.num_parameters,
        teacher_size=0 if run.teacher is None else run.teacher.num_parameters,
        teacher_judges=run.objective.needs_teacher,
        objective_size=num_weights(run.module),
    )
    seconds = clock.flush()
    run.ledger.add_seconds(seconds)
    total = sum(seconds.values())
    meter.add({f"time/{phase}_s": value for phase, value in seconds.items()})
    meter.add(
        {
            "time/step_s": total,
            "tokens_per_s": (run.ledger.student_tokens_forward - num_read) / total,
            **run.rollouts.metrics(),
        }
    )


def _write(run: Run, writer: MetricsWriter, meter: Meter) -> dict[str, float]:
    values = meter.flush() | run.ledger.metrics() | memory_metrics(run.student.device)
    writer.write(run.step, values)
    return values


def _evaluate(run: Run, writer: MetricsWriter, display: Display) -> dict[str, float]:
    if run.held_out is None or run.config.evaluation is None:
        run.owes_evaluation = False
        return {}
    display.phase("eval")
    found = evaluate(
        run.student,
        run.teacher,
        run.tokenizer,
        run.held_out,
        run.config.evaluation,
        max_completion_length=run.config.rollouts.max_completion_length,
        student_bytes=run.student_bytes,
        translator=run.translator,
    )
    if "eval/data_states/nll" in found.metrics:
        run.rollouts.observe(found.metrics["eval/data_states/nll"])
    writer.write(run.step, found.metrics)
    writer.write_samples(run.step, found.samples)
    run.owes_evaluation = False
    display.evaluated(run.step, found.metrics)
    display.phase("train")
    return found.metrics


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


@dataclass(slots=True)
class _Stop:
    """The signal that asked the run to stop, if one has."""

    signum: int = 0
    since: float = 0.0

    def __bool__(self) -> bool:
        return self.signum != 0

    def check(self) -> None:
        """End a wait when the time after a signal is over."""
        if self and time.monotonic() - self.since > _GRACE_S:
            raise _GivenUp


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Notes the first SIGINT or SIGTERM; a second one acts as usual."""
    received = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        received.signum, received.since = number, time.monotonic()
        for other, handler in usual.items():
            signal.signal(other, handler)

    for number in usual:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
