"""Published layers that are gated linear attention with prepared gates: RetNet's constants, mLSTM's two variants."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kernels.common.checks import matrix_state_plan, require_alike, require_shape, state_dtype
from kernels.common.dispatch import Decision, explain, explained_by, matrix_chunk
from kernels.common.varlen import per_sequence

OP = "mlstm"
VARIANTS = ("exponential", "sigmoid")
# a log gate below it counts as shut: in running sums it would swallow the digits of the gates beside it
SHUT = -1e6


class MLSTMState(NamedTuple):
    """State of the mLSTM, all relative to exp(m): matrix [B, H, K, V], normaliser [B, H, K], log scale m [B, H]."""

    matrix: Tensor
    normaliser: Tensor
    log_scale: Tensor


def retention_decay(num_heads: int, *, device: torch.device | None = None) -> Tensor:
    """RetNet's constant log decay per head, log(1 - 2 ** (-5 - h)).

    Example:
        >>> [round(x, 4) for x in retention_decay(3).exp().tolist()]
        [0.9688, 0.9844, 0.9922]
    """
    heads = torch.arange(num_heads, dtype=torch.float64, device=device)
    return torch.log1p(-torch.exp2(-5.0 - heads)).float()


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i_gate: Tensor,
    f_gate: Tensor,
    *,
    variant: str = "exponential",
    scale: float | None = None,
    initial_state: MLSTMState | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Decision:
    from kernels.gated_linear_attention import gated_linear_attention

    if variant not in VARIANTS:
        raise ValueError(f"{OP}: unknown variant {variant!r}; use one of {', '.join(VARIANTS)}")
    matrix_state_plan(OP, q, k, v, None, None, None, cu_seqlens, scale)
    for name, gate in (("i_gate", i_gate), ("f_gate", f_gate)):
        require_shape(OP, name, gate, tuple(q.shape[:3]), "[B, T, H]")
    require_alike(OP, {"q": q, "i_gate": i_gate, "f_gate": f_gate})
    if initial_state is not None:
        _require_state(initial_state, q, v, q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    found = explain(gated_linear_attention, q, k, v, f_gate, chunk=chunk, backend=backend)
    if found.backend == "triton" and chunk is None:
        own = _product_dtype(v.dtype, variant, found.backend)
        found = replace(found, chunk=matrix_chunk(own, per_channel=False, wide=False))
    return replace(found, op=OP, reason=f"{found.reason} (runs {found.op})")


def _product_dtype(dtype: torch.dtype, variant: str, backend: str) -> torch.dtype:
    """What queries, gated keys and values are given to `gated_linear_attention` in.

    Where n^T q is a small difference, h is as wrong as it is: keys times gates and the normaliser must not be rounded.
    Triton's products are of what they are given, 16 bits for speed; but what the normaliser divides, and the gradients
    that it divides, leave the range of float16.
    """
    is_narrow = backend == "triton" and (dtype != torch.float16 or variant == "sigmoid")
    return dtype if is_narrow else state_dtype(dtype)


def _require_state(state: MLSTMState, q: Tensor, v: Tensor, sequences: int) -> None:
    """Raise unless the state is one of this memory's."""
    if not isinstance(state, MLSTMState):
        raise ValueError(f"{OP}: initial_state must be an MLSTMState, got {type(state).__name__}")
    require_alike(OP, {"q": q, **{f"initial_state.{name}": x for name, x in state._asdict().items()}})
    heads, keys, values = q.shape[2], q.shape[3], v.shape[3]
    require_shape(OP, "initial_state.matrix", state.matrix, (sequences, heads, keys, values), "[sequences, H, K, V]")
    require_shape(OP, "initial_state.normaliser", state.normaliser, (sequences, heads, keys), "[sequences, H, K]")
    require_shape(OP, "initial_state.log_scale", state.log_scale, (sequences, heads), "[sequences, H]")


