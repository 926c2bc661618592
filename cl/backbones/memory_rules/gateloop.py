"""GateLoop: every key channel decays and turns in the complex plane, by rates that the token decides.

Shape legend: B rows, T tokens, D width, H heads, K key width, V value width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._state import State
from cl.backbones.memory_rules._rule import Gates, Row, Rule, outer
from kernels.common.fused import running_sum, turned
from kernels.gated_linear_attention import gated_linear_attention


class Gateloop(Rule):
    """S = diag(a) S + k (x) v,  o = Re(q S) / sqrt(K),  a = sigmoid(W_r x + b_r) exp(i W_p x), complex.

    Turning is moved to queries and keys, q_t e^(i Phi_t) and k_s e^(-i Phi_s) with Phi the running sum of phases, so
    that what is left is a gated linear attention of twice the key width. The state holds Re S, then Im S.

    Source: Katsch, "GateLoop: Fully Data-Controlled Linear Recurrence for Sequence Modeling", 2023; in the spirit of
        it: its recurrence was checked by numbers with one key a head, as the cell `gateloop` of scan_rnn says.
        Differences: magnitudes begin between 0.9 and 0.999.
    """

    row = Row(
        "S, complex",
        "-<k S, v>",
        "diag(a) S, complex, per key channel",
        "diag(a) S + k (x) v",
        "Re(q S)",
        "Im S",
        "Katsch, 2023",
    )

    def __init__(self, width: int, num_heads: int, key_width: int, value_width: int) -> None:
        super().__init__(width, num_heads, key_width, value_width)
        self.retention = nn.Linear(width, num_heads * key_width, bias=False)
        self.phase = nn.Linear(width, num_heads * key_width, bias=False)
        self.bias = nn.Parameter(torch.linspace(0.9, 0.999, key_width).logit().repeat(num_heads))

    def init_state(self, zeros: Tensor) -> State:
        return {"matrix": torch.cat((zeros, zeros), -2)}

    def prepare(self, q_BTHK: Tensor, k_BTHK: Tensor, position: int) -> tuple[Tensor, Tensor]:
        return q_BTHK, k_BTHK

    def gates(self, x_BTD: Tensor) -> Gates:
        raw, phase = self.retention(x_BTD), self.phase(x_BTD)
        wide = torch.promote_types(torch.float32, raw.dtype)
        log_decay, phase = F.logsigmoid(raw.to(wide) + self.bias), phase.to(wide)
        return {
            name: each.unflatten(-1, (self.num_heads, self.key_width))
            for name, each in (("log_decay", log_decay), ("phase", phase))
        }

    def step(self, state: State, q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, gates: Gates) -> tuple[Tensor, State]:
        s_BHKV = torch.complex(*state["matrix"].chunk(2, -2))
        a_BHK = torch.polar(gates["log_decay"].exp(), gates["phase"])
        s_BHKV = a_BHK.unsqueeze(-1) * s_BHKV + outer(k_BHK, v_BHV)
        o_BHV = (q_BHK.unsqueeze(-1) * s_BHKV).sum(-2).real * self.key_width**-0.5
        return o_BHV, {"matrix": torch.cat((s_BHKV.real, s_BHKV.imag), -2)}

    def chunk(
        self, state: State, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, gates: Gates, **how: Any
    ) -> tuple[Tensor, State]:
        turn = turned_since(gates["phase"], how.get("cu_seqlens"))
        with torch.no_grad():
            cos_sin = turn.cos(), turn.sin()
        q, k = (turned(x, turn, *cos_sin) for x in (q_BTHK, k_BTHK))
        real, imaginary = state["matrix"].chunk(2, -2)
        start = torch.cat((real, -imaginary), -2)
        log_decay = torch.cat((gates["log_decay"], gates["log_decay"]), -1)
        scale = self.key_width**-0.5
        o_BTHV, end = gated_linear_attention(q, k, v_BTHV, log_decay, scale=scale, initial_state=start, **how)
        last = turn[:, -1] if how.get("cu_seqlens") is None else turn[0, how["cu_seqlens"][1:].long() - 1]
        # in the turning frame the state is (c, -s): e^(i Phi) (c - i s) is S
        c, s = end.chunk(2, -2)
        cos, sin = last.cos().unsqueeze(-1), last.sin().unsqueeze(-1)
        return o_BTHV, {"matrix": torch.cat((cos * c + sin * s, sin * c - cos * s), -2)}


def turned_since(phase_BTHK: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sum of phases since before the first token of the row, or of the document in packed rows, less whole turns."""
    starts_BT = None
    if cu_seqlens is not None:
        starts_BT = torch.zeros(phase_BTHK.shape[:2], dtype=torch.bool, device=phase_BTHK.device)
        starts_BT[0, cu_seqlens[:-1].long()] = True
    return running_sum(phase_BTHK, starts_BT, 2 * math.pi)
