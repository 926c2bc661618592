"""Token loop of recurrent attention: the definition, in whatever precision the inputs have."""

from itertools import pairwise

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.dispatch import without_autocast
from kernels.recurrent_attention.state import RecurrentAttentionState

EPSILON = 1e-6


def rms_norm(x_BD: Tensor) -> Tensor:
    """x over the root of its mean square."""
    return x_BD * (x_BD.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


@without_autocast
def recurrent_attention_reference(
    tokens: list[Tensor],
    weights: list[Tensor],
    state: RecurrentAttentionState | None,
    slopes: Tensor | None,
    reset: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, RecurrentAttentionState]:
    """As the public op; tokens x, q, k, v, weights w_out, w_k, w_v and, with an inner layer, w_up, w_down."""
    if cu_seqlens is not None:
        return _packed(tokens, weights, state, slopes, reset, scale, cu_seqlens)
    dtype = state_dtype(tokens[0].dtype)
    x, q, own_k, own_v = (t.to(dtype) for t in tokens)
    w_out, w_k, w_v, *inner = (w.to(dtype) for w in weights)
    batch, length = x.shape[:2]
    keys, values, seen = [], [], torch.ones(batch, 0, dtype=torch.bool, device=x.device)
    if state is not None:
        keys, values = [state.keys.to(dtype)], [state.values.to(dtype)]
        seen = torch.arange(state.keys.shape[1], device=x.device) >= state.first[:, None]
    own = torch.ones(batch, 1, dtype=torch.bool, device=x.device)
    outs = []
    for t in range(length):
        if reset is not None:
            seen = seen & ~reset[:, t, None].bool()
        k = torch.cat([*keys, own_k[:, t, None]], dim=1)
        v = torch.cat([*values, own_v[:, t, None]], dim=1)
        seen = torch.cat([seen, own], dim=1)
        score_BHN = torch.einsum("bhk,bnhk->bhn", q[:, t], k) * scale
        if slopes is not None:
            distance = torch.arange(k.shape[1] - 1, -1, -1, device=x.device, dtype=dtype)
            score_BHN = score_BHN - slopes.to(dtype)[:, None] * distance
        weight = score_BHN.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        a_BHV = torch.einsum("bhn,bnhv->bhv", weight, v)
        y = x[:, t] + torch.einsum("bhv,hvd->bd", a_BHV, w_out)
        if inner:
            y = y + torch.nn.functional.gelu(rms_norm(y) @ inner[0]) @ inner[1]
        outs.append(y)
        z = rms_norm(y)
        keys.append(torch.einsum("bd,dhk->bhk", z, w_k)[:, None])
        values.append(torch.einsum("bd,dhv->bhv", z, w_v)[:, None])
    after = RecurrentAttentionState(torch.cat(keys, 1), torch.cat(values, 1), (~seen).sum(1))
    return torch.stack(outs, dim=1).to(tokens[0].dtype), after


def _packed(
    tokens: list[Tensor],
    weights: list[Tensor],
    state: RecurrentAttentionState | None,
    slopes: Tensor | None,
    reset: Tensor | None,
    scale: float,
    cu_seqlens: Tensor,
) -> tuple[Tensor, RecurrentAttentionState]:
    """Every sequence alone, then their states in rows of one length (the definition of varlen)."""
    dtype = state_dtype(tokens[0].dtype)
    outs, states = [], []
    for s, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        start = None if state is None else RecurrentAttentionState(*(part[s : s + 1] for part in state))
        if end > begin:
            part = [t[:, begin:end] for t in tokens]
            forget = None if reset is None else reset[:, begin:end]
            out, start = recurrent_attention_reference(part, weights, start, slopes, forget, scale)
            outs.append(out)
        if start is None:
            keys, values = (t.new_zeros(1, 0, *t.shape[2:], dtype=dtype) for t in tokens[2:])
            start = RecurrentAttentionState(keys, values, torch.zeros(1, dtype=torch.long, device=keys.device))
        states.append(start)
    longest = max(one.keys.shape[1] for one in states)

    def padded(x_1NX: Tensor) -> Tensor:
        x_1NX = x_1NX.to(dtype)
        return torch.cat([x_1NX.new_zeros(1, longest - x_1NX.shape[1], *x_1NX.shape[2:]), x_1NX], dim=1)

    first = torch.cat([one.first + longest - one.keys.shape[1] for one in states])
    keys, values = torch.cat([padded(one.keys) for one in states]), torch.cat([padded(one.values) for one in states])
    return torch.cat(outs, dim=1), RecurrentAttentionState(keys, values, first)
