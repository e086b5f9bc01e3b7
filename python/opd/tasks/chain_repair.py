# SPDX-License-Identifier: Apache-2.0
"""Iterate a hidden map, and repair a wrong value: a task that shows distillation in seconds.

    prompt      S m3 v7 4                     map m3, start at v7, four steps
    completion  v2 3 v9 2 v4 R v1 1 v8 0 E    value, countdown, ...

Here v4 was wrong, R took it back and v1 is right. Each of the eight maps is a fixed random
permutation of the sixteen values: 128 table entries to learn, and every step needs only the tokens
just before it. One slip ruins the answer unless it is repaired.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, START, REPAIR, END = "PAD", "S", "R", "E"
NUM_VALUES, NUM_MAPS, MAX_COUNTDOWN = 16, 8, 16
VALUES = tuple(f"v{i}" for i in range(NUM_VALUES))
MAPS = tuple(f"m{i}" for i in range(NUM_MAPS))
COUNTDOWN = tuple(str(i) for i in range(MAX_COUNTDOWN + 1))
VOCABULARY = (PAD, START, REPAIR, END, *VALUES, *MAPS, *COUNTDOWN)
PROMPT_LENGTH = 4
MAX_REPAIRS = 6

_VALUE_INDEX = {token: i for i, token in enumerate(VALUES)}
_MAP_INDEX = {token: i for i, token in enumerate(MAPS)}
_COUNTDOWN_INDEX = {token: i for i, token in enumerate(COUNTDOWN)}


@dataclass(frozen=True, kw_only=True)
class ChainRepair:
    """The task. The shipped teacher knows the maps of `map_seed=0`.

    Args:
        max_length_n: the longest chain that `rows` asks for, 1 to 16 steps.
        map_seed: draws the eight hidden permutations.
    """

    max_length_n: int = 16
    map_seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.max_length_n <= MAX_COUNTDOWN:
            raise ValueError(
                f"chain_repair: max_length_n must be in 1..{MAX_COUNTDOWN}, got {self.max_length_n}"
            )

    @property
    def max_completion_length(self) -> int:
        """Tokens that hold the longest completion with MAX_REPAIRS repairs in it, E included."""
        return 2 * self.max_length_n + 1 + 2 * MAX_REPAIRS

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per word, 45 in all; E ends a sequence; a foreign word is an error."""
        vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
        tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            eos_token=END,
            padding_side="left",
            clean_up_tokenization_spaces=False,
            model_max_length=PROMPT_LENGTH + 2 * MAX_COUNTDOWN + 1 + 2 * MAX_REPAIRS,
        )

    def step(self, map_name: str, value: str) -> str:
        """The value that `map_name` sends `value` to."""
        return VALUES[_permutations(self.map_seed)[_MAP_INDEX[map_name]][_VALUE_INDEX[value]]]

    def answer(self, prompt: str) -> str:
        """The value after all steps of the prompt.

        Raises:
            ValueError: the text is not `S <map> <value> <steps>`.
        """
        map_name, value, num_steps = _parse_prompt(prompt)
        for _ in range(num_steps):
            value = self.step(map_name, value)
        return value

    def rows(
        self, num_rows: int, *, seed: int, lengths: Sequence[int] | None = None
    ) -> list[dict[str, str]]:
        """Prompts with their answers. Row i has `lengths[i % len(lengths)]` steps.

        Args:
            num_rows: how many.
            seed: the same seed gives the same rows.
            lengths: numbers of steps to go through in turn. Default: 1..max_length_n.

        Returns:
            `{"prompt", "answer"}` each.
        """
        lengths = self._checked_lengths(lengths)
        rng = random.Random(f"chain_repair rows {seed}")
        prompts = (
            f"{START} {_pick(rng, MAPS)} {_pick(rng, VALUES)} {lengths[i % len(lengths)]}"
            for i in range(num_rows)
        )
        return [{"prompt": prompt, "answer": self.answer(prompt)} for prompt in prompts]

    def every_row(self, *, lengths: Sequence[int] | None = None) -> list[dict[str, str]]:
        """All 128 prompts of each length (default 1..max_length_n) with their answers, in order."""
        prompts = (
            f"{START} {map_name} {value} {num_steps}"
            for num_steps in self._checked_lengths(lengths)
            for map_name in MAPS
            for value in VALUES
        )
        return [{"prompt": prompt, "answer": self.answer(prompt)} for prompt in prompts]

    def expert_rows(
        self,
        num_rows: int,
        *,
        seed: int,
        error_rate: float = 0.15,
        lengths: Sequence[int] | None = None,
    ) -> list[dict[str, Any]]:
        """Right answers in which every so often a wrong value is injected and repaired.

        Args:
            num_rows: how many.
            seed: the same seed gives the same rows.
            error_rate: chance of a wrong value in front of each right one, in [0, 1).
                At most MAX_REPAIRS of them in a row.
            lengths: as in `rows`.

        Returns:
            `{"prompt", "completion", "answer", "completion_mask"}` each. The mask has one int per
            token of the completion, 0 on injected wrong values: nobody should learn to write those.
        """
        if not 0.0 <= error_rate < 1.0:
            raise ValueError(f"chain_repair: error_rate must be in [0, 1), got {error_rate}")
        rng = random.Random(f"chain_repair expert {seed}")
        rows: list[dict[str, Any]] = []
        for row in self.rows(num_rows, seed=seed, lengths=lengths):
            tokens, mask = self._expert_completion(row["prompt"], rng, error_rate)
            rows.append({**row, "completion": " ".join(tokens), "completion_mask": mask})
        return rows

    def verify(self, prompt: str, completion: str) -> bool:
        """True if the last value before the first E is the answer; without an E it is not."""
        tokens = completion.split()
        if END not in tokens:
            return False
        values = [token for token in tokens[: tokens.index(END)] if token in _VALUE_INDEX]
        return bool(values) and values[-1] == self.answer(prompt)

    def right_tokens(self, tokens: Sequence[str]) -> list[str | None]:
        """The one right next token after each prefix of prompt + completion, by the rules alone.

        Args:
            tokens: the four prompt tokens and any number of completion tokens.

        Returns:
            Item i is what should follow `tokens[: PROMPT_LENGTH + i]`: one item more than there are
            completion tokens. None where the rules say nothing: after E, and from the first token
            that breaks the form (two values in a row, say). From a wrong value that was not taken
            back the chain goes on.
        """
        map_name, value, countdown = _parse_prompt(" ".join(tokens[:PROMPT_LENGTH]))
        written: str | None = None
        expected: str | None = self.step(map_name, value)
        right: list[str | None] = [expected]
        for token in tokens[PROMPT_LENGTH:]:
            target = self.step(map_name, value)
            if expected is None or token == END:
                expected = None
            elif token in _VALUE_INDEX and written is None and expected == target:
                written = token
                expected = COUNTDOWN[countdown - 1] if token == target else REPAIR
            elif token == REPAIR and written is not None:
                written, expected = None, target
            elif token in _COUNTDOWN_INDEX and written is not None:
                value, written, countdown = written, None, _COUNTDOWN_INDEX[token]
                expected = self.step(map_name, value) if countdown > 0 else END
            else:
                expected = None
            right.append(expected)
        return right

    def _checked_lengths(self, lengths: Sequence[int] | None) -> Sequence[int]:
        if lengths is None:
            return range(1, self.max_length_n + 1)
        if not lengths or not all(1 <= n <= MAX_COUNTDOWN for n in lengths):
            raise ValueError(
                f"chain_repair: lengths must be numbers in 1..{MAX_COUNTDOWN}, at least one, "
                f"got {list(lengths)}"
            )
        return lengths

    def _expert_completion(
        self, prompt: str, rng: random.Random, error_rate: float
    ) -> tuple[list[str], list[int]]:
        map_name, value, num_steps = _parse_prompt(prompt)
        tokens: list[str] = []
        mask: list[int] = []
        repairs_left = MAX_REPAIRS
        for countdown in reversed(range(num_steps)):
            value = self.step(map_name, value)
            while repairs_left > 0 and rng.random() < error_rate:
                wrong = _pick(rng, [other for other in VALUES if other != value])
                tokens += [wrong, REPAIR]
                mask += [0, 1]
                repairs_left -= 1
            tokens += [value, COUNTDOWN[countdown]]
            mask += [1, 1]
        return [*tokens, END], [*mask, 1]


@lru_cache(maxsize=8)
def _permutations(map_seed: int) -> tuple[tuple[int, ...], ...]:
    # sorted by random() keys: Python promises that random() never changes, not that shuffle() does
    rng = random.Random(f"chain_repair maps {map_seed}")
    drawn = []
    for _ in MAPS:
        keys = [rng.random() for _ in VALUES]
        drawn.append(tuple(sorted(range(NUM_VALUES), key=keys.__getitem__)))
    return tuple(drawn)


def _pick(rng: random.Random, items: Sequence[str]) -> str:
    return items[int(rng.random() * len(items))]


def _parse_prompt(prompt: str) -> tuple[str, str, int]:
    words = prompt.split()
    is_prompt = (
        len(words) == PROMPT_LENGTH
        and words[0] == START
        and words[1] in _MAP_INDEX
        and words[2] in _VALUE_INDEX
        and _COUNTDOWN_INDEX.get(words[3], 0) > 0
    )
    if not is_prompt:
        raise ValueError(
            f"chain_repair: prompt must read 'S <m0..m7> <v0..v15> <1..{MAX_COUNTDOWN}>', "
            f"like 'S m3 v7 4', got {prompt!r}"
        )
    return words[1], words[2], int(words[3])
