"""The backward of the ParaRNN cells with a matrix per head in Triton: one linear solve, in one launch.

What a step's derivative holds beside the matrices, five planes, and the gradient of the matrices from that of the gate
inputs are computed outside, for all tokens at once. Here is only what must go through time, in the manner of
`triton_adjoint`: the map of a chunk is a D x D matrix per row, D unit adjoints walked along with the adjoint itself.

Packed rows [T, 3, H * D], planes [T, H * D]; states [S, P, H * D] with P = 1 (h) or 2 (c, h); everything in float32.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.triton import Kernel, Row, host, pow2, row
from kernels.common.varlen import states_before
from kernels.newton_rnn.cells import cell_of
from kernels.newton_rnn.triton_block import along, spread, units
from kernels.newton_rnn.triton_cells import load_state, only, store_state
from kernels.sequential_rnn.triton_cells import matrix


@triton.jit
def _pull(uc, uh, a, b, c, d, e, r0, r1, r2, LSTM: tl.constexpr, PREC: tl.constexpr):
    """The adjoint over a step, with transposed matrices: of the state before, and of the three pre-activations."""
    if LSTM:
        total = uc + d * uh
        x0, x1, x2 = total * b, uh * e, total * c
        wh = tl.dot(x0, r0, input_precision=PREC) + tl.dot(x1, r1, input_precision=PREC)
        return total * a, wh + tl.dot(x2, r2, input_precision=PREC), x0, x1, x2
    else:
        x0, x2 = uh * b, uh * c
        inner = tl.dot(x2, r2, input_precision=PREC)
        x1 = inner * e
        wh = uh * a + inner * d + tl.dot(x0, r0, input_precision=PREC)
        return uc, wh + tl.dot(x1, r1, input_precision=PREC), x0, x1, x2


@triton.jit
def _step(a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, dh_ptr, reset_ptr, t, eos, n, N, live, HAS_RESET: tl.constexpr):
    """The planes and the given gradient of tokens t; where there is a token, and where it keeps the state."""
    token = (t < eos)[:, None]
    inside, at = token & live[None, :], t[:, None] * N + n[None, :]
    a = tl.load(a_ptr + at, mask=inside, other=0.0)
    b = tl.load(b_ptr + at, mask=inside, other=0.0)
    c = tl.load(c_ptr + at, mask=inside, other=0.0)
    d = tl.load(d_ptr + at, mask=inside, other=0.0)
    e = tl.load(e_ptr + at, mask=inside, other=0.0)
    dh = tl.load(dh_ptr + at, mask=inside, other=0.0)
    keep = token
    if HAS_RESET:
        keep = (tl.load(reset_ptr + t, mask=t < eos, other=0) == 0)[:, None]
    return a, b, c, d, e, dh, token, keep


@triton.jit
def newton_block_adjoint(
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    e_ptr,
    r_ptr,
    reset_ptr,
    cu_ptr,
    dh_ptr,
    dfinal_ptr,
    dx_ptr,
    dh0_ptr,
    N,
    D,
    LSTM: tl.constexpr,
    HAS_RESET: tl.constexpr,
    PREC: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
):
    """dx [T, 3, N] and dh0 [S, P, N]. Rows are chunks in reversed order: row 0 is the last chunk of the block."""
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    n, live = head * D + tl.arange(0, BD), tl.arange(0, BD) < D
    j = tl.arange(0, ROWS)
    row_of = tl.arange(0, ROWS * BD) // BD
    bos, eos = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1)
    r0 = tl.trans(matrix(r_ptr, 0, head, heads, D, BD))
    r1 = tl.trans(matrix(r_ptr, 1, head, heads, D, BD))
    r2 = tl.trans(matrix(r_ptr, 2, head, heads, D, BD))
    carry_c, carry_h = load_state(dfinal_ptr, s, n, live, N, LSTM)
    blocks = (eos - bos + ROWS * C - 1) // (ROWS * C)
    for back in range(0, blocks):
        end = bos + (blocks - 1 - back) * ROWS * C + (ROWS - j) * C - 1
        wh = tl.zeros([ROWS, BD], tl.float32)
        wc = tl.zeros([ROWS, BD], tl.float32)
        hh = units(ROWS, BD)
        cc = units(ROWS, BD)
        hc = tl.zeros([ROWS * BD, BD], tl.float32)
        ch = tl.zeros([ROWS * BD, BD], tl.float32)
        for i in range(0, C):
            a, b, c, d, e, dh, token, keep = _step(
                a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, dh_ptr, reset_ptr, end - i, eos, n, N, live, HAS_RESET
            )
            nc, nh, _0, _1, _2 = _pull(wc, wh + dh, a, b, c, d, e, r0, r1, r2, LSTM, PREC)
            wh = tl.where(token, tl.where(keep, nh, 0.0), wh)
            wc = tl.where(token, tl.where(keep, nc, 0.0), wc)
            a, b, c = spread(a, ROWS, BD), spread(b, ROWS, BD), spread(c, ROWS, BD)
            d, e = spread(d, ROWS, BD), spread(e, ROWS, BD)
            mine = bos + (blocks - 1 - back) * ROWS * C + (ROWS - row_of) * C - 1 - i
            moves = (mine < eos)[:, None]
            if LSTM:
                nc, nh, _0, _1, _2 = _pull(cc, hc, a, b, c, d, e, r0, r1, r2, LSTM, PREC)
                cc, hc = tl.where(moves, nc, cc), tl.where(moves, nh, hc)
            nc, nh, _0, _1, _2 = _pull(ch, hh, a, b, c, d, e, r0, r1, r2, LSTM, PREC)
            ch, hh = tl.where(moves, nc, ch), tl.where(moves, nh, hh)
            if HAS_RESET:
                kept = (tl.load(reset_ptr + mine, mask=mine < eos, other=0) == 0)[:, None]
                hh = tl.where(kept, hh, 0.0)
                if LSTM:
                    hc, ch, cc = tl.where(kept, hc, 0.0), tl.where(kept, ch, 0.0), tl.where(kept, cc, 0.0)
        # what enters every chunk from the right, one after the other
        into_h = tl.zeros([ROWS, BD], tl.float32)
        into_c = tl.zeros([ROWS, BD], tl.float32)
        for place in range(0, ROWS):
            into_h += tl.where((j == place)[:, None], carry_h[None, :], 0.0)
            out_h = only(wh, place, ROWS) + along(hh, carry_h, place, ROWS, BD)
            if LSTM:
                into_c += tl.where((j == place)[:, None], carry_c[None, :], 0.0)
                out_h += along(hc, carry_c, place, ROWS, BD)
                carry_c = along(cc, carry_c, place, ROWS, BD) + along(ch, carry_h, place, ROWS, BD)
                carry_c += only(wc, place, ROWS)
            carry_h = out_h
        wh = into_h
        wc = into_c
        for i in range(0, C):
            a, b, c, d, e, dh, token, keep = _step(
                a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, dh_ptr, reset_ptr, end - i, eos, n, N, live, HAS_RESET
            )
            nc, nh, x0, x1, x2 = _pull(wc, wh + dh, a, b, c, d, e, r0, r1, r2, LSTM, PREC)
            wh = tl.where(token, tl.where(keep, nh, 0.0), wh)
            wc = tl.where(token, tl.where(keep, nc, 0.0), wc)
            at = dx_ptr + (end - i)[:, None] * 3 * N + n[None, :]
            inside = token & live[None, :]
            tl.store(at, x0, mask=inside)
            tl.store(at + N, x1, mask=inside)
            tl.store(at + 2 * N, x2, mask=inside)
    store_state(dh0_ptr, carry_c, carry_h, s, n, live, N, LSTM)


def rows(args: dict[str, Any]) -> list[Row]:
    """Of both kernels with a matrix per head."""
    return [row(BD=pow2(args["D"]), warps=warps, stages=1) for warps in (8, 4)]


ADJOINT = Kernel(newton_block_adjoint, rows, ("LSTM", "C", "ROWS"))


def backward(
    args: dict[str, Any],
    grid: Any,
    states: list[Tensor],
    starts: list[Tensor | None],
    given: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor | None],
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of x, r, peephole and of the initial states, from the states after every token [T, H, D]."""
    lstm, (dh, dfinal), (r, peephole) = args["LSTM"], given, weights
    cell = cell_of("lstm" if lstm else "gru", r, peephole, is_diagonal=False)
    # cells work on [B, n, U]: here one row of all tokens
    x = [gate[None] for gate in args["x_ptr"].float().unbind(1)]
    before = [
        states_before(state, args["cu_ptr"], start, reset)[None] for state, start in zip(states, starts, strict=True)
    ]
    after = [torch.empty_like(before[0]) for _ in range(2)]
    cell.step(x, before, after)
    planes = cell.planes(x, before, after)
    dx, dh0 = torch.empty_like(args["x_ptr"], dtype=torch.float32), torch.empty_like(dfinal)
    names = ("r_ptr", "reset_ptr", "cu_ptr", "N", "D", "LSTM", "HAS_RESET", "PREC", "C", "ROWS")
    factors = (host(plane) for plane in cell.factors(planes))
    ADJOINT.launch(
        grid,
        **{f"{name}_ptr": plane for name, plane in zip("abcde", factors, strict=True)},
        **{name: args[name] for name in names},
        dh_ptr=dh,
        dfinal_ptr=dfinal,
        dx_ptr=dx,
        dh0_ptr=dh0,
    )
    dr, dpeephole = cell.weights(planes, list(dx.view(1, -1, 3, *r.shape[1:3]).unbind(2)))
    return dx, torch.stack(dr), dpeephole, dh0
