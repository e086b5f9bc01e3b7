# SPDX-License-Identifier: Apache-2.0
"""The demo of two tokenizers: its texts, vocabularies, arms and bits per byte, and its words."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opd.config import load_config

FOLDER = Path(__file__).parents[2] / "examples" / "cross_tokenizer"
sys.path.insert(0, str(FOLDER))

import crossing  # noqa: E402
import table  # noqa: E402
import train_arm  # noqa: E402
import vocabularies  # noqa: E402
import world  # noqa: E402

ARMS = sorted(path.stem for path in (FOLDER / "arms").glob("*.yaml"))
CROSSING = (*crossing.OFF_POLICY, *crossing.ON_POLICY)
# what makes an arm: nothing else may differ
APART = {"output_dir", "teacher", "objective"}


@pytest.fixture(scope="module")
def rows() -> list[world.Row]:
    return world.Valley().rows(300, seed=0)


@pytest.fixture(scope="module")
def tokenizers(rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    vocabularies.write([row["prompt"] + row["completion"] for row in rows], folder)
    return folder


def test_the_sample_is_the_beginning_of_the_texts_of_seed_0(rows):
    assert (FOLDER / "sample.jsonl").read_text(encoding="utf-8") == world.as_lines(rows[:40])


def test_held_out_texts_are_other_texts_about_the_same_facts(rows):
    valley = world.Valley()
    held_out = valley.rows(300, seed=1, without=rows)
    assert not {tuple(row.values()) for row in rows} & {tuple(row.values()) for row in held_out}
    born = {one.name: one.born for one in valley.people}
    stated = [
        (row["prompt"].split()[1], re.search(r"year (\d+)|Birth: (\d+)", row["completion"]))
        for row in (*rows, *held_out)
        if row["prompt"].startswith("who")
    ]
    found = [(who, int(match[1] or match[2])) for who, match in stated if match]
    assert len(found) > 50 and all(born[who] == year for who, year in found)


def test_sums_in_the_ledgers_are_right(rows):
    prices = {good.name: good.price for good in world.Valley().goods}
    ledgers = [row["completion"] for row in rows if row["prompt"].startswith("ledger")]
    lines = [line.split() for ledger in ledgers for line in ledger.splitlines()]
    assert len(lines) > 50
    assert all(int(line[0]) * prices[line[2]] == int(line[-1]) for line in lines)


def test_names_are_spelled_letter_by_letter():
    assert world.in_script("Kalunu", "cyrillic") == "Калуну"
    assert world.in_script("Kalunu", "greek") == "Καλουνου"
    assert world.in_script("Kanu", "hangul") == "가누"


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_tokenizers_keep_every_byte_and_are_the_same_at_each_run(rows, tokenizers, side, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizers / side)
    sizes = {"teacher": vocabularies.TEACHER_SIZE, "student": vocabularies.STUDENT_SIZE}
    assert len(tokenizer) == sizes[side]
    for row in rows:
        ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == row["completion"]
    train = getattr(vocabularies, f"train_{side}_tokenizer")
    train([row["prompt"] + row["completion"] for row in rows]).save_pretrained(tmp_path)
    files = [folder / "tokenizer.json" for folder in (tokenizers / side, tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_arm_of_the_demo_has_a_file_and_a_label():
    assert {*crossing.ARMS, train_arm.WARM, *train_arm.TEACHERS} == set(ARMS) == set(table.LABELS)


@pytest.mark.parametrize("arm", CROSSING)
def test_an_arm_is_two_lines_away_from_a_teacher_with_the_same_tokenizer(arm):
    base = "on_policy_same_tokenizer" if arm in crossing.ON_POLICY else "same_tokenizer"
    ours, theirs = (load_config(FOLDER / "arms" / f"{name}.yaml") for name in (arm, base))
    assert ours.output_dir == f"runs/cross_tokenizer/{arm}"
    assert ours.objective.crosses_tokenizers
    assert ours.model_dump(exclude=APART) == theirs.model_dump(exclude=APART)
    path = "runs/cross_tokenizer/teacher"
    assert ours.teacher == theirs.teacher.model_copy(update={"model_name_or_path": path})


@pytest.mark.parametrize("arm", crossing.ARMS)
def test_arms_cost_the_student_the_same(arm):
    config = load_config(FOLDER / "arms" / f"{arm}.yaml")
    cost_per_token = {"dataset": 3, "mixture": 3.5}[config.rollouts.kind]
    cost = cost_per_token * config.max_steps * config.num_trajectories
    assert cost == pytest.approx(600 * 32, rel=0.01)


def test_jobs_start_with_the_teachers_then_slow_arms(tmp_path):
    planned = crossing.plan_jobs(tmp_path, ("alm", "same_tokenizer", "on_policy_alm"), (0, 1))
    assert [(job.arm, job.needs) for job in planned if job.seed == 1] == [
        ("teacher", None),
        ("warm_sft", "teacher"),
        ("twin_teacher", "warm_sft"),
        ("on_policy_alm", "warm_sft"),
        ("alm", "warm_sft"),
        ("same_tokenizer", "twin_teacher"),
    ]


def test_bits_per_byte_of_a_uniform_law_counts_its_tokens(rows, tokenizers, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizers / "student")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=160,
        )
    )
    torch.nn.init.zeros_(model.lm_head.weight)
    for part in (model, tokenizer):
        part.save_pretrained(train_arm.arm_dir(tmp_path, "alm"))
    (tmp_path / train_arm.HELD_OUT).write_text(world.as_lines(rows[:120]), encoding="utf-8")
    found = train_arm.bits_per_byte(tmp_path, "alm")
    for kind in ("all", "names"):
        those = [row for row in rows[:120] if kind == "all" or row["prompt"].startswith(kind)]
        texts = [row["completion"] for row in those]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        # one more for the end
        num_tokens = sum(len(some) + 1 for some in ids)
        wanted = num_tokens * math.log2(480) / sum(len(text.encode()) for text in texts)
        assert found[kind] == pytest.approx(wanted, rel=1e-6)
    assert set(found) == {"all", *table.KINDS}


def test_jobs_run_one_after_the_other_and_a_second_time_not_at_all(tmp_path, monkeypatch):
    load = train_arm.arm_config

    def short(root: Path, arm: str, seed: int):
        small = {"max_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 4}
        return load(root, arm, seed).model_copy(update=small)

    monkeypatch.setattr(train_arm, "arm_config", short)
    # an untrained teacher ends no text
    monkeypatch.setattr(train_arm, "MAX_WRITTEN", 8)
    for name, count in (("NUM_TEXTS", 120), ("NUM_STUDENT_TEXTS", 20), ("NUM_HELD_OUT", 20)):
        monkeypatch.setattr(train_arm, name, count)
    threads = torch.get_num_threads()
    for arm in ("teacher", "warm_sft", "alm"):
        result = train_arm.run(tmp_path, arm, 0)
        assert result["bits_per_byte"]["all"] > 0
    torch.set_num_threads(threads)
    assert len((tmp_path / train_arm.WRITTEN).read_text().splitlines()) == 120
    assert 0.9 < result["chunks"]["chunks/aligned_ratio"] <= 1.0
    assert json.loads(train_arm.result_path(tmp_path, "alm").read_text()) == result
    assert train_arm.read_result(tmp_path, "alm", 0) == result
    assert train_arm.read_result(tmp_path, "alm", 1) is None
    (tmp_path / train_arm.HELD_OUT).write_text("others")
    assert train_arm.read_result(tmp_path, "alm", 0) is None


def _made_up(bits: float) -> dict[str, float]:
    return dict.fromkeys(("all", *table.KINDS), bits) | {"cost": 1.0, "train_s": 2.0}


def _results(**bits: tuple[float, float]) -> table.Results:
    found = {"warm_sft": (0.9, 0.9), "more_sft": (0.8, 0.7)} | bits | {"teacher": (0.2, 0.2)}
    return {arm: [_made_up(one) for one in pair] for arm, pair in found.items()}


def test_words_compare_with_the_better_of_warm_and_more_sft_seed_by_seed():
    words = table.words(
        _results(alm=(0.5, 0.6), uld=(0.85, 0.9), simct=(0.79, 0.73), same_tokenizer=(0.4, 0.5))
    )
    assert "0.750 bits per byte (more SFT); the teacher has 0.200" in words
    assert "Below that in each of 2 seeds: ALM 0.550 (-0.200)." in words
    assert "In some seeds and not in others: SimCT 0.760 (+0.010)." in words
    assert "no better than no teacher: ULD 0.875 (+0.125)." in words
    assert "With a teacher that has the student's tokenizer: twin, forward KL 0.450" in words


def test_words_say_which_objectives_add_to_the_text_itself():
    words = table.words(_results(seq_kd=(0.55, 0.55), alm=(0.5, 0.5), uld=(0.5, 0.6)))
    assert "SeqKD, has 0.550; below that in each of 2 seeds: ALM 0.500 (-0.050)." in words
    words = table.words(_results(seq_kd=(0.4, 0.4), alm=(0.5, 0.5)))
    assert "SeqKD, has 0.400; no objective is below that in each of 2 seeds." in words


def test_table_tells_the_share_of_the_gap_that_is_closed():
    lines = table.table(_results(alm=(0.5, 0.6))).splitlines()
    assert lines[0].split() == ["bits/byte", "closed", *table.KINDS, "cost", "seconds"]
    alm = next(line.split() for line in lines if line.startswith("ALM"))
    assert alm[1:4] == ["0.550", "±0.071", "50%"]


def test_picture_is_drawn_and_the_readme_takes_the_table(tmp_path):
    table.draw(_results(alm=(0.5, 0.6)), tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    taken = table.with_table(readme, "a table")
    assert "```text\na table\n```" in taken
    assert table.with_table(taken, "a table") == taken
    with pytest.raises(ValueError, match=r"must have the lines"):
        table.with_table("nothing", "a table")
