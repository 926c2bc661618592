"""Families of memories, and the colours that they have in plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FAMILIES: Mapping[str, tuple[str, Sequence[str]]] = {
    "attention": ("black", ("attention",)),
    "memory_cache": ("tab:red", ("memory_cache",)),
    "segments: rmt, armt, block_recurrent, memformer": ("tab:orange", ("rmt", "armt", "block_recurrent", "memformer")),
    "neural and mixed: titans, ttt_linear, mixture_of_memories": (
        "tab:purple",
        ("titans", "titans, a matrix", "ttt_linear", "mixture_of_memories"),
    ),
    "window": ("tab:gray", ("window",)),
    "recurrent: min_gru, lru, gru, lstm, slstm": ("tab:green", ("min_gru", "lru", "gru", "lstm", "slstm")),
}
"""Their colour and their members by what a legend says; all others are matrices that are written and read."""
REST = ("linear memories, ridge, hippocampus", "tab:blue")


def family(name: str) -> tuple[str, str]:
    """What a legend says of a memory, and its colour.

    Example:
        >>> family("lru")[1], family("delta")
        ('tab:green', ('linear memories, ridge, hippocampus', 'tab:blue'))
    """
    found = [(label, color) for label, (color, names) in FAMILIES.items() if name in names]
    return found[0] if found else REST
