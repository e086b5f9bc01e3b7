# SPDX-License-Identifier: Apache-2.0
"""One run as one frozen object: YAML in, overrides applied, every key checked, YAML out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from opd.data import DataConfig, TaskConfig
from opd.evaluation import EvaluationConfig
from opd.model import StudentConfig
from opd.objectives import ObjectiveConfig
from opd.optim import OptimConfig
from opd.rollouts import RolloutConfig
from opd.schema import ConfigError, did_you_mean, sentences
from opd.teachers import TeacherConfig

RECIPES = Path(__file__).parent / "recipes"

# keys that change where or how a run is watched, but not one bit of its weights
_UNHASHED = (
    "output_dir",
    "resume_from_checkpoint",
    "report_to",
    "logging_steps",
    "save_steps",
    "save_total_limit",
)
_UNHASHED_OF_SERVERS = (
    "url",
    "concurrency",
    "request_timeout_s",
    "deadline_s",
    "patience_s",
)


class TrainConfig(OptimConfig):
    """A training run. Sections are objects of their own; the flat keys are named as in HF and TRL.

    Attributes:
        output_dir: receives config.yaml, metrics.jsonl, samples.jsonl, checkpoint-N/, report.html.
        per_device_train_batch_size: completions in one forward and backward pass.
        gradient_accumulation_steps: such passes in one optimizer step; the loss is divided by the
            number of trained tokens of the whole step, so the split does not change it.
        vocab_size: tokens that both heads share, when they are padded to different sizes.
        num_threads: of torch on the CPU; 1 is fastest for models below a million parameters.
        workspace_bytes: scratch memory of the fused kernels.
        resume_from_checkpoint: `auto` (the newest in output_dir, if any), `none` (start afresh and
            set what is there aside), or the path of a checkpoint.
    """

    output_dir: str
    seed: int = Field(0, ge=0)
    device: str = "auto"
    num_threads: int | None = Field(None, ge=1)
    task: TaskConfig | None = None
    data: DataConfig = DataConfig()
    student: StudentConfig
    teacher: Annotated[TeacherConfig, Field(discriminator="kind")] | None = None
    rollouts: Annotated[RolloutConfig, Field(discriminator="kind")]
    objective: Annotated[ObjectiveConfig, Field(discriminator="kind")]
    evaluation: EvaluationConfig | None = None
    per_device_train_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    vocab_size: int | None = Field(None, ge=1)
    workspace_bytes: int = Field(1 << 30, ge=1 << 16)
    logging_steps: int = Field(1, ge=1)
    save_steps: int | None = Field(None, ge=1)
    save_total_limit: int | None = Field(None, ge=1)
    report_to: tuple[Literal["jsonl", "tensorboard", "html"], ...] = (
        "jsonl",
        "tensorboard",
        "html",
    )
    resume_from_checkpoint: str = "auto"

    @field_validator("report_to", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        # as in HF, where one name need not be in a list and `none` is an empty one
        return ([] if value == "none" else [value]) if isinstance(value, str) else value

    @field_validator("teacher", mode="before")
    @classmethod
    def _local_by_default(cls, value: Any) -> Any:
        return {"kind": "local", **value} if isinstance(value, dict) else value

    @property
    def num_trajectories(self) -> int:
        """Completions in one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def num_prompts(self) -> int:
        """Prompts in one optimizer step."""
        return self.num_trajectories // self.rollouts.num_generations

    @model_validator(mode="after")
    def _check_parts_fit(self) -> Self:
        rollouts, objective = self.rollouts, self.objective
        if self.task is None and self.data.train_file is None:
            raise ValueError("data.train_file: is required when there is no task")
        if self.teacher is None and objective.needs_teacher:
            raise ValueError(f"teacher: is required by objective.kind {objective.kind!r}")
        if self.teacher is None and rollouts.needs_teacher:
            raise ValueError(f"teacher: is required by {_what_needs_it(rollouts)}")
        if self.teacher is not None:
            self._check_teacher(self.teacher)
        if objective.needs_behaviour_logprobs and not rollouts.tells_behaviour:
            mode = f" with mode {rollouts.mode!r}" if hasattr(rollouts, "mode") else ""
            raise ValueError(
                f"rollouts.kind: must be 'hf', 'teacher_mixed' or 'speculative' (mode rejection, "
                f"block or threshold) for objective.kind {objective.kind!r}, which needs the "
                f"log-probability of every token under the law it was drawn from, got "
                f"{rollouts.kind!r}{mode}"
            )
        if objective.needs_behaviour_logprobs:
            key = rollouts.temperature_key
            sampled_at = getattr(rollouts, key)
            if objective.temperature != sampled_at:
                raise ValueError(
                    f"objective.temperature: must equal rollouts.{key} {sampled_at}, "
                    f"at which the completions are sampled{_for_two_temperatures(rollouts)}, "
                    f"got {objective.temperature}"
                )
        is_cut = getattr(rollouts, "top_p", 1.0) < 1 or getattr(rollouts, "top_k", 0) > 0
        if is_cut and getattr(objective, "cliprange", None) is not None:
            raise ValueError(
                "objective.cliprange: must be null with rollouts.top_p or top_k: what they cut "
                f"puts every importance weight below 1, and {objective.cliprange} would drop the "
                "tokens that did badly and keep those that did well"
            )
        is_followed = self.evaluation is not None and self.evaluation.eval_steps is not None
        if rollouts.needs_evaluation and not is_followed:
            raise ValueError(
                f"evaluation.eval_steps: is required by rollouts.kind {rollouts.kind!r}, whose "
                "share of student data follows the held-out loss"
            )
        if "html" in self.report_to and "jsonl" not in self.report_to:
            raise ValueError("report_to: must have 'jsonl' for 'html', which is drawn from it")
        if self.num_trajectories % rollouts.num_generations:
            raise ValueError(
                f"rollouts.num_generations: must divide the {self.num_trajectories} completions "
                f"of a step, got {rollouts.num_generations}"
            )
        return self

    def _check_teacher(self, teacher: TeacherConfig) -> None:
        objective = self.objective
        if self.rollouts.needs_teacher and teacher.kind != "local":
            raise ValueError(
                f"teacher.kind: must be 'local' for {_what_needs_it(self.rollouts)}, in which the "
                f"teacher writes, got {teacher.kind!r}"
            )
        if objective.asks and objective.asks not in teacher.tells:
            raise ValueError(
                f"teacher.kind: {teacher.kind!r} as configured tells {in_words(teacher.tells)}; "
                f"objective.kind {objective.kind!r} asks for {_SIGNALS[objective.asks]}"
            )
        temperature = getattr(objective, "temperature", 1.0)
        if objective.asks and temperature != 1.0 and not teacher.takes_temperature:
            raise ValueError(
                f"objective.temperature: must be 1 with teacher.kind {teacher.kind!r}, which tells "
                f"its law as it is, got {temperature}"
            )


