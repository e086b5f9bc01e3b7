# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import opd_kernels as opk
from opd.batch import Trajectory, collate_step
from opd.schema import ConfigError
from opd.translation import Translator, turn_end_id
from tests.opd.crossing import byte_level, lines, pieces

TEXT, CHAT = {"prompt": "Say: "}, {"prompt": [{"role": "user", "content": "Say:"}]}


def _translator(student=None, teacher=None, **settings):
    student, teacher = student or byte_level(), teacher or pieces()
    return Translator(
        student,
        teacher,
        student_bytes=opk.TokenBytes(student),
        teacher_bytes=opk.TokenBytes(teacher),
        **settings,
    )


def _trajectory(completion, *, row=TEXT, mask=None, prompt=(5, 6, 7)):
    ids = torch.tensor([*prompt, *completion])
    loss_mask = torch.arange(len(ids)) >= len(prompt)
    if mask is not None:
        loss_mask[len(prompt) :] = torch.tensor(mask, dtype=torch.bool)
    return Trajectory(ids=ids, prompt_length=len(prompt), loss_mask=loss_mask, row=row)


def _written(text, *, end=True, tokenizer=None):
    tokenizer = tokenizer or byte_level()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if end else ids


def _chunks(translator, translated):
    """(student's bytes, teacher's bytes, aligned) of each chunk of the one trajectory."""
    (side,) = translated.trajectories
    theirs = side.ids[side.loss_mask].tolist()
    found, place = [], 0
    for count, is_aligned in zip(translated.teacher_lengths, translated.is_aligned, strict=True):
        stop = place + int(count)
        found.append((translator.teacher_bytes.join(theirs[place:stop]), bool(is_aligned)))
        place = stop
    assert place == len(theirs)
    return found


@pytest.mark.parametrize("names", [("student", "teacher"), ("teacher", "student")])
def test_every_line_reaches_the_teacher_byte_for_byte_with_an_end_token(names):
    pair = dict(zip(names, (byte_level(), pieces()), strict=True))
    translator = _translator(**pair)
    texts = lines(50, seed=1)
    trajectories = [_trajectory(_written(text, tokenizer=pair["student"])) for text in texts]
    translated = translator(trajectories)
    for text, side in zip(texts, translated.trajectories, strict=True):
        *rest, end = side.completion_ids.tolist()
        assert translator.teacher_bytes.join(rest) == text.encode()
        assert end == pair["teacher"].eos_token_id
    assert translated.is_aligned.all()
    assert int(translated.num_bytes.sum()) == sum(len(text.encode()) for text in texts)


