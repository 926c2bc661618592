"""Checkpoints: written in one step, the last good ones kept, nothing in them executed when they are read."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cl.core import Experience, UserError
from cl.frozen import frozen_weights, unchanged
from cl.hooks import Strategy, overrides
from cl.ledger import Ledger
from cl.result import replacing
from cl.shards import optimizer_shards
from cl.state import TrainState

FORMAT = "cl-lab checkpoint 1"
KEPT = 2
"""How many checkpoints stay: the newest, and the one to fall back on when the newest is damaged."""


PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


CLOSING = ("on_experience_end", "on_evaluation")
"""Hooks by which a strategy may close an experience, so that it cannot go on as if it had not ended."""


def save(folder: Path, step: int, payload: dict[str, Any], fingerprint: str, is_open: bool = False) -> Path:
    """Write a checkpoint so that a crash at any moment leaves the earlier ones intact.

    Args:
        payload: tensors, numbers, strings, lists and dicts only.
        fingerprint: of the settings that the run must be resumed with.
        is_open: an experience ends at this step, and nothing has closed it yet.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    path = _path(folder, step, is_open)
    with replacing(path) as file:
        try:
            torch.save({"format": FORMAT, "fingerprint": fingerprint, **payload}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                # torch closes its archive even so, and what it says then hides that the disk is full
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())
    _tidy(folder, path)
    return path


def _path(folder: Path, step: int, is_open: bool = False) -> Path:
    """Names sort by age: an open checkpoint comes before the other one of its step."""
    return folder / f"step-{step:09d}{'-open' * is_open}.pt"


def _require_plain(value: Any, where: str) -> None:
    """Refuse to write what `torch.load(weights_only=True)` would not read, or not in the same order.

    Raises:
        UserError: something else than tensors, numbers, strings, lists and dicts.
    """
    if type(value) in (dict, OrderedDict, list, tuple):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            _require_plain(entry, f"{where}[{key!r}]")
    elif type(value) not in PLAIN and not isinstance(value, Tensor):
        raise UserError(
            f"{where} is a {type(value).__name__}, which a checkpoint does not hold; "
            "it must be made of tensors, numbers, strings, lists and dicts"
        )


def _tidy(folder: Path, newest: Path) -> None:
    """Remove what `newest` makes useless: older checkpoints, later ones of a course that was left, half-written files.

    A later file is damaged, or from a run that started anew in the same folder; kept, it would be resumed from.
    """
    earlier = [path for path in _newest_first(folder) if path < newest]
    for path in {*_newest_first(folder), *folder.glob("step-*.tmp")} - {newest, *earlier[: KEPT - 1]}:
        path.unlink(missing_ok=True)


def load_latest(folder: Path, fingerprint: str, device: torch.device | None = None) -> tuple[Path, dict[str, Any]]:
    """The newest readable checkpoint; a damaged one is named in a warning and the one before it is used.

    Raises:
        UserError: there is none, or it belongs to a run with other settings.
    """
    for path in _newest_first(folder):
        payload = _read(path, fingerprint, device)
        if payload is not None:
            return path, payload
    raise UserError(f"{folder} holds no readable checkpoint; remove {folder.parent} and start the run again")


def load_open(folder: Path, step: int, fingerprint: str) -> dict[str, Any] | None:
    """What a run was when its last experience had taken its steps and was not closed yet, where that was written."""
    path = _path(folder, step, is_open=True)
    return _read(path, fingerprint) if path.is_file() else None


