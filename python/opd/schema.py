# SPDX-License-Identifier: Apache-2.0
"""What every configuration section shares: strictness, and errors that are one sentence each."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

_REQUIREMENTS = {
    "int": "must be an integer",
    "float": "must be a number",
    "finite": "must be a finite number",
    "bool": "must be true or false",
    "string": "must be a string",
    "list": "must be a list",
    "tuple": "must be a list",
    "dict": "must be a mapping",
    "model": "must be a mapping",
}


class ConfigError(ValueError):
    """A configuration that cannot run: one sentence a line, each with the path of the key."""


class Section(BaseModel):
    """A frozen configuration section in which an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, values: Any) -> Any:
        # pydantic would read true as 1; YAML reads 1e-4 as a string, so strict mode is no way out
        if not isinstance(values, dict):
            return values
        return {
            key: _without_bool(value)
            if key in cls.model_fields and _is_number(cls.model_fields[key].annotation)
            else value
            for key, value in values.items()
        }


def _without_bool(value: Any) -> Any:
    """The words for true and false, which are no numbers, in their place."""
    if isinstance(value, list | tuple):
        return [_without_bool(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else value


def _is_number(annotation: Any) -> bool:
    types = set(_leaves(annotation))
    return bool not in types and not types.isdisjoint((int, float))


def did_you_mean(word: object, candidates: Iterable[str]) -> str:
    """`, did you mean 'x'?` when a candidate is close to the word, else an empty string."""
    close = difflib.get_close_matches(str(word), list(candidates), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def sentences(
    error: ValidationError, root: type[BaseModel], source: str, overridden: Iterable[str] = ()
) -> str:
    """Every error of a pydantic validation as `source: path: sentence`, one a line.

    Args:
        error: of the validation.
        root: the model that was validated.
        source: where the values came from.
        overridden: paths that came from the command line instead.
    """
    paths = set(overridden)
    lines = []
    for item in error.errors():
        sentence = _sentence(item, root)
        is_override = sentence.partition(": ")[0] in paths
        lines.append(f"{'command line' if is_override else source}: {sentence}")
    return "\n".join(lines)


def _sentence(item: Any, root: type[BaseModel]) -> str:
    path, parent = _locate(item["loc"], root)
    context, got = item.get("ctx", {}), item["input"]
    kind = item["type"]
    if kind == "extra_forbidden":
        names = [*parent.model_fields] if parent else []
        hint = did_you_mean(item["loc"][-1], names) or _elsewhere(path, root)
        return f"{path}: unknown key{hint or ', the keys are ' + ', '.join(sorted(names))}"
    if kind == "missing":
        return f"{path}: is required"
    if kind == "union_tag_not_found":
        return f"{path}.kind: is required"
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        hint = did_you_mean(context["tag"], tags)
        return f"{path}.kind: must be one of {', '.join(tags)}, got {context['tag']!r}{hint}"
    if kind == "literal_error":
        hint = did_you_mean(got, [word.strip("' ") for word in context["expected"].split(",")])
        return f"{path}: must be {context['expected']}, got {got!r}{hint}"
    if kind == "value_error":
        return f"{path}: {context['error']}" if path else str(context["error"])
    bounds = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<"}
    bounds["less_than_equal"] = "<="
    if kind in bounds:
        limit = next(iter(context.values()))
        return f"{path}: must be {bounds[kind]} {limit:g}, got {got!r}"
    requirement = _REQUIREMENTS.get(kind.split("_")[0])
    if requirement:
        return f"{path}: {requirement}, got {got!r}"
    return f"{path}: {item['msg'][0].lower()}{item['msg'][1:]}, got {got!r}"


def _elsewhere(key: str, root: type[BaseModel]) -> str:
    """`, did you mean 'section.key'?` for a key of a section that stands outside of it."""
    found = [
        f"{name}.{key}"
        for name, field in root.model_fields.items()
        if any(key in section.model_fields for section in _sections(field.annotation))
    ]
    return f", did you mean {found[0]!r}?" if found else ""


def _locate(
    loc: tuple[int | str, ...], root: type[BaseModel]
) -> tuple[str, type[BaseModel] | None]:
    """The dotted path, without the tags that pydantic puts in for unions, and its section."""
    words: list[str] = []
    section: type[BaseModel] | None = root
    parent: type[BaseModel] | None = root
    choices: dict[str, type[BaseModel]] = {}
    for part in loc:
        if choices and part in choices:
            section, choices = choices[str(part)], {}
            continue
        parent = section
        words.append(str(part))
        field = section.model_fields.get(str(part)) if section else None
        options = list(_sections(field.annotation)) if field else []
        choices = {
            option.model_fields["kind"].default: option
            for option in options
            if "kind" in option.model_fields
        }
        section = options[0] if len(options) == 1 else None
    return ".".join(words), parent


def _leaves(annotation: Any) -> Iterator[type]:
    """The types in an annotation; those of its values for a literal."""
    arguments = typing.get_args(annotation)
    for argument in arguments:
        yield from _leaves(argument)
    if not arguments:
        yield annotation if isinstance(annotation, type) else type(annotation)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections(argument)
