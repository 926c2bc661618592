"""What a problem is: an op, how to draw its inputs, and what it costs.

Legend: B batch, T time, H heads, D width (K = V = D; a scan has H * D channels).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.common.dispatch import CPU_CHUNK

Inputs = dict[str, Tensor]
# batch, length, heads, width
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Problem:
    """An op with drawn inputs and its cost; `flops` counts one (token, head), forward and forward + backward."""

    name: str
    op: Callable[..., tuple[Tensor, Tensor]]
    draw: Callable[[Shape, torch.dtype, torch.device], Inputs]
    flops: Callable[[int, int], tuple[int, int]]
    # a slice small enough for the float64 loop; None cuts [B, T, H] of every input
    cut: Callable[[Inputs], Inputs] | None = None
    keeps_states: bool = False

    def compulsory_bytes(self, inputs: Inputs, out: Tensor) -> tuple[int, int]:
        """Bytes that must move, forward and forward + backward: each input, output and gradient once per pass."""
        given = sum(x.numel() * x.element_size() for x in inputs.values())
        result = out.numel() * out.element_size()
        return given + result, 3 * given + 2 * result

    def allowance(self, inputs: Inputs, shape: Shape) -> int:
        """Bytes of the inputs, and of one state per chunk where the op keeps them: half of what it may need (CPU)."""
        batch, length, heads, width = shape
        states = 4 * batch * heads * -(-length // CPU_CHUNK) * width**2 if self.keeps_states else 0
        return sum(x.numel() * x.element_size() for x in inputs.values()) + states
