"""The backward walk of the sequential cells in Triton: the adjoint of one head and tile of sequences, last token first.

Recurrent products come from outside, computed for all tokens at once; what leaves is their gradient.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

import triton
import triton.language as tl

from kernels.common.triton_device import tanh
from kernels.sequential_rnn.triton_cells import gate_input, load_parts, matrix, slstm_scale, state_at


@triton.jit
def _past(states_ptr, s0_ptr, part, P: tl.constexpr, TOKENS, token, t, s, H, head, D, d, inside, HAS: tl.constexpr):
    """One part of the state each token started from, before any reset."""
    earlier = (part * TOKENS + token[:, None] - 1) * H * D + head * D + d[None, :]
    x = tl.load(states_ptr + earlier, mask=inside & (t > 0), other=0.0)
    if HAS:
        first = (s[:, None] * P + part) * H * D + head * D + d[None, :]
        x += tl.load(s0_ptr + first, mask=inside & (t == 0), other=0.0)
    return x


@triton.jit
def rnn_adjoint(
    x_ptr,
    r_ptr,
    s0_ptr,
    reset_ptr,
    cu_ptr,
    states_ptr,
    recurrent_ptr,
    dh_ptr,
    dfinal_ptr,
    g_ptr,
    dn_ptr,
    ds0_ptr,
    TOKENS,
    S,
    H,
    D,
    GRU: tl.constexpr,
    LSTM: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_RESET: tl.constexpr,
    PREC: tl.constexpr,
    KEEP: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """Gradients of the recurrent products g [H, T, G, D] (the GRU's x_n has its own, dn [T, H, D]) and of the start."""
    P: tl.constexpr = 1 if GRU else (2 if LSTM else 4)
    G: tl.constexpr = 3 if GRU else 4
    head = tl.program_id(0)
    s = tl.program_id(1).to(tl.int64) * BB + tl.arange(0, BB)
    d = tl.arange(0, BD)
    bos = tl.load(cu_ptr + s, mask=s < S, other=0)
    length = tl.load(cu_ptr + s + 1, mask=s < S, other=0) - bos
    wide = (d < D)[None, :]
    own = (s < S)[:, None] & wide
    at = (s[:, None] * P * H + head) * D + d[None, :]
    uc, un, um, uh = load_parts(dfinal_ptr, at, H * D, own, P)
    if KEEP:
        r0 = tl.trans(matrix(r_ptr, 0, head, H, D, BD))
        r1 = tl.trans(matrix(r_ptr, 1, head, H, D, BD))
        r2 = tl.trans(matrix(r_ptr, 2, head, H, D, BD))
        if not GRU:
            r3 = tl.trans(matrix(r_ptr, 3, head, H, D, BD))
    longest = tl.max(length, 0)
    for back in range(0, longest):
        t = longest - 1 - back
        active = (t < length)[:, None]
        inside = active & wide
        token = bos + t
        keep = active
        if HAS_RESET:
            keep = (tl.load(reset_ptr + token, mask=t < length, other=0) == 0)[:, None]
        line = ((head * TOKENS + token[:, None]) * G) * D + d[None, :]
        out = (token[:, None] * H + head) * D + d[None, :]
        u = uh + tl.load(dh_ptr + out, mask=inside, other=0.0)
        x0 = gate_input(x_ptr, token, 0, G, head, H, D, d, inside)
        x1 = gate_input(x_ptr, token, 1, G, head, H, D, d, inside)
        x2 = gate_input(x_ptr, token, 2, G, head, H, D, d, inside)
        a0 = tl.load(recurrent_ptr + line, mask=inside, other=0.0)
        a1 = tl.load(recurrent_ptr + line + D, mask=inside, other=0.0)
        a2 = tl.load(recurrent_ptr + line + 2 * D, mask=inside, other=0.0)
        if GRU:
            h = _past(states_ptr, s0_ptr, 0, P, TOKENS, token, t, s, H, head, D, d, inside, HAS_START)
            h = tl.where(keep, h, 0.0)
            gate = tl.sigmoid(x0 + a0)
            z = tl.sigmoid(x1 + a1)
            value = tanh(x2 + gate * a2)
            dn = u * (1 - z) * (1 - value * value)
            g0 = dn * a2 * gate * (1 - gate)
            g1 = u * (h - value) * z * (1 - z)
            g2 = dn * gate
            new = u * z
            tl.store(dn_ptr + out, dn, mask=inside)
        else:
            x3 = gate_input(x_ptr, token, 3, G, head, H, D, d, inside)
            a3 = tl.load(recurrent_ptr + line + 3 * D, mask=inside, other=0.0)
            c = _past(states_ptr, s0_ptr, 0, P, TOKENS, token, t, s, H, head, D, d, inside, HAS_START)
            c = tl.where(keep, c, 0.0)
            c_new = tl.load(states_ptr + out, mask=inside, other=0.0)
            o = tl.sigmoid(x3 + a3)
            value = tanh(x2 + a2)
            if LSTM:
                i = tl.sigmoid(x0 + a0)
                f = tl.sigmoid(x1 + a1)
                th = tanh(c_new)
                total = uc + u * o * (1 - th * th)
                g0 = total * value * i * (1 - i)
                g1 = total * c * f * (1 - f)
                g2 = total * i * (1 - value * value)
                g3 = u * th * o * (1 - o)
                uc = tl.where(active, tl.where(keep, total * f, 0.0), uc)
            else:
                n = _past(states_ptr, s0_ptr, 1, P, TOKENS, token, t, s, H, head, D, d, inside, HAS_START)
                m = _past(states_ptr, s0_ptr, 2, P, TOKENS, token, t, s, H, head, D, d, inside, HAS_START)
                n = tl.where(keep, n, 0.0)
                n_new = tl.load(states_ptr + state_at(1, TOKENS, token, H, head, D, d), mask=inside, other=1.0)
                _top, kept, write, past = slstm_scale(x0 + a0, x1 + a1, n, m, EXPONENTIAL)
                ratio = c_new / n_new
                total = uc + u * o / n_new
                total_n = un - u * o * ratio / n_new
                carried = (total * c + total_n * n) * kept
                written = (total * value + total_n) * write
                rest = um - carried - written
                carried += tl.where(past, rest, 0.0)
                g0 = written + tl.where(past, 0.0, rest)
                g1 = carried if EXPONENTIAL else carried * tl.sigmoid(-(x1 + a1))
                g2 = total * write * (1 - value * value)
                g3 = u * ratio * o * (1 - o)
                uc = tl.where(active, tl.where(keep, total * kept, 0.0), uc)
                un = tl.where(active, tl.where(keep, total_n * kept, 0.0), un)
                um = tl.where(active, tl.where(keep, carried, 0.0), um)
            new = tl.zeros([BB, BD], tl.float32)
            tl.store(g_ptr + line + 3 * D, g3, mask=inside)
            g3 = tl.where(inside, g3, 0.0).to(r_ptr.dtype.element_ty)
            if KEEP:
                new += tl.dot(g3, r3, input_precision=PREC)
            else:
                new += tl.dot(g3, tl.trans(matrix(r_ptr, 3, head, H, D, BD)), input_precision=PREC)
        tl.store(g_ptr + line, g0, mask=inside)
        tl.store(g_ptr + line + D, g1, mask=inside)
        tl.store(g_ptr + line + 2 * D, g2, mask=inside)
        g0 = tl.where(inside, g0, 0.0).to(r_ptr.dtype.element_ty)
        g1 = tl.where(inside, g1, 0.0).to(r_ptr.dtype.element_ty)
        g2 = tl.where(inside, g2, 0.0).to(r_ptr.dtype.element_ty)
        if KEEP:
            new += tl.dot(g0, r0, input_precision=PREC)
            new += tl.dot(g1, r1, input_precision=PREC)
            new += tl.dot(g2, r2, input_precision=PREC)
        else:
            new += tl.dot(g0, tl.trans(matrix(r_ptr, 0, head, H, D, BD)), input_precision=PREC)
            new += tl.dot(g1, tl.trans(matrix(r_ptr, 1, head, H, D, BD)), input_precision=PREC)
            new += tl.dot(g2, tl.trans(matrix(r_ptr, 2, head, H, D, BD)), input_precision=PREC)
        uh = tl.where(active, tl.where(keep, new, 0.0), uh)
    tl.store(ds0_ptr + at + (P - 1) * H * D, uh, mask=own)
    if not GRU:
        tl.store(ds0_ptr + at, uc, mask=own)
    if P == 4:
        tl.store(ds0_ptr + at + H * D, un, mask=own)
        tl.store(ds0_ptr + at + 2 * H * D, um, mask=own)
