"""Whether a process trains in a folder: it locks the log, and the system lets go of it however the process ends."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import IO

LOG = "run.log"


def hold(log: IO[str]) -> None:
    """Lock the log for as long as it is open; nothing happens where there are no locks."""
    # Windows has no such module, some network disks no locks
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_going_on(run_dir: Path) -> bool:
    """Whether a process trains in this folder, as far as there are locks."""
    with suppress(ImportError, OSError), (run_dir / LOG).open("r+") as log:
        import fcntl

        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
