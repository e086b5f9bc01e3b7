# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent, and that training goes on from bit for bit.

`checkpoint-N/` is a Hugging Face model (safetensors, tokenizer) plus `objective.safetensors` (where
the objective trains something of its own), `state.json` (step, config, ledger, versions) and
`training_state.pt` (optimizer, random numbers, rollouts; plain tensors, read with `weights_only`).
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from opd.schema import ConfigError

_NAME = re.compile(r"checkpoint-\d+")
_OBJECTIVE = "objective.safetensors"
_PARTIAL, _TRASH = ".partial-", ".trash-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds besides the model, whose weights lie in `path`.

    Attributes:
        path: of the directory.
        state: state.json.
        tensors: training_state.pt: `optimizer`, `random`, `rollouts`.
    """

    path: Path
    state: dict[str, Any]
    tensors: dict[str, Any]


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        path
        for path in Path(output_dir).glob("checkpoint-*")
        if _NAME.fullmatch(path.name) and (path / "state.json").is_file()
    ]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The N of checkpoint-N."""
    return int(path.name.removeprefix("checkpoint-"))


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def save_checkpoint(
    output_dir: str | Path,
    *,
    save_model: Callable[[Path], None],
    state: dict[str, Any],
    tensors: dict[str, Any],
    save_total_limit: int | None = None,
) -> Path:
    """Write a checkpoint next to the others, flush it to the disk, then give it its name.

    A process killed at any moment leaves either all of it or none of it under that name.

    Args:
        output_dir: of the run.
        save_model: writes the model and the tokenizer into a directory.
        state: with the `step`; written as JSON.
        tensors: tensors and plain values.
        save_total_limit: how many checkpoints to keep; the oldest go.
    """
    root = Path(output_dir)
    root.mkdir(parents=True, exist_ok=True)
    name = f"checkpoint-{state['step']}"
    remove_leftovers(root)
    partial, target = root / f"{_PARTIAL}{name}", root / name
    partial.mkdir()
    save_model(partial)
    torch.save(tensors, partial / "training_state.pt")
    (partial / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    if target.exists():
        # a directory cannot be replaced in one step, so the old one steps aside first
        target.rename(root / f"{_TRASH}{name}")
    partial.rename(target)
    _flush(root)
    if save_total_limit is not None:
        for old in list_checkpoints(root)[:-save_total_limit]:
            # renamed first, so that a kill during removal leaves no half of a checkpoint
            old.rename(root / f"{_TRASH}{old.name}")
    remove_leftovers(root)
    return target


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read the training state of a checkpoint.

    Raises:
        ConfigError: there is no complete checkpoint, or it is damaged.
    """
    path = Path(path)
    if not (path / "state.json").is_file():
        newest = newest_checkpoint(path)
        if newest is None:
            siblings = ", ".join(p.name for p in list_checkpoints(path.parent)) or "none"
            raise ConfigError(
                f"no checkpoint at '{path}'; complete ones in '{path.parent}': {siblings}"
            )
        path = newest
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("state.json has no step")
        tensors = torch.load(path / "training_state.pt", weights_only=True, map_location="cpu")
    except (OSError, ValueError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"the checkpoint '{path}' is damaged, {reason}") from None
    return Checkpoint(path=path, state=state, tensors=tensors)


def save_module(module: nn.Module | None, path: Path) -> None:
    """Write what an objective trains, if anything, beside the model."""
    if module is not None:
        # of clones: safetensors takes no views of one another
        state = {name: value.detach().clone() for name, value in module.state_dict().items()}
        save_file(state, path / _OBJECTIVE)


def load_module(module: nn.Module | None, path: Path) -> None:
    """Put it where `save_module` found it.

    Raises:
        ValueError: it is not there, or of another shape.
    """
    if module is None:
        return
    try:
        state = load_file(path / _OBJECTIVE)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"its {_OBJECTIVE} cannot be read: {error}") from None
    module.load_state_dict(state)


def remove_leftovers(root: Path) -> None:
    """Delete what a killed process left half written or half removed."""
    for path in root.glob(f"{_PARTIAL}checkpoint-*"):
        shutil.rmtree(path)
    for path in root.glob(f"{_TRASH}checkpoint-*"):
        target = root / path.name.removeprefix(_TRASH)
        is_only_copy = not target.exists() and not list_checkpoints(root)
        # killed between the two renames of a replacement: the old one is the only good one
        path.rename(target) if is_only_copy else shutil.rmtree(path)


def set_aside(root: Path, names: Sequence[str] = (), *, after_step: int = -1) -> Path | None:
    """Move files of these names, and checkpoints after a step, into `root/previous-K/`."""
    found = [root / name for name in names if (root / name).exists()]
    found += [path for path in list_checkpoints(root) if checkpoint_step(path) > after_step]
    if not found:
        return None
    number = 1
    while (root / f"previous-{number}").exists():
        number += 1
    aside = root / f"previous-{number}"
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside


def seed_everything(seed: int) -> None:
    """Start every random number generator from a seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every random number generator, as tensors and plain values."""
    numpy_state = np.random.get_state(legacy=False)
    state = numpy_state["state"]
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**state, "key": state["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every random number generator where `random_state` found it."""
    random.setstate(state["python"])
    numpy_state = state["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
