"""Device functions of the sequential cells: the matrices of a head, gate inputs, the scale of the sLSTM."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

import triton
import triton.language as tl


@triton.jit
def matrix(r_ptr, g, head, H, D, BD: tl.constexpr):
    """R_g of one head [BD, BD]; zeros outside."""
    i = tl.arange(0, BD)
    at = ((g * H + head) * D + i[:, None]) * D + i[None, :]
    return tl.load(r_ptr + at, mask=(i < D)[:, None] & (i < D)[None, :], other=0.0)


@triton.jit
def load_parts(ptr, at, size, mask, P: tl.constexpr):
    """The parts c, n, m, h of a state of P parts that lie `size` numbers apart; zeros for those it has not."""
    c = tl.zeros(at.shape, tl.float32)
    n = tl.zeros(at.shape, tl.float32)
    m = tl.zeros(at.shape, tl.float32)
    if P > 1:
        c = tl.load(ptr + at, mask=mask, other=0.0)
    if P == 4:
        n = tl.load(ptr + at + size, mask=mask, other=0.0)
        m = tl.load(ptr + at + 2 * size, mask=mask, other=0.0)
    return c, n, m, tl.load(ptr + at + (P - 1) * size, mask=mask, other=0.0)


@triton.jit
def state_at(part, TOKENS, token, H, head, D, d):
    """Offsets in one part of the states [P, T, H, D]; from the 64-bit token on, since TOKENS * H * D may pass 2^31."""
    return ((part * TOKENS + token[:, None]) * H + head) * D + d[None, :]


@triton.jit
def gate_input(ptr, token, g, G: tl.constexpr, head, H, D, d, mask):
    """Inputs of gate g, [rows, BD]."""
    at = ((token[:, None] * G + g) * H + head) * D + d[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def slstm_scale(i, f, n, m, EXPONENTIAL: tl.constexpr):
    """New maximum, what is kept, what is written, and whether the maximum came from the past; n = 0 is empty."""
    if EXPONENTIAL:
        log_f = f
    else:
        # log sigmoid without overflow
        log_f = tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f)))
    carried = tl.where(n == 0.0, float("-inf"), log_f + m)
    top = tl.maximum(carried, i)
    return top, tl.exp(carried - top), tl.exp(i - top), carried >= i
