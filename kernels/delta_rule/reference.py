"""Token loop of the gated delta rule: the definition, in whatever precision the inputs have."""

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.dispatch import without_autocast
from kernels.common.varlen import per_sequence


@without_autocast
def delta_rule_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    g_BTHG: Tensor | None,
    h0_BHKV: Tensor | None,
    scale: float,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S' = diag(exp g_t) S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; o_t = scale * S_t^T q_t.

    `normalize` takes q_t / sqrt(|q_t|^2 + 1e-6) for q_t, and k_t alike.

    Returns:
        o [B, T, H, V] in the dtype of v, and the last state [B, H, K, V] in the state dtype.
    """
    if cu_seqlens is not None:
        one = lambda q, k, v, b, g, s: delta_rule_reference(q, k, v, b, g, s, scale, normalize)  # noqa: E731
        return per_sequence(one, [q_BTHK, k_BTHK, v_BTHV, beta_BTH, g_BTHG], h0_BHKV, cu_seqlens)
    dtype = state_dtype(v_BTHV.dtype)
    q_BTHK, k_BTHK = q_BTHK.to(dtype), k_BTHK.to(dtype)
    if normalize:
        q_BTHK, k_BTHK = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q_BTHK, k_BTHK))
    q, k, v, beta = (x.to(dtype).unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, beta_BTH))
    g = (q_BTHK.new_zeros(*q_BTHK.shape[:3], 1) if g_BTHG is None else g_BTHG).to(dtype)
    decay = (g if g.dim() == 4 else g[..., None]).exp().unbind(1)
    batch, _, heads, width = v_BTHV.shape
    s_BHKV = (
        v_BTHV.new_zeros(batch, heads, q_BTHK.shape[3], width, dtype=dtype) if h0_BHKV is None else h0_BHKV.to(dtype)
    )
    outs = []
    for t in range(len(q)):
        s_BHKV = decay[t][..., None] * s_BHKV
        error_BHV = v[t] - (k[t][..., None, :] @ s_BHKV)[..., 0, :]
        s_BHKV = s_BHKV + k[t][..., None] * (beta[t][..., None] * error_BHV)[..., None, :]
        outs.append((q[t][..., None, :] @ s_BHKV)[..., 0, :])
    o_BTHV = torch.stack(outs, dim=1) * scale if outs else v_BTHV
    return o_BTHV.to(v_BTHV.dtype), s_BHKV
