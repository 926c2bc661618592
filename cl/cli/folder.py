"""The folder of a run: what it holds, whether it is done, begun or somebody else's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from cl.cli import build, lock
from cl.core import UserError
from cl.result import Result
from cl.tracking import has_ended
from cl.tracking.journal import JOURNAL

CONFIG, RESULT, LOG = "config.yaml", "result.json", "run.log"
START = "start.pt"
"""Weights and optimizer state that a run begins with, where `cl rewarm` took them from another run."""
PARTS = ("seed", "stream", "strategy", "backbone", "optimizer", "schedule", "trainer")
"""Of every config."""


def saved_config(run_dir: Path) -> dict:
    """The config that a run was started with.

    Raises:
        UserError: the folder holds no run, or its config cannot be read.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no {CONFIG}")
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    missing = [name for name in PARTS if name not in config] if isinstance(config, dict) else PARTS
    if missing:
        raise UserError(f"{path} is not the whole config of a run: it lacks {', '.join(missing)}")
    for name in (*PARTS[1:], "data", "tracking"):
        if not isinstance(config.get(name) or {}, dict):
            raise UserError(f"{path} cannot be read: {name} is {config[name]!r}; it must be settings with their values")
    return config


def is_over(run_dir: Path, result: Result) -> bool:
    """Whether nothing is left to do; a run that was killed after its last result has yet to tell its trackers."""
    return result.status == "done" and (has_ended(run_dir) or not has_checkpoint(run_dir))


def has_checkpoint(run_dir: Path) -> bool:
    """Whether there is something to go on from."""
    return any((run_dir / "checkpoints").glob("step-*.pt"))


def is_done(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder holds this very run, finished.

    Raises:
        UserError: it holds a run with other settings, or a result that cannot be read.
    """
    if not (folder / CONFIG).is_file():
        return False
    if build.fingerprint(saved_config(folder)) != build.fingerprint(config):
        raise UserError(f"{folder} holds a run with other settings; choose another folder with out=FOLDER")
    try:
        return (folder / RESULT).is_file() and is_over(folder, Result.load(folder / RESULT))
    except ValueError as error:
        raise UserError(f"{error}; delete it, and the same command goes on with that run from its checkpoint") from None


def make_ready(run_dir: Path) -> bool:
    """Make a folder ready for an unfinished run of a comparison: a result without a checkpoint is taken away.

    Returns:
        whether the run goes on from a checkpoint.
    """
    lock.require_free(run_dir)
    if has_checkpoint(run_dir):
        return True
    (run_dir / RESULT).unlink(missing_ok=True)
    return False


def require_own(run_dir: Path) -> None:
    """Refuse a folder with files of somebody else's; what a run leaves that was killed at its start may be there."""
    ours = {LOG, START, *((CONFIG, JOURNAL, "checkpoints") if _holds_config(run_dir) else ())}
    found = [path.name for path in run_dir.iterdir()] if run_dir.is_dir() else []
    others = sorted(name for name in found if name not in ours and not name.endswith(".tmp"))
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise UserError(f"{run_dir} holds other files ({shown}); a run takes a folder of its own, out=FOLDER")


def _holds_config(run_dir: Path) -> bool:
    try:
        return bool(saved_config(run_dir))
    except UserError:
        return False


def check_writable(folder: Path) -> None:
    """Refuse a folder in which nothing could be written, before anything runs for it; makes none."""
    try:
        with tempfile.TemporaryFile(dir=next(each for each in (folder, *folder.parents) if each.exists())):
            pass
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be written: {error.strerror or error}") from None


def remove_if_empty(folder: Path) -> None:
    """Take back the folder that Hydra made for a run which never started."""
    if not lock.is_going_on(folder):
        with suppress(OSError):
            folder.rmdir()
