"""Token loop of the diagonal recurrence: the definition, in whatever precision the inputs have."""

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.varlen import per_sequence


def linear_scan_reference(
    a_BTN: Tensor, u_BTN: Tensor, h0_BN: Tensor | None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + u_t, one token after the other.

    Returns:
        h_BTN in the dtype of `u_BTN`, and the last state [B, N] (per sequence when packed) in the state dtype.
    """
    if cu_seqlens is not None:
        return per_sequence(linear_scan_reference, [a_BTN, u_BTN], h0_BN, cu_seqlens)
    dtype = state_dtype(u_BTN.dtype)
    h_BN = u_BTN.new_zeros(u_BTN.shape[0], u_BTN.shape[2], dtype=dtype) if h0_BN is None else h0_BN.to(dtype)
    states = []
    # unbind, not indexing: the gradient of x[:, t] is a full tensor of zeros per step
    for a_BN, u_BN in zip(a_BTN.to(dtype).unbind(1), u_BTN.to(dtype).unbind(1), strict=True):
        h_BN = a_BN * h_BN + u_BN
        states.append(h_BN)
    h_BTN = torch.stack(states, dim=1) if states else u_BTN
    return h_BTN.to(u_BTN.dtype), h_BN
