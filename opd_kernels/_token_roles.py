# SPDX-License-Identifier: Apache-2.0
"""Roles of special tokens, by which two vocabularies' meet: begin, end, end of turn, fill."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# bits of TokenBytes.symbols
ROLES = {"bos": 1, "eos": 2, "eot": 4, "pad": 8, "unk": 16}

# what published vocabularies call them; only special tokens are looked up
NAMES = {
    "bos": (
        "<s>",
        "<bos>",
        "<|begin_of_text|>",
        "<|startoftext|>",
        "<｜begin▁of▁sentence｜>",
        "<BOS_TOKEN>",
        "[BOS]",
    ),
    "eos": (
        "</s>",
        "<eos>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eos|>",
        "<｜end▁of▁sentence｜>",
        "<EOS_TOKEN>",
        "[EOS]",
    ),
    "eot": (
        "<|im_end|>",
        "<|eot_id|>",
        "<|eot|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<turn|>",
        "<|end|>",
        "<|return|>",
        "<|end_of_turn|>",
        "<|endofturn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|EOT|>",
        "[EOT]",
    ),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>", "<PAD>"),
    "unk": ("<unk>", "[UNK]", "<|unk|>", "<UNK>"),
}
_REPLY = "zqx7"


def find_roles(
    tokenizer: Any,
    specials: Mapping[str, int],
    given: Mapping[str, int | None],
) -> dict[str, tuple[int, ...]]:
    """Ids by role, ascending.

    Args:
        tokenizer: may say its own by `bos_token_id` and the like, and have a chat template.
        specials: special and added tokens, by name.
        given: what the vocabulary itself says.
    """
    found: dict[str, set[int]] = {}
    for role, names in NAMES.items():
        found[role] = {specials[name] for name in names if name in specials}
        said = getattr(tokenizer, f"{role}_token_id", None)
        for token_id in (said, given.get(role)):
            # an ordinary token that fills batches too is text wherever a loss sees it
            is_role = role in ("bos", "eos") or token_id in specials.values()
            if isinstance(token_id, int) and token_id >= 0 and is_role:
                found[role].add(token_id)
    found["eot"] |= _ends_of_turns(tokenizer, specials)
    # <|endoftext|> is all of them in GPT-2: an end is met as an end
    found["unk"] -= found["bos"] | found["eos"] | found["eot"]
    return sorted_roles(found)


def sorted_roles(roles: Mapping[str, Collection[int]]) -> dict[str, tuple[int, ...]]:
    """Every role with its ids, ascending; () for none."""
    return {role: tuple(sorted(roles.get(role, ()))) for role in ROLES}


def _ends_of_turns(tokenizer: Any, specials: Mapping[str, int]) -> set[int]:
    """The special token that the chat template writes right after what an assistant says."""
    if not getattr(tokenizer, "chat_template", None):
        return set()
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _REPLY}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template is a program of its own, and may refuse any chat
        return set()
    after = text.rpartition(_REPLY)[2].lstrip()
    names = [name for name in specials if after.startswith(name)]
    return {specials[max(names, key=len)]} if names else set()
