"""What the studies of architecture share: networks of equal size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from cl.backbones.mlps.moe import Moe
from cl.core import StreamInfo


def active_weights(model: nn.Module) -> int:
    """Weights that touch a token: all of them, but of every mixture of experts only as many as are chosen."""
    idle = sum(
        sum(p.numel() for p in part.experts.parameters()) * (1 - part.top / len(part.experts))
        for part in model.modules()
        if isinstance(part, Moe)
    )
    return round(sum(p.numel() for p in model.parameters()) - idle)


def network(words: Sequence[str], info: StreamInfo) -> nn.Module:
    """The backbone that a request would build for the rows that `info` describes."""
    # here, so that networks made without words can be fitted where hydra is not installed
    from cl.cli.build import make
    from cl.cli.compose import composed, seeded

    made: nn.Module = make("backbone", seeded(composed("run", list(words)), 0)["backbone"])(info)
    return made


def fitted(words: Sequence[str], target: int, info: StreamInfo, multiple: int = 8) -> tuple[str, ...]:
    """The request with the hidden width, a multiple of `multiple`, whose active weights come nearest to `target`.

    Raises:
        ValueError: as `fitted_width`.
    """

    def size(width: int) -> int:
        return active_weights(network([*words, f"backbone.mlp_width={width}"], info))

    return (*words, f"backbone.mlp_width={fitted_width(size, target, multiple, ' '.join(words))}")


def fitted_width(size: Callable[[int], int], target: int, multiple: int, name: str, within: float = 0.03) -> int:
    """The hidden width whose `size`, which grows linearly, comes nearest to `target`.

    Raises:
        ValueError: the nearest is further off than the share `within`, so that no study can call it equal.
    """
    first, slope = size(64), (size(128) - size(64)) / 64
    width = max(multiple, multiple * round((64 + (target - first) / slope) / multiple))
    if abs(size(width) / target - 1) > within:
        raise ValueError(f"{name} has {size(width):,} weights at its nearest, and {target:,} are wanted")
    return width
