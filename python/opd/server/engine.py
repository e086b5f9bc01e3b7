# SPDX-License-Identifier: Apache-2.0
"""Sequences in, laws out. The only file of the server that touches the model, in one thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import opd_kernels as opk
from opd.batch import Trajectory, collate
from opd.identity import model_fingerprint, tokenizer_hash
from opd.model import LanguageModel
from opd.server.projection import Projection, project_head
from opd.server.requests import Limits, ScoreRequest

Rows = dict[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One sequence of a request."""

    request: ScoreRequest
    index: int

    @property
    def ids(self) -> Tensor:
        """[S] int64."""
        return self.request.sequences[self.index]

    @property
    def start(self) -> int:
        """Its first scored token."""
        return self.request.starts[self.index]

    @property
    def num_rows(self) -> int:
        """C."""
        return len(self.ids) - self.start


class Engine:
    """A frozen model that scores sequences.

    Args:
        model: split at its head.
        name: for `/v1/info`.
        tokenizer: for its hash; None: unknown.
        hidden_rank: directions of projected hidden states; 0: none.
        limits: of requests, as keywords of `Limits`, over what the model gives.

    Raises:
        ValueError: a hidden_rank that the head has not.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        name: str,
        tokenizer: Any = None,
        hidden_rank: int = 0,
        **limits: int,
    ) -> None:
        self._model = model
        self.name = name
        self.fingerprint = model_fingerprint(model.model)
        self._tokenizer = tokenizer
        self._hashes: dict[int, str] = {}
        self.projection: Projection | None = None
        if hidden_rank:
            self.projection = project_head(model.head, hidden_rank)
        weight = model.lm_head_weight
        config = model.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or 1 << 20
        length = min(limits.pop("max_length", 0) or positions, positions)
        vocab_size = model.vocab_size or weight.shape[0]
        given = Limits(
            vocab_size=vocab_size,
            input_size=model.model.get_input_embeddings().weight.shape[0],
            max_length=length,
            hidden_rank=hidden_rank,
            hidden_size=weight.shape[1],
            **limits,
        )
        self.limits = replace(
            given,
            max_topk=min(given.max_topk, vocab_size),
            # the longest sequence must fit into a request
            max_request_tokens=max(given.max_request_tokens, length),
        )

    def tokenizer_hash(self, vocab_size: int) -> str | None:
        """Of the first tokens; None of a model that came without."""
        if self._tokenizer is None:
            return None
        if vocab_size not in self._hashes:
            # a client asks for one size; whoever asks for many keeps no memory busy
            self._hashes = {vocab_size: tokenizer_hash(self._tokenizer, vocab_size)}
        return self._hashes[vocab_size]

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(self._model.lm_head_weight.dtype).removeprefix("torch.")

    def head_tensors(self, *, projected: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and metadata of `/v1/head`."""
        if projected:
            assert self.projection is not None
            head = self.projection.head
        else:
            head = self._model.head
        rows = self.limits.vocab_size
        tensors = {"weight": head.weight.detach()[:rows]}
        if head.bias is not None:
            tensors["bias"] = head.bias.detach()[:rows]
        meta = {
            "fingerprint": self.fingerprint,
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
        }
        return tensors, meta

    @torch.inference_mode()
    def score(self, pieces: Sequence[Piece]) -> list[Rows]:
        """Of each sequence what its request asks for, [C, ...] on the CPU, in one forward pass."""
        scored = [piece for piece in pieces if piece.num_rows]
        hidden = self._hidden(scored) if scored else torch.empty(0)
        sizes = [piece.num_rows for piece in scored]
        parts = dict(zip(map(id, scored), hidden.split(sizes) if scored else (), strict=True))
        found: dict[int, Rows] = {}
        for request in dict.fromkeys(piece.request for piece in pieces):
            mine = [piece for piece in pieces if piece.request is request]
            found |= self._answer(request, mine, parts)
        return [found[id(piece)] for piece in pieces]

    def _hidden(self, pieces: Sequence[Piece]) -> Tensor:
        """[R, D], the rows of each sequence behind those of the one before it."""
        trajectories = [
            Trajectory(
                ids=piece.ids,
                prompt_length=piece.start,
                loss_mask=torch.arange(len(piece.ids)) >= piece.start,
            )
            for piece in pieces
        ]
        batch = collate(trajectories, pad_id=0, device=self._model.device)
        return self._model.hidden(batch)

    def _answer(
        self, request: ScoreRequest, pieces: Sequence[Piece], parts: dict[int, Tensor]
    ) -> dict[int, Rows]:
        """The rows of one request's sequences, in one call of the head."""
        sizes = [piece.num_rows for piece in pieces]
        blank = torch.empty(0, self.limits.hidden_size)
        with_rows = [parts[id(piece)] for piece in pieces if piece.num_rows]
        rows = self._rows(request, pieces, torch.cat(with_rows) if with_rows else blank)
        pieces_of = {name: tensor.cpu().split(sizes) for name, tensor in rows.items()}
        return {
            id(piece): {name: split[i] for name, split in pieces_of.items()}
            for i, piece in enumerate(pieces)
        }

    def _rows(self, request: ScoreRequest, pieces: Sequence[Piece], hidden: Tensor) -> Rows:
        if request.signal == "hidden":
            if not request.is_projected:
                return {"hidden": hidden.to(request.dtype)}
            assert self.projection is not None
            basis = self.projection.basis
            sent, error = self.projection.project(hidden.to(basis.device), request.dtype)
            return {"hidden": sent, "logit_error": error}
        if request.query_ids is None:
            queries = torch.cat([piece.ids[piece.start :] for piece in pieces])[:, None]
        else:
            queries = torch.cat([request.query_ids[piece.index] for piece in pieces])
        num_topk = request.num_topk if request.signal == "topk" else 1
        if not len(hidden):
            return _no_rows(request.signal, num_topk, queries.shape[1])
        head = self._model.head
        found = opk.fused_linear_topk(
            hidden,
            head.weight,
            num_topk=num_topk,
            token_ids=queries.to(hidden.device),
            temperature=request.temperature,
            **head.options(),
            vocab_size=request.vocab_size,
            workspace_bytes=self._model.workspace_bytes,
        )
        rows = {"token_logprobs": found.token_logprobs.float(), "entropy": found.entropy.float()}
        if request.signal == "topk":
            rows |= {
                "ids": found.ids,
                "logprobs": found.logprobs.float(),
                "tail_logprob": found.tail_logprob.float(),
            }
        return rows


def _no_rows(signal: str, num_topk: int, num_ids: int) -> Rows:
    rows = {"token_logprobs": torch.empty(0, num_ids), "entropy": torch.empty(0)}
    if signal == "topk":
        ids = torch.empty(0, num_topk, dtype=torch.int32)
        rows |= {
            "ids": ids,
            "logprobs": torch.empty(0, num_topk),
            "tail_logprob": torch.empty(0),
        }
    return rows
