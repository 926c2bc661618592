"""Chunk layout on torch tensors and the decay of a call, shared by every matrix-state op.

Legend: B batch, T time, H heads, N chunks, C chunk length, K/V key/value width, M = N*B*H chunk rows (chunk-major, so
that one step of the loop over chunks is a contiguous slice), G gate width: 1 (one decay per head) or K (per channel).
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

import torch
from torch import Tensor

from kernels.common.channel_decay import ChannelDecay
from kernels.common.checks import state_dtype
from kernels.common.decay import Decay, ScalarDecay


def to_chunks(x_BTHD: Tensor, chunk: int, scale: float = 1.0) -> Tensor:
    """`scale` * x as [M, C, D] in the arithmetic dtype, padded with zeros: a zero token changes no state."""
    batch, length, heads, width = x_BTHD.shape
    n = -(-length // chunk)
    dtype = state_dtype(x_BTHD.dtype)
    if n * chunk == length:
        whole_NBHCD: Tensor = x_BTHD.unflatten(1, (n, chunk)).permute(1, 0, 3, 2, 4)
        out = torch.empty(whole_NBHCD.shape, dtype=dtype, device=x_BTHD.device)
        if scale == 1.0 or x_BTHD.dtype != dtype:
            out.copy_(whole_NBHCD)
        else:
            torch.mul(whole_NBHCD, scale, out=out)
            scale = 1.0
    else:
        out = x_BTHD.new_zeros(n, batch, heads, chunk, width, dtype=dtype)
        whole = n - 1
        body, tail = x_BTHD[:, : whole * chunk], x_BTHD[:, whole * chunk :]
        if whole:
            out[:whole] = body.unflatten(1, (whole, chunk)).permute(1, 0, 3, 2, 4)
        out[whole, :, :, : tail.shape[1]] = tail.transpose(1, 2)
    rows = out.view(-1, chunk, width)
    return rows if scale == 1.0 else rows.mul_(scale)


def put_chunks(out_BTHD: Tensor, x_MCD: Tensor) -> None:
    """Inverse of `to_chunks`, in one copy: write the rows to their tokens, dropping the padding."""
    batch, length, heads, width = out_BTHD.shape
    chunk = x_MCD.shape[1]
    x_BNCHD = x_MCD.view(-1, batch, heads, chunk, width).permute(1, 0, 3, 2, 4)
    whole = length // chunk
    if whole:
        out_BTHD[:, : whole * chunk].unflatten(1, (whole, chunk)).copy_(x_BNCHD[:, :whole])
    if whole * chunk < length:
        out_BTHD[:, whole * chunk :] = x_BNCHD[:, whole, : length - whole * chunk]


def from_chunks(x_MCD: Tensor, batch: int, length: int, heads: int) -> Tensor:
    """Inverse of `to_chunks`: a new [B, T, H, D]."""
    out = x_MCD.new_empty(batch, length, heads, x_MCD.shape[2])
    put_chunks(out, x_MCD)
    return out


# e to the power of it is zero in every dtype
WIPED = -800.0


def decay_of(g_BTHG: Tensor | None, like_BTHK: Tensor, chunk: int) -> Decay:
    """The decay of a call; no gate at all is a gate of zero.

    What lies below `WIPED` (-1e30 of a mask, the -inf of log 0) is cut to it, which changes no factor: in sums it would
    swallow the digits of the gates beside it.
    """
    if g_BTHG is None:
        g_BTHG = like_BTHK.new_zeros(*like_BTHK.shape[:3])
    if g_BTHG.dim() == 3:
        return ScalarDecay(to_chunks(g_BTHG[..., None], chunk).clamp_(min=WIPED))
    return ChannelDecay(to_chunks(g_BTHG, chunk).clamp_(min=WIPED))
