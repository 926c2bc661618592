"""The delta rule in chunks, on any device, with the backward written by hand.

Inside a chunk the corrections D solve (I + A) D = diag(beta) (V - K_in S), A[i, j] = beta_i <k_i, k_j> decayed, j < i:
(I + A)^-1 by substitution, never by squaring A. With D in the place of V the rest is gated linear attention.
The backward differentiates the solve implicitly: R = (I + A)^-T dD.

Legend: as in kernels.common.chunks and kernels.common.sections.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.common import sections
from kernels.common.chunks import decay_of, to_chunks
from kernels.common.decay import Decay


def _inverse(a_MCC: Tensor) -> Tensor:
    """(I + A)^-1 by substitution; A is strictly lower, its unit diagonal is implied.

    X (I + A) = I and not (I + A) X = I: with both in the order LAPACK wants nothing is copied, four times faster.
    """
    eye = torch.eye(a_MCC.shape[1], dtype=a_MCC.dtype, device=a_MCC.device).expand_as(a_MCC)
    solved: Tensor = torch.linalg.solve_triangular(a_MCC, eye, upper=False, left=False, unitriangular=True)
    return solved


def _unit(x_MCK: Tensor) -> Tensor:
    """Bring the rows to length 1 in place; returns what they were multiplied by."""
    scale = (x_MCK * x_MCK).sum(-1, keepdim=True).add_(1e-6).rsqrt_()
    x_MCK.mul_(scale)
    return scale


def _unit_backward(y_MCK: Tensor, scale_MC1: Tensor, dy_MCK: Tensor) -> Tensor:
    """Gradient of the rows that became `y`, in the place of `dy`."""
    return dy_MCK.addcmul_(y_MCK, (y_MCK * dy_MCK).sum(-1, keepdim=True), value=-1).mul_(scale_MC1)


class _Parts(NamedTuple):
    """Of one section; `triangle` is <k_i, k_j> decayed, below the diagonal, `inverse` (I + A)^-1."""

    decay: Decay
    keys: Tensor
    key_scale: Tensor | None
    values: Tensor
    beta: Tensor
    triangle: Tensor
    inverse: Tensor


def _parts(tokens: sections.Tokens, chunk: int, normalize: bool) -> _Parts:
    q, k, v, beta, g = tokens
    assert q is not None
    assert k is not None
    assert v is not None
    assert beta is not None
    decay = decay_of(g, q, chunk)
    kc, vc, bc = to_chunks(k, chunk), to_chunks(v, chunk), to_chunks(beta[..., None], chunk)
    key_scale = _unit(kc) if normalize else None
    kk = decay.scores(kc, kc, strict=True)
    return _Parts(decay, kc, key_scale, vc, bc, kk, _inverse(kk * bc))


def _forward_section(
    tokens: sections.Tokens, s_ZKV: Tensor, states_nZKV: Tensor, *, scale: float, chunk: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    decay, kc, _, vc, bc, _, inverse = _parts(tokens, chunk, normalize)
    assert tokens[0] is not None
    qc, rows = to_chunks(tokens[0], chunk), states_nZKV.shape[:2]
    if normalize:
        _unit(qc)
    qc.mul_(scale)
    corrections, k_out = torch.empty_like(vc), kc * decay.out_MCG
    k_in, error = (kc * decay.into_MCG).mul_(bc), vc.mul_(bc)
    states_nZKV[0] = s_ZKV
    last = torch.empty_like(s_ZKV)
    by_chunk = (x.unflatten(0, rows) for x in (error, k_in, inverse, corrections, decay.total_MG1, k_out))
    for n, (error_n, k_in_n, inverse_n, d_n, total_n, k_out_n) in enumerate(zip(*by_chunk, strict=True)):
        torch.bmm(inverse_n, error_n.baddbmm_(k_in_n, states_nZKV[n], alpha=-1), out=d_n)
        after = last if n + 1 == rows[0] else states_nZKV[n + 1]
        torch.mul(states_nZKV[n], total_n, out=after).baddbmm_(k_out_n.mT, d_n)
    out = torch.bmm(decay.scores(qc, kc, strict=False), corrections)
    return out.baddbmm_(qc.mul_(decay.into_MCG), states_nZKV.flatten(0, 1)), last


def _backward_section(
    tokens: sections.Tokens,
    do: Tensor,
    states_nZKV: Tensor,
    ds_ZKV: Tensor,
    *,
    scale: float,
    chunk: int,
    normalize: bool,
) -> tuple[list[Tensor | None], Tensor]:
    decay, kc, key_scale, vc, bc, kk, inverse = _parts(tokens, chunk, normalize)
    assert tokens[0] is not None
    # scaling the gradient of the output instead of q leaves only one tensor to scale
    qc, doc = to_chunks(tokens[0], chunk), to_chunks(do, chunk, scale)
    query_scale = _unit(qc) if normalize else None
    q_in, k_in, k_out = qc * decay.into_MCG, kc * decay.into_MCG, kc * decay.out_MCG
    rows, states = states_nZKV.shape[:2], states_nZKV.flatten(0, 1)
    # the forward once more: corrections D = (I + A)^-1 beta error, scores P
    error = vc.baddbmm_(k_in, states, alpha=-1)
    d, p = torch.bmm(inverse, error * bc), decay.scores(qc, kc, strict=False)
    # gradients of D, R = (I + A)^-T dD and the gradients of the states, last chunk first
    dd, r, k_solve = torch.bmm(p.mT, doc), torch.empty_like(d), k_in * bc
    # what a chunk's outputs give to the state before it is written where that gradient belongs
    dstates = torch.empty_like(states)
    torch.bmm(q_in[rows[1] :].mT, doc[rows[1] :], out=dstates[: -rows[1]])
    first, dstates_n = torch.bmm(q_in[: rows[1]].mT, doc[: rows[1]]), dstates.unflatten(0, rows)
    dstates_n[-1] = ds_ZKV
    by_chunk = (x.unflatten(0, rows).unbind() for x in (dd, inverse, r, k_solve, k_out, decay.total_MG1, dstates))
    before = [first, *dstates_n[:-1].unbind()]
    for dd_n, inverse_n, r_n, k_solve_n, k_out_n, total_n, ds_n, before_n in reversed(
        list(zip(*by_chunk, before, strict=True))
    ):
        torch.bmm(inverse_n.mT, dd_n.baddbmm_(k_out_n, ds_n), out=r_n)
        before_n.addcmul_(total_n, ds_n).baddbmm_(k_solve_n.mT, r_n, alpha=-1)
    # through the solve: dA = -R D^T below the diagonal
    da = torch.bmm(r, d.mT).neg_()
    dbeta = (r * error).sum(-1, keepdim=True).add_((da * kk).sum(-1, keepdim=True))
    dv = r.mul_(bc)
    # through the output and the states
    dq, dk, dg = decay.scores_backward(qc, kc, p, torch.bmm(doc, d.mT), kk, da.mul_(bc))
    dq_in, dk_out, dk_in = torch.bmm(doc, states.mT), torch.bmm(d, dstates.mT), torch.bmm(dv, states.mT).neg_()
    dq.addcmul_(dq_in, decay.into_MCG)
    dk.addcmul_(dk_out, decay.out_MCG).addcmul_(dk_in, decay.into_MCG)
    if query_scale is not None and key_scale is not None:
        _unit_backward(qc, query_scale, dq)
        _unit_backward(kc, key_scale, dk)
    if tokens[4] is None:
        return [dq, dk, dv, dbeta, None], first
    dg += decay.gate_gradient(q_in.mul_(dq_in).addcmul_(k_in, dk_in), k_out.mul_(dk_out), states, dstates)
    return [dq, dk, dv, dbeta, dg], first


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
    normalize: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o [B, T, H, V], the last states [S, H, K, V] and, if `save`, the chunk states [R, H, K, V]."""
    start = sections.start_of(h0, q, v, cu_seqlens)
    section = partial(_forward_section, scale=scale, chunk=chunk, normalize=normalize)
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
    normalize: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, g and of the initial state [S, H, K, V]."""
    section = partial(_backward_section, scale=scale, chunk=chunk, normalize=normalize)
    grads, dh0 = sections.backward(section, [q, k, v, beta, g], do, dfinal, states, cu_seqlens, chunk)
    return *grads, dh0
