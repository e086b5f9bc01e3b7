# SPDX-License-Identifier: Apache-2.0
"""Shapes to time: vocabularies of real models with hidden sizes that two CPU cores can bear."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """T tokens, V vocabulary, Ds and Dt hidden sizes."""

    num_tokens: int
    vocab_size: int
    student_hidden_size: int
    teacher_hidden_size: int

    def __str__(self) -> str:
        return (
            f"T{self.num_tokens}-V{self.vocab_size}"
            f"-Ds{self.student_hidden_size}-Dt{self.teacher_hidden_size}"
        )


# the shape: every LM-head cost at a size that two CPU cores finish in under a second
CPU = Shape(512, 32_000, 512, 1024)
# a real vocabulary, few tokens
CPU_LARGE_VOCAB = Shape(128, 151_936, 256, 512)
# GPT-2's vocabulary is no multiple of anything
CPU_AWKWARD = Shape(255, 50_257, 384, 768)