_SIGNALS = {
    "hidden": "hidden states",
    "topk": "its likeliest tokens",
    "given_tokens": "log-probabilities of tokens it is given",
    "token_logprobs": "log-probabilities of the sampled tokens",
    "samples": "tokens that it draws",
}


def _what_needs_it(rollouts: RolloutConfig) -> str:
    """The key for which the teacher must write."""
    if getattr(rollouts, "on_policy", None) is not None:
        return "rollouts.on_policy"
    return "rollouts.seq_kd" if hasattr(rollouts, "seq_kd") else f"rollouts.kind {rollouts.kind!r}"


def _for_two_temperatures(rollouts: RolloutConfig) -> str:
    """What of two temperatures in one completion the objective's follows."""
    theirs = getattr(rollouts, "teacher_temperature", None)
    if getattr(rollouts, "mode", None) != "threshold" or theirs in (None, rollouts.temperature):
        return ""
    return (
        f" by the student (what the teacher writes after a switch is sampled at {theirs}, and its "
        "ratios are to the student's law at objective.temperature)"
    )


def in_words(signals: Collection[str]) -> str:
    """What a teacher tells, or an objective asks for, in words."""
    return ", ".join(words for name, words in _SIGNALS.items() if name in signals) or "nothing"


def load_config(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """The configuration in a YAML file, or in the recipe of that name, with `a.b=c` overrides.

    Raises:
        ConfigError: a missing file, bad YAML, an unknown key, a wrong type, parts that do not fit.
    """
    path = find_config(source)
    values = read_yaml(path)
    overridden = [apply_override(values, override) for override in overrides]
    return parse_config(values, str(path), overridden)


def parse_config(
    values: dict[str, Any], source: str = "config", overridden: Sequence[str] = ()
) -> TrainConfig:
    """The configuration in a mapping. `source` and `overridden` say in errors whose fault it is."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(sentences(error, TrainConfig, source, overridden)) from None


def find_config(source: str | Path) -> Path:
    """The path of a YAML file, or of the recipe with that name."""
    path = Path(source)
    if path.is_file():
        return path
    recipes = {recipe.stem: recipe for recipe in RECIPES.glob("*.yaml")}
    if str(source) in recipes:
        return recipes[str(source)]
    siblings = [str(path.parent / other.name) for other in path.parent.glob("*.y*ml")]
    hint = did_you_mean(source, [*siblings, *recipes])
    hint = hint or f", the recipes are {', '.join(sorted(recipes))}"
    raise ConfigError(f"{source}: no such file or recipe{hint}")


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, but of two equal keys the first one is not silently dropped."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, read with the safe loader."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8, {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise ConfigError(f"{path}{where}: is not valid YAML, {problem}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys, got {type(values).__name__}")
    return values


def apply_override(values: dict[str, Any], override: str) -> str:
    """Set one `a.b=c` in the mapping; c is read as YAML. Returns `a.b`."""
    key, equals, text = override.partition("=")
    words = key.removeprefix("--").split(".")
    if not equals or not all(words):
        raise ConfigError(f"override {override!r}: must look like key=value or section.key=value")
    try:
        value = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None
    section = values
    for word in words[:-1]:
        if section.get(word) is None:
            section[word] = {}
        section = section[word]
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {word!r} is not a section")
    section[words[-1]] = value
    return ".".join(words)


def dump_config(config: TrainConfig) -> str:
    """The resolved configuration as YAML; loading it gives an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_hash(config: TrainConfig) -> str:
    """16 hex digits over every key that can change the weights."""
    values = _weighty(config.model_dump(mode="json"), unhashed(config))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def unhashed(config: TrainConfig) -> set[str]:
    """The keys that may change between the stop and the resumption of a run."""
    return {*_UNHASHED, *([] if config.rollouts.needs_evaluation else ["evaluation"])}


def differences(config: TrainConfig, theirs: dict[str, Any]) -> list[str]:
    """`path (a there, b here)` for every weight-changing key in which a dumped config differs."""
    skipped = unhashed(config)
    ours = _weighty(config.model_dump(mode="json"), skipped)
    return _differences(ours, _weighty(theirs, skipped), "")


def _weighty(values: dict[str, Any], skipped: set[str]) -> dict[str, Any]:
    """The values that can change the weights: not where a teacher's server is, or how to wait."""
    kept = {key: value for key, value in values.items() if key not in skipped}
    teacher = kept.get("teacher")
    if isinstance(teacher, dict) and teacher.get("kind") == "server":
        kept["teacher"] = {k: v for k, v in teacher.items() if k not in _UNHASHED_OF_SERVERS}
    return kept


def _differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str) -> list[str]:
    found: list[str] = []
    for key in sorted({*ours, *theirs}):
        here, there = ours.get(key), theirs.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            found += _differences(here, there, f"{prefix}{key}.")
        elif here != there:
            found.append(f"{prefix}{key} ({there!r} there, {here!r} here)")
    return found
