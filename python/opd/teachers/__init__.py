# SPDX-License-Identifier: Apache-2.0
"""Teachers: things with a `law(batch)`. To add one: a file with a config that builds it, a line."""

from typing import Protocol

from opd.batch import Batch, Law
from opd.sparse_law import DrawnLaw, SparseLaw
from opd.teachers.cached import CachedConfig, CachedTeacher
from opd.teachers.local import LocalConfig, LocalTeacher
from opd.teachers.server import ServerConfig, ServerTeacher

TEACHERS = {"local": LocalConfig, "server": ServerConfig, "cached": CachedConfig}

TeacherConfig = LocalConfig | ServerConfig | CachedConfig


class Teacher(Protocol):
    """What the loop asks of a teacher.

    Its config says what its laws tell (`tells`: `hidden`, `topk`, `given_tokens`,
    `token_logprobs`, `samples`), and whether at any temperature (`takes_temperature`); a teacher
    that knows better has a `tells` of its own. One that is no `LanguageModel` has a
    `check_fits(student, tokenizer)`, which refuses another vocabulary. `fingerprint` is
    `opd.identity.model_fingerprint` of its weights wherever they are, None where nobody says.
    """

    # False: only at states that it was asked about before, so not in evaluation
    judges_any_state: bool

    @property
    def fingerprint(self) -> str | None: ...

    @property
    def num_parameters(self) -> int: ...

    @property
    def max_positions(self) -> int | None: ...

    def law(self, batch: Batch) -> Law | SparseLaw | DrawnLaw: ...


__all__ = [
    "TEACHERS",
    "CachedConfig",
    "CachedTeacher",
    "LocalConfig",
    "LocalTeacher",
    "ServerConfig",
    "ServerTeacher",
    "Teacher",
    "TeacherConfig",
]
