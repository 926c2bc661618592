"""The delta rule in chunks, on any device, with the backward written by hand.

Inside a chunk the corrections D solve (I + A) D = diag(beta) (V - K_in S), A[i, j] = beta_i <k_i, k_j> decayed, j < i:
a triangular solve, never an explicit inverse. With D in the place of V the rest is gated linear attention.
The backward differentiates the solve implicitly: R = (I + A)^-T dD.

Legend: as in kernels.common.chunks; Z = B*H; R rows of saved chunk states.
"""

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.chunks import Decay, decay_of, from_chunks, to_chunks
from kernels.common.varlen import groups, num_chunks


def _solve(a_MCC: Tensor, x_MCD: Tensor, *, transposed: bool = False) -> Tensor:
    """(I + A)^-1 X, or (I + A)^-T X; A is strictly lower, its unit diagonal is implied."""
    matrix = a_MCC.mT if transposed else a_MCC
    return torch.linalg.solve_triangular(matrix, x_MCD, upper=transposed, unitriangular=True)


def _parts(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, chunk: int
) -> tuple[Decay, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decay, scaled queries, keys, values, beta [M, C, 1] and <k_i, k_j> decayed, strictly lower."""
    decay = decay_of(g, q, chunk)
    qc, kc, vc = to_chunks(q, chunk).mul(scale), to_chunks(k, chunk), to_chunks(v, chunk)
    return decay, qc, kc, vc, to_chunks(beta[..., None], chunk), decay.scores(kc, kc, strict=True)


def _forward_dense(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0_BHKV: Tensor, scale: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    decay, qc, kc, vc, bc, kk = _parts(q, k, v, beta, g, scale, chunk)
    width = v.shape[3]
    uw = _solve(kk.mul_(bc), torch.cat([vc, kc * decay.into_MCG], dim=-1).mul_(bc))
    rows = (-1, batch * heads)
    u, w, k_out = (x.unflatten(0, rows) for x in (uw[..., :width], uw[..., width:], kc * decay.out_MCG))
    total = decay.total_MG1.unflatten(0, rows)
    corrections = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    states = u.new_empty(u.shape[0], *h0_BHKV.flatten(0, 1).shape)
    s = h0_BHKV.flatten(0, 1)
    for n in range(u.shape[0]):
        states[n] = s
        d = torch.baddbmm(u[n], w[n], s, alpha=-1, out=corrections[n])
        s = torch.baddbmm(total[n] * s, k_out[n].mT, d)
    out = torch.bmm(decay.scores(qc, kc, strict=False), corrections.flatten(0, 1))
    out.baddbmm_(qc * decay.into_MCG, states.flatten(0, 1))
    return from_chunks(out, batch, length, heads).to(v.dtype), s.view_as(h0_BHKV), states.unflatten(1, (batch, heads))


def _backward_dense(
    do: Tensor,
    dfinal_BHKV: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    states_NBHKV: Tensor,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    batch, length, heads, _ = q.shape
    decay, qc, kc, vc, bc, kk = _parts(q, k, v, beta, g, scale, chunk)
    doc = to_chunks(do, chunk)
    q_in, k_in, k_out = qc * decay.into_MCG, kc * decay.into_MCG, kc * decay.out_MCG
    a = kk * bc
    p = decay.scores(qc, kc, strict=False)
    states = states_NBHKV.flatten(0, 2)
    error = torch.baddbmm(vc, k_in, states, alpha=-1)
    solved = _solve(a, torch.cat([error, k_in], dim=-1).mul_(bc))
    d, w = solved[..., : v.shape[3]], solved[..., v.shape[3] :]

    rows = (-1, batch * heads)
    dd = torch.bmm(p.mT, doc)
    dd_n, w_n, k_out_n, total = (x.unflatten(0, rows) for x in (dd, w, k_out, decay.total_MG1))
    qdo = torch.bmm(q_in.mT, doc).unflatten(0, rows)
    dstates = torch.empty_like(qdo)
    ds = dfinal_BHKV.flatten(0, 1)
    for n in range(qdo.shape[0] - 1, -1, -1):
        dstates[n] = ds
        dd_n[n].baddbmm_(k_out_n[n], ds)
        ds = torch.addcmul(qdo[n], total[n], ds).baddbmm_(w_n[n].mT, dd_n[n], alpha=-1)
    dstates = dstates.flatten(0, 1)

    r = _solve(a, dd, transposed=True)
    dbeta = (r * error).sum(-1, keepdim=True)
    da = torch.bmm(r, d.mT).neg_().tril_(-1)
    dbeta += (da * kk).sum(-1, keepdim=True)
    dv = r.mul_(bc)
    dk_rows, dk_columns, dg = decay.scores_backward(kc, kc, kk, da.mul_(bc), strict=True)
    dq, dk, dg_out = decay.scores_backward(qc, kc, p, torch.bmm(doc, d.mT), strict=False)
    dk += dk_rows.add_(dk_columns)
    dq_in, dk_out, dk_in = torch.bmm(doc, states.mT), torch.bmm(d, dstates.mT), torch.bmm(dv, states.mT).neg_()
    dq.addcmul_(dq_in, decay.into_MCG).mul_(scale)
    dk.addcmul_(dk_out, decay.out_MCG).addcmul_(dk_in, decay.into_MCG)
    back = [from_chunks(x, batch, length, heads) for x in (dq, dk, dv, dbeta)]
    dgate = None
    if g is not None:
        into = q_in.mul_(dq_in).addcmul_(k_in, dk_in)
        dg += dg_out
        dg += decay.gate_gradient(into, k_out.mul_(dk_out), dstates.mul_(states) * decay.total_MG1)
        dgate = from_chunks(dg, batch, length, heads).view(g.shape).to(g.dtype)
    dq, dk, dv = back[0].to(q.dtype), back[1].to(k.dtype), back[2].to(v.dtype)
    return dq, dk, dv, back[3][..., 0].to(beta.dtype), dgate, ds.view_as(dfinal_BHKV)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
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
        out, final, states = _forward_dense(q, k, v, beta, g, start, scale, chunk)
        return out, final.clone(), states.flatten(0, 1) if save else states.new_empty(0)
    out, final = torch.empty_like(v, memory_format=torch.contiguous_format), start.clone()
    kept = start.new_zeros(num_chunks(1, q.shape[1], chunk, cu_seqlens) if save else 0, *shape)
    for group in groups(cu_seqlens, chunk):
        qs, ks, vs, bs, gs = (group.gather(x) for x in (q, k, v, beta, g))
        o, last, states = _forward_dense(qs, ks, vs, bs, gs, start[group.rows], scale, chunk)
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
    beta: Tensor,
    g: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, beta, g and of the initial state [S, H, K, V]."""
    dfinal = dfinal.to(states.dtype)
    if cu_seqlens is None:
        shape = (-1, q.shape[0], *states.shape[1:])
        return _backward_dense(do, dfinal, q, k, v, beta, g, states.view(shape), scale, chunk)
    tokens = [q, k, v, beta, g]
    grads = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in tokens]
    dh0 = dfinal.clone()
    for group in groups(cu_seqlens, chunk):
        qs, ks, vs, bs, gs = (group.gather(x) for x in tokens)
        own = group.take_chunks(states).transpose(0, 1)
        *parts, dstart = _backward_dense(
            group.gather(do), dfinal[group.rows], qs, ks, vs, bs, gs, own, scale, chunk
        )
        for grad, part in zip(grads, parts, strict=True):
            if grad is not None:
                group.scatter(grad, part)
        dh0[group.rows] = dstart
    return grads[0], grads[1], grads[2], grads[3], grads[4], dh0
