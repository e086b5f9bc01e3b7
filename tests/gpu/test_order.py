# SPDX-License-Identifier: Apache-2.0
"""The order of tests/gpu: what a time limit cuts off is Triton's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from tests.gpu import conftest


def item(name: str, backend: str | None = None, path: Path = conftest.HERE) -> SimpleNamespace:
    """Of a test file here or elsewhere, as pytest has it."""
    made = SimpleNamespace(name=name, path=path / "test_file.py")
    if backend is not None:
        made.callspec = SimpleNamespace(params={"backend": backend})
    return made


def test_cpp_comes_before_triton_and_all_else_stays():
    elsewhere = conftest.HERE.parent / "opd_kernels"
    items = [
        item("other", "triton", elsewhere),
        item("a", "triton"),
        item("b", "cuda"),
        item("c"),
        item("another", "cuda", elsewhere),
        item("d", "triton"),
        item("e", "cuda"),
    ]
    conftest.pytest_collection_modifyitems(items)
    assert [each.name for each in items] == ["other", "b", "c", "e", "another", "a", "d"]
