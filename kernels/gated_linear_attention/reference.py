"""Token loop of gated linear attention: the definition, in whatever precision the inputs have."""

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.dispatch import without_autocast
from kernels.common.varlen import per_sequence


@without_autocast
def gated_linear_attention_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHG: Tensor | None,
    h0_BHKV: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t.

    Returns:
        o [B, T, H, V] in the dtype of v, and the last state [B, H, K, V] in the state dtype.
    """
    if cu_seqlens is not None:
        one = lambda q, k, v, g, s: gated_linear_attention_reference(q, k, v, g, s, scale)  # noqa: E731
        return per_sequence(one, [q_BTHK, k_BTHK, v_BTHV, g_BTHG], h0_BHKV, cu_seqlens)
    dtype = state_dtype(v_BTHV.dtype)
    q, k, v = (x.to(dtype).unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV))
    g = (q_BTHK.new_zeros(*q_BTHK.shape[:3], 1) if g_BTHG is None else g_BTHG).to(dtype)
    decay = (g if g.dim() == 4 else g[..., None]).exp().unbind(1)
    batch, _, heads, width = v_BTHV.shape
    s_BHKV = (
        v_BTHV.new_zeros(batch, heads, q_BTHK.shape[3], width, dtype=dtype) if h0_BHKV is None else h0_BHKV.to(dtype)
    )
    outs = []
    for t in range(len(q)):
        s_BHKV = decay[t][..., None] * s_BHKV + k[t][..., None] * v[t][..., None, :]
        outs.append((q[t][..., None, :] @ s_BHKV)[..., 0, :])
    o_BTHV = torch.stack(outs, dim=1) * scale if outs else v_BTHV
    return o_BTHV.to(v_BTHV.dtype), s_BHKV
