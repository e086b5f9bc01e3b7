# SPDX-License-Identifier: Apache-2.0
"""Small texts about a made-up valley, whose facts recur: who knows them predicts better.

python examples/cross_tokenizer/world.py 12     twelve rows, as they are in sample.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Row = dict[str, str]

NUM_PEOPLE, NUM_TOWNS = 24, 12
CRAFTS = ("weaver", "ferryman", "baker", "smith", "potter", "clerk", "shepherd", "miller")
INSTRUMENTS = ("horn", "lute", "drum", "flute", "fiddle", "bells")
COLOURS = ("green", "red", "white", "blue", "grey", "yellow")
RIVERS = ("the Oder Brook", "the Long Water", "the Ash", "the Three Bends", "the Low Run")
SKIES = ("☀️", "🌧️", "🌫️", "❄️", "🌈", "⛈️")
# name, unit, sign; one with a combining accent, two with a variation selector
GOODS = (
    ("salt", "sack", "🧂"),
    ("fish", "crate", "🐟"),
    ("honey", "jar", "🍯"),
    ("timber", "load", "🪵"),
    ("wool", "bale", "🐑"),
    ("oil", "jar", "🫒"),
    ("tin", "bar", "🔩"),
    ("paper", "ream", "📜"),
    ("glass", "pane", "🪟"),
    ("tea", "chest", "🍵"),
    ("cafe\u0301", "sack", "☕️"),
    ("steel", "bar", "⚔️"),
)
CONSONANTS, VOWELS = "kmnrstpl", "aeiou"
CYRILLIC = dict(zip(CONSONANTS + VOWELS, "кмнрстплаеиоу", strict=True))
GREEK = dict(zip(CONSONANTS + "aeio", "κμνρστπλαειο", strict=True)) | {"u": "ου"}
# places of the same sounds in the Unicode table of Hangul syllables
HANGUL_FIRST = dict(zip(CONSONANTS, (0, 6, 2, 5, 9, 16, 17, 5), strict=True))
HANGUL_SECOND = dict(zip(VOWELS, (0, 5, 20, 8, 13), strict=True))


@dataclass(frozen=True, slots=True)
class Town:
    """What is true of one town."""

    name: str
    river: str
    height: int
    founded: int
    good: str
    sky: str


@dataclass(frozen=True, slots=True)
class Person:
    """What is true of one inhabitant."""

    name: str
    town: str
    craft: str
    born: int
    instrument: str
    boat: str
    friend: str


@dataclass(frozen=True, slots=True)
class Good:
    """What is true of one ware."""

    name: str
    unit: str
    sign: str
    price: int
    town: str


def in_script(name: str, script: str) -> str:
    """A name of consonant and vowel in turn, letter by letter in another script."""
    name = name.lower()
    if script == "hangul":
        pairs = zip(name[::2], name[1::2], strict=True)
        return "".join(
            chr(0xAC00 + (HANGUL_FIRST[first] * 21 + HANGUL_SECOND[second]) * 28)
            for first, second in pairs
        )
    letters = {"cyrillic": CYRILLIC, "greek": GREEK}[script]
    return "".join(letters[letter] for letter in name).capitalize()


class Valley:
    """The facts, which a seed decides, and texts that state some of them in some words."""

    def __init__(self, seed: int = 0) -> None:
        draw = random.Random(f"valley {seed}")
        names = _names(draw, NUM_PEOPLE + NUM_TOWNS)
        people, towns = names[:NUM_PEOPLE], names[NUM_PEOPLE:]
        self.towns = [
            Town(
                name,
                draw.choice(RIVERS),
                draw.randrange(20, 980),
                draw.randrange(100, 300),
                draw.choice(GOODS)[0],
                draw.choice(SKIES),
            )
            for name in towns
        ]
        self.people = [
            Person(
                name,
                draw.choice(towns),
                draw.choice(CRAFTS),
                draw.randrange(301, 400),
                draw.choice(INSTRUMENTS),
                draw.choice(COLOURS),
                draw.choice([other for other in people if other != name]),
            )
            for name in people
        ]
        self.goods = [
            Good(name, unit, sign, draw.randrange(2, 13), draw.choice(towns))
            for name, unit, sign in GOODS
        ]

    def rows(self, num_rows: int, seed: int, *, without: Sequence[Row] = ()) -> list[Row]:
        """Rows of a `prompt` and a `completion`, no two the same.

        Args:
            num_rows: how many.
            seed: of the texts, not of the facts.
            without: rows that none of them may be, those of another split.
        """
        draw = random.Random(f"texts {seed}")
        seen = {(row["prompt"], row["completion"]) for row in without}
        found: list[Row] = []
        kinds: list[Callable[[random.Random], tuple[str, str]]] = [
            self._portrait,
            self._place,
            self._ledger,
            self._program,
            self._spelling,
        ]
        while len(found) < num_rows:
            kind = draw.choices(kinds, weights=(40, 25, 15, 10, 10))[0]
            text = kind(draw)
            if text not in seen:
                seen.add(text)
                found.append({"prompt": text[0], "completion": text[1]})
        return found

    def _portrait(self, draw: random.Random) -> tuple[str, str]:
        one = draw.choice(self.people)
        sentences = [
            _either(draw, f"{one.name} lives in {one.town}.", f"{one.name} is of {one.town}."),
            _either(draw, f"By trade a {one.craft}.", f"Works as a {one.craft}."),
            _either(draw, f"Born in the year {one.born}.", f"Birth: {one.born}."),
            _either(draw, f"Plays the {one.instrument}.", f"Of an evening, the {one.instrument}."),
            _either(draw, f"Sails a {one.boat} boat.", f"The boat is {one.boat}."),
            _either(draw, f"A friend of {one.friend}.", f"Is often seen with {one.friend}."),
            _home_abroad(draw, one),
        ]
        return f"who {one.name}\n", " ".join(_some(draw, sentences, 3, 5)) + "\n"

    def _place(self, draw: random.Random) -> tuple[str, str]:
        one = draw.choice(self.towns)
        here = [person.name for person in self.people if person.town == one.name]
        sentences = [
            _either(draw, f"{one.name} lies on {one.river}.", f"The river here is {one.river}."),
            _either(draw, f"It is {one.height} m above the sea.", f"Height: {one.height} m."),
            _either(draw, f"Founded in {one.founded}.", f"The first stone is of {one.founded}."),
            _either(draw, f"Known for its {one.good}.", f"It sells {one.good} to the valley."),
            _either(draw, f"Sky: {one.sky}.", f"Most days are {one.sky}."),
        ]
        if here:
            sentences.append(f"Ask for {draw.choice(here)}.")
        return f"town {one.name}\n", " ".join(_some(draw, sentences, 3, 5)) + "\n"

    def _ledger(self, draw: random.Random) -> tuple[str, str]:
        lines = []
        for one in draw.sample(self.goods, draw.randrange(2, 5)):
            count = draw.randrange(2, 10)
            lines.append(f"{count} {one.unit}s {one.name} {one.sign} = {count * one.price}")
        return f"ledger {draw.choice(self.towns).name}\n", "\n".join(lines) + "\n"

    def _program(self, draw: random.Random) -> tuple[str, str]:
        some = draw.sample(self.goods, draw.randrange(1, 4))
        one, count = some[0], draw.randrange(2, 10)
        prices = ", ".join(f'"{good.name}": {good.price}' for good in some)
        body = _either(
            draw,
            f'cost = {{{prices}}}\nprint({count} * cost["{one.name}"])  # {count * one.price}\n',
            f"def cost(n):\n    return {one.price} * n  # {one.unit}s from {one.town}\n\n"
            f"assert cost({count}) == {count * one.price}\n",
        )
        return f"code {one.name}\n", body

    def _spelling(self, draw: random.Random) -> tuple[str, str]:
        names = draw.sample([one.name for one in (*self.people, *self.towns)], 2)
        scripts = ["cyrillic", "greek", "hangul"]
        draw.shuffle(scripts)
        lines = [" · ".join(in_script(name, script) for script in scripts) for name in names]
        return f"names {' '.join(names)}\n", "\n".join(lines) + "\n"


def _home_abroad(draw: random.Random, one: Person) -> str:
    """Where a person lives, said in another language."""
    script = draw.choice(("cyrillic", "greek", "hangul"))
    who, where = in_script(one.name, script), in_script(one.town, script)
    if script == "cyrillic":
        return f"{who} живёт в городе {where}."
    return f"{who} ζει: {where}." if script == "greek" else f"{who}는 {where}에 산다."


def _either(draw: random.Random, usual: str, other: str) -> str:
    return usual if draw.random() < 0.75 else other


def _some(draw: random.Random, sentences: list[str], fewest: int, most: int) -> list[str]:
    """Some of them, mostly in the order in which they stand."""
    places = draw.sample(range(len(sentences)), draw.randint(fewest, most))
    if draw.random() < 0.8:
        places.sort()
    return [sentences[place] for place in places]


def _names(draw: random.Random, count: int) -> list[str]:
    def syllables() -> Iterator[str]:
        while True:
            yield draw.choice(CONSONANTS) + draw.choice(VOWELS)

    source, found = syllables(), []
    while len(found) < count:
        name = "".join(next(source) for _ in range(draw.choice((2, 3)))).capitalize()
        if name not in found:
            found.append(name)
    return found


def as_lines(rows: Sequence[Row]) -> str:
    """JSON lines, other scripts as they are."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(as_lines(Valley().rows(int(sys.argv[1]), seed=0)))
