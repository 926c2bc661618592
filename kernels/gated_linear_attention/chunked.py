"""Gated linear attention in chunks, on any device, with the backward written by hand.

Inside a chunk attention is a masked matrix product; between chunks only the state S [K, V] travels. Kept for the
backward: the inputs and the state at every chunk start; everything else is computed again.

Legend: as in kernels.common.chunks and kernels.common.sections.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

from functools import partial

import torch
from torch import Tensor

from kernels.common import sections
from kernels.common.chunks import decay_of, to_chunks


def _forward_section(
    tokens: sections.Tokens, s_ZKV: Tensor, states_nZKV: Tensor, *, scale: float, chunk: int
) -> tuple[Tensor, Tensor]:
    q, k, v, g = tokens
    assert q is not None
    assert k is not None
    assert v is not None
    decay = decay_of(g, q, chunk)
    qc, kc, vc = to_chunks(q, chunk, scale), to_chunks(k, chunk), to_chunks(v, chunk)
    rows, states = states_nZKV.shape[:2], states_nZKV.flatten(0, 1)
    total = decay.total_MG1.unflatten(0, rows)
    # what a chunk adds to the state is written where the state behind it belongs, then the state before is added
    k_out, ahead = kc * decay.out_MCG, states.shape[0] - rows[1]
    states_nZKV[0] = s_ZKV
    torch.bmm(k_out[:ahead].mT, vc[:ahead], out=states[rows[1] :])
    for n in range(1, rows[0]):
        states_nZKV[n].addcmul_(total[n - 1], states_nZKV[n - 1])
    last = torch.bmm(k_out[ahead:].mT, vc[ahead:]).addcmul_(total[-1], states_nZKV[-1])
    out = torch.bmm(decay.scores(qc, kc, strict=False), vc)
    return out.baddbmm_(qc.mul_(decay.into_MCG), states), last


def _backward_section(
    tokens: sections.Tokens, do: Tensor, states_nZKV: Tensor, ds_ZKV: Tensor, *, scale: float, chunk: int
) -> tuple[list[Tensor | None], Tensor]:
    q, k, v, g = tokens
    assert q is not None
    assert k is not None
    assert v is not None
    decay = decay_of(g, q, chunk)
    # scaling the gradient of the output instead of q leaves only one tensor to scale
    qc, kc, vc, doc = to_chunks(q, chunk), to_chunks(k, chunk), to_chunks(v, chunk), to_chunks(do, chunk, scale)
    q_in, k_out = qc * decay.into_MCG, kc * decay.out_MCG
    rows, states = states_nZKV.shape[:2], states_nZKV.flatten(0, 1)
    total = decay.total_MG1.unflatten(0, rows)
    dstates = torch.empty_like(states)
    dstates_n = dstates.unflatten(0, rows)
    torch.bmm(q_in[rows[1] :].mT, doc[rows[1] :], out=dstates[: -rows[1]])
    dstates_n[-1] = ds_ZKV
    for n in range(rows[0] - 1, 0, -1):
        dstates_n[n - 1].addcmul_(total[n], dstates_n[n])
    first = torch.bmm(q_in[: rows[1]].mT, doc[: rows[1]]).addcmul_(total[0], dstates_n[0])
    p = decay.scores(qc, kc, strict=False)
    dv = torch.bmm(p.mT, doc).baddbmm_(k_out, dstates)
    dq, dk, dg = decay.scores_backward(qc, kc, p, torch.bmm(doc, vc.mT), None, None)
    dq_in, dk_out = torch.bmm(doc, states.mT), torch.bmm(vc, dstates.mT)
    dq.addcmul_(dq_in, decay.into_MCG)
    dk.addcmul_(dk_out, decay.out_MCG)
    if g is None:
        return [dq, dk, dv, None], first
    dg += decay.gate_gradient(q_in.mul_(dq_in), k_out.mul_(dk_out), states, dstates)
    return [dq, dk, dv, dg], first


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
    start = sections.start_of(h0, q, v, cu_seqlens)
    section = partial(_forward_section, scale=scale, chunk=chunk)
    return sections.forward(section, [q, k, v, g], v, start, cu_seqlens, chunk, save)


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
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g and of the initial state [S, H, K, V]."""
    section = partial(_backward_section, scale=scale, chunk=chunk)
    grads, dh0 = sections.backward(section, [q, k, v, g], do, dfinal, states, cu_seqlens, chunk)
    return *grads, dh0
