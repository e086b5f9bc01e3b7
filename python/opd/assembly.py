# SPDX-License-Identifier: Apache-2.0
"""From a configuration to the objects of a run, checked against each other, resumed if possible."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import opd_kernels as opk
from opd import checkpoint as ckpt
from opd.batch import Prompt, law_size
from opd.config import TrainConfig, config_hash, differences, dump_config, in_words
from opd.data import PromptStream, tokenize_rows, training_rows
from opd.evaluation import HeldOut, load_held_out
from opd.ledger import Ledger
from opd.model import (
    LanguageModel,
    StudentConfig,
    disable_dropout,
    load_model,
    load_tokenizer,
)
from opd.objectives import Parts
from opd.optim import build_optimizer
from opd.rollouts.hf import end_token_ids
from opd.schema import ConfigError
from opd.teachers import ServerTeacher
from opd.tokens import check_crossing, load_bytes, load_teacher_tokenizer, load_translator
from opd.translation import Translator

_log = logging.getLogger(__name__)
_LONGER = "completions may grow to the length limit, see completions/clipped_ratio"
_RUN_FILES = ["config.yaml", "metrics.jsonl", "samples.jsonl", "tensorboard", "report.html"]


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that the loop works on. `step` counts the optimizer steps done, of the last of
    which `owes_evaluation` says that it was to be evaluated and was not yet."""

    config: TrainConfig
    output_dir: Path
    tokenizer: Any
    student: LanguageModel
    teacher: Any
    data: PromptStream
    rollouts: Any
    held_out: HeldOut | None
    optimizer: torch.optim.Optimizer
    objective: Any
    translator: Translator | None = None
    student_bytes: opk.TokenBytes | None = None
    ledger: Ledger = field(default_factory=Ledger)
    step: int = 0
    owes_evaluation: bool = False
    _marked: dict[str, Any] | None = None

    @property
    def module(self) -> torch.nn.Module | None:
        """What the objective trains beside the student, if anything."""
        return getattr(self.objective, "module", None)

    def mark(self) -> None:
        """Note what the next step changes before the weights, for `save(as_marked=True)`."""
        if isinstance(self.teacher, ServerTeacher):
            self._marked = {"random": ckpt.random_state(), "rollouts": self.rollouts.state_dict()}

    def close(self) -> None:
        """Let go of a teacher's connections."""
        close_teacher(self.teacher)

    def save(self, *, as_marked: bool = False) -> Path:
        """A checkpoint of this moment, or of the last `mark` if no step was taken since."""
        moving = self._marked if as_marked else None
        if moving is None:
            moving = {"random": ckpt.random_state(), "rollouts": self.rollouts.state_dict()}
        return ckpt.save_checkpoint(
            self.output_dir,
            save_model=self._save_model,
            state={
                "step": self.step,
                "owes_evaluation": self.owes_evaluation,
                "config_hash": config_hash(self.config),
                "config": self.config.model_dump(mode="json"),
                "ledger": self.ledger.state_dict(),
                "versions": versions(),
                "teacher": None if self.teacher is None else self.teacher.fingerprint,
                "teacher_tokenizer": None
                if self.translator is None
                else self.translator.teacher_bytes.fingerprint,
            },
            tensors={
                "optimizer": self.optimizer.state_dict(),
                **moving,
            },
            save_total_limit=self.config.save_total_limit,
        )

    def _save_model(self, path: Path) -> None:
        self.student.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        ckpt.save_module(self.module, path)


