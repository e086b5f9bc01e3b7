# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from opd.schema import Section, did_you_mean, sentences


class _Inner(Section):
    width: int = Field(1, ge=1)
    name: str = "a"


class _Outer(Section):
    inner: _Inner = _Inner()
    required: float
    many: list[Annotated[float, Field(ge=0)]] = Field([1.0])
    one: Literal[1] = 1
    flag: bool = False
    free: dict[str, Any] = Field({})


def _error(values):
    with pytest.raises(ValidationError) as caught:
        _Outer.model_validate(values)
    return sentences(caught.value, _Outer, "file.yaml", ["inner.width"])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"required": 1, "iner": {}}, "file.yaml: iner: unknown key, did you mean 'inner'?"),
        (
            {"required": 1, "inner": {"zzz": 1}},
            "file.yaml: inner.zzz: unknown key, the keys are name, width",
        ),
        (
            {"required": 1, "width": 2},
            "file.yaml: width: unknown key, did you mean 'inner.width'?",
        ),
        ({}, "file.yaml: required: is required"),
        ({"required": "x"}, "file.yaml: required: must be a number, got 'x'"),
        ({"required": 1, "inner": 3}, "file.yaml: inner: must be a mapping, got 3"),
        ({"required": 1, "inner": {"width": 0}}, "command line: inner.width: must be >= 1, got 0"),
        ({"required": 1, "inner": {"name": 3}}, "file.yaml: inner.name: must be a string, got 3"),
        ({"required": True}, "file.yaml: required: must be a number, got 'true'"),
        (
            {"required": 1, "inner": {"width": True}},
            "command line: inner.width: must be an integer, got 'true'",
        ),
        ({"required": float("nan")}, "file.yaml: required: must be a finite number, got nan"),
        ({"required": "inf"}, "file.yaml: required: must be a finite number, got 'inf'"),
        (
            {"required": 1, "many": [1, False]},
            "file.yaml: many.1: must be a number, got 'false'",
        ),
        (
            {"required": 1, "one": True},
            "file.yaml: one: must be 1, got 'true'",
        ),
    ],
)
def test_every_error_is_one_sentence_with_its_path(values, sentence):
    assert _error(values) == sentence


def test_two_errors_are_two_lines():
    assert len(_error({"inner": {"width": 0}}).splitlines()) == 2


def test_did_you_mean_is_silent_when_nothing_is_close():
    assert did_you_mean("loss", ["learning_rate"]) == ""


def test_numbers_as_yaml_reads_them_and_true_where_it_belongs():
    made = _Outer.model_validate({"required": "1e-4", "flag": True, "free": {"tied": True}})
    assert (made.required, made.flag, made.free) == (1e-4, True, {"tied": True})
