"""Token loop of ridge memory with an exact solve: the definition, in whatever precision the inputs have."""

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.dispatch import without_autocast
from kernels.common.varlen import per_sequence


@without_autocast
def ridge_memory_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor | None,
    g_BTH: Tensor | None,
    mix_BTH: Tensor | None,
    s0_BHKW: Tensor | None,
    ratio: float,
    floor: float,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + beta_t k_t [k_t, v_t]^T = [H, U]; o_t = scale U_t^T (H_t + lambda_t I)^-1 q_t.

    Returns:
        o [B, T, H, V] in the dtype of v, and the last state [B, H, K, K + V] in the state dtype.
    """
    if cu_seqlens is not None:
        one = lambda q, k, v, b, g, m, s: ridge_memory_reference(q, k, v, b, g, m, s, ratio, floor, scale)  # noqa: E731
        return per_sequence(one, [q_BTHK, k_BTHK, v_BTHV, beta_BTH, g_BTH, mix_BTH], s0_BHKW, cu_seqlens)
    dtype = state_dtype(v_BTHV.dtype)
    batch, length, heads, width = k_BTHK.shape
    q, k, v = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV))
    kv = torch.cat([k, v], dim=-1)
    ones = q.new_ones(batch, length, heads)
    beta = ones if beta_BTH is None else beta_BTH.to(dtype)
    decay = ones if g_BTH is None else g_BTH.to(dtype).exp()
    mix = ones * 0 if mix_BTH is None else mix_BTH.to(dtype)
    s_BHKW = q.new_zeros(batch, heads, width, kv.shape[3]) if s0_BHKW is None else s0_BHKW.to(dtype)
    eye = torch.eye(width, dtype=dtype, device=q.device)
    outs = []
    for t in range(length):
        s_BHKW = decay[:, t, :, None, None] * s_BHKW
        s_BHKW = s_BHKW + (beta[:, t, :, None] * k[:, t])[..., None] * kv[:, t][..., None, :]
        h_BHKK, u_BHKV = s_BHKW[..., :width], s_BHKW[..., width:]
        strength = ratio * torch.linalg.matrix_norm(h_BHKK) + floor
        x_BHK = torch.linalg.solve(h_BHKK + strength[..., None, None] * eye, q[:, t])
        x_BHK = mix[:, t, :, None] * q[:, t] + (1 - mix[:, t, :, None]) * x_BHK
        outs.append((x_BHK[..., None, :] @ u_BHKV)[..., 0, :])
    o_BTHV = torch.stack(outs, dim=1) * scale if outs else v_BTHV
    return o_BTHV.to(v_BTHV.dtype), s_BHKW
