"""One process at a time trains in a folder: it locks it, and the system lets go however the process ends.

Where there are no locks (Windows, some network disks) nothing is held and nobody is seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cl.core import UserError


def _try(descriptor: int) -> bool:
    """Lock an open folder; False where somebody else has."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def is_going_on(run_dir: Path) -> bool:
    """Whether a process trains in this folder."""
    with suppress(OSError):
        descriptor = os.open(run_dir, os.O_RDONLY)
        try:
            return not _try(descriptor)
        finally:
            os.close(descriptor)
    return False


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Train in this folder, inside the context.

    Raises:
        UserError: another process does.
    """
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        if descriptor is not None and not _try(descriptor):
            raise UserError(
                f"{run_dir} is being trained by another process; wait for it or stop it, or choose another folder"
            )
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def require_free(run_dir: Path) -> None:
    """Raise `UserError` where another process trains in this folder."""
    with alone(run_dir):
        pass