@explained_by(_plan)
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i_gate: Tensor,
    f_gate: Tensor,
    *,
    variant: str = "exponential",
    scale: float | None = None,
    initial_state: MLSTMState | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """The matrix LSTM of xLSTM: C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, f_t = sigmoid.

    exponential: i_t = exp(i_gate), h_t = C_t^T q_t / max(|n_t^T q_t|, 1); the running maximum m of the log gates keeps
    all finite and drops out of the result. sigmoid: i_t = sigmoid(i_gate), h_t = C_t^T q_t, no normaliser.

    Args:
        q: queries [B, T, H, K]; k: keys, same shape; v: values [B, T, H, V].
        i_gate: input gate before its activation [B, T, H]; f_gate: forget gate likewise.
        variant: "exponential" or "sigmoid".
        scale: factor of q; None takes K ** -0.5.
        initial_state: as returned; None starts empty.
        cu_seqlens, chunk, backend: as in `gated_linear_attention`, which does the work.

    Returns:
        h [B, T, H, V] in the dtype of v, and the state (with variant "sigmoid": normaliser and log scale are zero). The
        log scale returned is a constant: gradients pass from call to call through matrix and normaliser.

    Raises:
        ValueError: shapes, kinds or devices disagree, an unknown variant, or the backend asked for cannot run.

    Cost: `gated_linear_attention` with one more column of values.
    Source: xLSTM and Tiled Flash Linear Attention. Differences: the maximum starts at the first gate, not at 0, when
        there is no initial state; the result does not depend on it.

    Example:
        >>> x = torch.ones(1, 2, 1, 1)
        >>> h, state = mlstm(x, x, x, torch.zeros(1, 2, 1), torch.zeros(1, 2, 1))
        >>> h.flatten().tolist()
        [1.0, 1.0]
    """
    from kernels.gated_linear_attention import gated_linear_attention

    decision = _plan(
        q,
        k,
        v,
        i_gate,
        f_gate,
        variant=variant,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        chunk=chunk,
        backend=backend,
    )
    dtype = state_dtype(v.dtype)
    log_f = logsigmoid(f_gate.to(dtype))
    wide = _product_dtype(v.dtype, variant, decision.backend)
    q = q.to(wide)
    rest = {"scale": scale, "cu_seqlens": cu_seqlens, "chunk": chunk, "backend": backend}
    if variant == "sigmoid":
        start = None if initial_state is None else initial_state.matrix
        gated = (k * i_gate.to(dtype).sigmoid()[..., None]).to(wide)
        h, matrix = gated_linear_attention(q, gated, v.to(wide), log_f, initial_state=start, **rest)
        return h.to(v.dtype), MLSTMState(matrix, matrix.new_zeros(matrix.shape[:3]), matrix.new_zeros(matrix.shape[:2]))
    log_i = i_gate.to(dtype)
    m0 = None if initial_state is None else initial_state.log_scale
    # any m gives the same h, so no gradient has to go through it; only consistency counts
    with torch.no_grad():
        if cu_seqlens is None:
            m, last = _running_maximum(log_f, log_i, m0)
        else:
            m, last = per_sequence(_running_maximum, [log_f, log_i], m0, cu_seqlens)
    # but the log scale of a state that is given says how large the state is
    before = _shifted(m, m0, cu_seqlens)
    start = None
    if initial_state is not None:
        start = torch.cat([initial_state.matrix, initial_state.normaliser[..., None]], dim=-1)
    keys = (k.to(dtype) * (log_i - m).exp()[..., None]).to(wide)
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1).to(wide)
    both, final = gated_linear_attention(q, keys, values, log_f + (before - m), initial_state=start, **rest)
    out, normaliser = both[..., :-1].to(dtype), both[..., -1:].to(dtype)
    # e^-m may be zero, and so may a query: what it reads then is nothing, over anything
    one = (-m).exp().clamp(min=torch.finfo(dtype).tiny)
    h = out / torch.maximum(normaliser.abs(), one[..., None])
    return h.to(v.dtype), MLSTMState(final[..., :-1], final[..., -1], last)


def _running_maximum(log_f: Tensor, log_i: Tensor, m0: Tensor | None) -> tuple[Tensor, Tensor]:
    """m_t = max(m_{t-1} + log_f_t, log_i_t) for all t, and the last [B, H]; an empty sequence keeps m0."""
    total = log_f.double().clamp(min=SHUT).cumsum(1)
    m = (log_i.double().clamp(min=SHUT) - total).cummax(1).values if log_f.shape[1] else total
    if m0 is not None:
        m = torch.maximum(m, m0[:, None].double())
    m = (m + total).to(log_f.dtype)
    if log_f.shape[1]:
        return m, m[:, -1]
    return m, log_f.new_zeros(log_f.shape[0], log_f.shape[2]) if m0 is None else m0.to(log_f.dtype)


def _shifted(m: Tensor, m0: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """m of the token before; at the first token m0, or m itself where there is no state to rescale."""
    before = torch.cat([m[:, :1], m[:, :-1]], dim=1)
    if cu_seqlens is None:
        if m0 is not None:
            before[:, 0] = m0
        return before
    first = cu_seqlens[:-1].long()
    alive = cu_seqlens.diff() > 0
    before[0, first[alive]] = m[0, first[alive]] if m0 is None else m0[alive].to(m.dtype)
    return before
