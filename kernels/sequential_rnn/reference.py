"""Token loops of the recurrences that cannot be solved in parallel: the definitions, in whatever precision comes.

Legend: B batch, T time, G gates, H heads, D width; P parts of the state; K, V key and value width of the M2RNN.
"""

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.dispatch import without_autocast
from kernels.common.varlen import per_sequence

# parts of the state, and gates
PARTS = {"gru": 1, "lstm": 2, "slstm": 4, "slstm_exp": 4}
GATES = {"gru": 3, "lstm": 4, "slstm": 4, "slstm_exp": 4}


@without_autocast
def sequential_rnn_reference(
    x_BTGHD: Tensor,
    r_GHDD: Tensor,
    bias_GHD: Tensor | None,
    s0_BPHD: Tensor | None,
    cell: str,
    reset_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GRU, LSTM or sLSTM with a recurrent matrix per head, one token after the other.

    Returns:
        h [B, T, H, D] and the last state [B, P, H, D], both in the state dtype.
    """
    if cu_seqlens is not None:
        one = lambda x, flag, s: sequential_rnn_reference(x, r_GHDD, bias_GHD, s, cell, flag)  # noqa: E731
        return per_sequence(one, [x_BTGHD, reset_BT], s0_BPHD, cu_seqlens)
    dtype = state_dtype(x_BTGHD.dtype)
    r = r_GHDD.to(dtype)
    bias = x_BTGHD.new_zeros(r.shape[:3], dtype=dtype) if bias_GHD is None else bias_GHD.to(dtype)
    shape = (x_BTGHD.shape[0], PARTS[cell], *x_BTGHD.shape[3:])
    state = x_BTGHD.new_zeros(shape, dtype=dtype) if s0_BPHD is None else s0_BPHD.to(dtype)
    outs = []
    for t, x in enumerate(x_BTGHD.to(dtype).unbind(1)):
        if reset_BT is not None:
            state = state.masked_fill(reset_BT[:, t, None, None, None], 0)
        h = state[:, -1]
        recurrent = torch.einsum("bhd,ghde->bghe", h, r) + bias
        if cell == "gru":
            gate = torch.sigmoid(x[:, :2] + recurrent[:, :2])
            n = torch.tanh(x[:, 2] + gate[:, 0] * recurrent[:, 2])
            h = (1 - gate[:, 1]) * n + gate[:, 1] * h
            state = h[:, None]
        elif cell == "lstm":
            i, f, g, o = (x + recurrent).unbind(1)
            c = torch.sigmoid(f) * state[:, 0] + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            state = torch.stack([c, h], 1)
        else:
            i, f, z, o = (x + recurrent).unbind(1)
            c, n, m, _ = state.unbind(1)
            log_f = torch.nn.functional.logsigmoid(f) if cell == "slstm" else f
            # an empty memory (n = 0) has no scale of its own
            carried = torch.where(n == 0, i, log_f + m)
            # of two that are equal the carried one is the maximum, and takes its gradient
            m_new = torch.where(carried >= i, carried, i)
            keep = torch.where(n == 0, 0.0, torch.exp(carried - m_new))
            write = torch.exp(i - m_new)
            c, n = keep * c + write * torch.tanh(z), keep * n + write
            h = torch.sigmoid(o) * c / n
            state = torch.stack([c, n, m_new, h], 1)
        outs.append(h)
    h_BTHD = torch.stack(outs, dim=1) if outs else x_BTGHD[:, :, 0].to(dtype)
    return h_BTHD, state


@without_autocast
def m2rnn_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    f_BTH: Tensor,
    w_HVV: Tensor,
    s0_BHKV: Tensor | None,
    reset_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Z = tanh(S_{t-1} W + k v^T), S_t = f S_{t-1} + (1 - f) Z, o_t = S_t^T q_t.

    Returns:
        o [B, T, H, V] and the last state [B, H, K, V], both in the state dtype.
    """
    if cu_seqlens is not None:
        one = lambda q, k, v, f, flag, s: m2rnn_reference(q, k, v, f, w_HVV, s, flag)  # noqa: E731
        return per_sequence(one, [q_BTHK, k_BTHK, v_BTHV, f_BTH, reset_BT], s0_BHKV, cu_seqlens)
    dtype = state_dtype(v_BTHV.dtype)
    q, k, v, f = (x.to(dtype).unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, f_BTH))
    w = w_HVV.to(dtype)
    batch, _, heads, width = v_BTHV.shape
    shape = (batch, heads, q_BTHK.shape[3], width)
    state = v_BTHV.new_zeros(shape, dtype=dtype) if s0_BHKV is None else s0_BHKV.to(dtype)
    outs = []
    for t in range(len(q)):
        if reset_BT is not None:
            state = state.masked_fill(reset_BT[:, t, None, None, None], 0)
        z = torch.tanh(state @ w + k[t][..., None] * v[t][..., None, :])
        gate = f[t][..., None, None]
        state = gate * state + (1 - gate) * z
        outs.append((q[t][..., None, :] @ state)[..., 0, :])
    o_BTHV = torch.stack(outs, dim=1) if outs else v_BTHV.to(dtype)
    return o_BTHV, state
