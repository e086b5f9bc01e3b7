# SPDX-License-Identifier: Apache-2.0
"""A teacher in this process: frozen weights, hidden states on demand."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opd.batch import Batch
from opd.identity import model_fingerprint
from opd.model import LanguageModel, ModelSource, load_model


class LocalConfig(ModelSource):
    """A Hugging Face causal LM next to the student.

    Attributes:
        tokenizer_name_or_path: default: the model's own, or the student's if it has none.
    """

    tells: ClassVar[frozenset[str]] = frozenset(
        {"hidden", "topk", "given_tokens", "token_logprobs", "samples"}
    )
    takes_temperature: ClassVar[bool] = True

    kind: Literal["local"] = "local"
    tokenizer_name_or_path: str | None = None

    def build(
        self, tokenizer: Any, *, device: str, vocab_size: int | None, workspace_bytes: int
    ) -> LocalTeacher:
        """Load it, freeze it.

        Raises:
            ConfigError: no such model, or one that the fused loss would get wrong.
        """
        model = load_model(self, tokenizer, name="teacher", seed=0, device=device)
        return LocalTeacher(
            model, name="teacher", vocab_size=vocab_size, workspace_bytes=workspace_bytes
        )


class LocalTeacher(LanguageModel):
    """A `LanguageModel` in eval mode whose laws carry no gradient."""

    judges_any_state = True

    def __init__(self, model: Any, **settings: Any) -> None:
        super().__init__(model.eval().requires_grad_(False), **settings)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights."""
        return model_fingerprint(self.model)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """[T, D] final hidden states at the positions whose next token is trained."""
        return super().hidden(batch)
