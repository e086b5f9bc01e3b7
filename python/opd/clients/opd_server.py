# SPDX-License-Identifier: Apache-2.0
"""Client of `opd serve-teacher`: binary, checksummed, any temperature, any ids, hidden states."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from opd.batch import Head
from opd.clients.http_client import Ask, HttpClient, Item
from opd.clients.laws import finite_logprobs
from opd.clients.opd_replies import (
    ZERO_LOGPROB,
    checked_topk,
    is_number,
    query_width,
    read_lists,
    read_message,
    read_object,
)
from opd.clients.protocol import BadReply, Scores, TeacherInfo, TeacherRefused
from opd.clients.transport import Deadline
from opd.wire import CONTENT_TYPE, DTYPES, JSON_TYPE, Message, WireError, checksum_of, pack

_PATHS = {"topk": "topk", "token_logprobs": "token_logprobs", "hidden": "hidden_states"}


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one request may ask for; `/v1/info` says it."""

    max_request_tokens: int
    max_sequences: int
    max_query_ids: int
    hidden_size: int
    hidden_rank: int
    dtype: str


class OpdClient(HttpClient):
    """Of a server of ours.

    Args:
        url: as in `HttpClient`.
        wire: "binary"; "json" is many times slower and there to be compared with.
        law_size: the laws are over the first so many tokens, where the heads of student and
            teacher are padded differently. Default: all that the server has.
        hidden_dtype: of hidden states on the wire; default: of the teacher's weights, which loses
            nothing. `Scores.hidden` has the dtype of `head()` in any case.
        projected: take hidden states on the leading singular directions of the head
            (`opd serve-teacher --hidden-rank`), with a bound of the error of each row.
        settings: of `HttpClient`.
    """

    kind = "opd"
    takes_query_ids = True
    takes_empty_completions = True

    def __init__(
        self,
        url: str,
        *,
        wire: Literal["binary", "json"] = "binary",
        law_size: int | None = None,
        hidden_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        projected: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(url, **settings)
        for name, value, known in (
            ("wire", wire, ("binary", "json")),
            ("hidden_dtype", hidden_dtype, (*DTYPES, None)),
        ):
            if value not in known:
                raise TeacherRefused(
                    f"teacher server: {name} must be one of {known}, got {value!r}"
                )
        self._wire = wire
        self._law_size = law_size
        self._hidden_dtype = hidden_dtype
        self._projected = projected
        self._limits: ServerLimits | None = None
        self._head: Head | None = None
        self._head_lock = threading.Lock()

    def check(self, tokenizer: Any) -> list[str]:
        """As `HttpClient.check`: by the hash of the tokens that the laws are over."""
        from opd.identity import tokenizer_hash

        info = self.info()
        theirs, size = info.tokenizer_hash, self._law_size or info.vocab_size
        if theirs is None:
            return [
                f"teacher {self.url}: its model came without a tokenizer, so nothing checks that "
                "its tokens are the student's"
            ]
        ours = tokenizer_hash(tokenizer, size)
        if theirs != ours:
            raise TeacherRefused(
                f"teacher {self.url}: the first {size} tokens of its tokenizer have the hash "
                f"{theirs} and the student's have {ours}; token-by-token losses need one vocabulary"
            )
        return []

    def head(self) -> Head:
        """What makes logits of `Scores.hidden`; sent once, checked against the teacher's hash.

        Raises:
            TeacherRefused: `projected` without `--hidden-rank` on the server.
            TeacherUnavailable, BadReply: as `score`.
        """
        with self._head_lock:
            if self._head is None:
                self._head = self._ask_head()
            return self._head

    def _ask_head(self) -> Head:
        deadline = Deadline(self._deadline_s)
        info = self._known_info(deadline)
        self._check_rank()
        path = "/v1/head?projected=1" if self._projected else "/v1/head"
        message: Message = self.transport.call(
            "GET", path, deadline=deadline, parse=lambda body, _: read_message(body, self.url)
        )
        where = f"teacher {self.url}: /v1/head"
        meta = message.meta
        self._check_fingerprint(meta, info, where)
        weight = message.tensors.get("weight", torch.empty(0))
        bias = message.tensors.get("bias")
        softcap, scale = meta.get("softcap"), meta.get("logit_scale")
        fits = (
            weight.dim() == 2
            and weight.dtype in DTYPES.values()
            and weight.shape == (info.vocab_size, self._hidden_width())
            and bool(weight.isfinite().all())
            and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype))
            and (softcap is None or is_number(softcap))
            and is_number(scale)
        )
        if not fits:
            raise BadReply(
                f"{where}: must be a head of {info.vocab_size} tokens on {self._hidden_width()}, "
                f"got {weight.dtype} {list(weight.shape)}, softcap {softcap!r:.50}, "
                f"logit_scale {scale!r:.50}"
            )
        return Head(weight, bias, softcap, float(scale))

    def _ask_info(self, deadline: Deadline) -> TeacherInfo:
        where = f"teacher {self.url}: /v1/info"

        def parse(body: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
            found = read_object(body, headers, where)
            wanted = {
                "vocab_size": int,
                "max_length": int,
                "max_topk": int,
                "fingerprint": str,
                "model": str,
                "max_request_tokens": int,
                "max_sequences": int,
                "max_query_ids": int,
                "hidden_size": int,
                "hidden_rank": int,
                "dtype": str,
            }
            for key, kind in wanted.items():
                if type(found.get(key)) is not kind or (kind is int and found[key] < 0):
                    raise BadReply(
                        f"{where}: {key} must be {kind.__name__}, got {found.get(key)!r}; is this "
                        "an `opd serve-teacher` of this release?"
                    )
            return found

        path = "/v1/info"
        if self._law_size is not None and self._law_size > 0:
            path += f"?vocab_size={self._law_size}"
        found = self.transport.call("GET", path, deadline=deadline, parse=parse)
        self._limits = ServerLimits(
            found["max_request_tokens"],
            max(1, found["max_sequences"]),
            found["max_query_ids"],
            found["hidden_size"],
            found["hidden_rank"],
            found["dtype"],
        )
        if found["dtype"] not in DTYPES:
            raise BadReply(f"{where}: dtype must be one of {[*DTYPES]}, got {found['dtype']!r:.50}")
        law_size = self._law_size
        if law_size is not None and not 0 < law_size <= found["vocab_size"]:
            raise TeacherRefused(
                f"teacher {self.url}: has {found['vocab_size']} tokens, got law_size {law_size}"
            )
        if self.vocab_size is not None and (law_size or found["vocab_size"]) > self.vocab_size:
            raise TeacherRefused(
                f"teacher {self.url}: its laws are over {law_size or found['vocab_size']} tokens "
                f"and the student has {self.vocab_size}; if only their padding differs, set "
                f"law_size to the tokens that both have"
            )
        return TeacherInfo(
            model=found["model"],
            vocab_size=found["vocab_size"],
            max_length=found["max_length"],
            max_topk=found["max_topk"],
            tokenizer_hash=found.get("tokenizer_hash"),
            fingerprint=found["fingerprint"],
            signals=frozenset(_PATHS),
            takes_temperature=True,
        )

    def _parts(self, items: Sequence[Item], ask: Ask) -> list[list[Item]]:
        limits = self._limits
        assert limits is not None
        self._max_tokens = min(self._max_tokens, limits.max_request_tokens)
        widest = max((0 if i.query_ids is None else i.query_ids.shape[1] for i in items), default=0)
        if widest > limits.max_query_ids:
            raise TeacherRefused(
                f"teacher {self.url}: takes at most {limits.max_query_ids} query_ids per position, "
                f"got {widest}"
            )
        if ask.signal == "hidden":
            self._check_rank()
            if self._wire == "json":
                raise TeacherRefused("score: hidden states travel in the binary format only")
        cut = []
        for part in super()._parts(items, ask):
            # one request has one width of query_ids
            run: list[Item] = []
            for item in part:
                if run and (
                    len(run) == limits.max_sequences or query_width(run[0]) != query_width(item)
                ):
                    cut.append(run)
                    run = []
                run.append(item)
            cut.append(run)
        return cut

    def _check_rank(self) -> None:
        if self._projected and not (self._limits and self._limits.hidden_rank):
            raise TeacherRefused(
                f"teacher {self.url}: sends no projected hidden states; start it with "
                "--hidden-rank, or set projected to false"
            )

    def _score_part(self, items: Sequence[Item], ask: Ask, deadline: Deadline) -> list[Scores]:
        path = f"/v1/{_PATHS[ask.signal]}"
        where = f"teacher {self.url}: {path}"
        is_binary = self._wire == "binary"
        body = self._binary_body(items, ask) if is_binary else self._json_body(items, ask)
        checksum = checksum_of(body) if is_binary else zlib.crc32(body)

        def parse(reply: bytes, headers: Mapping[str, str]) -> list[Scores]:
            if is_binary:
                message = read_message(reply, self.url)
                self._check_meta(message.meta, ask, checksum, where)
                try:
                    return self._read_tensors(message, items, ask, where)
                except WireError as error:
                    raise BadReply(f"{where}: {error}") from None
            found = read_object(reply, headers, where)
            self._check_meta(found.get("meta"), ask, checksum, where)
            return read_lists(found, items, ask, where, self._law_vocab())

        return self.transport.call(
            "POST",
            path,
            deadline=deadline,
            parse=parse,
            content=body,
            headers={"content-type": CONTENT_TYPE if is_binary else JSON_TYPE},
        )

    def _meta(self, ask: Ask) -> dict[str, Any]:
        meta: dict[str, Any] = {"temperature": ask.temperature}
        if self._law_size is not None:
            meta["vocab_size"] = self._law_size
        if ask.signal == "topk":
            meta["num_topk"] = ask.num_topk
        if ask.signal == "hidden":
            meta |= {"dtype": self._wire_dtype(), "projected": self._projected}
        return meta

    def _hidden_width(self) -> int:
        assert self._limits is not None
        return self._limits.hidden_rank if self._projected else self._limits.hidden_size

    def _wire_dtype(self) -> str:
        assert self._limits is not None
        return self._hidden_dtype or self._limits.dtype

    def _binary_body(self, items: Sequence[Item], ask: Ask) -> bytes:
        tensors = {
            "token_ids": torch.cat([item.ids for item in items]).int(),
            "lengths": torch.tensor([len(item.ids) for item in items], dtype=torch.int32),
            "starts": torch.tensor([item.start for item in items], dtype=torch.int32),
        }
        if items[0].query_ids is not None:
            queries = [item.query_ids for item in items if item.query_ids is not None]
            tensors["query_ids"] = torch.cat(queries).int()
        return pack(tensors, self._meta(ask))

    def _json_body(self, items: Sequence[Item], ask: Ask) -> bytes:
        body = self._meta(ask) | {
            "sequences": [item.ids.tolist() for item in items],
            "starts": [item.start for item in items],
        }
        if items[0].query_ids is not None:
            body["query_ids"] = [
                item.query_ids.tolist() for item in items if item.query_ids is not None
            ]
        return json.dumps(body).encode()

    def _law_vocab(self) -> int:
        assert self._info is not None and self._info.vocab_size is not None
        return self._law_size or self._info.vocab_size

    def _check_meta(self, meta: Any, ask: Ask, checksum: int, where: str) -> None:
        if not isinstance(meta, dict):
            raise BadReply(f"{where}: its reply has no metadata")
        info = self._info
        assert info is not None
        self._check_fingerprint(meta, info, where)
        for key, want in (
            ("signal", ask.signal),
            ("temperature", ask.temperature),
            ("vocab_size", self._law_vocab()),
            ("request_crc32", checksum),
        ):
            if meta.get(key) != want:
                raise BadReply(
                    f"{where}: its reply has {key} {meta.get(key)!r}, asked was {want!r}"
                )

    def _check_fingerprint(self, meta: dict[str, Any], info: TeacherInfo, where: str) -> None:
        if meta.get("fingerprint") != info.fingerprint:
            raise BadReply(
                f"{where}: answers with the weights {meta.get('fingerprint')!r}, earlier they were "
                f"{info.fingerprint!r}; the server was restarted with another model or dtype"
            )

    def _read_tensors(
        self, message: Message, items: Sequence[Item], ask: Ask, where: str
    ) -> list[Scores]:
        sizes = [item.num_rows for item in items]
        rows, width = sum(sizes), query_width(items[0])
        columns: dict[str, Tensor] = {}
        if ask.signal == "hidden":
            assert self._limits is not None
            dtype = self._wire_dtype()
            hidden = message.take("hidden", DTYPES[dtype], (rows, self._hidden_width()))
            if not hidden.isfinite().all():
                raise BadReply(f"{where}: a hidden state is not finite in {dtype}")
            # as the head has it: kernels take both in one dtype
            head_dtype = "float32" if self._projected else self._limits.dtype
            columns["hidden"] = hidden.to(DTYPES[head_dtype])
            if self._projected:
                error = message.take("logit_error", torch.float32, (rows,))
                if not (error.isfinite().all() and (error >= 0).all()):
                    raise BadReply(f"{where}: a bound of an error is not finite")
                columns["logit_error"] = error
        else:
            found = message.take("token_logprobs", torch.float32, (rows, width))
            columns["token_logprobs"] = finite_logprobs(found, where, zero=ZERO_LOGPROB)
            entropy = message.take("entropy", torch.float32, (rows,))
            if not (entropy.isfinite().all() and (entropy >= -1e-4).all()):
                raise BadReply(f"{where}: an entropy is negative or not finite")
            columns["entropy"] = entropy
        if ask.signal == "topk":
            ids = message.take("ids", torch.int32, (rows, ask.num_topk))
            logprobs = message.take("logprobs", torch.float32, (rows, ask.num_topk))
            tail = message.take("tail_logprob", torch.float32, (rows,))
            columns |= checked_topk(ids, logprobs, tail, self._law_vocab(), where)
        pieces = {name: tensor.split(sizes) for name, tensor in columns.items()}
        return [
            Scores(token_ids=item.completion, **{name: parts[i] for name, parts in pieces.items()})
            for i, item in enumerate(items)
        ]
