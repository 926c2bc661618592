"""Recurrences that are a scan: minGRU, minLSTM, LRU, S5, HiPPO-LegS, GateLoop, FFM and leaky units, behind one mixer.

Shape legend: B rows, T tokens, D width, F units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._cells import ages, gated_out, make_cell
from cl.backbones._mixer import Lifetime, Mixer, require_mode
from cl.backbones._spec import Spec
from cl.backbones._state import State


class ScanRnn(Mixer):
    """h_t = a_t * h_{t-1} + u_t with a and u from x_t alone; y_t = W_out (read(h_t, x_t) * silu(W_gate x_t)).

    All tokens of a call at once (mode chunk) by `kernels.linear_scan`, or one after the other (mode recurrent). A reset
    is the element of the scan that forgets what is on its left, so boundaries of documents cost nothing.

    Args:
        width: D.
        cell: mingru, minlstm, lru, s5, hippo, gateloop, ffm or leaky, or one with options, such as hippo(order=4).
        units: F, what the cell gives to be gated; None takes the width.
        is_gated: multiply by silu(W_gate x).

    Raises:
        UserError: no such cell, or no such option of it.

    Cost: that of the cell, and 2 D F multiply-adds a token; state as the cell says, in float32, and an age.
    Source: of each cell in its file. Differences: the gate and the output map are the same for all cells; none has the
        short convolution that some sources put in front.
    """

    lifetime = Lifetime(fast=("h", "age"))
    examples = tuple(
        f"scan_rnn(cell={cell})"
        for cell in (
            *("mingru", "mingru(activation=positive)", "minlstm", "lru", "s5", "hippo(order=4)", "gateloop", "ffm"),
            "leaky",
        )
    )

    def __init__(
        self, width: int, *, cell: str | Spec = "mingru", units: int | None = None, is_gated: bool = True
    ) -> None:
        super().__init__()
        units = width if units is None else units
        self.cell = make_cell(cell, "scan_cells", "cell of scan_rnn", width, units=units)
        self.gate = nn.Linear(width, units, bias=False) if is_gated else None
        self.out = nn.Linear(units, width, bias=False)

    def init_state(self, num_rows: int) -> State:
        return {"h": self.fresh(num_rows, *self.cell.kept_shape), "age": self.fresh(num_rows)}

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, reset: Tensor | None = None, mode: str = "chunk"
    ) -> tuple[Tensor, State]:
        require_mode(mode)
        rows, num_tokens = x_BTD.shape[:2]
        state = self.init_state(rows) if state is None else state
        age_BT = ages(num_tokens, reset, state["age"])
        if mode == "recurrent":
            h, last = self._walk(x_BTD, state["h"], age_BT, reset)
        else:
            h, last = self.cell.run(x_BTD, state["h"], age_BT, reset)
        y_BTF = self.cell.read(h, x_BTD)
        return gated_out(y_BTF, x_BTD, self.gate, self.out), {"h": last, "age": age_BT[:, -1]}

    def _walk(self, x_BTD: Tensor, kept: Tensor, age_BT: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token by token, as the source of the cell writes it."""
        h, states = self.cell.opened(kept), []
        for t in range(x_BTD.shape[1]):
            if reset is not None:
                h = h.masked_fill(reset[:, t].view(-1, *[1] * (h.dim() - 1)), 0)
            h = self.cell.step(x_BTD[:, t], h, age_BT[:, t])
            states.append(h)
        return torch.stack(states, 1), self.cell.closed(h)