@given(st.lists(st.integers(3, 299), max_size=30), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_any_tokens_tile_both_sides(ids, end, data):
    """Also invalid UTF-8, specials in the middle, and masks of any shape."""
    specials = st.sampled_from([[], [0], [2], [0, 2]])
    completion = data.draw(specials) + ids + data.draw(specials) + ids[:3] + [0] * end
    mask = data.draw(st.lists(st.booleans(), min_size=len(completion), max_size=len(completion)))
    translator = _translator()
    translated = translator([_trajectory(completion, mask=mask)])
    assert int(translated.student_lengths.sum()) == sum(mask)
    student = [i for i, is_kept in zip(completion, mask, strict=True) if is_kept]
    text = translator.student_bytes.join(student)
    assert int(translated.num_bytes.sum()) == len(text)
    for _, is_aligned in _chunks(translator, translated):
        assert isinstance(is_aligned, bool)
    if all(mask):
        assert b"".join(part for part, _ in _chunks(translator, translated)) == text
        assert translated.is_aligned.all()


def test_a_completion_cut_within_a_letter_has_its_first_bytes_and_no_end():
    translator = _translator()
    ids = _written("an 🦜", end=False)[:-1]
    (side,) = translator([_trajectory(ids)]).trajectories
    text = translator.teacher_bytes.join(side.completion_ids.tolist())
    assert text == translator.student_bytes.join(ids)
    with pytest.raises(UnicodeDecodeError):
        text.decode()


def test_prompts_are_the_teachers_own():
    translator = _translator()
    (chat, text) = translator(
        [_trajectory([60], row=CHAT), _trajectory([60], row=TEXT)]
    ).trajectories
    rendered = pieces().decode(chat.ids[: chat.prompt_length])
    assert rendered == "<s>[user] Say:[assistant] "
    assert text.ids[: text.prompt_length].tolist() == pieces()("Say: ")["input_ids"]


def test_the_end_is_the_teachers_end_of_a_turn_in_chats_and_of_a_text_elsewhere():
    tokenizer = byte_level()
    assert turn_end_id(tokenizer, opk.TokenBytes(tokenizer)) == 2
    translator = _translator(student=pieces(), teacher=tokenizer)
    written = _written("x", tokenizer=pieces())
    sides = translator([_trajectory(written, row=row) for row in (CHAT, TEXT)]).trajectories
    assert [int(side.ids[-1]) for side in sides] == [2, 0]


def test_any_end_of_the_students_counts_as_one():
    # of the generation config, without a role
    translator = _translator(end_ids=[1])
    (side,) = translator([_trajectory([60, 61, 1])]).trajectories
    assert int(side.ids[-1]) == pieces().eos_token_id
    assert side.completion_length >= 2


def test_a_chunk_with_a_part_of_its_tokens_trained_is_not_aligned():
    teacher = pieces()
    text = "apple and 1234"
    ids = _written(text, end=False)
    translator = _translator()
    whole = translator([_trajectory(ids)])
    first = int(whole.student_lengths.argmax())
    assert whole.student_lengths[first] > 1, teacher
    begin = int(whole.student_lengths[:first].sum())
    mask = [True] * len(ids)
    mask[begin] = False
    part = translator([_trajectory(ids, mask=mask)])
    assert part.is_aligned.tolist() == [i != first for i in range(len(whole.is_aligned))]
    assert part.student_lengths[first] == whole.student_lengths[first] - 1
    assert torch.equal(part.teacher_lengths, whole.teacher_lengths)
    nothing = translator([_trajectory(ids, mask=[False] * len(ids))])
    assert len(nothing.is_aligned) == 0
    assert not nothing.trajectories[0].loss_mask.any()


def test_batches_carry_their_part_of_the_step():
    translator = _translator()
    trajectories = [_trajectory(_written(text)) for text in lines(5, seed=2)]
    translated = translator(trajectories)
    batches, count = collate_step(trajectories, batch_size=2, pad_id=0, translated=translated)
    assert count == int(translated.student_lengths.sum())
    whole = translated.part(0, 5)
    assert whole.num_chunks == sum(batch.translation.num_chunks for batch in batches)
    for batch in batches:
        part = batch.translation
        assert part.num_step_chunks == translated.num_step_chunks
        assert int(part.student_offsets[-1]) == batch.num_tokens
        assert int(part.teacher_offsets[-1]) == part.batch.num_tokens
        assert int(part.chunk_ends[-1]) == part.num_chunks
        assert batch.for_teacher is part.batch
        # the chunks of a trajectory are its tokens
        ends = part.student_offsets[part.chunk_ends]
        assert torch.equal(ends, batch.segment_ends)


def test_one_vocabulary_keeps_every_id():
    tokenizer = byte_level()
    bytes_ = opk.TokenBytes(tokenizer)
    translator = Translator(tokenizer, tokenizer, student_bytes=bytes_, teacher_bytes=bytes_)
    # not what the tokenizer itself would make of these bytes
    ids = [70, 71, 72, 0, 2]
    prompt = tokenizer("Say: ")["input_ids"]
    trajectory = _trajectory(ids, prompt=prompt)
    translated = translator([trajectory])
    assert torch.equal(translated.trajectories[0].ids, trajectory.ids)
    assert translated.student_lengths.tolist() == translated.teacher_lengths.tolist() == [1] * 5
    assert translated.is_aligned.all()


def test_what_is_beyond_the_teachers_positions_is_not_aligned():
    ids = _written("apple and apple and apple")
    free = _translator()([_trajectory(ids)])
    length = len(free.trajectories[0].ids)
    room = length - 4
    translated = _translator(max_positions=room)([_trajectory(ids)])
    (side,) = translated.trajectories
    assert len(side.ids) <= room
    assert int(translated.teacher_lengths.sum()) == int(side.loss_mask.sum())
    assert int(translated.student_lengths.sum()) == len(ids)
    assert not translated.is_aligned[-1] and translated.is_aligned[0]
    assert free.trajectories[0].is_terminated and not side.is_terminated
    assert translated.metrics()["chunks/unaligned_bytes"] > 0


def test_a_prompt_without_room_is_refused_before_training():
    from opd.batch import Prompt

    prompt = Prompt(ids=torch.tensor([1, 2]), row={"prompt": "apple " * 30}, group_id=4)
    with pytest.raises(ConfigError, match=r"row 5 has a prompt of \d+ of its tokens"):
        _translator(max_positions=20).check_room([prompt])


def test_a_token_without_text_is_said():
    with pytest.raises(ConfigError, match=r"vocab_size: must be at most 300.* token 310"):
        _translator()([_trajectory([60, 310])])


def test_a_chat_for_a_teacher_without_template_is_said():
    translator = _translator()
    translator.teacher = _without_template(pieces())
    with pytest.raises(ConfigError, match=r"teacher: a row: is a chat, but .* no chat template"):
        translator([_trajectory([60], row=CHAT)])


def _without_template(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    return other


def test_what_a_lossy_tokenizer_cannot_say_is_not_aligned():
    """A teacher that lowercases, and has no token for most of the world."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=90, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(["apple and pear"] * 9, trainer)
    teacher = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]", pad_token="[SEP]"
    )
    translator = Translator(
        byte_level(),
        teacher,
        student_bytes=opk.TokenBytes(byte_level()),
        teacher_bytes=opk.TokenBytes(teacher, lossy=True),
    )
    assert translator.mode == "repair"
    trajectory = _trajectory(_written(" apple 苹果 and"), row={"prompt": "apple"})
    translated = translator([trajectory])
    assert 0 < int(translated.is_aligned.sum()) < len(translated.is_aligned)
    assert translated.is_aligned[-1], "the end of the text"
    assert int(translated.student_lengths.sum()) == trajectory.completion_length
    assert translated.metrics()["chunks/unaligned_bytes"] >= len("苹果".encode())


def test_ratios_are_of_the_aligned_chunks():
    translated = _translator()([_trajectory(_written(text)) for text in lines(20, seed=3)])
    found = translated.metrics()
    assert found["chunks/aligned_ratio"] == 1.0
    assert found["chunks/unaligned_bytes"] == 0.0
    assert found["chunks/student_tokens"] > found["chunks/teacher_tokens"] >= 1.0
