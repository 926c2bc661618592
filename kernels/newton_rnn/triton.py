"""Newton's RNN in Triton: the launches, for a weight per unit (`triton_walk`, `triton_adjoint`) or a matrix per head.

Packed rows [T, 3, N]; states [S, P, N] with P = 1 (h) or 2 (c, h); everything in float32 on the chip.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.common.triton import Kernel, Row, host, offsets, precision, row
from kernels.common.varlen import chunk_offsets, num_chunks
from kernels.newton_rnn import triton_block_adjoint
from kernels.newton_rnn.triton_adjoint import newton_adjoint
from kernels.newton_rnn.triton_block import newton_block_walk
from kernels.newton_rnn.triton_walk import newton_walk


def _rows(args: dict[str, Any]) -> list[Row]:
    return [row(BN=16, warps=4, stages=1), row(BN=32, warps=4, stages=1), row(BN=32, warps=8, stages=1)]


def _walk_rows(args: dict[str, Any]) -> list[Row]:
    # the derivative of the LSTM is four tiles: the first row spills nothing on sm_90
    return sorted(_rows(args), key=lambda r: -r.warps) if args["LSTM"] else _rows(args)


KEY = ("LSTM", "C", "ROWS")
WALK = Kernel(newton_walk, _walk_rows, KEY, parts=("count_ptr", "residual_ptr"))
ADJOINT = Kernel(newton_adjoint, _rows, KEY)
BLOCK_WALK = Kernel(newton_block_walk, triton_block_adjoint.rows, KEY)


class _Call:
    """The call as the kernels see it."""

    def __init__(
        self,
        x: Tensor,
        r: Tensor,
        peephole: Tensor | None,
        h0: Tensor | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        cell: str,
        chunk: int,
        block: int,
    ):
        self.cu = offsets(x.shape[0], x.shape[1], cu_seqlens, x.device)
        # a matrix per head: x [B, T, 3, H, D] with one program per head; else x [B, T, 3, N] in tiles of N
        self.is_block, self.sequences, self.units = x.dim() == 5, self.cu.shape[0] - 1, x.shape[3:].numel()
        self.tiles = x.shape[3] if self.is_block else -(-self.units // 16)
        self.rows = num_chunks(x.shape[0], x.shape[1], block, cu_seqlens)
        packed, recurrent = host(x.flatten(0, 1)), host(r.float())
        self.args: dict[str, Any] = {
            "x_ptr": packed,
            "r_ptr": recurrent,
            "p_ptr": recurrent if peephole is None else host(peephole.float()),
            "h0_ptr": recurrent if h0 is None else host(h0.float()),
            "reset_ptr": self.cu if reset is None else reset.to(torch.int8).flatten().contiguous(),
            "cu_ptr": self.cu,
            "N": self.units,
            "LSTM": cell == "lstm",
            "HAS_START": h0 is not None,
            "HAS_PEEPHOLE": peephole is not None,
            "HAS_RESET": reset is not None,
            "C": chunk,
            "ROWS": block // chunk,
        }
        if self.is_block:
            self.args |= {"D": x.shape[4], "PREC": precision()}

    def grid(self, meta: dict[str, int]) -> tuple[int, ...]:
        return (self.sequences, self.tiles if self.is_block else -(-self.units // meta["BN"]))


def forward(
    x_BTGU: Tensor,
    r: Tensor,
    peephole: Tensor | None,
    h0_SPU: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    chunk: int,
    block: int,
    tolerance: float,
    most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `chunked.forward`, without the GRU's candidates; the report has one entry per sequence and block."""
    call = _Call(x_BTGU, r, peephole, h0_SPU, reset, cu_seqlens, cell, chunk, block)
    units = x_BTGU.shape[3:]
    h = x_BTGU.new_empty(*x_BTGU.shape[:2], *units, dtype=torch.float32)
    c = h.new_empty(h.shape if cell == "lstm" else (0,))
    final = h.new_empty(call.sequences, 2 if cell == "lstm" else 1, *units)
    # a tile of units that is not launched (wider rows) and a row of the table that is not used stay at zero
    counts = torch.zeros(call.rows, call.tiles, dtype=torch.int32, device=h.device)
    residual = torch.zeros(call.rows, call.tiles, dtype=torch.float32, device=h.device)
    (BLOCK_WALK if call.is_block else WALK).launch(
        call.grid,
        **call.args,
        **({} if call.is_block else {"TILES": call.tiles}),
        first_ptr=chunk_offsets(call.cu, block),
        h_ptr=h,
        c_ptr=h if c.numel() == 0 else c,
        final_ptr=final,
        count_ptr=counts,
        residual_ptr=residual,
        tolerance=tolerance,
        MOST=most,
    )
    if most == 0:
        counts.fill_(-1)
    # the worst tile of every block
    return h, c, final, counts.amax(1), residual.amax(1)


def backward(
    dh_BTU: Tensor,
    dfinal_SPU: Tensor,
    x_BTGU: Tensor,
    r: Tensor,
    peephole: Tensor | None,
    h0_SPU: Tensor | None,
    h_BTU: Tensor,
    c_BTU: Tensor,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    chunk: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """As `chunked.backward`; weight gradients as one sum per sequence, added up here."""
    call = _Call(x_BTGU, r, peephole, h0_SPU, reset, cu_seqlens, cell, chunk, block)
    dh, dfinal = host(dh_BTU.float()), host(dfinal_SPU.float())
    if call.is_block:
        parts = [h_BTU] if cell == "gru" else [c_BTU, h_BTU]
        starts: list[Tensor | None] = [None] * len(parts) if h0_SPU is None else [*h0_SPU.unbind(1)]
        weights = (call.args["r_ptr"], None if peephole is None else call.args["p_ptr"])
        dx, dr, dpeephole, dh0 = triton_block_adjoint.backward(
            call.args, call.grid, [part.flatten(0, 1) for part in parts], starts, (dh, dfinal), weights, reset
        )
    else:
        dx, dh0 = torch.empty_like(call.args["x_ptr"]), torch.empty_like(dfinal)
        sums = h_BTU.new_empty(call.sequences, 5, call.units)
        ADJOINT.launch(
            call.grid,
            **call.args,
            h_ptr=h_BTU,
            c_ptr=h_BTU if c_BTU.numel() == 0 else c_BTU,
            dh_ptr=dh,
            dfinal_ptr=dfinal,
            dx_ptr=dx,
            dh0_ptr=dh0,
            dr_ptr=sums,
        )
        dr, dpeephole = sums.sum(0).tensor_split((3,))
    # what an op returns must not share memory with another
    dpeephole = None if peephole is None or dpeephole is None else dpeephole.to(peephole.dtype, copy=True)
    return dx.view(x_BTGU.shape).to(x_BTGU.dtype), dr.to(r.dtype, copy=True), dpeephole, dh0
