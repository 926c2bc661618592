"""Thalamic router: what a column hands to the queries of the next one.

    c_t = W_5 norm(h_t)
    focal_t = sum_{j < 4} w_j * c_{t-j}                    past_t = mean_{u < t} c_u, 0 where t is the first
    g_t = sigmoid(W_f c_t + a_f s_t + b_f)                 d_t = sigmoid(W_d c_t - a_d s_t + b_d)
    P = g focal + d past;   z_i = P_i / (1 + mean_{j in group(i)} |P_j|)

s_t is how surprising the text was two tokens ago. Everything looks at the token itself or strictly back, within the
document.

Shape legend: B rows, T tokens, D width, R rank, G groups, J tokens of the focal path.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._norm import RMSNorm
from cl.backbones._state import State
from cl.backbones.trc2_parts.convolution import convolved
from cl.core import UserError

SPAN = 4


class Thalamus(nn.Module):
    """The router of one column.

    Args:
        width: D.
        rank: R, a multiple of `groups`.
        groups: G, which share their gates and compete among themselves.
        is_alert: whether surprise moves the gates.
        has_past: False leaves the mean of the past out.
        has_competition: False takes z = P.

    Raises:
        UserError: a rank that groups do not divide.

    Cost: D R + (J + 2 G) R multiply-adds a token; the state holds J R numbers a row.
    Source: our own specification of the router of TRC2 (Khadangi, arXiv 2602.22479, v2 to v5); the published text that
        could be read names the two paths, their gates and the group-wise competition, but no sizes.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        groups: int = 8,
        is_alert: bool = True,
        has_past: bool = True,
        has_competition: bool = True,
    ) -> None:
        super().__init__()
        if rank % groups:
            raise UserError(f"backbone.rank is {rank}; it must be a multiple of backbone.groups={groups}")
        self.groups, self.has_competition = groups, has_competition
        self.norm = RMSNorm(width, eps=1e-6)
        self.down = nn.Linear(width, rank, bias=False)
        self.focal_JR = nn.Parameter(torch.full((SPAN, rank), 1 / SPAN))
        self.focal_gate = nn.Linear(rank, groups)
        self.past_gate = nn.Linear(rank, groups) if has_past else None
        # of both gates: how much surprise opens the focal one and closes the other
        self.alert_2G = nn.Parameter(torch.ones(2, groups)) if is_alert else None

    def init_state(self, num_rows: int, like: Tensor) -> State:
        """The last tokens, and the sum over the document; zeros of the kind of `like`."""
        span, rank = self.focal_JR.shape
        return {"tail": like.new_zeros(num_rows, span - 1, rank), "sum": like.new_zeros(num_rows, rank)}

    def forward(self, h_BTD: Tensor, state: State, before_BT: Tensor, surprise_BT: Tensor) -> tuple[Tensor, State]:
        """(B, T, R) for the queries of the next column, and what to remember.

        Args:
            before_BT: tokens of the document before each one.
            surprise_BT: normalised surprise that is known at each token; 0 where there is none.
        """
        # sums over a text are kept in full precision
        narrow_BTR = self.down(self.norm(h_BTD))
        c_BTR = narrow_BTR.to(state["sum"].dtype)
        local_BTR, tail = convolved(c_BTR, state["tail"], self.focal_JR, before_BT)
        past_BTR, sum_BR = self._past(c_BTR, state["sum"], before_BT)
        surprise_BT1 = surprise_BT.unsqueeze(2).to(c_BTR.dtype)
        focal, past = (0.0, 0.0) if self.alert_2G is None else (alert_G * surprise_BT1 for alert_G in self.alert_2G)
        p_BTGI = self._gated(local_BTR, self.focal_gate(narrow_BTR) + focal)
        if self.past_gate is not None:
            p_BTGI = p_BTGI + self._gated(past_BTR, self.past_gate(narrow_BTR) - past)
        z_BTGI = p_BTGI / (1 + p_BTGI.abs().mean(3, keepdim=True)) if self.has_competition else p_BTGI
        return z_BTGI.flatten(2), {"tail": tail, "sum": sum_BR}

    def _gated(self, path_BTR: Tensor, open_BTG: Tensor) -> Tensor:
        """(B, T, G, R / G)."""
        return torch.sigmoid(open_BTG).unsqueeze(3) * path_BTR.unflatten(2, (self.groups, -1))

    @staticmethod
    def _past(c_BTR: Tensor, carried_BR: Tensor, before_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the tokens of the document before each one, and the sum that the next piece goes on with."""
        through_BTR = c_BTR.cumsum(1)
        earlier_BTR = through_BTR - c_BTR
        start_BT = torch.arange(c_BTR.shape[1], device=c_BTR.device) - before_BT
        # documents that began in an earlier piece bring their sum along; the others leave out what was before them
        outside_BTR = earlier_BTR.gather(1, start_BT.clamp(min=0).unsqueeze(2).expand_as(c_BTR))
        is_new_BT1 = (start_BT >= 0).unsqueeze(2)
        sum_BTR = earlier_BTR + torch.where(is_new_BT1, -outside_BTR, carried_BR.unsqueeze(1))
        mean_BTR = sum_BTR / before_BT.clamp(min=1).unsqueeze(2)
        return mean_BTR, sum_BTR[:, -1] + c_BTR[:, -1]
