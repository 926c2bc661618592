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

from cl.backbones._state import State


def tokens_before(reset_BT: Tensor | None, count_B: Tensor, num_tokens: int) -> Tensor:
    """(B, T) how many tokens of its document a token has before it.

    Args:
        count_B: tokens that were read before, of the document that each row is in.

    Example:
        >>> reset = torch.tensor([[False, False, True, False]])
        >>> tokens_before(reset, torch.tensor([5]), 4).tolist()
        [[5, 6, 0, 1]]
    """
    places = torch.arange(num_tokens, device=count_B.device)
    going_on_BT = count_B.unsqueeze(1) + places
    if reset_BT is None:
        return going_on_BT
    start_BT = torch.where(reset_BT, places, -1).cummax(1).values
    return torch.where(start_BT >= 0, places - start_BT, going_on_BT)


class Thalamus(nn.Module):
    """The router of one column.

    Args:
        width: D.
        rank: R, a multiple of `groups`.
        groups: G, which share their gates and compete among themselves.
        span: J, tokens of the focal path.
        is_alert: whether surprise moves the gates.

    Cost: D R + (J + 2 G) R multiply-adds a token; the state holds J R numbers a row.
    Source: our own specification of the router of TRC2 (Khadangi, arXiv 2602.22479, v2 to v5); the published text that
        could be read names the two paths, their gates and the group-wise competition, but no sizes.
    """

    def __init__(self, width: int, rank: int, groups: int = 8, span: int = 4, is_alert: bool = True) -> None:
        super().__init__()
        self.groups = groups
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.down = nn.Linear(width, rank, bias=False)
        self.focal_JR = nn.Parameter(torch.full((span, rank), 1 / span))
        self.focal_gate = nn.Linear(rank, groups)
        self.past_gate = nn.Linear(rank, groups)
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
        c_BTR = self.down(self.norm(h_BTD)).to(state["sum"].dtype)
        seen_BNR = torch.cat((state["tail"], c_BTR), 1)
        focal_BTG, past_BTG = self.focal_gate(c_BTR), self.past_gate(c_BTR)
        if self.alert_2G is not None:
            surprise_BT1 = surprise_BT.unsqueeze(2).to(c_BTR.dtype)
            focal_BTG = focal_BTG + self.alert_2G[0] * surprise_BT1
            past_BTG = past_BTG - self.alert_2G[1] * surprise_BT1
        past_BTR, sum_BR = self._past(c_BTR, state["sum"], before_BT)
        p_BTGI = torch.sigmoid(focal_BTG).unsqueeze(3) * self._grouped(self._focal(seen_BNR, before_BT))
        p_BTGI = p_BTGI + torch.sigmoid(past_BTG).unsqueeze(3) * self._grouped(past_BTR)
        z_BTGI = p_BTGI / (1 + p_BTGI.abs().mean(3, keepdim=True))
        return z_BTGI.flatten(2), {"tail": seen_BNR[:, c_BTR.shape[1] :], "sum": sum_BR}

    def _grouped(self, x_BTR: Tensor) -> Tensor:
        return x_BTR.unflatten(2, (self.groups, -1))

    def _focal(self, seen_BNR: Tensor, before_BT: Tensor) -> Tensor:
        """A short causal convolution, each number by itself, that does not look over the start of a document."""
        num_tokens, span = before_BT.shape[1], len(self.focal_JR)
        total = torch.zeros_like(seen_BNR[:, :num_tokens])
        for back in range(span):
            low = span - 1 - back
            is_own_BT1 = (before_BT >= back).unsqueeze(2)
            total = total + torch.where(is_own_BT1, self.focal_JR[back] * seen_BNR[:, low : low + num_tokens], 0)
        return total

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
