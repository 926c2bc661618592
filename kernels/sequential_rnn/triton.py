"""GRU, LSTM and sLSTM in Triton: one program per head and tile of sequences walks all of its time in one launch.

The recurrent matrices of the head stay on the chip (or in the cache next to it), the state never leaves registers. The
backward recomputes the recurrent products of all tokens in one matrix product, walks the adjoint in one launch, and has
the weight gradient as one product after it: no atomics, one order of summation.

Packed tokens [T, G, H, D]; states [P, T, H, D]; recurrent products and their gradients [H, T, G, D]; float32 but for
the operands of products, which are in the dtype of x.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.triton import Kernel, Row, host, offsets, pow2, precision, row
from kernels.common.triton_device import tanh
from kernels.common.varlen import states_before
from kernels.sequential_rnn.reference import GATES, PARTS
from kernels.sequential_rnn.triton_adjoint import rnn_adjoint
from kernels.sequential_rnn.triton_cells import gate_input, load_parts, matrix, slstm_scale, state_at


@triton.jit
def _rnn_walk(
    x_ptr,
    r_ptr,
    bias_ptr,
    s0_ptr,
    reset_ptr,
    cu_ptr,
    states_ptr,
    final_ptr,
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
    """All states [P, T, H, D] and the last ones; KEEP holds the matrices over the whole walk."""
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
    h = tl.zeros([BB, BD], tl.float32)
    c = tl.zeros([BB, BD], tl.float32)
    n = tl.zeros([BB, BD], tl.float32)
    m = tl.zeros([BB, BD], tl.float32)
    if HAS_START:
        c, n, m, h = load_parts(s0_ptr, at, H * D, own, P)
    if KEEP:
        r0 = matrix(r_ptr, 0, head, H, D, BD)
        r1 = matrix(r_ptr, 1, head, H, D, BD)
        r2 = matrix(r_ptr, 2, head, H, D, BD)
        if not GRU:
            r3 = matrix(r_ptr, 3, head, H, D, BD)
    b0 = tl.load(bias_ptr + head * D + d, mask=d < D, other=0.0)[None, :]
    b1 = tl.load(bias_ptr + (H + head) * D + d, mask=d < D, other=0.0)[None, :]
    b2 = tl.load(bias_ptr + (2 * H + head) * D + d, mask=d < D, other=0.0)[None, :]
    if not GRU:
        b3 = tl.load(bias_ptr + (3 * H + head) * D + d, mask=d < D, other=0.0)[None, :]
    for t in range(0, tl.max(length, 0)):
        active = (t < length)[:, None]
        inside = active & wide
        token = bos + t
        if HAS_RESET:
            keep = (tl.load(reset_ptr + token, mask=t < length, other=0) == 0)[:, None]
            h = tl.where(keep, h, 0.0)
            c = tl.where(keep, c, 0.0)
            n = tl.where(keep, n, 0.0)
            m = tl.where(keep, m, 0.0)
        hd = h.to(r_ptr.dtype.element_ty)
        if KEEP:
            a0 = tl.dot(hd, r0, input_precision=PREC) + b0
            a1 = tl.dot(hd, r1, input_precision=PREC) + b1
            a2 = tl.dot(hd, r2, input_precision=PREC) + b2
            if not GRU:
                a3 = tl.dot(hd, r3, input_precision=PREC) + b3
        else:
            a0 = tl.dot(hd, matrix(r_ptr, 0, head, H, D, BD), input_precision=PREC) + b0
            a1 = tl.dot(hd, matrix(r_ptr, 1, head, H, D, BD), input_precision=PREC) + b1
            a2 = tl.dot(hd, matrix(r_ptr, 2, head, H, D, BD), input_precision=PREC) + b2
            if not GRU:
                a3 = tl.dot(hd, matrix(r_ptr, 3, head, H, D, BD), input_precision=PREC) + b3
        x0 = gate_input(x_ptr, token, 0, G, head, H, D, d, inside)
        x1 = gate_input(x_ptr, token, 1, G, head, H, D, d, inside)
        x2 = gate_input(x_ptr, token, 2, G, head, H, D, d, inside)
        if GRU:
            z = tl.sigmoid(x1 + a1)
            new = tanh(x2 + tl.sigmoid(x0 + a0) * a2)
            h = tl.where(active, new + z * (h - new), h)
        else:
            x3 = gate_input(x_ptr, token, 3, G, head, H, D, d, inside)
            o = tl.sigmoid(x3 + a3)
            value = tanh(x2 + a2)
            if LSTM:
                c = tl.where(active, tl.sigmoid(x1 + a1) * c + tl.sigmoid(x0 + a0) * value, c)
                h = tl.where(active, o * tanh(c), h)
            else:
                top, kept, write, _past = slstm_scale(x0 + a0, x1 + a1, n, m, EXPONENTIAL)
                c = tl.where(active, kept * c + write * value, c)
                n = tl.where(active, kept * n + write, n)
                m = tl.where(active, top, m)
                h = tl.where(active, o * c / tl.where(n == 0.0, 1.0, n), h)
                tl.store(states_ptr + state_at(1, TOKENS, token, H, head, D, d), n, mask=inside)
                tl.store(states_ptr + state_at(2, TOKENS, token, H, head, D, d), m, mask=inside)
            tl.store(states_ptr + state_at(0, TOKENS, token, H, head, D, d), c, mask=inside)
        tl.store(states_ptr + state_at(P - 1, TOKENS, token, H, head, D, d), h, mask=inside)
    tl.store(final_ptr + at + (P - 1) * H * D, h, mask=own)
    if not GRU:
        tl.store(final_ptr + at, c, mask=own)
    if P == 4:
        tl.store(final_ptr + at + H * D, n, mask=own)
        tl.store(final_ptr + at + 2 * H * D, m, mask=own)


def _rows(args: dict[str, Any]) -> list[Row]:
    width = pow2(args["D"])
    if width * args["r_ptr"].element_size() <= 128:
        return [row(BB=16, BD=width, KEEP=1, warps=4), row(BB=16, BD=width, KEEP=1, warps=8)]
    # one stage: prefetching the matrices of the next step would take the room of this one's
    return [row(BB=16, BD=width, KEEP=0, warps=8, stages=1), row(BB=16, BD=width, KEEP=0, warps=4, stages=1)]


def _adjoint_rows(args: dict[str, Any]) -> list[Row]:
    # more of everything is alive at once than in the walk
    return sorted(_rows(args), key=lambda r: -r.warps)


WALK = Kernel(_rnn_walk, _rows, key=("GRU", "LSTM", "D"))
ADJOINT = Kernel(rnn_adjoint, _adjoint_rows, key=("GRU", "LSTM", "D"))


class _Call:
    """The call as the kernels see it."""

    def __init__(
        self, x: Tensor, r: Tensor, s0: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None, cell: str
    ):
        self.cu = offsets(x.shape[0], x.shape[1], cu_seqlens, x.device)
        self.sequences, self.heads = self.cu.shape[0] - 1, x.shape[3]
        self.parts = PARTS[cell]
        packed = host(x.flatten(0, 1))
        self.args: dict[str, Any] = {
            "x_ptr": packed,
            "r_ptr": host(r.to(packed.dtype)),
            "s0_ptr": self.cu if s0 is None else host(s0.float()),
            "reset_ptr": self.cu if reset is None else reset.to(torch.int8).flatten().contiguous(),
            "cu_ptr": self.cu,
            "TOKENS": packed.shape[0],
            "S": self.sequences,
            "H": self.heads,
            "D": x.shape[4],
            "GRU": cell == "gru",
            "LSTM": cell == "lstm",
            "EXPONENTIAL": cell == "slstm_exp",
            "HAS_START": s0 is not None,
            "HAS_RESET": reset is not None,
            "PREC": precision(),
        }
        if s0 is None:
            self.args["s0_ptr"] = self.args["r_ptr"]

    def grid(self, meta: dict[str, int]) -> tuple[int, ...]:
        return (self.heads, -(-self.sequences // meta["BB"]))


def forward(
    x_BTGHD: Tensor,
    r_GHDD: Tensor,
    bias_GHD: Tensor | None,
    s0_SPHD: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.forward`; the kept states are [P, T, H, D]."""
    call = _Call(x_BTGHD, r_GHDD, s0_SPHD, reset, cu_seqlens, cell)
    batch, length, gates, heads, width = x_BTGHD.shape
    states = x_BTGHD.new_empty(call.parts, batch * length, heads * width, dtype=torch.float32)
    final = states.new_empty(call.sequences, call.parts, heads, width)
    bias = states.new_zeros(gates, heads, width) if bias_GHD is None else host(bias_GHD.float())
    WALK.launch(call.grid, **call.args, bias_ptr=bias, states_ptr=states, final_ptr=final)
    return states[-1].clone().view(batch, length, heads, width), final, states


