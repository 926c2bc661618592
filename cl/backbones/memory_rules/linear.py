"""Linear attention: every association is added, none forgotten.

Shape legend: B rows, T tokens, D width, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.backbones._state import State
from cl.backbones.memory_rules._rule import Gates, Row, Rule, outer, read
from kernels.gated_linear_attention import gated_linear_attention


class Linear(Rule):
    """S = S + k (x) v,  z = z + k,  o = q S / (q . z),  with q, k = elu(.) + 1.

    Args:
        normaliser: divide by q . z; false reads o = q S with q and k of length 1.

    Source: Katharopoulos et al., "Transformers are RNNs", 2020. Checked by numbers against the authors' recurrent form
        (idiap/fast-transformers) and fla's naive_recurrent_linear_attn. Differences: nothing is added to q . z.
    """

    row = Row("S", "-<k S, v>", "S", "S + k (x) v", "q S / (q . z)", "z", "Katharopoulos et al., 2020")

    def __init__(
        self, width: int, num_heads: int, key_width: int, value_width: int, *, normaliser: bool = True
    ) -> None:
        super().__init__(width, num_heads, key_width, value_width)
        self.has_normaliser = normaliser

    def init_state(self, zeros: Tensor) -> State:
        return {"matrix": zeros, "normaliser": zeros[..., 0]} if self.has_normaliser else {"matrix": zeros}

    def prepare(self, q_BTHK: Tensor, k_BTHK: Tensor, position: int) -> tuple[Tensor, Tensor]:
        if self.has_normaliser:
            return F.elu(q_BTHK) + 1, F.elu(k_BTHK) + 1
        return super().prepare(q_BTHK, k_BTHK, position)

    def step(self, state: State, q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, gates: Gates) -> tuple[Tensor, State]:
        matrix = state["matrix"] + outer(k_BHK, v_BHV)
        if not self.has_normaliser:
            return read(q_BHK, matrix), {"matrix": matrix}
        z_BHK = state["normaliser"] + k_BHK
        weight_BH1 = (q_BHK * z_BHK).sum(-1, keepdim=True)
        return _shared(read(q_BHK, matrix), weight_BH1), {"matrix": matrix, "normaliser": z_BHK}

    def chunk(
        self, state: State, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, gates: Gates, **how: Any
    ) -> tuple[Tensor, State]:
        start = state["matrix"]
        if not self.has_normaliser:
            o_BTHV, end = gated_linear_attention(q_BTHK, k_BTHK, v_BTHV, scale=1.0, initial_state=start, **how)
            return o_BTHV, {"matrix": end}
        # the normaliser is one more column of values, which are all 1
        values = torch.cat((v_BTHV, torch.ones_like(v_BTHV[..., :1])), -1)
        start = torch.cat((start, state["normaliser"].unsqueeze(-1)), -1)
        both, end = gated_linear_attention(q_BTHK, k_BTHK, values, scale=1.0, initial_state=start, **how)
        return _shared(both[..., :-1], both[..., -1:]), {"matrix": end[..., :-1], "normaliser": end[..., -1]}


def _shared(total: Tensor, weight: Tensor) -> Tensor:
    """q S / (q . z); features of large negative numbers are zero, and a query that no key answers to reads nothing."""
    is_answered = weight > 0
    return torch.where(is_answered, total / torch.where(is_answered, weight, 1), 0)
