"""The matrix LSTM of xLSTM: exponential input gate, sigmoid forget gate, and a normaliser.

Shape legend: B rows, T tokens, D width, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._state import State
from cl.backbones.memory_rules._rule import Gates, Row, Rule, outer, read
from kernels.gated_linear_attention import mlstm
from kernels.gated_linear_attention.mlstm import MLSTMState


class Mlstm(Rule):
    """C = f C + i k (x) v,  n = f n + i k,  o = q C / max(|q . n|, 1),  i = exp(W_i x), f = sigmoid(W_f x).

    C and n are kept relative to exp(m), m the running maximum of the log gates. q is divided by sqrt(K).

    Source: Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024. Checked by numbers against the authors'
        recurrent and parallel forms (NX-AI/xlstm). Differences: gates read x, in that code q, k and v; nothing is added
        to the maximum; the layer around it is the one of all rules, without the block's own up-projection.
    """

    row = Row(
        "C",
        "-<k C, v>",
        "f C, f per head",
        "f C + i k (x) v, i = exp(.)",
        "q C / max(|q . n|, 1)",
        "n, m",
        "Beck et al., 2024",
    )

    def __init__(self, width: int, num_heads: int, key_width: int, value_width: int) -> None:
        super().__init__(width, num_heads, key_width, value_width)
        self.write, self.keep = nn.Linear(width, num_heads), nn.Linear(width, num_heads)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Forget gates begin nearly open, each head at its own rate."""
        self.keep.bias.copy_(torch.linspace(3.0, 6.0, self.num_heads))

    def init_state(self, zeros: Tensor) -> State:
        return {"matrix": zeros, "normaliser": zeros[..., 0], "log_scale": zeros[..., 0, 0]}

    def prepare(self, q_BTHK: Tensor, k_BTHK: Tensor, position: int) -> tuple[Tensor, Tensor]:
        return q_BTHK, k_BTHK

    def gates(self, x_BTD: Tensor) -> Gates:
        i_BTH, f_BTH = self.write(x_BTD), self.keep(x_BTD)
        wide = torch.promote_types(torch.float32, i_BTH.dtype)
        return {"write": i_BTH.to(wide), "keep": f_BTH.to(wide)}

    def step(self, state: State, q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, gates: Gates) -> tuple[Tensor, State]:
        log_f, log_i = F.logsigmoid(gates["keep"]) + state["log_scale"].detach(), gates["write"]
        # any m gives the same o, so no gradient goes through it
        m_BH = torch.maximum(log_f, log_i).detach()
        f_BH1, i_BH1 = ((x - m_BH).exp().unsqueeze(-1) for x in (log_f, log_i))
        matrix = f_BH1.unsqueeze(-1) * state["matrix"] + outer(i_BH1 * k_BHK, v_BHV)
        n_BHK = f_BH1 * state["normaliser"] + i_BH1 * k_BHK
        q_BHK = q_BHK * self.key_width**-0.5
        weight_BH1 = (q_BHK * n_BHK).sum(-1, keepdim=True).abs()
        o_BHV = read(q_BHK, matrix) / torch.maximum(weight_BH1, (-m_BH).exp().unsqueeze(-1))
        return o_BHV, {"matrix": matrix, "normaliser": n_BHK, "log_scale": m_BH}

    def chunk(
        self, state: State, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, gates: Gates, **how: Any
    ) -> tuple[Tensor, State]:
        # as in a step: the scale says how large the matrix is, and what it was made of is in the matrix
        start = MLSTMState(state["matrix"], state["normaliser"], state["log_scale"].detach())
        o_BTHV, end = mlstm(q_BTHK, k_BTHK, v_BTHV, gates["write"], gates["keep"], initial_state=start, **how)
        return o_BTHV, {"matrix": end.matrix, "normaliser": end.normaliser, "log_scale": end.log_scale}
