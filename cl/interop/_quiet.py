"""The door to Avalanche: imported at first use, and its warnings about itself stay behind it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from cl.core import UserError

LOUD = ("avalanche",)
"""Folders of packages whose warnings nobody here can act on."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that Avalanche, which is frozen, raises about itself and about newer libraries.

    They are dropped where they are shown: a filter would not do, because Avalanche sets its own before it warns.
    """
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_others(message: Any, category: type[Warning], filename: str, *where: Any, **more: Any) -> None:
            if not set(LOUD) & set(PurePath(filename).parts):
                show(message, category, filename, *where, **more)

        warnings.showwarning = show_others
        yield


def require_avalanche() -> None:
    """Import Avalanche.

    Raises:
        UserError: it is not installed, or does not import.
    """
    try:
        with warnings.catch_warnings():
            # what it imports is deprecated too, by whoever made that
            warnings.simplefilter("ignore")
            import avalanche.benchmarks
            import avalanche.training  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"this needs avalanche-lib 0.6, which cannot be imported here ({error}); install it with "
            "`pip install avalanche-lib`"
        ) from None
