"""The norm of all blocks: torch's, in one pass over memory where a CPU has compiled loops for it."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.common.fused import rms_norm


class RMSNorm(nn.RMSNorm):
    """w * x / sqrt(mean of x^2 + eps), over the last axis.

    Example:
        >>> import torch
        >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, -3.0])).tolist()
        [1.0, -1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None  # torch would take one by the dtype
        return rms_norm(x, self.weight, self.eps)