def open_run(config: TrainConfig) -> Run:
    """Load, check and connect the parts of a run, from the newest checkpoint if there is one.

    Raises:
        ConfigError: something that a part needs is not there, or two parts do not fit.
    """
    prepare_process(config)
    output_dir = _make_output_dir(config)
    resumed = find_checkpoint(config)
    tokenizer = load_run_tokenizer(config)
    student = load_student(config, tokenizer, resumed.path if resumed else None)
    teacher, translator = load_teacher_side(config, tokenizer, student)
    if resumed is not None:
        _check_same_teacher(config, resumed, teacher, translator)
    rows = training_rows(
        config.task, config.data, with_completions=config.rollouts.needs_completions
    )
    prompts = tokenize_rows(
        rows,
        tokenizer,
        add_special_tokens=config.task is None,
        max_prompt_length=config.data.max_prompt_length,
    )
    check_completions(config, student, prompts)
    held_out = None
    if config.evaluation is not None:
        held_out = load_held_out(config.evaluation, config.task, config.data, tokenizer)
        check_completions(config, student, held_out=held_out)
        if config.rollouts.needs_evaluation and not held_out.with_completion:
            raise ConfigError(
                "data.eval_file: must have completions for rollouts.kind "
                f"{config.rollouts.kind!r}, which follows their likelihood"
            )
    check_positions(
        config, student, teacher, prompts=prompts, held_out=held_out, translator=translator
    )
    objective = config.objective.bind(
        Parts(
            student=student,
            teacher=teacher,
            student_bytes=translator and translator.student_bytes,
            teacher_bytes=translator and translator.teacher_bytes,
            seed=config.seed,
        )
    )
    run = Run(
        config=config,
        output_dir=output_dir,
        tokenizer=tokenizer,
        student=student,
        teacher=teacher,
        data=PromptStream(prompts, seed=config.seed, shuffle=config.data.shuffle),
        rollouts=config.rollouts.build(
            student,
            teacher,
            tokenizer,
            translator=translator,
            seed=config.seed,
            max_steps=config.max_steps,
        ),
        held_out=held_out,
        optimizer=build_optimizer(
            student.model,
            config,
            module=getattr(objective, "module", None),
            module_learning_rate=getattr(objective, "module_learning_rate", None),
        ),
        objective=objective,
        translator=translator,
        student_bytes=None if held_out is None else load_student_bytes(config, tokenizer),
    )
    (output_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    # last, so that nothing above can move the random numbers
    ckpt.seed_everything(config.seed)
    if resumed is not None:
        try:
            _restore(run, resumed)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"resume_from_checkpoint: '{resumed.path}' does not fit this run, {error}"
            ) from None
    return run


def _check_same_teacher(
    config: TrainConfig, resumed: ckpt.Checkpoint, teacher: Any, translator: Translator | None
) -> None:
    """A path may hold other weights than it did, and the configuration would not tell.

    Raises:
        ConfigError: the teacher is another one, and nobody asked to go on all the same.
    """
    now = {
        "teacher": (
            "teacher, its weights or their dtype have",
            getattr(teacher, "fingerprint", None),
        ),
        "teacher_tokenizer": (
            "tokenizer of the teacher, its tokens have",
            translator and translator.teacher_bytes.fingerprint,
        ),
    }
    for name, (words, ours) in now.items():
        theirs = resumed.state.get(name)
        if theirs is not None and ours is not None and theirs != ours:
            _refuse_other_teacher(
                config,
                resumed,
                f"'{resumed.path}' was trained with another {words} the fingerprint {theirs} there "
                f"and {ours} here",
            )


def _refuse_other_teacher(config: TrainConfig, resumed: ckpt.Checkpoint, what: str) -> None:
    if config.resume_from_checkpoint != "auto":
        _log.warning("%s", what)
        return
    raise ConfigError(
        f"output_dir: {what}; take another output_dir, or resume_from_checkpoint=none to start "
        f"afresh, or resume_from_checkpoint={resumed.path} to go on from it all the same"
    )


def _restore(run: Run, resumed: ckpt.Checkpoint) -> None:
    """Put everything but the weights where the checkpoint has it."""
    _tell_of_other_versions(resumed.state["versions"])
    run.step = resumed.state["step"]
    run.owes_evaluation = resumed.state.get("owes_evaluation", False)
    run.ledger = Ledger(**resumed.state["ledger"])
    ckpt.load_module(run.module, resumed.path)
    # the state is the checkpoint's, the hyperparameters are this configuration's
    settings = [dict(group) for group in run.optimizer.param_groups]
    run.optimizer.load_state_dict(resumed.tensors["optimizer"])
    for group, ours in zip(run.optimizer.param_groups, settings, strict=True):
        group.update({name: value for name, value in ours.items() if name != "params"})
    theirs, kind = resumed.state["config"]["rollouts"]["kind"], run.config.rollouts.kind
    if theirs == kind:
        run.rollouts.load_state_dict(resumed.tensors["rollouts"])
    else:
        _log.warning("rollouts %r start afresh, the checkpoint is of %r", kind, theirs)
    ckpt.set_random_state(resumed.tensors["random"])


