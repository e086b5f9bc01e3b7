# SPDX-License-Identifier: Apache-2.0
"""Rows from a task or a JSON-lines file, tokenized, in an order that the step alone decides."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from opd.batch import Prompt
from opd.schema import ConfigError, Section, did_you_mean

_log = logging.getLogger(__name__)


class TaskConfig(Section):
    """A task that makes its own rows and checks its own answers.

    Attributes:
        kind: a name out of `opd.tasks.TASKS`.
        num_rows: training rows to make.
        lengths: difficulties to draw from. Default: all that the task has.
        seed: of the training rows.
    """

    kind: str
    num_rows: int = Field(4096, ge=1)
    lengths: list[int] | None = None
    seed: int = Field(1, ge=0)

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, kind: str) -> str:
        from opd.tasks import TASKS

        if kind not in TASKS:
            raise ValueError(
                f"must be one of {', '.join(TASKS)}, got {kind!r}{did_you_mean(kind, TASKS)}"
            )
        return kind

    def load(self) -> Any:
        """The task object."""
        from opd.tasks import TASKS

        return TASKS[self.kind]()


class DataConfig(Section):
    """JSON-lines files. A row has `prompt` (text, or a chat) or `messages` (a chat, whose last
    assistant turn is the completion), and optionally `completion`, `completion_mask` (one 0 or 1
    per completion token) and `answer`.

    Attributes:
        train_file: training rows; with a task, in place of the task's own.
        eval_file: held-out rows; with a task, in place of the task's own.
        max_prompt_length: rows with a longer prompt are left out, with a warning.
        shuffle: draw the rows of each epoch in a new order.
    """

    train_file: str | None = None
    eval_file: str | None = None
    max_prompt_length: int | None = Field(None, ge=1)
    shuffle: bool = True


class PromptStream:
    """Prompts in epochs. The seed and the step alone decide what a step gets."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        self.prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, list[int]] = {}

    def take(self, step: int, num_prompts: int) -> list[Prompt]:
        """The prompts of one step."""
        first = step * num_prompts
        places = (divmod(i, len(self.prompts)) for i in range(first, first + num_prompts))
        return [self.prompts[self._order(epoch)[place]] for epoch, place in places]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self.prompts)))
            if self._shuffle:
                random.Random(f"{self._seed} epoch {epoch}").shuffle(order)
            # a step straddles two epochs at most
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]


def training_rows(
    task: TaskConfig | None, data: DataConfig, *, with_completions: bool
) -> list[dict[str, Any]]:
    """The training rows, from `data.train_file` or else from the task."""
    if data.train_file is not None:
        return read_rows(data.train_file, "data.train_file")
    assert task is not None
    make = task.load().expert_rows if with_completions else task.load().rows
    with task_errors("task.lengths"):
        return make(task.num_rows, seed=task.seed, lengths=task.lengths)


@contextmanager
def task_errors(key: str) -> Iterator[None]:
    """What a task does not accept is the configuration's fault."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def read_rows(path: str, key: str) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file.

    Raises:
        ConfigError: no such file, not UTF-8, a line that is not an object, a row without prompt or
            messages.
    """
    file = Path(path)
    if not file.is_file():
        siblings = [str(other) for other in file.parent.glob("*.jsonl")]
        raise ConfigError(f"{key}: no such file {path!r}{did_you_mean(path, siblings)}")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: cannot read {path!r} as UTF-8, {error}") from None
    rows = []
    # JSON strings may hold what splitlines() takes for the end of a line, U+2028 for one
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{key}: {path}:{number}: is not JSON, {error.msg}") from None
        if not isinstance(row, dict) or not ("prompt" in row or "messages" in row):
            found = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
            raise ConfigError(
                f"{key}: {path}:{number}: must have 'prompt' or 'messages', got {found}"
            )
        rows.append(row)
    if not rows:
        raise ConfigError(f"{key}: {path!r} has no rows")
    return rows


