"""Other people's kernels for the same recurrence, when they are installed; absence is a dash in the table.

Each peer takes our inputs (layout [B, T, H, D] is theirs too) and runs its own op; only the output is timed.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

Peer = Callable[..., Any]
# ours -> (module, function, how our argument names map to theirs)
_FLA: dict[str, tuple[str, str, dict[str, str]]] = {
    "gla_scalar": ("fla.ops.simple_gla", "chunk_simple_gla", {}),
    "gla_channel": ("fla.ops.gla", "chunk_gla", {}),
    "deltanet": ("fla.ops.delta_rule", "chunk_delta_rule", {}),
    "gated_deltanet": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", {}),
    "kda": ("fla.ops.kda", "chunk_kda", {}),
}


def _function(module: str, name: str) -> Peer | None:
    try:
        found: Peer | None = getattr(importlib.import_module(module), name, None)
    except Exception:  # a peer broken by its own imports is an absent peer
        return None
    return found


def _fla(problem: str) -> Peer | None:
    if problem not in _FLA:
        return None
    module, name, _ = _FLA[problem]
    return _function(module, name)


def _fla_plain(problem: str) -> Peer | None:
    """The same without its optional back-ends (TileLang and others), which it picks by this variable."""
    inner = _fla(problem)
    if inner is None:
        return None

    def call(**inputs: Tensor) -> Any:
        before = os.environ.get("FLA_DISABLE_BACKEND_DISPATCH")
        os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"
        try:
            return inner(**inputs)
        finally:
            if before is None:
                del os.environ["FLA_DISABLE_BACKEND_DISPATCH"]
            else:
                os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = before

    return call


def _accelerated_scan(problem: str) -> Peer | None:
    if problem != "linear_scan":
        return None
    scan = _function("accelerated_scan.warp", "scan")
    if scan is None:
        return None
    # it wants [B, N, T] contiguous; the transposes are its price, not ours, and are paid outside the timing
    return lambda a, u: (scan(a.transpose(1, 2).contiguous(), u.transpose(1, 2).contiguous()).transpose(1, 2), None)


PEERS: dict[str, Callable[[str], Peer | None]] = {
    "fla": _fla,
    "fla-plain": _fla_plain,
    "accelerated-scan": _accelerated_scan,
}


def peers_of(problem: str, wanted: list[str]) -> dict[str, Peer]:
    """The installed peers of a problem."""
    found = {name: PEERS[name](problem) for name in wanted if name in PEERS}
    return {name: peer for name, peer in found.items() if peer is not None}
