# SPDX-License-Identifier: Apache-2.0
"""Which teacher a law is of: enough to refuse the laws of another one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from opd.identity import hash_bytes, model_fingerprint, tokenizer_hash

# of a configuration, what says where it came from and not what it is
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "architectures", "use_cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFingerprint:
    """A teacher, its tokenizer and its temperature.

    Attributes:
        model: name or path, for people: a teacher that has moved is still the same.
        config_hash: of the model's configuration.
        weights_hash: of names, shapes, dtypes and some numbers of every parameter.
        tokenizer_hash: of the tokens that the laws are over, and their ids.
        temperature: that divides the logits of the laws.
    """

    model: str
    config_hash: str
    weights_hash: str
    tokenizer_hash: str
    temperature: float

    def digest(self) -> str:
        """32 hex digits of everything but the name."""
        values = {key: value for key, value in asdict(self).items() if key != "model"}
        return hash_bytes(json.dumps(values, sort_keys=True).encode()).hex()

    def differences(self, other: TeacherFingerprint) -> list[str]:
        """What is another one there, in words; empty for the same teacher."""
        words = {
            "config_hash": "the model's configuration",
            "weights_hash": "the weights",
            "tokenizer_hash": "the tokenizer",
            "temperature": "the temperature",
        }
        return [
            f"{words[field.name]} ({getattr(other, field.name)} there, "
            f"{getattr(self, field.name)} here)"
            for field in fields(self)
            if field.name != "model" and getattr(self, field.name) != getattr(other, field.name)
        ]


def fingerprint_of(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TeacherFingerprint:
    """The fingerprint of a transformers model with its tokenizer.

    Args:
        model: its weights are sampled, see `opd.identity`.
        tokenizer: whose ids the laws are over.
        name: for people.
        temperature: of the laws.
        vocab_size: ids that the laws are over; what others stand for does not matter. None: all.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_THE_MODEL}
    return TeacherFingerprint(
        model=name,
        config_hash=hash_bytes(json.dumps(config, sort_keys=True, default=str).encode()).hex(),
        weights_hash=model_fingerprint(model),
        tokenizer_hash=tokenizer_hash(tokenizer, vocab_size),
        temperature=float(temperature),
    )
