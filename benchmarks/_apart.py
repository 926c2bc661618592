"""Calls in processes of their own: what one of them holds, compiles or breaks does not touch the next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch


def compiled(calls: Sequence[tuple[Any, ...]], jobs: int) -> None:
    """Make these calls, several at a time, for the kernels that they leave compiled."""
    # what tuners choose while others use the card is worth nothing
    with (
        TemporaryDirectory() as folder,
        patch.dict(os.environ, KERNELS_CACHE=folder, FLA_CACHE_RESULTS="0"),
        ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        wait([pool.submit(*call) for call in calls])


def apart(device: str, *call: Any) -> dict[str, Any]:
    """What a function returns, from a process of its own, or the `failure` that ended it."""
    # a fork holds what this process has loaded, but cannot use a card that this process has looked at
    context = get_context("spawn" if device == "cuda" else "fork")
    try:
        with ProcessPoolExecutor(1, context) as pool:
            found: dict[str, Any] = pool.submit(*call).result()
    except Exception as error:  # of a layer of others on this card, for instance: one row is missing, no more
        found = {"failure": f"{type(error).__name__}: {error}"}
    return found
