"""The delta rule in chunks, on any device, with the backward written by hand.

Inside a chunk the corrections D solve (I + A) D = diag(beta) (V - K_in S), A[i, j] = beta_i <k_i, k_j> decayed, j < i:
a triangular solve, never an explicit inverse. With D in the place of V the rest is gated linear attention.
The backward differentiates the solve implicitly: R = (I + A)^-T dD.

Legend: as in kernels.common.chunks and kernels.common.sections.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

from functools import partial

import torch
from torch import Tensor

from kernels.common import sections
from kernels.common.chunks import Decay, decay_of, from_chunks, to_chunks


def _solve(a_MCC: Tensor, x_MCD: Tensor, *, transposed: bool = False) -> Tensor:
    """(I + A)^-1 X, or (I + A)^-T X; A is strictly lower, its unit diagonal is implied."""
    matrix = a_MCC.mT if transposed else a_MCC
    solved: Tensor = torch.linalg.solve_triangular(matrix, x_MCD, upper=transposed, unitriangular=True)
    return solved


def _parts(tokens: sections.Tokens, scale: float, chunk: int) -> tuple[Decay, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decay, scaled queries, keys, values, beta [M, C, 1], and <k_i, k_j> decayed, strictly lower."""
    q, k, v, beta, g = tokens
    assert q is not None
    assert k is not None
    assert v is not None
    assert beta is not None
    decay = decay_of(g, q, chunk)
    qc, kc, vc = to_chunks(q, chunk).mul(scale), to_chunks(k, chunk), to_chunks(v, chunk)
    return decay, qc, kc, vc, to_chunks(beta[..., None], chunk), decay.scores(kc, kc, strict=True)


def _forward_section(
    tokens: sections.Tokens, s_ZKV: Tensor, states_nZKV: Tensor, *, scale: float, chunk: int
) -> tuple[Tensor, Tensor]:
    decay, qc, kc, vc, bc, kk = _parts(tokens, scale, chunk)
    rows, width = states_nZKV.shape[:2], vc.shape[2]
    uw = _solve(kk.mul_(bc), torch.cat([vc, kc * decay.into_MCG], dim=-1).mul_(bc))
    u, w, k_out = (x.unflatten(0, rows) for x in (uw[..., :width], uw[..., width:], kc * decay.out_MCG))
    total = decay.total_MG1.unflatten(0, rows)
    corrections = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    for n in range(rows[0]):
        states_nZKV[n] = s_ZKV
        d = corrections[n] = torch.baddbmm(u[n], w[n], s_ZKV, alpha=-1)
        s_ZKV = torch.baddbmm(total[n] * s_ZKV, k_out[n].mT, d)
    out = torch.bmm(decay.scores(qc, kc, strict=False), corrections.flatten(0, 1))
    out.baddbmm_(qc.mul_(decay.into_MCG), states_nZKV.flatten(0, 1))
    assert tokens[0] is not None
    return from_chunks(out, *tokens[0].shape[:3]), s_ZKV


def _backward_section(
    tokens: sections.Tokens, do: Tensor, states_nZKV: Tensor, ds_ZKV: Tensor, *, scale: float, chunk: int
) -> tuple[list[Tensor | None], Tensor]:
    decay, qc, kc, vc, bc, kk = _parts(tokens, scale, chunk)
    doc = to_chunks(do, chunk)
    q_in, k_in, k_out = qc * decay.into_MCG, kc * decay.into_MCG, kc * decay.out_MCG
    rows, states = states_nZKV.shape[:2], states_nZKV.flatten(0, 1)
    # the forward once more: corrections D, their dependence W on the state, scores P
    a, p = kk * bc, decay.scores(qc, kc, strict=False)
    error = torch.baddbmm(vc, k_in, states, alpha=-1)
    solved = _solve(a, torch.cat([error, k_in], dim=-1).mul_(bc))
    d, w = solved[..., : vc.shape[2]], solved[..., vc.shape[2] :]
    # gradients of D and of the states, last chunk first
    dd, qdo = torch.bmm(p.mT, doc), torch.bmm(q_in.mT, doc)
    dstates = torch.empty_like(qdo)
    by_chunk = [x.unflatten(0, rows) for x in (dd, w, k_out, decay.total_MG1, qdo, dstates)]
    for dd_n, w_n, k_out_n, total_n, qdo_n, dstates_n in reversed(list(zip(*by_chunk, strict=True))):
        dstates_n.copy_(ds_ZKV)
        dd_n.baddbmm_(k_out_n, ds_ZKV)
        ds_ZKV = torch.addcmul(qdo_n, total_n, ds_ZKV).baddbmm_(w_n.mT, dd_n, alpha=-1)
    # through the solve
    r = _solve(a, dd, transposed=True)
    da = torch.bmm(r, d.mT).neg_().tril_(-1)
    dbeta = (r * error).sum(-1, keepdim=True) + (da * kk).sum(-1, keepdim=True)
    dv = r.mul_(bc)
    dk, dk_columns, dg = decay.scores_backward(kc, kc, kk, da.mul_(bc), strict=True)
    # through the output and the states
    dq, dk_scores, dg_scores = decay.scores_backward(qc, kc, p, torch.bmm(doc, d.mT), strict=False)
    dq_in, dk_out, dk_in = torch.bmm(doc, states.mT), torch.bmm(d, dstates.mT), torch.bmm(dv, states.mT).neg_()
    dq.addcmul_(dq_in, decay.into_MCG).mul_(scale)
    dk.add_(dk_columns).add_(dk_scores).addcmul_(dk_out, decay.out_MCG).addcmul_(dk_in, decay.into_MCG)
    q, g = tokens[0], tokens[4]
    assert q is not None
    dq, dk, dv, dbeta = (from_chunks(x, *q.shape[:3]) for x in (dq, dk, dv, dbeta))
    dgate = None
    if g is not None:
        into = q_in.mul_(dq_in).addcmul_(k_in, dk_in)
        dg += dg_scores
        dg += decay.gate_gradient(into, k_out.mul_(dk_out), dstates.mul_(states).mul_(decay.total_MG1))
        dgate = from_chunks(dg, *q.shape[:3]).view(g.shape)
    return [dq, dk, dv, dbeta[..., 0], dgate], ds_ZKV


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
    start = sections.start_of(h0, q, v, cu_seqlens)
    section = partial(_forward_section, scale=scale, chunk=chunk)
    return sections.forward(section, [q, k, v, beta, g], v, start, cu_seqlens, chunk, save)


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
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, g and of the initial state [S, H, K, V]."""
    section = partial(_backward_section, scale=scale, chunk=chunk)
    grads, dh0 = sections.backward(section, [q, k, v, beta, g], do, dfinal, states, cu_seqlens, chunk)
    return *grads, dh0
