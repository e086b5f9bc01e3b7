# SPDX-License-Identifier: Apache-2.0
"""Client of a stock vLLM server: the log-probabilities of a prompt, as JSON.

Start it with `vllm serve MODEL --max-logprobs K` (its default K is 20). Log-probabilities of a
prompt are taken before the sampler's temperature, so only temperature 1 is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from opd.clients.http_client import Ask, HttpClient, Item
from opd.clients.openai_rows import prompt_scores
from opd.clients.protocol import BadReply, Scores, TeacherInfo, TeacherRefused
from opd.clients.reading import read_json
from opd.clients.transport import Deadline, HttpRefused

# words of several scripts, digits, spaces and code: tokenizers that agree on these rarely differ
PROBE_TEXT = (
    "The naïve café, 12345 + 67 = ?\n\tdef f(x): return x**2  # Привет, 你好, こんにちは 🙂"
)


class VllmClient(HttpClient):
    """Of a vLLM server.

    Args:
        model: its served name; default: the first that it lists.
        endpoint: "completions" is /v1/completions, many sequences a request; "generate" is
            /inference/v1/generate of newer servers, one sequence a request, which need not turn
            every candidate into text.
        settings: as in `HttpClient`.
    """

    kind = "vllm"

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        endpoint: Literal["completions", "generate"] = "completions",
        **settings: Any,
    ) -> None:
        super().__init__(url, **settings)
        if endpoint not in ("completions", "generate"):
            raise TeacherRefused(
                f"teacher server: endpoint must be 'completions' or 'generate', got {endpoint!r}"
            )
        self._model = model
        self._endpoint = endpoint

    def check(self, tokenizer: Any) -> list[str]:
        """As `HttpClient.check`: by the tokens of one line of text, if the server has /tokenize."""
        model = self.info().model
        body = {"model": model, "prompt": PROBE_TEXT, "add_special_tokens": False}
        where = f"teacher {self.url}: /tokenize"
        try:
            found = self._post_json(
                "/tokenize",
                body,
                Deadline(self._deadline_s),
                lambda reply, _: read_json(reply, where),
            )
        except HttpRefused:
            return super().check(tokenizer)
        theirs = found.get("tokens")
        ours = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
        if theirs != ours:
            raise TeacherRefused(
                f"teacher {self.url}: makes other tokens of a line of text than the student's "
                f"tokenizer, {str(theirs)[:80]} there and {str(ours)[:80]} here; token-by-token "
                "losses need one vocabulary"
            )
        return []

    def _ask_info(self, deadline: Deadline) -> TeacherInfo:
        where = f"teacher {self.url}: /v1/models"

        def parse(body: bytes, _: Mapping[str, str]) -> list[dict[str, Any]]:
            models = read_json(body, where).get("data")
            if not isinstance(models, list) or not all(
                isinstance(model, dict) and isinstance(model.get("id"), str) for model in models
            ):
                raise BadReply(f"{where}: must list models with an id, got {models!r:.100}")
            return models

        models = self.transport.call("GET", "/v1/models", deadline=deadline, parse=parse)
        names = [model["id"] for model in models]
        if not names or (self._model is not None and self._model not in names):
            raise TeacherRefused(
                f"teacher {self.url}: serves {', '.join(names) or 'no model'}, asked was "
                f"{self._model or 'any'}"
            )
        chosen = models[names.index(self._model) if self._model else 0]
        length = chosen.get("max_model_len")
        # one token is always generated
        longest = length - 1 if type(length) is int and length > 1 else None
        return TeacherInfo(model=chosen["id"], max_length=longest)

    def _parts(self, items: Sequence[Item], ask: Ask) -> list[list[Item]]:
        if self._endpoint == "generate":
            return [[item] for item in items]
        return super()._parts(items, ask)

    def _score_part(
        self, items: Sequence[Item], ask: Ask, deadline: Deadline
    ) -> Sequence[Scores | None]:
        # so that processed log-probabilities, where a server sends them, are the raw ones
        sampling = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": -1}
        sampling["prompt_logprobs"] = ask.num_topk if ask.signal == "topk" else 0
        info = self._known_info(deadline)
        if self._endpoint == "generate":
            path = "/inference/v1/generate"
            body = {
                "model": info.model,
                "token_ids": items[0].ids.tolist(),
                "sampling_params": sampling | {"detokenize": False},
            }
        else:
            path = "/v1/completions"
            prompts = [item.ids.tolist() for item in items]
            body = {"model": info.model, "prompt": prompts} | sampling
        where = f"teacher {self.url}: {path}"

        def parse(reply: bytes, _: Mapping[str, str]) -> Sequence[Scores | None]:
            found = read_json(reply, where)
            lists = [found.get("prompt_logprobs")]
            if self._endpoint == "completions":
                lists = _choices(found, len(items), where)
            return [
                None
                if rows is None
                else prompt_scores(rows, item, ask, vocab_size=self.vocab_size, where=where)
                for item, rows in zip(items, lists, strict=True)
            ]

        try:
            return self._post_json(path, body, deadline, parse)
        except HttpRefused as error:
            raise self._explained(error, ask) from None

    def _explained(self, error: HttpRefused, ask: Ask) -> TeacherRefused:
        """What to do about the refusals that people meet."""
        reason = error.reason.lower()
        if "logprobs" in reason and ("max" in reason or "greater" in reason):
            return TeacherRefused(
                f"teacher {self.url}: num_topk is {ask.num_topk}, above the server's limit; start "
                f"it with --max-logprobs {ask.num_topk} ({error.reason})"
            )
        if "context length" in reason or "max_model_len" in reason or "too long" in reason:
            return TeacherRefused(
                f"teacher {self.url}: a sequence is longer than the server takes; shorten prompts "
                f"or completions, or start it with a larger --max-model-len ({error.reason})"
            )
        if error.status in (403, 404) and self._endpoint == "generate":
            return TeacherRefused(
                f"teacher {self.url}: has no /inference/v1/generate; start it with "
                f"--enable-scale-out, or set endpoint to 'completions' ({error.reason})"
            )
        return error


def _choices(found: dict[str, Any], num_items: int, where: str) -> list[Any]:
    """`prompt_logprobs` by the index of the prompt; None for one that the reply leaves out."""
    choices = found.get("choices")
    if not isinstance(choices, list):
        raise BadReply(f"{where}: the reply must have a list of choices")
    lists: list[Any] = [None] * num_items
    seen: set[int] = set()
    for place, choice in enumerate(choices):
        index = choice.get("index", place) if isinstance(choice, dict) else None
        if type(index) is not int or not 0 <= index < num_items or index in seen:
            raise BadReply(
                f"{where}: choices must have the indices 0 to {num_items - 1} once each, got "
                f"{index!r:.50}"
            )
        seen.add(index)
        lists[index] = choice.get("prompt_logprobs")
    return lists