def tokenize_rows(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    add_special_tokens: bool,
    max_prompt_length: int | None = None,
    source: str = "data.train_file",
) -> list[Prompt]:
    """Prompts with their completions, if the rows have any.

    Args:
        rows: as `DataConfig` describes them.
        tokenizer: of the student.
        add_special_tokens: to plain-text prompts; a chat template brings its own.
        max_prompt_length: longer prompts are left out.
        source: the key to name in errors.
    """
    prompts = []
    for number, row in enumerate(rows):
        where = f"{source}: row {number + 1}"
        ids, completion = _encode(row, tokenizer, add_special_tokens, where)
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            continue
        completion_ids, mask = _complete(row, completion, tokenizer, where)
        prompts.append(
            Prompt(
                ids=torch.tensor(ids, dtype=torch.int64),
                completion_ids=completion_ids,
                completion_mask=mask,
                row=row,
                group_id=number,
            )
        )
    if len(prompts) < len(rows):
        left_out = len(rows) - len(prompts)
        _log.warning("%d of %d prompts are longer than data.max_prompt_length", left_out, len(rows))
    if not prompts:
        raise ConfigError(f"data.max_prompt_length: leaves none of {len(rows)} rows")
    return prompts


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a row is a chat, which a template renders, and not text."""
    return isinstance(row.get("messages", row.get("prompt")), list)


def encode_prompt(
    row: Mapping[str, Any], tokenizer: Any, add_special_tokens: bool, where: str
) -> list[int]:
    """A row's prompt in a tokenizer's ids; chats are rendered by its template."""
    return _encode(row, tokenizer, add_special_tokens, where)[0]


def chat_template(tokenizer: Any) -> Any:
    """A tokenizer's template of chats; None for those of texts."""
    return getattr(tokenizer, "chat_template", None)


def render_prompt(row: Mapping[str, Any], tokenizer: Any, where: str) -> tuple[str, str | None]:
    """A row's prompt as text, chats by the tokenizer's template, and its completion or None."""
    prompt, completion = row.get("messages", row.get("prompt")), row.get("completion")
    if isinstance(completion, list):
        completion = _content(completion[-1:], where)
    if isinstance(prompt, list):
        prompt, turn = _split_chat(prompt)
        completion = completion if turn is None else _content([turn], where)
        if chat_template(tokenizer) is None:
            raise ConfigError(f"{where}: is a chat, but the tokenizer has no chat template")
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    if not isinstance(prompt, str):
        raise ConfigError(f"{where}: its prompt must be text or a chat, got {prompt!r}")
    return prompt, completion


def _encode(
    row: Mapping[str, Any], tokenizer: Any, add_special_tokens: bool, where: str
) -> tuple[list[int], str | None]:
    """The prompt's ids, and the completion's text if there is one."""
    prompt, completion = render_prompt(row, tokenizer, where)
    # a template writes the special tokens itself
    with_specials = add_special_tokens and not is_chat(row)
    ids = tokenizer(prompt, add_special_tokens=with_specials)["input_ids"]
    if not ids:
        raise ConfigError(f"{where}: its prompt has no tokens, a model cannot continue nothing")
    return ids, completion


def _split_chat(messages: list[Any]) -> tuple[list[Any], Any]:
    """The turns before a last assistant turn, and that turn or None."""
    last = messages[-1] if messages else None
    if isinstance(last, dict) and last.get("role") == "assistant":
        return messages[:-1], last
    return messages, None


def _content(turns: list[Any], where: str) -> str:
    if turns and isinstance(turns[0], dict) and isinstance(turns[0].get("content"), str):
        return turns[0]["content"]
    raise ConfigError(f"{where}: its completion must be text, or a chat turn with a content")


def _complete(
    row: Mapping[str, Any], completion: str | None, tokenizer: Any, where: str
) -> tuple[Tensor | None, Tensor | None]:
    if completion is None:
        return None, None
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    mask = list(row.get("completion_mask") or [1] * len(ids))
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
        if len(mask) == len(ids) - 1:
            mask.append(1)
    if len(mask) != len(ids):
        raise ConfigError(
            f"{where}: completion_mask must have {len(ids)} items, one per token, got {len(mask)}"
        )
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool)
