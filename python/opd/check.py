# SPDX-License-Identifier: Apache-2.0
"""What a run would train on, before it does: tokenizers, prompts, alignment, a probe of zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import opd_kernels as opk
from opd.assembly import (
    check_completions,
    close_teacher,
    load_run_tokenizer,
    load_student,
    load_teacher_side,
    prepare_process,
)
from opd.batch import Prompt, Trajectory
from opd.config import TrainConfig
from opd.data import chat_template, is_chat, render_prompt, tokenize_rows, training_rows
from opd.probe import probe
from opd.rollouts import DatasetRollouts, Sampling, sample
from opd.rollouts.hf import end_token_ids
from opd.tokens import load_bytes, load_teacher_tokenizer
from opd.translation import (
    LEAST_ALIGNED,
    Translated,
    Translator,
    end_ids_of,
    text_behind_a_turn,
    turn_end_id,
)

ROLES = ("bos", "eos", "eot", "pad", "unk")
_PROBE_TRAJECTORIES = 4
_PROBE_TOKENS = 32
# of special tokens without a role; some tokenizers reserve hundreds
_MOST_NAMES = 8
STAGES = ("student and tokenizers", "teacher", "data", "vocabularies", "alignment", "probe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One thing that was looked at, as rows of words."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(slots=True, kw_only=True)
class Findings:
    """Of one configuration.

    Attributes:
        tables: what there is.
        wrong: what would train wrongly, a sentence each.
        doubts: what deserves a look.
    """

    tables: list[Table] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    def add(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table, if it has rows."""
        words = [[_word(cell) for cell in row] for row in rows]
        if words:
            self.tables.append(Table(title=title, header=list(header), rows=words))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check(
    config: TrainConfig,
    *,
    num_rows: int = 64,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Findings:
    """Load the parts of a run, look at them and at some rows; nothing is written.

    Args:
        config: of the run.
        num_rows: rows of the data to look at.
        on_stage: called with the name of what comes next, one of `STAGES`.

    Raises:
        ConfigError: two parts do not fit, as in training.
    """
    prepare_process(config)
    on_stage(STAGES[0])
    tokenizer = load_run_tokenizer(config)
    student = load_student(config, tokenizer)
    student.model.eval()
    on_stage(STAGES[1])
    teacher, translator = load_teacher_side(config, tokenizer, student)
    on_stage(STAGES[2])
    rows = training_rows(
        config.task, config.data, with_completions=config.rollouts.needs_completions
    )
    prompts = tokenize_rows(
        rows[:num_rows],
        tokenizer,
        add_special_tokens=config.task is None,
        max_prompt_length=config.data.max_prompt_length,
    )
    check_completions(config, student, prompts)
    trajectories, source = _texts(config, tokenizer, student, teacher, translator, prompts)
    findings = Findings()
    on_stage(STAGES[3])
    theirs = translator.teacher if translator else teacher and load_teacher_tokenizer(config)
    ours = (
        translator.student_bytes
        if translator
        else load_bytes(tokenizer, name="student", lossy=True)
    )
    their_bytes = translator and translator.teacher_bytes
    if theirs is not None and theirs is not tokenizer and their_bytes in (None, ours):
        # of one vocabulary the roles may still differ
        their_bytes = load_bytes(theirs, name="teacher", lossy=True) or their_bytes
    view = _View(
        config, tokenizer, student, teacher, translator, ours, theirs, their_bytes, findings
    )
    view.tokenizers()
    view.specials(prompts[0].row)
    view.prompts(prompts)
    translated = translator and translator(trajectories)
    view.vocabularies(trajectories, translated)
    on_stage(STAGES[4])
    view.alignment(trajectories, translated, source)
    on_stage(STAGES[5])
    view.probe(trajectories)
    close_teacher(teacher)
    return findings


def _texts(
    config: TrainConfig,
    tokenizer: Any,
    student: Any,
    teacher: Any,
    translator: Translator | None,
    prompts: Sequence[Prompt],
) -> tuple[list[Trajectory], str]:
    """Completions to look at, by who writes those that are trained on: the data, a teacher that
    writes whole texts, else the student."""
    rollouts = config.rollouts
    limit = rollouts.max_completion_length
    if rollouts.needs_completions and not config.objective.needs_behaviour_logprobs:
        return DatasetRollouts(limit).collect(prompts, 0), "completions of the data"
    few = prompts[: 2 * _PROBE_TRAJECTORIES]
    sampling = Sampling(
        max_completion_length=min(limit, _PROBE_TOKENS),
        temperature=getattr(config.objective, "temperature", 1.0),
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if rollouts.kind == "dataset" and rollouts.seq_kd:
            changes = {"max_completion_length": sampling.max_completion_length}
            writing = rollouts.model_copy(update=changes)
            engine = writing.build(student, teacher, tokenizer, translator=translator)
            return engine.collect(few, 0), "completions of the teacher"
        return sample(student, tokenizer, few, sampling), "completions of the student"


@dataclass(frozen=True, slots=True)
class _View:
    """The parts of a run, and what is found in them."""

    config: TrainConfig
    tokenizer: Any
    student: Any
    teacher: Any
    translator: Translator | None
    # the student's bytes, the teacher's tokenizer and its bytes, None where nobody knows them
    ours: opk.TokenBytes | None
    theirs: Any
    their_bytes: opk.TokenBytes | None
    findings: Findings

    def sides(self) -> Iterator[tuple[str, Any, opk.TokenBytes | None]]:
        """Name, tokenizer and bytes of the student and of a teacher that reads its own tokens."""
        yield "student", self.tokenizer, self.ours
        if self.translator is not None:
            yield "teacher", self.theirs, self.their_bytes

    @property
    def crosses(self) -> bool:
        """Whether the teacher's tokens are other ones."""
        return self.translator is not None and not self.translator.has_one_vocabulary

    def tokenizers(self) -> None:
        """Kind, size, and whether bytes are exact."""
        rows = []
        for name, tokenizer, found in self.sides():
            known = ("unknown", "no") if found is None else (found.kind, found.is_exact)
            rows.append([name, type(tokenizer).__name__, len(tokenizer), *known])
            if self.crosses and not found.is_exact:
                self.findings.doubts.append(
                    f"{name}: its tokenizer changes texts before it cuts them, so what differs "
                    "between both tokenizations is left out of the loss"
                )
        self.findings.add("tokenizers", ["", "class", "tokens", "kind", "exact bytes"], rows)

    def specials(self, row: Mapping[str, Any]) -> None:
        """Tokens by role, and the ends of both models."""
        sides = [side for side in self.sides() if side[2] is not None]
        rows = []
        for role in ROLES:
            cells = [
                " ".join(tokenizer.convert_ids_to_tokens(list(found.roles.get(role, ()))))
                for _, tokenizer, found in sides
            ]
            if any(cells):
                rows.append([role, *(cell or "none" for cell in cells)])
        others = [_without_role(tokenizer, found) for _, tokenizer, found in sides]
        if any(others):
            rows.append(["no role: text", *(cell or "none" for cell in others)])
        self.findings.add("special tokens by role", ["", *(name for name, *_ in sides)], rows)
        for name, tokenizer, found in sides:
            if not end_ids_of(tokenizer, found):
                self.findings.wrong.append(
                    f"{name}: its tokenizer has no end token, so no text of it ever ends"
                )
        self._ends(is_chat(row))

    def _ends(self, in_chats: bool) -> None:
        """Where a model's generation stops, and where its template says that a turn does."""
        ends = {}
        for name, tokenizer, found in self.sides():
            model = getattr(self.student if name == "student" else self.teacher, "model", None)
            if model is None or found is None or not hasattr(model, "generation_config"):
                continue
            ends[name] = end_token_ids(model, tokenizer)
            end = turn_end_id(tokenizer, found)
            if in_chats and text_behind_a_turn(tokenizer) and end not in ends[name]:
                self.findings.wrong.append(
                    f"{name}: its chat template ends a turn with "
                    f"{tokenizer.convert_ids_to_tokens(end)!r}, its generation_config stops at "
                    f"{tokenizer.convert_ids_to_tokens(ends[name])}: its turns would not end"
                )
            if in_chats and name == "student" and end != tokenizer.eos_token_id:
                self.findings.doubts.append(
                    f"student: its chat template ends a turn with "
                    f"{tokenizer.convert_ids_to_tokens(end)!r}, and completions of the data end "
                    f"with {tokenizer.eos_token!r}, its tokenizer's end token"
                )
        if self.crosses or self.theirs is None or "student" not in ends:
            return
        end = self.theirs.eos_token_id
        if in_chats:
            end = turn_end_id(self.theirs, self.their_bytes or self.ours)
        if end not in ends["student"]:
            words = self.tokenizer.convert_ids_to_tokens([end, *ends["student"]])
            self.findings.wrong.append(
                f"the teacher ends what it writes with {words[0]!r}, the student stops at "
                f"{words[1:]}: it would be taught never to end"
            )

    def prompts(self, prompts: Sequence[Prompt]) -> None:
        """The first row as both models read it."""
        first = prompts[0]
        ids = {"student": first.ids.tolist()}
        if self.translator is not None:
            ids["teacher"] = self.translator.prompt(first.row)
        for name, tokenizer in (("student", self.tokenizer), ("teacher", self.theirs)):
            if name in ids:
                self._check_end_of_prompt(name, tokenizer, ids[name])
        if self.translator is None and (
            not is_chat(first.row) or chat_template(self.theirs) is None
        ):
            return
        rows = []
        for name, tokenizer in (("student", self.tokenizer), ("teacher", self.theirs)):
            tail = text_behind_a_turn(tokenizer) if is_chat(first.row) else None
            if self.translator is None:
                # by the template that nobody applies, to see what it would change
                text = render_prompt(first.row, tokenizer, name)[0]
            else:
                text = tokenizer.decode(ids[name])
            rows.append([name, repr(text), "" if tail is None else repr(tail)])
        self.findings.add("the first prompt", ["", "as text", "behind a turn"], rows)
        if self.translator is None and rows[0][1:] != rows[1][1:]:
            self.findings.doubts.append(
                "the chat templates differ, and the teacher reads prompts as the student's writes "
                "them; objectives that cross tokenizers let it read its own"
            )

    def _check_end_of_prompt(self, name: str, tokenizer: Any, ids: list[int]) -> None:
        if ids[-1] == tokenizer.eos_token_id:
            self.findings.wrong.append(
                f"{name}: its tokenizer puts {tokenizer.eos_token!r} behind every prompt, so the "
                "model continues a text that has ended"
            )

    def vocabularies(
        self, trajectories: Sequence[Trajectory], translated: Translated | None
    ) -> None:
        """How many tokens both have, and how much of the texts they are."""
        if translated is None or not self.crosses:
            return
        shared = opk.project_vocab(self.translator.student_bytes, self.translator.teacher_bytes)
        rows = []
        for name, ids, known, coverage in (
            ("student", _trained(trajectories), shared.student_ids, shared.student_coverage),
            (
                "teacher",
                _trained(translated.trajectories),
                shared.teacher_ids,
                shared.teacher_coverage,
            ),
        ):
            used = float(torch.isin(ids, known).double().mean()) if len(ids) else 0.0
            rows.append([name, len(known), f"{coverage:.1%}", f"{used:.1%}"])
        header = ["", "shared tokens", "of its vocabulary", "of its tokens in the texts"]
        self.findings.add("shared vocabulary", header, rows)
        if not len(shared.student_ids):
            self.findings.wrong.append("the two vocabularies have no token in common")

    def alignment(
        self, trajectories: Sequence[Trajectory], translated: Translated | None, source: str
    ) -> None:
        """Bytes in aligned chunks, tokens in a chunk."""
        if translated is None:
            return
        aligned, num_bytes = translated.is_aligned, translated.num_bytes
        total = int(num_bytes.sum())
        share = float(num_bytes[aligned].sum()) / max(1, total)
        found = translated.metrics()
        rows = [
            [
                f"{len(trajectories)} {source}",
                total,
                f"{share:.2%}",
                len(aligned),
                f"{found['chunks/student_tokens']:.2f}",
                f"{found['chunks/teacher_tokens']:.2f}",
            ]
        ]
        header = ["texts", "bytes", "aligned", "chunks", "student's tokens", "teacher's tokens"]
        self.findings.add("alignment", header, rows)
        if not bool(aligned.any()):
            self.findings.wrong.append("no chunk is aligned: the loss would be 0")
        elif total and share < LEAST_ALIGNED:
            self.findings.wrong.append(
                f"only {share:.1%} of the bytes are in aligned chunks; the rest has no loss"
            )

    def probe(self, trajectories: Sequence[Trajectory]) -> None:
        """The objective where the teacher is the student."""
        if not self.config.objective.needs_teacher:
            return
        trained = [trajectory for trajectory in trajectories if trajectory.loss_mask.any()]
        if not trained:
            self.findings.wrong.append("none of the texts has a token that is trained")
            return
        rows = []
        for line in probe(
            self.config,
            self.tokenizer,
            self.student,
            trained[:_PROBE_TRAJECTORIES],
            self.ours,
        ):
            rows.append([line.name, line.loss, line.gradient, line.verdict])
            if line.is_wrong:
                self.findings.wrong.append(
                    f"objective.kind {self.config.objective.kind!r}: with the student as its own "
                    f"teacher ({line.name}) its gradient is {line.gradient} of that of the "
                    "likelihood, and should vanish"
                )
        header = ["the student as its own teacher", "loss, nats", "gradient", "verdict"]
        self.findings.add("probe of zero", header, rows)


def _without_role(tokenizer: Any, found: opk.TokenBytes) -> str:
    """Special tokens that are read as the text of their names."""
    known = {i for ids in found.roles.values() for i in ids}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = [str(token) for i, token in added.items() if token.special and i not in known]
    rest = len(names) - _MOST_NAMES
    return " ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _trained(trajectories: Sequence[Trajectory]) -> torch.Tensor:
    return torch.cat([trajectory.ids[trajectory.loss_mask] for trajectory in trajectories])


def _word(cell: Any) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)