def _make_output_dir(config: TrainConfig) -> Path:
    path = Path(config.output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: cannot make {config.output_dir!r}: {error}") from None
    return path


@contextmanager
def claim_output_dir(config: TrainConfig) -> Iterator[None]:
    """Hold the output_dir against other runs; the system lets go of it when the process ends.

    Raises:
        ConfigError: another run holds it, or it cannot be written to.
    """
    path = _make_output_dir(config) / ".lock"
    try:
        file = path.open("w")
    except OSError as error:
        raise ConfigError(f"output_dir: cannot write there: {error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"output_dir: another run is at work in {config.output_dir!r}; wait for it, or "
                "take another output_dir"
            ) from None
        except OSError as error:
            # some network file systems have no locks
            _log.warning("nothing keeps a second run out of the output_dir: %s", error)
        yield


def prepare_process(config: TrainConfig) -> None:
    """Threads, and the progress bars of a library that would draw over ours."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)


def find_checkpoint(config: TrainConfig) -> ckpt.Checkpoint | None:
    """The checkpoint that `resume_from_checkpoint` means; None to start at step 0.

    Raises:
        ConfigError: `auto` found one of a different configuration, or a path leads to none.
    """
    wanted, root = config.resume_from_checkpoint, Path(config.output_dir)
    if wanted == "none":
        _tell(ckpt.set_aside(root, _RUN_FILES))
        return None
    if wanted != "auto":
        try:
            found = ckpt.load_checkpoint(wanted)
        except ConfigError as error:
            raise ConfigError(f"resume_from_checkpoint: {error}") from None
        # later ones are of a run that this one now departs from
        _tell(ckpt.set_aside(root, after_step=found.state["step"]))
        return found
    ckpt.remove_leftovers(root)
    newest = ckpt.newest_checkpoint(root)
    if newest is None:
        return None
    found = ckpt.load_checkpoint(newest)
    if found.state.get("config_hash") != config_hash(config):
        differing = differences(config, found.state.get("config", {}))
        raise ConfigError(
            f"output_dir: '{newest}' was made with other settings, {', '.join(differing)}; take "
            f"another output_dir, or resume_from_checkpoint=none to start afresh, or "
            f"resume_from_checkpoint={newest} to go on from it all the same"
        )
    return found


def _tell(aside: Path | None) -> None:
    if aside is not None:
        _log.warning("moved what an earlier run left to %s", aside)


def _tell_of_other_versions(theirs: dict[str, str]) -> None:
    """A resumed run repeats an uninterrupted one bit for bit only on the same software."""
    ours = versions()
    changed = [
        f"{name} {theirs.get(name)} -> {ours[name]}"
        for name in ours
        if theirs.get(name) != ours[name]
    ]
    if changed:
        _log.warning("the checkpoint was written with other versions: %s", ", ".join(changed))


def load_run_tokenizer(config: TrainConfig) -> Any:
    """The task's tokenizer, unless the student names one of its own."""
    if config.task is not None and config.student.tokenizer_name_or_path is None:
        return config.task.load().load_tokenizer()
    return load_tokenizer(config.student)


def load_student(config: TrainConfig, tokenizer: Any, path: Path | None = None) -> LanguageModel:
    """The student, in train mode, with the weights at a path instead of its own if one is given."""
    source: StudentConfig = config.student
    if path is not None:
        source = source.model_copy(update={"model_name_or_path": str(path)})
    model = load_model(source, tokenizer, name="student", seed=config.seed, device=config.device)
    if source.disable_dropout:
        disable_dropout(model)
    if source.gradient_checkpointing:
        # transformers 5.23 gave it a new name and warns about the old one
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    student = LanguageModel(
        model,
        name="student",
        vocab_size=config.vocab_size,
        workspace_bytes=config.workspace_bytes,
    )
    _check_rows(student, len(tokenizer) if config.vocab_size is None else config.vocab_size)
    student.model.train()
    return student


def load_teacher(config: TrainConfig, tokenizer: Any, student: LanguageModel) -> Any:
    """The teacher of a run, which has the student's vocabulary.

    Raises:
        ConfigError: it has another one.
    """
    teacher, translator = load_teacher_side(config, tokenizer, student)
    if translator is not None and not translator.has_one_vocabulary:
        raise ConfigError(
            "teacher.model_name_or_path: the teacher has other tokens than the student; its laws "
            "can be kept only for a student with its own"
        )
    return teacher


def load_teacher_side(
    config: TrainConfig, tokenizer: Any, student: LanguageModel
) -> tuple[Any, Translator | None]:
    """The teacher, if there is one, and what renders the student's texts for it, if anything asks.

    Raises:
        ConfigError: the vocabularies differ in size or in tokens, and the objective does not cross
            tokenizers.
    """
    if config.teacher is None:
        return None, None
    _check_topk(config, student)
    rows = student.lm_head_weight.shape[0]
    theirs = load_teacher_tokenizer(config)
    crosses = check_crossing(config, tokenizer, theirs, config.vocab_size or rows)
    teacher = config.teacher.build(
        theirs if crosses else tokenizer,
        device=config.device,
        # vocab_size is the student's; a teacher's head may be padded beyond its own tokens
        vocab_size=len(theirs) if crosses else config.vocab_size,
        workspace_bytes=config.workspace_bytes,
    )
    if isinstance(teacher, LanguageModel):
        _check_head(config, teacher, student, tokenizer, len(theirs) if crosses else None)
    else:
        teacher.check_fits(None if crosses else student, theirs if crosses else tokenizer)
        _check_told(config, teacher)
        _check_temperature(config, getattr(teacher, "temperature", None))
    translator = load_translator(config, tokenizer, theirs, student, teacher, crosses=crosses)
    if translator is not None:
        _sample_texts(student, len(translator.student_bytes))
        if translator.has_one_vocabulary and isinstance(teacher, LanguageModel):
            _sample_texts(teacher, len(translator.teacher_bytes))
    return teacher, translator


def _sample_texts(model: LanguageModel, num_tokens: int) -> None:
    """Draw none of the ids beyond the tokenizer's, which a padded head has too."""
    if num_tokens < law_size(model):
        model.sampled_size = num_tokens


def _check_head(
    config: TrainConfig,
    teacher: LanguageModel,
    student: LanguageModel,
    tokenizer: Any,
    num_tokens: int | None,
) -> None:
    """Whether the teacher's head has rows for its tokens: `num_tokens` of its own, or the
    student's."""
    ours, theirs = student.lm_head_weight.shape[0], teacher.lm_head_weight.shape[0]
    if num_tokens is not None:
        if theirs < num_tokens:
            raise ConfigError(
                f"teacher: its head has {theirs} tokens, fewer than the {num_tokens} of its "
                "tokenizer"
            )
        return
    if config.vocab_size is None and ours != theirs:
        raise ConfigError(
            f"teacher.model_name_or_path: the teacher's head has {theirs} tokens and the student's "
            f"{ours}; if only their padding differs, set "
            f"vocab_size={min(len(tokenizer), ours, theirs)}"
        )
    _check_rows(teacher, config.vocab_size or theirs)
    _tell_of_other_ends(teacher, student, tokenizer)


def load_student_bytes(config: TrainConfig, tokenizer: Any) -> opk.TokenBytes | None:
    """Of the student's tokens, for an evaluation that counts in bytes; None where these mean
    nothing."""
    if config.task and not config.student.tokenizer_name_or_path:
        return None
    return load_bytes(tokenizer, name="student")


def close_teacher(teacher: Any) -> None:
    """Let go of the connections of a teacher that has any."""
    if isinstance(teacher, ServerTeacher):
        teacher.close()


def _check_topk(config: TrainConfig, student: LanguageModel) -> None:
    wanted, size = getattr(config.objective, "teacher_top_k", 0), student.lm_head_weight.shape[0]
    size = config.vocab_size or size
    if wanted > size:
        raise ConfigError(
            f"objective.teacher_top_k: must be at most {size}, the size of the vocabulary, got "
            f"{wanted}"
        )


def _check_told(config: TrainConfig, teacher: Any) -> None:
    """What only the teacher itself knows that it tells: a store, of what it was filled with."""
    asked, told = config.objective.asks, getattr(teacher, "tells", None)
    if asked and told is not None and asked not in told:
        raise ConfigError(
            f"objective.kind: must be one that asks for {in_words(told)}, which is what the store "
            f"'{teacher.store.path}' holds, got {config.objective.kind!r}, which asks for "
            f"{in_words([asked])}"
        )
    for key, there in getattr(teacher, "drawn_with", {}).items():
        here = getattr(config.objective, key)
        if asked and here != there:
            raise ConfigError(
                f"objective.{key}: must be {there:g}, with which the store '{teacher.store.path}' "
                f"was filled, got {here:g}"
            )


def _check_temperature(config: TrainConfig, theirs: float | None) -> None:
    ours = getattr(config.objective, "temperature", 1.0)
    if config.objective.needs_teacher and theirs not in (None, ours):
        raise ConfigError(
            f"objective.temperature: must be {theirs:g}, at which the teacher's laws were stored, "
            f"got {ours:g}"
        )


def check_positions(
    config: TrainConfig,
    student: LanguageModel,
    teacher: Any,
    *,
    prompts: Sequence[Prompt] = (),
    held_out: HeldOut | None = None,
    translator: Translator | None = None,
) -> None:
    """Refuse prompts and completions that are together longer than a model's positions.

    A teacher with other tokens must have room for its prompts; how many tokens a completion has
    for it is not known, and what is beyond its positions is not aligned.

    Raises:
        ConfigError: the longest are.
    """
    wanted = config.rollouts.max_completion_length
    cases = [("rollouts", wanted, prompts)]
    if held_out is not None:
        own = config.evaluation and config.evaluation.max_completion_length
        section, length = ("evaluation", own) if own else ("rollouts", wanted)
        cases.append((section, length, [*held_out.prompts, *held_out.with_completion]))
    if translator is not None and not translator.has_one_vocabulary:
        for _, _, those in cases:
            translator.check_room(those)
        teacher = None
    for model in (student, teacher):
        limit = None if model is None else model.max_positions
        for section, length, those in cases:
            longest = max((len(prompt.ids) for prompt in those), default=0)
            if limit is not None and those and longest + length > limit:
                raise ConfigError(
                    f"{section}.max_completion_length: must be at most {limit - longest} with "
                    f"prompts of up to {longest} tokens and a {model.name} of {limit} positions, "
                    f"got {length}"
                )


def check_completions(
    config: TrainConfig,
    student: LanguageModel,
    prompts: Sequence[Prompt] = (),
    held_out: HeldOut | None = None,
) -> None:
    """Refuse rows without the completion that is trained on, and tokens without a probability.

    Raises:
        ConfigError: the first such row.
    """
    size = config.vocab_size or student.lm_head_weight.shape[0]
    trained = prompts if config.rollouts.needs_completions else ()
    evaluated = () if held_out is None else held_out.with_completion
    for source, those in (("data.train_file", trained), ("data.eval_file", evaluated)):
        for prompt in those:
            if prompt.completion_ids is None:
                raise ConfigError(
                    f"{source}: row {prompt.group_id + 1} has no completion, which "
                    f"rollouts.kind {config.rollouts.kind!r} trains on"
                )
            ids = prompt.completion_ids[prompt.completion_mask]
            if len(ids) and int(ids.max()) >= size:
                raise ConfigError(
                    f"{source}: row {prompt.group_id + 1} has token {int(ids.max())} in its "
                    f"completion, the student's law is over {size}; set vocab_size above it"
                )


def _check_rows(model: LanguageModel, num_tokens: int) -> None:
    rows = model.lm_head_weight.shape[0]
    if rows < num_tokens:
        raise ConfigError(
            f"{model.name}: its head has {rows} tokens, fewer than the {num_tokens} of "
            f"{'vocab_size' if model.vocab_size else 'the tokenizer'}"
        )


def _tell_of_other_ends(teacher: Any, student: LanguageModel, tokenizer: Any) -> None:
    """A teacher that ends its text with another token teaches the student never to end."""
    theirs, ours = (end_token_ids(model.model, tokenizer) for model in (teacher, student))
    if theirs != ours:
        names = [tokenizer.convert_ids_to_tokens(ids) for ids in (theirs, ours)]
        _log.warning("the teacher's end tokens are %s, the student's %s; %s", *names, _LONGER)


def versions() -> dict[str, str]:
    """Of the packages that a result depends on."""
    import platform

    import transformers

    import opd_kernels

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "opd_kernels": getattr(opd_kernels, "__version__", "unknown"),
    }