def backward(
    dh_BTHD: Tensor,
    dfinal_SPHD: Tensor,
    x_BTGHD: Tensor,
    r_GHDD: Tensor,
    bias_GHD: Tensor | None,
    s0_SPHD: Tensor | None,
    kept: Tensor,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `chunked.backward`."""
    call = _Call(x_BTGHD, r_GHDD, s0_SPHD, reset, cu_seqlens, cell)
    batch, length, gates, heads, width = x_BTGHD.shape
    assert gates == GATES[cell]
    tokens = batch * length
    start = None if s0_SPHD is None else s0_SPHD[:, -1]
    before_HTD = states_before(kept[-1].view(tokens, heads, width), call.cu, start, reset).transpose(0, 1)
    r_HDE = r_GHDD.float().permute(1, 2, 0, 3).flatten(2)
    bias = kept.new_zeros(gates, heads, width) if bias_GHD is None else bias_GHD.float()
    recurrent = torch.baddbmm(bias.transpose(0, 1).flatten(1)[:, None], before_HTD, r_HDE)
    g = torch.empty_like(recurrent)
    dn = kept.new_empty(tokens, heads, width) if cell == "gru" else g
    ds0 = kept.new_empty(dfinal_SPHD.shape)
    ADJOINT.launch(
        call.grid,
        **call.args,
        states_ptr=kept,
        recurrent_ptr=recurrent,
        dh_ptr=host(dh_BTHD.float()),
        dfinal_ptr=host(dfinal_SPHD.float()),
        g_ptr=g,
        dn_ptr=dn,
        ds0_ptr=ds0,
    )
    # one product over all tokens, in a fixed order
    dr = torch.bmm(before_HTD.mT, g).unflatten(2, (gates, width)).permute(2, 0, 1, 3)
    g_HTGD = g.unflatten(2, (gates, width))
    dbias = g_HTGD.sum(1).transpose(0, 1)
    dx = g_HTGD.permute(1, 2, 0, 3).to(x_BTGHD.dtype, memory_format=torch.contiguous_format, copy=True)
    if cell == "gru":
        dx[:, 2] = dn
    like = r_GHDD if bias_GHD is None else bias_GHD
    return dx.view(x_BTGHD.shape), dr.to(r_GHDD.dtype).contiguous(), dbias.to(like.dtype).contiguous(), ds0
