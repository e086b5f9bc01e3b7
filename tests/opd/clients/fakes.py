# SPDX-License-Identifier: Apache-2.0
"""Servers that answer as vLLM, SGLang and TRL do, from a tiny model in this process.

The shapes are those of their sources and issue threads, as docs/teacher_server.md lists them. Each
takes `edit`, which changes a reply before it is sent, and keeps the requests it got.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from typing import Any

import httpx2
import torch
from torch import Tensor

Edit = Callable[[Any], Any]


class Fake:
    """What the three have in common: laws, errors, and a log of the requests."""

    def __init__(
        self,
        model,
        *,
        temperature: float = 1.0,
        shift: int = 0,
        as_logits: bool = False,
        max_length: int = 64,
        max_logprobs: int = 20,
        edit: Edit = lambda reply: reply,
    ) -> None:
        self.model = model
        self.temperature = temperature
        self.shift = shift
        self.as_logits = as_logits
        self.max_length = max_length
        self.max_logprobs = max_logprobs
        self.edit = edit
        self.requests: list[tuple[str, Any]] = []
        self.failures: list[httpx2.Response | Exception] = []

    @torch.no_grad()
    def law(self, ids: list[int], temperature: float | None = None) -> Tensor:
        """[S, V]: row t is of token t, row 0 is unused."""
        logits = self.model(torch.tensor([ids])).logits[0].float()
        logits = logits / (temperature or self.temperature)
        rows = logits if self.as_logits else logits.log_softmax(-1)
        rows = torch.cat([torch.full_like(rows[:1], math.nan), rows[:-1]])
        return rows.roll(-self.shift, 0) if self.shift else rows

    def best(self, row: Tensor, num: int) -> list[tuple[int, float]]:
        """(id, value), best first."""
        found = row.topk(num)
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def transport(self) -> httpx2.MockTransport:
        """For `Transport(transport=...)`."""
        return httpx2.MockTransport(self._handle)

    def _handle(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content) if request.content else None
        path = request.url.path
        self.requests.append((path, body))
        if self.failures and request.method == "POST":
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return failure
        reply = self.answer(path, body)
        if isinstance(reply, httpx2.Response):
            return reply
        edited = self.edit(reply) if request.method == "POST" else reply
        text = edited if isinstance(edited, bytes) else json.dumps(edited).encode()
        return httpx2.Response(200, content=text)

    def answer(self, path: str, body: Any) -> Any:
        raise NotImplementedError


def refusal(status: int, message: str) -> httpx2.Response:
    """An error as vLLM words it."""
    return httpx2.Response(
        status, json={"error": {"message": message, "type": "BadRequestError", "code": status}}
    )


class FakeVllm(Fake):
    """Prompt log-probs of /v1/completions and /inference/v1/generate."""

    def answer(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "tiny", "max_model_len": self.max_length}]}
        if path == "/tokenize":
            return {"tokens": [1, 2, 3], "count": 3}
        generate = path == "/inference/v1/generate"
        options = body["sampling_params"] if generate else body
        k = options["prompt_logprobs"]
        if k > self.max_logprobs:
            return refusal(
                400,
                f"Requested prompt logprobs of {k}, which is greater than max allowed: "
                f"{self.max_logprobs}",
            )
        prompts = [body["token_ids"]] if generate else body["prompt"]
        for ids in prompts:
            if len(ids) + options["max_tokens"] > self.max_length:
                return refusal(
                    400, f"This model's maximum context length is {self.max_length} tokens."
                )
        lists = [self.prompt_logprobs(ids, k) for ids in prompts]
        if generate:
            return {"request_id": "x", "choices": [{"index": 0}], "prompt_logprobs": lists[0]}
        return {
            "object": "text_completion",
            "choices": [
                {"index": i, "text": "x", "finish_reason": "length", "prompt_logprobs": rows}
                for i, rows in enumerate(lists)
            ],
        }

    def prompt_logprobs(self, ids: list[int], k: int) -> list[Any]:
        """null, then maps with string ids: the token itself first, then the K best."""
        rows: list[Any] = [None]
        for token, row in zip(ids[1:], self.law(ids)[1:], strict=True):
            order = row.argsort(descending=True).tolist()
            picked = dict.fromkeys([token, *order[:k]])
            rows.append(
                {
                    str(i): {
                        "logprob": max(float(row[i]), -9999.0),
                        "rank": order.index(i) + 1,
                        "decoded_token": None if i % 5 == 0 else f"t{i}",
                    }
                    for i in picked
                }
            )
        return rows


class FakeSglang(Fake):
    """/generate with input log-probs, as lists of triples or as flat arrays."""

    flat = True
    echoes_temperature = False
    null_first = True

    def answer(self, path: str, body: Any) -> Any:
        if path == "/get_model_info":
            return {"model_path": "tiny"}
        for ids in body["input_ids"]:
            if len(ids) > self.max_length:
                return refusal(
                    400,
                    f"The input ({len(ids)} tokens) is longer than the model's context length "
                    f"({self.max_length} tokens).",
                )
        results = []
        starts = body["logprob_start_len"]
        for place, ids in enumerate(body["input_ids"]):
            temperature = body.get("input_logprob_temperature", 1.0)
            meta = self.meta(ids, starts[place], body, place, temperature)
            results.append({"text": "", "meta_info": meta})
        return results

    def meta(self, ids, start, body, place, temperature) -> dict[str, Any]:
        applied = temperature if self.echoes_temperature else 1.0
        law = self.law(ids, applied * self.temperature)
        null = start if self.null_first or start == 0 else None
        own = [
            [None if t == null else float(law[t, ids[t]]), ids[t], None]
            for t in range(start, len(ids))
        ]
        meta = {
            "input_token_logprobs": own,
            # an output may be there even when none was asked for
            "output_token_logprobs": [[-0.5, 1, None]],
            "finish_reason": {"type": "length", "length": 0},
        }
        if self.echoes_temperature:
            meta["input_logprob_temperature"] = temperature
        k = body.get("top_logprobs_num", [0])[place]
        if not k:
            return meta
        rows = [
            None if t == null else [[value, i, None] for i, value in self.best(law[t], k)]
            for t in range(start, len(ids))
        ]
        if not (self.flat and body.get("return_flat_raw_top_logprobs")):
            return meta | {"input_top_logprobs": rows}
        prefix = sum(row is None for row in rows)
        values = torch.tensor([[v for v, _, _ in row] for row in rows[prefix:]])
        tokens = torch.tensor([[i for _, i, _ in row] for row in rows[prefix:]])
        name = "input_top_logprobs"
        meta |= {f"{name}_shape": [len(rows), k], f"{name}_null_prefix": prefix}
        if body.get("return_flat_raw_top_logprobs_b64"):
            return meta | {
                f"{name}_val_flat_b64": encode(values.float()),
                f"{name}_idx_flat_b64": encode(tokens.int()),
                f"{name}_val_flat_b64_dtype": "float32",
                f"{name}_idx_flat_b64_dtype": "int32",
            }
        return meta | {
            f"{name}_val_flat": values.flatten().tolist(),
            f"{name}_idx_flat": tokens.flatten().tolist(),
        }


class FakeTrl(Fake):
    """/get_sequence_logprobs/ in both formats."""

    def answer(self, path: str, body: Any) -> Any:
        if path == "/health/":
            return {"status": "ok"}
        k, starts = body["top_logprobs"], body["prompt_lengths"]
        laws = [self.law(ids)[start:] for ids, start in zip(body["sequences"], starts, strict=True)]
        tails = [ids[start:] for ids, start in zip(body["sequences"], starts, strict=True)]
        if body["response_format"] == "json":
            ids, values = [], []
            for law, tail in zip(laws, tails, strict=True):
                picked = [
                    sorted({*dict(self.best(row, k)), token}, key=lambda i, row=row: -row[i])
                    for row, token in zip(law, tail, strict=True)
                ]
                ids.append(picked)
                values.append(
                    [[float(row[i]) for i in p] for row, p in zip(law, picked, strict=True)]
                )
            return {"logprobs": values, "logprob_token_ids": ids}
        longest = max(map(len, tails))
        shape = [len(tails), longest, k]
        values = torch.full(shape, -torch.inf)
        ids = torch.zeros(shape, dtype=torch.int32)
        own = torch.full([*shape[:2], 1], -torch.inf)
        own_ids = torch.zeros([*shape[:2], 1], dtype=torch.int32)
        for b, (law, tail) in enumerate(zip(laws, tails, strict=True)):
            for t, (row, token) in enumerate(zip(law, tail, strict=True)):
                best = self.best(row, k)
                ids[b, t] = torch.tensor([i for i, _ in best])
                values[b, t] = torch.tensor([value for _, value in best])
                own[b, t, 0], own_ids[b, t, 0] = row[token], token
        return {
            "logprobs_b64": encode(values),
            "token_ids_b64": encode(ids),
            "actual_logprobs_b64": encode(own),
            "actual_token_ids_b64": encode(own_ids),
            "shape": shape,
            "completion_lengths": [len(tail) for tail in tails],
        }


def encode(tensor: Tensor) -> str:
    """Base64 of a tensor's bytes."""
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode()
