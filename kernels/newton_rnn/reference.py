"""Token loop of the ParaRNN cells: the definition, in whatever precision the inputs have.

Legend: B batch, T time, G gates, U units: [N] with diagonal weights, [H, D] with a matrix per head; P parts.
"""

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.dispatch import without_autocast
from kernels.common.varlen import per_sequence


@without_autocast
def newton_rnn_reference(
    x_BTGU: Tensor,
    r: Tensor,
    peephole_2U: Tensor | None,
    h0_BPU: Tensor | None,
    cell: str,
    reset_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The GRU and the CIFG-LSTM of ParaRNN, one token after the other.

    Returns:
        h [B, T, U] and the last state [B, P, U] (P = 1 for the GRU: h; 2 for the LSTM: c, h), both in the state dtype.
    """
    if cu_seqlens is not None:
        flags = None if reset_BT is None else reset_BT
        one = lambda x, flag, s: newton_rnn_reference(x, r, peephole_2U, s, cell, flag)  # noqa: E731
        return per_sequence(one, [x_BTGU, flags], h0_BPU, cu_seqlens)
    dtype = state_dtype(x_BTGU.dtype)
    weights = r.to(dtype)
    is_diagonal = r.dim() == x_BTGU.dim() - 2
    peephole = None if peephole_2U is None else peephole_2U.to(dtype)

    def recur(g: int, v: Tensor) -> Tensor:
        return weights[g] * v if is_diagonal else (v[..., None, :] @ weights[g])[..., 0, :]

    parts = 2 if cell == "lstm" else 1
    shape = (x_BTGU.shape[0], parts, *x_BTGU.shape[3:])
    state = x_BTGU.new_zeros(shape, dtype=dtype) if h0_BPU is None else h0_BPU.to(dtype)
    outs = []
    for t, x in enumerate(x_BTGU.to(dtype).unbind(1)):
        if reset_BT is not None:
            state = state.masked_fill(reset_BT[:, t].reshape(-1, *[1] * (state.dim() - 1)), 0)
        h = state[:, -1]
        if cell == "gru":
            z, gate = torch.sigmoid(x[:, 0] + recur(0, h)), torch.sigmoid(x[:, 1] + recur(1, h))
            candidate = torch.tanh(x[:, 2] + recur(2, gate * h))
            h = (1 - z) * h + z * candidate
            state = h[:, None]
        else:
            c = state[:, 0]
            f, o, z = (x[:, g] + recur(g, h) for g in range(3))
            f = torch.sigmoid(f if peephole is None else f + peephole[0] * c)
            c = f * c + (1 - f) * torch.tanh(z)
            o = torch.sigmoid(o if peephole is None else o + peephole[1] * c)
            h = o * torch.tanh(c)
            state = torch.stack([c, h], dim=1)
        outs.append(h)
    h_BTU = torch.stack(outs, dim=1) if outs else x_BTGU[:, :, 0].to(dtype)
    return h_BTU, state
