"""GRU, LSTM and sLSTM on a CPU as compiled loops: every sequence and head walks through its tokens alone.

Such a lane pays for the arithmetic of a step, where torch pays for its calls, which are ten times as much. Lanes share
nothing and are spread over threads, so that results do not depend on how many there are. The gates are not kept: the
backward computes them again from the states. The weight gradient is one product over all tokens after the loop.

Legend: S sequences, R tokens, G gates, P parts of the state, H heads, D width; inputs [R, G, H, D], states
[P, R, H, D], recurrent weights [H, D, G * D].
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.numba import array, places, spread
from kernels.sequential_rnn import numba_loops as loops
from kernels.sequential_rnn.reference import PARTS

CODES = {"gru": loops.GRU, "lstm": loops.LSTM, "slstm": loops.SLSTM, "slstm_exp": loops.SLSTM_EXP}


class _Call:
    """What both passes of one call read, as arrays in the order of the loops' arguments."""

    def __init__(
        self,
        x: Tensor,
        r: Tensor,
        bias: Tensor | None,
        s0: Tensor | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        cell: str,
    ):
        batch, length, gates, heads, width = x.shape
        self.dtype = state_dtype(x.dtype)
        where = places(batch, length, reset, cu_seqlens)
        self.sequences = len(where[0])
        self.lanes, self.work = self.sequences * heads, batch * length * r.numel()
        if bias is None:
            bias = r.new_zeros(gates, heads, width)
        if s0 is None:
            s0 = r.new_zeros(self.sequences, PARTS[cell], heads, width)
        numbers = [x.flatten(0, 1), r.permute(1, 2, 0, 3).flatten(2), bias.transpose(0, 1).flatten(1), s0]
        numbers = [each.to(self.dtype) for each in numbers]
        self.arguments = (*map(array, where), CODES[cell], *map(array, numbers))

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)


def forward(
    x: Tensor,
    r: Tensor,
    bias: Tensor | None,
    s0: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h [B, T, H, D], the last state [S, P, H, D] and all states [P, R, H * D] in the order of the tokens."""
    batch, length, _, heads, width = x.shape
    call = _Call(x, r, bias, s0, reset, cu_seqlens, cell)
    states = call.new(PARTS[cell], batch * length, heads, width)
    final = call.new(call.sequences, PARTS[cell], heads, width)
    spread(loops.forward, call.lanes, call.work, *call.arguments, array(states), array(final))
    return states[-1].view(batch, length, heads, width).clone(), final, states.flatten(2)


def backward(
    dh: Tensor,
    dfinal: Tensor,
    x: Tensor,
    r: Tensor,
    bias: Tensor | None,
    s0: Tensor | None,
    kept: Tensor,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, r, bias [G, H, D] and of the initial states [S, P, H, D]."""
    batch, length, gates, heads, width = x.shape
    call, tokens = _Call(x, r, bias, s0, reset, cu_seqlens, cell), batch * length
    given = (kept.unflatten(2, (heads, width)), dh.to(call.dtype).flatten(0, 1), dfinal.to(call.dtype))
    dx, dpre = call.new(tokens, gates, heads, width), call.new(heads, tokens, gates * width)
    before, dstarts = call.new(heads, tokens, width), call.new(*dfinal.shape)
    spread(loops.backward, call.lanes, call.work, *call.arguments, *map(array, (*given, dx, dpre, before, dstarts)))
    dr = torch.bmm(before.mT, dpre).unflatten(2, (gates, width)).permute(2, 0, 1, 3)
    dbias = dpre.sum(1).unflatten(1, (gates, width)).transpose(0, 1)
    like = r if bias is None else bias
    return dx.view(x.shape).to(x.dtype), dr.to(r.dtype).contiguous(), dbias.to(like.dtype).contiguous(), dstarts
