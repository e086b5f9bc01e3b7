# SPDX-License-Identifier: Apache-2.0
"""The JSON of a run: its schema as dataclasses, a check of it, and a file that is never half."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import types
import typing
from pathlib import Path

SCHEMA_VERSION = 1
PARTS = ("build", "smoke", "tests", "sanitizer", "ceilings", "ours", "peers", "ncu")
# an outcome of a check: a finding that may be the tool's
TO_JUDGE = "to be judged"
STATUSES = ("passed", "failed", "timed out", "stopped", "skipped", "running")


class SchemaError(ValueError):
    """A results file that is not what this version writes."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler reports of one kernel."""

    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


@dataclasses.dataclass(frozen=True)
class Check:
    """A test, a sanitizer's verdict, or a case that was left out."""

    name: str
    outcome: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What the machine does without us: a copy in GB/s, or GEMMs in TFLOP/s."""

    name: str
    ms: float
    best_ms: float
    rate: float
    unit: str
    shape: str


@dataclasses.dataclass(frozen=True)
class Timing:
    """A step of one contestant, beside the bare GEMMs and beside ours of the same turns."""

    case: str
    contestant: str
    divergence: str
    head: str
    ms: float
    best_ms: float
    rounds: int
    floor_ms: float
    ratio_to_floor: float
    ours_ms: float | None
    ratio_ours: float | None
    peak_bytes: int | None
    allowed_bytes: int | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class RowKernel:
    """A kernel that reads and writes rows, against the copy of the same run."""

    name: str
    backend: str
    ms: float
    bytes: int
    gb_per_s: float
    of_copy: float


@dataclasses.dataclass(frozen=True)
class Precision:
    """Relative error, in the Frobenius norm, of gradients against float64.

    `of_eager`: the worse over that of eager on operands widened to float32; `of_rounded`: over that
    of eager on 16-bit operands, whose logits are rounded. None if that eager did not run before.
    """

    contestant: str
    divergence: str
    law: str
    grad_hidden: float
    grad_weight: float
    of_eager: float | None
    of_rounded: float | None = None


@dataclasses.dataclass(frozen=True)
class Counter:
    """One hardware counter of one launch."""

    kernel: str
    launch: int
    metric: str
    unit: str
    value: float


ROWS = {
    row.__name__: row for row in (Kernel, Check, Ceiling, Timing, RowKernel, Precision, Counter)
}


@dataclasses.dataclass(frozen=True)
class Part:
    """How a part ended, and what it measured by then."""

    status: str
    seconds: float
    budget_s: float
    reason: str
    rows: list[dict[str, typing.Any]]


@dataclasses.dataclass(frozen=True)
class Goal:
    """A promise and what was measured; `met` is None where nothing was."""

    goal: str
    sense: str
    limit: float
    measured: float | None
    met: bool | None
    note: str


@dataclasses.dataclass(frozen=True)
class Results:
    """A whole file."""

    schema_version: int
    dry_run: bool
    date: str
    commit: str
    dirty: bool | None
    machine: dict[str, typing.Any]
    versions: dict[str, typing.Any]
    parts: dict[str, Part]
    goals: list[Goal]


def row_of(row: object) -> dict[str, typing.Any]:
    """A row as it is kept: its fields, and of which kind it is."""
    return {"kind": type(row).__name__, **dataclasses.asdict(row)}


def rows_of(results: dict, part: str, kind: type) -> list:
    """The rows of a kind in a part, as objects."""
    rows = results["parts"].get(part, {}).get("rows", ())
    wanted = [row for row in rows if row["kind"] == kind.__name__]
    return [kind(**{key: row[key] for key in row if key != "kind"}) for row in wanted]


def check(results: object) -> None:
    """Raises for the first thing that is not as the dataclasses above say.

    Raises:
        SchemaError: where, what was expected and what was found.
    """
    _check(results, Results, "results")
    if results["schema_version"] != SCHEMA_VERSION:
        raise SchemaError(
            f"schema_version: expected {SCHEMA_VERSION}, got {results['schema_version']}; run "
            "benchmarks/gpu.sh of this version again"
        )
    for name, part in results["parts"].items():
        where = f"parts.{name}"
        if name not in PARTS:
            raise SchemaError(f"{where}: expected one of {', '.join(PARTS)}")
        if part["status"] not in STATUSES:
            raise SchemaError(f"{where}.status: expected one of {', '.join(STATUSES)}")
        for index, row in enumerate(part["rows"]):
            check_row(row, f"{where}.rows[{index}]")


def check_row(row: object, where: str = "row") -> None:
    """One row of any kind.

    Raises:
        SchemaError: as `check`.
    """
    kind = row.get("kind") if isinstance(row, dict) else None
    if kind not in ROWS:
        raise SchemaError(f"{where}.kind: expected one of {', '.join(ROWS)}, got {kind!r}")
    _check({key: row[key] for key in row if key != "kind"}, ROWS[kind], where)


def _check(value: object, expected: object, where: str) -> None:
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if expected is typing.Any:
        return
    if dataclasses.is_dataclass(expected):
        _check(value, dict, where)
        fields = typing.get_type_hints(expected)
        for name in value.keys() ^ fields.keys():
            state = "missing" if name in fields else "unknown"
            raise SchemaError(f"{where}.{name}: {state}")
        for name, field in fields.items():
            _check(value[name], field, f"{where}.{name}")
    elif origin is types.UnionType:
        if value is not None:
            _check(value, inner[0], where)
    elif origin is list:
        _check(value, list, where)
        for index, item in enumerate(value):
            _check(item, inner[0], f"{where}[{index}]")
    elif origin is dict:
        _check(value, dict, where)
        for key, item in value.items():
            _check(item, inner[1], f"{where}.{key}")
    else:
        accepted = (int, float) if expected is float else expected
        is_flag = isinstance(value, bool) and expected is not bool
        if is_flag or not isinstance(value, accepted):
            raise SchemaError(f"{where}: expected {expected.__name__}, got {value!r}")


def load(path: Path) -> dict:
    """A checked results file.

    Raises:
        SchemaError: it is none.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SchemaError(f"{path}: expected JSON, {error}") from None
    try:
        check(results)
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from None
    return results


def save(results: dict, path: Path) -> None:
    """Replaces the file in one step: whoever is killed leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        json.dump(results, file, indent=1, allow_nan=False)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
