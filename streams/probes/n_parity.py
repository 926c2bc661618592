"""N-parity: is the number of ones among the last N bits odd? An experience for each N, with one head or a head each.

The curricula and the rows are described in `streams/probes/_bits.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cl.core import Setting, Stream
from streams._settings import require_setting
from streams.probes._bits import bit_stream


def n_parity(
    sizes: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    setting: str = "domain_incremental",
    train_rows: int = 5000,
    eval_rows: int = 500,
    seed: int = 0,
) -> Stream:
    """Build the stream.

    Args:
        sizes: N of each experience.
        setting: domain_incremental (one head) or task_incremental (a head for each N).
        train_rows, eval_rows: of every experience, and of every domain.

    Raises:
        UserError: a value outside its range.
    """
    kind = require_setting(setting, (Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL))
    return bit_stream("n_parity", parity, kind, sizes, train_rows, eval_rows, seed)


def parity(last_BN: Tensor, size: int) -> Tensor:
    """1 where the number of ones is odd."""
    return last_BN.sum(1) % 2
