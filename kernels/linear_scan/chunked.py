"""Diagonal recurrence on any device in three cache-friendly passes, with the backward written by hand.

Chunks of C steps run side by side. Pass 1 keeps only each chunk's summary (product of gates, last value from a zero
start); pass 2 walks the summaries, T/C steps; pass 3 walks the chunks again from their true start and writes h.
Five reads and writes of the inputs' size in all; no log-space anywhere, it loses gradients.

Legend: B batch, T time, N channels, C chunk, S sequences (S = B unless packed).
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

import torch
from torch import Tensor

from kernels.common.checks import state_dtype


def walk(a_BTN: Tensor, u_BTN: Tensor, h_BN: Tensor, out_BTN: Tensor, chunk: int, reverse: bool) -> Tensor:
    """Write every state into `out_BTN` and return the last; `reverse` walks time backwards."""
    length = u_BTN.shape[1]
    n = length // chunk
    body = slice(length - n * chunk, length) if reverse else slice(0, n * chunk)
    tail = range(length - n * chunk) if reverse else range(n * chunk, length)
    if n >= 2:
        a, u, out = (x[:, body].unflatten(1, (n, chunk)) for x in (a_BTN, u_BTN, out_BTN))
        steps = range(chunk - 1, -1, -1) if reverse else range(chunk)
        chunks = range(n - 1, -1, -1) if reverse else range(n)
        product, last = a[:, :, steps[0]].clone(), u[:, :, steps[0]].clone()
        for i in steps[1:]:
            product.mul_(a[:, :, i])
            torch.addcmul(u[:, :, i], a[:, :, i], last, out=last)
        start = torch.empty_like(last)
        for j in chunks:
            start[:, j] = h_BN
            h_BN = torch.addcmul(last[:, j], product[:, j], h_BN)
        state = start
        for i in steps:
            torch.addcmul(u[:, :, i], a[:, :, i], state, out=out[:, :, i])
            state = out[:, :, i]
    else:
        tail = range(length)
    for t in reversed(tail) if reverse else tail:
        torch.addcmul(u_BTN[:, t], a_BTN[:, t], h_BN, out=out_BTN[:, t])
        h_BN = out_BTN[:, t]
    return h_BN.clone()


def _ends(cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask of non-empty sequences, and the first and last token of each of those."""
    cu = cu_seqlens.long()
    alive = cu[1:] > cu[:-1]
    return alive, cu[:-1][alive], cu[1:][alive] - 1


def forward(
    a_BTN: Tensor, u_BTN: Tensor, h0_SN: Tensor | None, cu_seqlens: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return every state [B, T, N] in the dtype of u, and the last states [S, N] in the state dtype."""
    dtype = state_dtype(u_BTN.dtype)
    a, u = a_BTN.to(dtype).contiguous(), u_BTN.to(dtype).contiguous()
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h0 = u.new_zeros(sequences, u.shape[2]) if h0_SN is None else h0_SN.to(dtype)
    out = torch.empty_like(u)
    if cu_seqlens is None:
        final = walk(a, u, h0, out, chunk, reverse=False)
    else:
        # a gate of zero at its first token makes a sequence independent of the one before
        alive, first, last = _ends(cu_seqlens)
        a, u = a.clone(), u.clone()
        u[0, first] += a[0, first] * h0[alive]
        a[0, first] = 0
        walk(a, u, torch.zeros_like(u[:, 0]), out, chunk, reverse=False)
        final = h0.clone()
        final[alive] = out[0, last]
    return out.to(u_BTN.dtype), final


def backward(
    dh_BTN: Tensor,
    dfinal_SN: Tensor,
    a_BTN: Tensor,
    h_BTN: Tensor,
    h0_SN: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoint: x_t = dh_t + conj(a_{t+1}) x_{t+1}; du = x, da_t = x_t conj(h_{t-1}), dh0 = conj(a_1) x_1."""
    dtype = state_dtype(h_BTN.dtype)
    a, h = a_BTN.to(dtype).conj().resolve_conj().contiguous(), h_BTN.to(dtype).conj().resolve_conj()
    dfinal = dfinal_SN.to(dtype)
    h0 = torch.zeros_like(dfinal) if h0_SN is None else h0_SN.to(dtype).conj().resolve_conj()
    g = dh_BTN.to(dtype).contiguous()
    x = torch.empty_like(g)
    da = torch.empty_like(a)
    if cu_seqlens is None:
        x[:, -1] = g[:, -1] + dfinal
        walk(a[:, 1:], g[:, :-1], x[:, -1], x[:, :-1], chunk, reverse=True)
        torch.mul(x[:, 1:], h[:, :-1], out=da[:, 1:])
        torch.mul(x[:, 0], h0, out=da[:, 0])
        return da.to(a_BTN.dtype), x.to(h_BTN.dtype), a[:, 0] * x[:, 0]
    alive, first, last = _ends(cu_seqlens)
    g, gate = g.clone(), a.clone()
    g[0, last] += dfinal[alive]
    gate[0, first] = 0
    x[:, -1] = g[:, -1]
    walk(gate[:, 1:], g[:, :-1], x[:, -1], x[:, :-1], chunk, reverse=True)
    torch.mul(x[:, 1:], h[:, :-1], out=da[:, 1:])
    da[0, first] = x[0, first] * h0[alive]
    dh0 = dfinal.clone()
    dh0[alive] = a[0, first] * x[0, first]
    return da.to(a_BTN.dtype), x.to(h_BTN.dtype), dh0
