# SPDX-License-Identifier: Apache-2.0
"""Teachers: things with a `law(batch)`. To add one: a file with a config that builds it, a line."""

from typing import Protocol

from opd.batch import Batch, Law
from opd.teachers.local import LocalConfig, LocalTeacher

TEACHERS = {"local": LocalConfig}

TeacherConfig = LocalConfig


class Teacher(Protocol):
    """What the loop asks of a teacher."""

    @property
    def num_parameters(self) -> int: ...

    def law(self, batch: Batch) -> Law: ...


__all__ = ["TEACHERS", "LocalConfig", "LocalTeacher", "Teacher", "TeacherConfig"]