def _read(path: Path, fingerprint: str, device: torch.device | None = None) -> dict[str, Any] | None:
    """A checkpoint; None and a warning where it is damaged."""
    try:
        payload = torch.load(path, map_location=device or "cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way; the sentence says which file it was
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        warnings.warn(f"checkpoint {path} cannot be read ({reason}); trying the one before it", stacklevel=3)
        return None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        warnings.warn(f"{path} is not a checkpoint of this version; trying the one before it", stacklevel=3)
        return None
    if payload["fingerprint"] != fingerprint:
        raise UserError(
            f"checkpoint {path} belongs to a run with other settings (its fingerprint is "
            f"{payload['fingerprint']}, this run's is {fingerprint}); resume with the config it was made with"
        )
    return payload


def load_start(path: Path, state: TrainState) -> None:
    """Begin a run with the weights and the optimizer state of another one.

    Raises:
        UserError: they do not fit the backbone or the optimizer of this run, or its pretrained model is another one.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)["state"]
    try:
        state.load_weights(saved)
        state.optimizer.load_state_dict(optimizer_shards(saved["optimizer"], state.optimizer))
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        # torch's first line only announces those that say what does not fit
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(f"the weights in {path} do not fit this run: {reason}") from None


def _newest_first(folder: Path) -> list[Path]:
    digits = "[0-9]" * 9
    return sorted([*folder.glob(f"step-{digits}.pt"), *folder.glob(f"step-{digits}-open.pt")], reverse=True)


class Keeper:
    """Writes down where a run stands, and takes it up again.

    Args:
        run_dir: where `result.json` and `checkpoints/` go; None keeps no checkpoints.
        fingerprint: of the settings that the run must be resumed with.
        strategies: of the run; the list is shared with the trainer.
        batch_size: that strategies are asked for their costs with.
    """

    def __init__(
        self,
        run_dir: Path | None,
        fingerprint: str,
        state: TrainState,
        strategies: Sequence[Strategy],
        ledger: Ledger,
        batch_size: int,
    ) -> None:
        self.folder = None if run_dir is None else run_dir / "checkpoints"
        self.fingerprint = fingerprint
        self.state, self.strategies, self.ledger = state, strategies, ledger
        self.batch_size = batch_size
        # now, before anything can have changed them
        self.frozen = {} if self.folder is None else frozen_weights(state.model)

    def save_result(self) -> None:
        # a strategy that has just failed is not asked: its answer could hide the first error behind a second
        asked = () if self.ledger.result.status == "failed" else self.strategies
        self.ledger.save(self.state, sum(strategy.cost(self.state, self.batch_size).buffer_bytes for strategy in asked))

    def finish(self) -> None:
        """The last word of a run; observers hear it even where the disk takes no more."""
        try:
            self.save_result()
        finally:
            self.ledger.tell("on_end", self.ledger.result)

    def save_open(self, experience: Experience, steps_done: int) -> None:
        """What `cl extend` goes on from: the end of the run, before strategies close its last experience."""
        self.ledger.flush(self.state)
        is_closed = any(overrides(strategy, hook) for strategy in self.strategies for hook in CLOSING)
        if self.folder is not None and is_closed and experience is self.state.stream.experiences[-1]:
            self.save(experience.id, steps_done, is_open=True)

    def save(self, next_experience: int, steps_done: int, is_open: bool = False) -> None:
        """The result so far, and everything that the rest of the run depends on: states, and its position."""
        self.ledger.flush(self.state)
        self.ledger.require_finite_weights(self.state)
        self.save_result()
        if self.folder is None:
            return
        # every process has shards to give
        state = self.state.state_dict(unchanged(self.state.model, self.frozen))
        if self.state.world.rank:
            # that the first process writes
            self.ledger.last_checkpoint = _path(self.folder, self.state.step, is_open)
            return
        kept = [strategy.state_dict() for strategy in self.strategies]
        for strategy, content in zip(self.strategies, kept, strict=True):
            _require_plain(content, f"strategy {strategy.name}: state_dict()")
        payload = {
            "state": state,
            "scaler": self.state.scaler.state_dict(),
            "strategies": kept,
            "ledger": self.ledger.state_dict(),
            "position": [next_experience, steps_done],
            "content": self.state.stream.content,
        }
        self.ledger.last_checkpoint = save(self.folder, self.state.step, payload, self.fingerprint, is_open)
        self.ledger.tell("on_checkpoint", self.state, str(self.ledger.last_checkpoint))

    def restore(self) -> tuple[int, int]:
        """Take up the latest checkpoint; returns the experience to go on with and the steps already done in it."""
        if self.folder is None:
            raise ValueError("a run without run_dir keeps no checkpoint to resume from")
        self.ledger.last_checkpoint, saved = load_latest(self.folder, self.fingerprint)
        content, found = saved.get("content", ""), self.state.stream.content
        if content != found:
            raise UserError(
                f"the data of stream {self.state.info.name} changed since {self.ledger.last_checkpoint} was written "
                f"(their hash was {content[:12]!r} and is {found[:12]!r}); put the old data back, or start a new run"
            )
        for strategy, content in zip(self.strategies, saved["strategies"], strict=True):
            strategy.load_state_dict(tree_map_only(Tensor, lambda tensor: tensor.to(self.state.device), content))
            strategy.on_resume(self.state)
        # after the strategies, which may have to put adapters in place before there are weights to load
        self.state.load_state_dict(saved["state"])
        self.state.scaler.load_state_dict(saved["scaler"])
        self.ledger.load_state_dict(saved["ledger"])
        start, steps_done = saved["position"]
        return start, steps_done
