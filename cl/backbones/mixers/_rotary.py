"""Rotary positions (Su et al., 2021): queries and keys turned by angles, so that their products see distances only.

Shape legend: B rows, T tokens, H heads, K width of a head.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from cl.core import UserError


def rotary_angles(
    start: int, num_tokens: int, head_width: int, base: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin (T, K / 2) of position * base^(-2i / K), computed in float64."""
    return _angles(start, num_tokens, head_width, base, str(device), dtype)


def require_rope_base(value: object) -> None:
    """Raise `UserError` unless it is a base of rotary angles, or None for no positions."""
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1 < value < float("inf"):
        raise UserError(f"backbone.rope_base is {value!r}; it must be a number above 1, or none")


@lru_cache(maxsize=16)
def _angles(
    start: int, num_tokens: int, head_width: int, base: float, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # made outside of inference mode, so that training may use what an evaluation made first
    with torch.inference_mode(False), torch.no_grad():
        rate = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64, device=device) / head_width)
        angle = torch.arange(start, start + num_tokens, dtype=torch.float64, device=device).unsqueeze(1) * rate
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotated(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_i, x_{i + K/2}) turned by its angle, in the angles' precision; keeps the dtype."""
    left, right = x_BHTK.to(cos.dtype).chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x_BHTK.dtype)
