"""Recurrences that are no scan: GRU, LSTM, sLSTM, M2RNN, LEM, bilinear and leaky units, behind one mixer.

Shape legend: B rows, T tokens, D width, F units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._cells import gated_out, make_cell
from cl.backbones._mixer import Lifetime, Mixer, in_full_precision, require_mode
from cl.backbones._spec import Spec
from cl.backbones._state import State


class NonlinearRnn(Mixer):
    """h_t = f(h_{t-1}, x_t); y_t = W_out (read(h_t) * silu(W_gate x_t)).

    GRU and LSTM are solved for all tokens together by `kernels.newton_rnn`; sLSTM and M2RNN run in order in
    `kernels.sequential_rnn`, the others in a loop of torch. Such states can count and follow automata, which no scan
    with positive gates can.

    Args:
        width: D.
        cell: gru, lstm, slstm, m2rnn, lem, bilinear or leaky_tau, or one with options, such as leaky_tau(longest=8).
        units: F; None takes the width.
        num_heads: of the cells that have heads.
        is_gated: multiply by silu(W_gate x).

    Raises:
        UserError: no such cell, or no such option of it.

    Cost: that of the cell, and 2 D F multiply-adds a token; state as the cell says, in float32.
    Source: of each cell in its file. Differences: the gate and the output map are the same for all cells; none has the
        short convolution that some sources put in front.
    """

    lifetime = Lifetime(fast=("h",))
    examples = tuple(
        f"nonlinear_rnn(cell={cell})"
        for cell in ("gru", "lstm", "slstm", "slstm(is_exponential=true)", "m2rnn", "lem", "bilinear", "leaky_tau")
    )

    def __init__(
        self,
        width: int,
        *,
        cell: str | Spec = "gru",
        units: int | None = None,
        num_heads: int = 4,
        is_gated: bool = True,
    ) -> None:
        super().__init__()
        units = width if units is None else units
        shared = {"units": units, "num_heads": num_heads}
        self.cell = make_cell(cell, "rnn_cells", "cell of nonlinear_rnn", width, **shared)
        self.gate = nn.Linear(width, units, bias=False) if is_gated else None
        self.out = nn.Linear(units, width, bias=False)

    def init_state(self, num_rows: int) -> State:
        return {"h": self.cell.start(self.fresh(num_rows, *self.cell.state_shape))}

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, reset: Tensor | None = None, mode: str = "chunk"
    ) -> tuple[Tensor, State]:
        require_mode(mode)
        h = (self.init_state(x_BTD.shape[0]) if state is None else state)["h"]
        if mode == "chunk":
            run, driven_BT = self.cell.run, self.cell.drive(x_BTD)
        else:
            run, driven_BT = self.cell.walk, torch.stack([self.cell.drive(x_BD) for x_BD in x_BTD.unbind(1)], 1)
        # products of states stay in float32
        with in_full_precision(x_BTD):
            y_BTF, last = run(driven_BT, h, reset)
        return gated_out(y_BTF, x_BTD, self.gate, self.out), {"h": last}
