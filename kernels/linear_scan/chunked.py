"""Diagonal recurrence on any device in three cache-friendly passes, with the backward written by hand.

Chunks of C steps run side by side. Pass 1 keeps only each chunk's summary (product of gates, last value from a zero
start); pass 2 walks the summaries, T/C steps; pass 3 walks the chunks again from their true start and writes h.
Five reads and writes of the inputs' size in all; no log-space anywhere, it loses gradients.

Legend: B batch, T time, N channels, C chunk, S sequences (S = B unless packed).
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.common.checks import state_dtype

# no power of two: rows that lie so many bytes apart would share few sets of the cache (a tenth of a walk)
CHUNK = 40


def steps_of(x_BTN: Tensor, begin: int, n: int, chunk: int) -> Sequence[Tensor]:
    """Step i of all n chunks from token `begin` on, for every i: C views [B, n, N]."""
    steps: Sequence[Tensor] = x_BTN[:, begin : begin + n * chunk].unflatten(1, (n, chunk)).unbind(2)
    return steps


def gates_ahead(gates: Sequence[Tensor], behind: float = 1.0) -> list[Tensor]:
    """The gates of the tokens after, `behind` the last token as given: views but for one step."""
    return [*gates[1:], torch.cat([gates[0][:, 1:], torch.full_like(gates[0][:, :1], behind)], 1)]


def _products(a_BTN: Tensor, n: int, *, ahead: bool) -> Tensor:
    """Products [B, n, N] of the gates of n chunks; `ahead` those of the tokens after, 1 behind the last one."""
    chunks: Tensor = a_BTN.unflatten(1, (n, -1))
    if not ahead:
        return chunks.prod(2)
    product: Tensor = chunks[:, :, 1:].prod(2)
    product[:, :-1] *= chunks[:, 1:, 0]
    return product


def walk(a_BTN: Tensor, u_BTN: Tensor, h_BN: Tensor, out_BTN: Tensor, chunk: int, reverse: bool) -> Tensor:
    """Write out_t = u_t + a_t out_{t-1}, with `h` before the first token, and return the last.

    `reverse` walks time backwards, out_t = u_t + a_{t+1} out_{t+1}, with `h` behind the last token (its gate is 1).
    """
    length, way = u_BTN.shape[1], -1 if reverse else 1
    n = length // chunk if length >= 2 * chunk else 0
    rest = length - n * chunk
    if n:
        gates, inputs, outs = (steps_of(x, rest if reverse else 0, n, chunk) for x in (a_BTN, u_BTN, out_BTN))
        if reverse:
            gates = gates_ahead(gates)
        steps = list(zip(gates, inputs, outs, strict=True))[::way]
        last = steps[0][1].clone()
        for gate, given, _ in steps[1:]:
            torch.addcmul(given, gate, last, out=last)
        # what stands before every chunk, and behind the last one
        states = last.new_empty(last.shape[0], n + 1, last.shape[2])
        before, after = (states[:, 1:], states[:, :-1]) if reverse else (states[:, :-1], states[:, 1:])
        before[:, -1 if reverse else 0] = h_BN
        product = _products(a_BTN[:, rest:] if reverse else a_BTN[:, : n * chunk], n, ahead=reverse)
        for parts in list(zip(*(x.unbind(1) for x in (last, product, before, after)), strict=True))[::way]:
            h_BN = torch.addcmul(*parts[:3], out=parts[3])
        state = before
        for gate, given, out in steps:
            state = torch.addcmul(given, gate, state, out=out)
    tail = slice(0, rest) if reverse else slice(length - rest, length)
    gates, inputs, outs = (x[:, tail].unbind(1) for x in (a_BTN, u_BTN, out_BTN))
    if reverse:
        gates = a_BTN[:, 1 : rest + 1].unbind(1)
        gates = gates if n else [*gates, torch.ones_like(h_BN)]
    for gate, given, out in list(zip(gates, inputs, outs, strict=True))[::way]:
        h_BN = torch.addcmul(given, gate, h_BN, out=out)
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
        walk(a, g, dfinal, x, chunk, reverse=True)
        torch.mul(x[:, 1:], h[:, :-1], out=da[:, 1:])
        torch.mul(x[:, 0], h0, out=da[:, 0])
        return da.to(a_BTN.dtype), x.to(h_BTN.dtype), a[:, 0] * x[:, 0]
    alive, first, last = _ends(cu_seqlens)
    g, gate = g.clone(), a.clone()
    g[0, last] += dfinal[alive]
    gate[0, first] = 0
    walk(gate, g, torch.zeros_like(g[:, 0]), x, chunk, reverse=True)
    torch.mul(x[:, 1:], h[:, :-1], out=da[:, 1:])
    da[0, first] = x[0, first] * h0[alive]
    dh0 = dfinal.clone()
    dh0[alive] = a[0, first] * x[0, first]
    return da.to(a_BTN.dtype), x.to(h_BTN.dtype), dh0
