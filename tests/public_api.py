# SPDX-License-Identifier: Apache-2.0
"""Public names and parameters; `python -m tests.public_api > tests/public_api.txt` lists them."""

from __future__ import annotations

import inspect
import types

import opd_kernels
from opd_kernels import divergences, reference, targets


def describe() -> list[str]:
    """`module.name(parameters)` for functions; fields or bases after a colon for classes."""
    lines = []
    for module in (opd_kernels, divergences, targets, reference):
        for name in sorted(module.__all__):
            value = getattr(module, name)
            if not isinstance(value, types.ModuleType):
                lines.append(f"{module.__name__}.{name}{_shape(value)}")
    return lines


def _shape(value: object) -> str:
    if inspect.isclass(value):
        fields = getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", None)
        if fields:
            return f": {', '.join(fields)}"
        return f": {', '.join(base.__name__ for base in value.__bases__)}"
    if callable(value):
        parts, keyword_only = [], False
        for parameter in inspect.signature(value).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
                parts.append("*")
                keyword_only = True
            default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
            stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
            parts.append(f"{stars.get(parameter.kind, '')}{parameter.name}{default}")
        return f"({', '.join(parts)})"
    return f": {', '.join(value)}"


if __name__ == "__main__":
    print("\n".join(describe()))
