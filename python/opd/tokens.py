# SPDX-License-Identifier: Apache-2.0
"""The tokenizers of a run: the teacher's, if it is not the student's, and the bytes of both."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import opd_kernels as opk
from opd.data import chat_template
from opd.identity import first_difference, vocabulary
from opd.model import load_tokenizer_at, resolve_model_path
from opd.objectives import OBJECTIVES
from opd.rollouts.hf import end_token_ids
from opd.schema import ConfigError
from opd.translation import Translator

if TYPE_CHECKING:
    from opd.config import TrainConfig
    from opd.model import LanguageModel

_log = logging.getLogger(__name__)
_ROLES = ("bos", "eos", "pad", "unk")


def crossing_objectives() -> list[str]:
    """Kinds of objectives whose teacher may have another tokenizer."""
    return sorted(kind for kind, section in OBJECTIVES.items() if section.crosses_tokenizers)


def load_teacher_tokenizer(config: TrainConfig) -> Any:
    """The teacher's own tokenizer; None where it comes with none.

    Raises:
        ConfigError: there is none where `teacher.tokenizer_name_or_path` points.
    """
    source = config.teacher
    named = getattr(source, "tokenizer_name_or_path", None)
    path = named or getattr(source, "model_name_or_path", None)
    if path is None:
        return None
    trusts = getattr(source, "trust_remote_code", False)
    if named is not None:
        return load_tokenizer_at(named, "teacher.tokenizer_name_or_path", trusts)
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(resolve_model_path(path), trust_remote_code=trusts)
    except (OSError, ValueError):
        _log.warning(
            "the teacher '%s' has no tokenizer to compare with the student's, so nothing checks "
            "that its tokens are the same ones; teacher.tokenizer_name_or_path can name one",
            path,
        )
        return None
    if found.pad_token_id is None:
        found.pad_token = found.eos_token
    return found


def _writes_whole_texts(rollouts: Any) -> bool:
    """Whether all that a teacher writes is texts of its own, which go back through their bytes."""
    return rollouts.kind == "dataset"


def check_crossing(
    config: TrainConfig, tokenizer: Any, teacher_tokenizer: Any, vocab_size: int
) -> bool:
    """Whether the teacher's tokens are other ones than the student's, which only some parts of a
    run can live with.

    Args:
        config: of the run.
        tokenizer: the student's.
        teacher_tokenizer: the teacher's, or None where nobody knows it.
        vocab_size: the prefix of the vocabulary that the student's law is over.

    Raises:
        ConfigError: they are, and the objective, the rollouts or the teacher need one vocabulary.
    """
    if teacher_tokenizer is None:
        return False
    difference = first_difference(teacher_tokenizer, tokenizer, vocab_size)
    if difference is None:
        return False
    assert config.teacher is not None
    key = {"local": "model_name_or_path", "server": "tokenizer_name_or_path"}
    where = f"teacher.{key.get(config.teacher.kind, 'kind')}"
    objective = config.objective
    if objective.needs_teacher and not objective.crosses_tokenizers:
        raise ConfigError(
            f"{where}: the teacher's vocabulary differs, {difference}; token-by-token losses need "
            f"one vocabulary; objective.kind {objective.kind!r} is one, "
            f"{', '.join(crossing_objectives()) or 'none yet'} cross tokenizers"
        )
    if config.rollouts.needs_teacher and not _writes_whole_texts(config.rollouts):
        raise ConfigError(
            f"rollouts: the teacher's vocabulary differs, {difference}; what it writes for "
            "rollouts.kind "
            f"{config.rollouts.kind!r} would be other tokens than the student's; let the student "
            "write (kind: hf), the data, or the teacher whole texts (kind: dataset, seq_kd)"
        )
    return True


def load_bytes(tokenizer: Any, *, name: str, lossy: bool = False) -> opk.TokenBytes | None:
    """The bytes of a tokenizer's ids; None, with a warning, where it hides them.

    Args:
        tokenizer: of transformers.
        name: the configuration key of its model, for the warning.
        lossy: take a tokenizer that changes a text before it cuts it.
    """
    try:
        return opk.TokenBytes(tokenizer, lossy=lossy)
    except opk.TokenBytesError as error:
        _log.warning("%s: %s", name, error)
        return None


def _words(tokenizer: Any) -> opk.TokenBytes:
    """Of a tokenizer without bytes, names that tell its ids apart."""
    pairs = vocabulary(tokenizer)
    words = [b""] * (pairs[-1][0] + 1)
    for i, token in pairs:
        words[i] = token.encode()
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    return opk.TokenBytes.from_bytes(
        words, roles={role: i for role, i in ids.items() if i is not None}
    )


def load_translator(
    config: TrainConfig,
    tokenizer: Any,
    teacher_tokenizer: Any,
    student: LanguageModel,
    teacher: Any,
    *,
    crosses: bool,
) -> Translator | None:
    """What renders the student's texts for the teacher; None where nothing asks for it.

    Args:
        config: of the run.
        tokenizer, teacher_tokenizer: of both; None for a teacher's that nobody knows.
        student, teacher: the models.
        crosses: what `check_crossing` found.

    Raises:
        ConfigError: a tokenizer hides the bytes of its tokens.
    """
    if teacher is None or not (crosses or config.objective.crosses_tokenizers):
        return None
    if crosses:
        ours = load_bytes(tokenizer, name="student", lossy=True)
        theirs = load_bytes(teacher_tokenizer, name="teacher", lossy=True)
    else:
        ours = theirs = _bytes_or_words(tokenizer)
    if ours is None or theirs is None:
        raise ConfigError(
            f"{'teacher' if ours else 'student'}: the bytes of its tokens are not known, see the "
            "line above, so nothing can be said across tokenizers"
        )
    if teacher_tokenizer is None or (not crosses and chat_template(teacher_tokenizer) is None):
        teacher_tokenizer = tokenizer
    if teacher_tokenizer.eos_token_id is None:
        raise ConfigError("teacher: its tokenizer has no end token, so it cannot say where to stop")
    return Translator(
        tokenizer,
        teacher_tokenizer,
        student_bytes=ours,
        teacher_bytes=theirs,
        add_special_tokens=config.task is None,
        end_ids=end_token_ids(student.model, tokenizer),
        max_positions=teacher.max_positions,
    )


def _bytes_or_words(tokenizer: Any) -> opk.TokenBytes:
    """With one vocabulary no text is encoded anew, so that names of its tokens do."""
    try:
        return opk.TokenBytes(tokenizer, lossy=True)
    except opk.TokenBytesError:
        return _words(tokenizer)
