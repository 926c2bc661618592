"""The model and data hub from a machine that may have no network: one quick question before minutes of retries."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT_S = 3.0
OFFLINE = "HF_HUB_OFFLINE"
"""Name of the variable of the environment, and of the constant that libraries read it into."""


def hub_address() -> str:
    """Where ids are looked up: the `HF_ENDPOINT` of the environment, or the public hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_answers(timeout_s: float = TIMEOUT_S) -> bool:
    """Whether the hub can be reached now, through the proxies of the environment where there are some.

    False at once when the environment says that it is offline (`HF_HUB_OFFLINE=1`).
    """
    if os.environ.get(OFFLINE, "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(hub_address(), method="HEAD"), timeout=timeout_s).close()
    except urllib.error.HTTPError:
        # an answer, if not the one that was hoped for
        return True
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def offline() -> Iterator[None]:
    """The libraries of the hub answer from their cache or fail at once, instead of asking again and again.

    `local_files_only` alone is not enough: what a library looks up on the side is still asked for 23 seconds.
    """
    import huggingface_hub.constants

    places = [huggingface_hub.constants]
    if "datasets" in sys.modules:
        places.append(sys.modules["datasets"].config)
    before = [getattr(place, OFFLINE) for place in places]
    for place in places:
        setattr(place, OFFLINE, True)
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, OFFLINE, value)
