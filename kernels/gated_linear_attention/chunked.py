"""Gated linear attention in chunks, on any device, with the backward written by hand.

Inside a chunk attention is a masked matrix product; between chunks only the state S [K, V] travels. Kept for the
backward: the inputs and the state at every chunk start; everything else is computed again.

Legend: as in kernels.common.chunks; Z = B*H; R rows of saved chunk states.
"""

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.chunks import decay_of, from_chunks, to_chunks
from kernels.common.varlen import groups, num_chunks


def walk_states(kv_NZKV: Tensor, total_NZG1: Tensor, h0_ZKV: Tensor) -> tuple[Tensor, Tensor]:
    """S_{n+1} = total_n S_n + kv_n: the state at every chunk start [N, Z, K, V], and the last."""
    states = torch.empty_like(kv_NZKV)
    s = h0_ZKV
    for n in range(kv_NZKV.shape[0]):
        states[n] = s
        s = torch.addcmul(kv_NZKV[n], total_NZG1[n], s)
    return states, s


def walk_states_backward(qdo_NZKV: Tensor, total_NZG1: Tensor, dfinal_ZKV: Tensor) -> tuple[Tensor, Tensor]:
    """Adjoint of `walk_states`: the gradient of the state at every chunk end, and of the first state."""
    dstates = torch.empty_like(qdo_NZKV)
    ds = dfinal_ZKV
    for n in range(qdo_NZKV.shape[0] - 1, -1, -1):
        dstates[n] = ds
        ds = torch.addcmul(qdo_NZKV[n], total_NZG1[n], ds)
    return dstates, ds


def _forward_dense(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, h0_BHKV: Tensor, scale: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    decay = decay_of(g, q, chunk)
    qc, kc, vc = to_chunks(q, chunk).mul(scale), to_chunks(k, chunk), to_chunks(v, chunk)
    kv = torch.bmm((kc * decay.out_MCG).mT, vc)
    rows = (-1, batch * heads)
    states, final = walk_states(
        kv.unflatten(0, rows), decay.total_MG1.unflatten(0, rows), h0_BHKV.flatten(0, 1)
    )
    out = torch.bmm(decay.scores(qc, kc, strict=False), vc)
    out.baddbmm_(qc * decay.into_MCG, states.flatten(0, 1))
    return from_chunks(out, batch, length, heads).to(v.dtype), final.view_as(h0_BHKV), states.unflatten(1, (batch, heads))


def _backward_dense(
    do: Tensor,
    dfinal_BHKV: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    states_NBHKV: Tensor,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    batch, length, heads, _ = q.shape
    decay = decay_of(g, q, chunk)
    qc, kc, vc, doc = to_chunks(q, chunk).mul(scale), to_chunks(k, chunk), to_chunks(v, chunk), to_chunks(do, chunk)
    q_in, k_out = qc * decay.into_MCG, kc * decay.out_MCG
    rows = (-1, batch * heads)
    states = states_NBHKV.flatten(0, 2)
    dstates, dh0 = walk_states_backward(
        torch.bmm(q_in.mT, doc).unflatten(0, rows), decay.total_MG1.unflatten(0, rows), dfinal_BHKV.flatten(0, 1)
    )
    dstates = dstates.flatten(0, 1)
    p = decay.scores(qc, kc, strict=False)
    dv = torch.bmm(p.mT, doc).baddbmm_(k_out, dstates)
    dq, dk, dg = decay.scores_backward(qc, kc, p, torch.bmm(doc, vc.mT), strict=False)
    del p
    dq_in, dk_out = torch.bmm(doc, states.mT), torch.bmm(vc, dstates.mT)
    dq.addcmul_(dq_in, decay.into_MCG).mul_(scale)
    dk.addcmul_(dk_out, decay.out_MCG)
    back = [from_chunks(x, batch, length, heads) for x in (dq, dk, dv)]
    dgate = None
    if g is not None:
        dg += decay.gate_gradient(q_in.mul_(dq_in), k_out.mul_(dk_out), dstates.mul_(states) * decay.total_MG1)
        dgate = from_chunks(dg, batch, length, heads).view(g.shape).to(g.dtype)
    return back[0].to(q.dtype), back[1].to(k.dtype), back[2].to(v.dtype), dgate, dh0.view_as(dfinal_BHKV)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o [B, T, H, V], the last states [S, H, K, V] and, if `save`, the chunk states [R, H, K, V]."""
    dtype = state_dtype(v.dtype)
    shape = (q.shape[2], q.shape[3], v.shape[3])
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    start = v.new_zeros(sequences, *shape, dtype=dtype) if h0 is None else h0.to(dtype)
    if cu_seqlens is None:
        out, final, states = _forward_dense(q, k, v, g, start, scale, chunk)
        return out, final.clone(), states.flatten(0, 1) if save else states.new_empty(0)
    out, final = torch.empty_like(v, memory_format=torch.contiguous_format), start.clone()
    kept = start.new_zeros(num_chunks(1, q.shape[1], chunk, cu_seqlens) if save else 0, *shape)
    for group in groups(cu_seqlens, chunk):
        qs, ks, vs, gs = (group.gather(x) for x in (q, k, v, g))
        o, last, states = _forward_dense(qs, ks, vs, gs, start[group.rows], scale, chunk)
        group.scatter(out, o)
        final[group.rows] = last
        if save:
            group.put_chunks(kept, states.transpose(0, 1))
    return out, final, kept if save else start.new_empty(0)


def backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, g and of the initial state [S, H, K, V]."""
    dfinal = dfinal.to(states.dtype)
    if cu_seqlens is None:
        shape = (-1, q.shape[0], *states.shape[1:])
        return _backward_dense(do, dfinal, q, k, v, g, states.view(shape), scale, chunk)
    tokens = [q, k, v, g]
    grads = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in tokens]
    dh0 = dfinal.clone()
    for group in groups(cu_seqlens, chunk):
        qs, ks, vs, gs = (group.gather(x) for x in tokens)
        own = group.take_chunks(states).transpose(0, 1)
        *parts, dstart = _backward_dense(
            group.gather(do), dfinal[group.rows], qs, ks, vs, gs, own, scale, chunk
        )
        for grad, part in zip(grads, parts, strict=True):
            if grad is not None:
                group.scatter(grad, part)
        dh0[group.rows] = dstart
    return grads[0], grads[1], grads[2], grads[3], dh0
