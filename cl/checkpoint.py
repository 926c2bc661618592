"""Checkpoints: written in one step, the last good ones kept, nothing in them executed when they are read."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cl.core import UserError
from cl.hooks import Strategy
from cl.ledger import Ledger
from cl.state import TrainState

FORMAT = "cl-lab checkpoint 1"
KEPT = 2
"""How many checkpoints stay: the newest, and the one to fall back on when the newest is damaged."""


def save(folder: Path, step: int, payload: dict[str, Any], fingerprint: str) -> Path:
    """Write a checkpoint so that a crash at any moment leaves the earlier ones intact.

    Args:
        payload: tensors, numbers, strings, lists and dicts only.
        fingerprint: of the settings that the run must be resumed with.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    descriptor, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"format": FORMAT, "fingerprint": fingerprint, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _tidy(folder, path)
    return path


def _tidy(folder: Path, newest: Path) -> None:
    """Remove what `newest` makes useless: older checkpoints, later ones of a course that was left, half-written files.

    A later file is damaged, or from a run that started anew in the same folder; kept, it would be resumed from.
    """
    earlier = [path for path in _newest_first(folder) if path < newest]
    for path in {*_newest_first(folder), *folder.glob("*.tmp")} - {newest, *earlier[: KEPT - 1]}:
        path.unlink(missing_ok=True)


def load_latest(folder: Path, fingerprint: str, device: torch.device | None = None) -> tuple[Path, dict[str, Any]]:
    """The newest readable checkpoint; a damaged one is named in a warning and the one before it is used.

    Raises:
        UserError: there is none, or it belongs to a run with other settings.
    """
    for path in _newest_first(folder):
        try:
            payload = torch.load(path, map_location=device or "cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail in any way; the sentence says which file it was
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            warnings.warn(f"checkpoint {path} cannot be read ({reason}); trying the one before it", stacklevel=2)
            continue
        if not isinstance(payload, dict) or payload.get("format") != FORMAT:
            warnings.warn(f"{path} is not a checkpoint of this version; trying the one before it", stacklevel=2)
            continue
        if payload["fingerprint"] != fingerprint:
            raise UserError(
                f"checkpoint {path} belongs to a run with other settings (its fingerprint is "
                f"{payload['fingerprint']}, this run's is {fingerprint}); resume with the config it was made with"
            )
        return path, payload
    raise UserError(f"{folder} holds no readable checkpoint; start the run again with `cl run`")


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)


def capture(
    state: TrainState, scaler: torch.amp.GradScaler, strategies: Sequence[Strategy], ledger: Ledger
) -> dict[str, Any]:
    """Everything that the rest of a run depends on, except its position in the stream."""
    return {
        "state": state.state_dict(),
        "scaler": scaler.state_dict(),
        "strategies": [strategy.state_dict() for strategy in strategies],
        "ledger": ledger.state_dict(),
    }


def apply(
    saved: Mapping[str, Any],
    state: TrainState,
    scaler: torch.amp.GradScaler,
    strategies: Sequence[Strategy],
    ledger: Ledger,
) -> None:
    """Put back what `capture` took, strategies' tensors on the run's device."""
    state.load_state_dict(saved["state"])
    scaler.load_state_dict(saved["scaler"])
    for strategy, content in zip(strategies, saved["strategies"], strict=True):
        strategy.load_state_dict(tree_map_only(Tensor, lambda tensor: tensor.to(state.device), content))
    ledger.load_state_dict(saved["ledger"])
