# SPDX-License-Identifier: Apache-2.0
"""store.json: what every row of a store is, and of which teacher."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from opd.identity import hash_bytes
from opd.store.files import StoreError, write_atomically
from opd.store.fingerprint import TeacherFingerprint
from opd.store.forms import Form, parse_form

FORMAT, VERSION = "opd-teacher-store", 1
NAME = "store.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What all records of a store have in common.

    Attributes:
        fingerprint: of the teacher.
        vocab_size: the laws are over ids in [0, vocab_size).
        form: what is kept of a law.
    """

    fingerprint: TeacherFingerprint
    vocab_size: int
    form: Form

    def values(self) -> dict[str, Any]:
        """What store.json holds besides its format."""
        values = asdict(self)
        form = values.pop("form")
        return {**values, **form}

    def write(self, path: Path) -> bool:
        """Create store.json in a directory; False if there is one."""
        values = {"format": FORMAT, "version": VERSION, **self.values()}
        values["checksum"] = _checksum(values)
        data = json.dumps(values, indent=2).encode()
        return write_atomically(path / NAME, data, replace=False)

    def refuse(self, path: Path, found: Manifest) -> None:
        """Say what is another in a store that is there.

        Raises:
            StoreError: something is.
        """
        differing = self.fingerprint.differences(found.fingerprint)
        here, there = self.values(), found.values()
        words = {"vocab_size": "vocab_size"}
        if type(self.form) is type(found.form):
            words |= self.form.words
        else:
            differing.append(
                f"what is kept of a law ({found.form.in_words()} there, {self.form.in_words()} "
                "here)"
            )
        differing += [
            f"{name} ({there[key]} there, {here[key]} here)"
            for key, name in words.items()
            if here[key] != there[key]
        ]
        if differing:
            raise StoreError(
                f"the store '{path}' holds laws of the teacher {found.fingerprint.model!r} and "
                f"does not fit {self.fingerprint.model!r}, for it differs in "
                f"{', '.join(differing)}; take another path for this teacher"
            )


def read_manifest(path: Path) -> Manifest:
    """The manifest of a store, every value checked.

    Raises:
        StoreError: there is no store, it is damaged, or of a version that this code can't read.
    """
    file = path / NAME
    if not file.is_file():
        raise StoreError(
            f"no teacher store at '{path}': it has no {NAME}; `opd cache build` makes one"
        )
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"'{file}' is damaged: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise StoreError(f"'{file}' is not the {NAME} of a teacher store")
    if values.get("version") != VERSION:
        raise StoreError(
            f"'{file}' is of version {values.get('version')!r}, and this opd reads {VERSION}; use "
            "the opd that wrote it"
        )
    if values.pop("checksum", None) != _checksum(values):
        raise StoreError(f"'{file}' is damaged: its checksum does not fit")
    return _parse(file, values)


def _parse(file: Path, values: dict[str, Any]) -> Manifest:
    teacher = values.get("fingerprint")
    names = {field.name for field in fields(TeacherFingerprint)}
    if not isinstance(teacher, dict) or set(teacher) != names:
        raise StoreError(f"'{file}' is damaged: its fingerprint must have {', '.join(names)}")
    try:
        found = Manifest(
            fingerprint=TeacherFingerprint(**teacher),
            vocab_size=values["vocab_size"],
            form=parse_form(values),
        )
        found.form.check(found.vocab_size)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"'{file}' is damaged: {error}") from None
    return found


def _checksum(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hash_bytes(text.encode()).hex()
