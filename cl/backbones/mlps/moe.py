"""Mixture of experts: each token is sent to a few of many gated MLPs.

Shape legend: B rows, T tokens, N = B T, D width, E experts, k experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._heads import require_width
from cl.backbones.mlps.swiglu import Swiglu
from cl.core import UserError


class Moe(nn.Module):
    """y = sum_{e in top(p)} p_e / sum_{top} p * expert_e(x) + shared(x),   p = softmax(W_router x).

    The auxiliary term `balance` is balance * E * sum_e f_e P_e: f_e is the share of the choices that fell on expert e,
    P_e the mean of p_e over tokens; it is `balance` when all experts are used alike, and grows to balance * E / top.
    Both means are over the tokens of one forward pass: of a micro-batch, and under DDP of one process's share of it, as
    in Switch Transformer and Mixtral; the terms are then averaged. So with `trainer.accumulation` or in several
    processes every such piece is to use all experts alike, which is more than the whole batch is asked for; Qiu et al.
    (2025) share f_e between the pieces instead, which lets experts specialise.

    Args:
        width: D.
        hidden: units of an expert; None takes 8/3 D, rounded up to a multiple of 8.
        experts: E.
        top: k, experts that read a token.
        shared: experts that read every token.
        balance: weight of the auxiliary term; 0 leaves it out.

    Raises:
        UserError: a value outside its range.

    Cost: 3 (k + shared) D F + E D multiply-adds a token; 3 (E + shared) D F weights.
    Source: Shazeer et al., 2017; the term as in Switch Transformer (Fedus et al., 2021), over all k choices as in
        Mixtral; shared experts from DeepSeekMoE (Dai et al., 2024); pieces and whole batches in Qiu et al., "Demons in
        the Detail: On Implementing Load Balancing Loss for Training Specialized Mixture-of-Expert Models", ACL 2025.
    Differences: no capacity limit, so no token is dropped.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        experts: int = 8,
        top: int = 2,
        shared: int = 0,
        balance: float = 0.01,
    ) -> None:
        super().__init__()
        require_width("mlp experts", experts)
        if not isinstance(top, int) or isinstance(top, bool) or not 1 <= top <= experts:
            raise UserError(f"top of moe is {top!r}; it must be an integer from 1 to the number of experts, {experts}")
        if not isinstance(shared, int) or isinstance(shared, bool) or shared < 0:
            raise UserError(f"shared of moe is {shared!r}; it must be an integer of at least 0")
        if not isinstance(balance, int | float) or not balance >= 0:
            raise UserError(f"balance of moe is {balance!r}; it must be a number of at least 0")
        self.top, self.balance = top, float(balance)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Swiglu(width, hidden=hidden) for _ in range(experts))
        self.shared = nn.ModuleList(Swiglu(width, hidden=hidden) for _ in range(shared))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x_ND = x_BTD.flatten(0, -2)
        # routing in full precision: a bfloat16 softmax sends near ties elsewhere
        p_NE = self.router(x_ND).to(torch.promote_types(torch.float32, x_ND.dtype)).softmax(-1)
        weight_Nk, chosen_Nk = p_NE.topk(self.top, -1)
        weight_Nk = weight_Nk / weight_Nk.sum(-1, keepdim=True)
        y_ND = torch.zeros_like(x_ND, dtype=p_NE.dtype)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen_Nk == number).nonzero(as_tuple=True)
            # an expert that nobody chose still reads nothing, so that its weights get a gradient of zero
            out_RD, _ = expert(x_ND[rows])
            y_ND = y_ND.index_add(0, rows, out_RD.to(y_ND.dtype) * weight_Nk[rows, place].unsqueeze(1))
        for expert in self.shared:
            y_ND = y_ND + expert(x_ND)[0]
        auxiliary = (
            {"balance": self.balance * self._imbalance(p_NE, chosen_Nk)} if self.balance and self.training else {}
        )
        return y_ND.to(x_BTD.dtype).view_as(x_BTD), auxiliary

    @staticmethod
    def _imbalance(p_NE: Tensor, chosen_Nk: Tensor) -> Tensor:
        """E sum_e f_e P_e."""
        experts = p_NE.shape[1]
        share_E = torch.bincount(chosen_Nk.flatten(), minlength=experts).to(p_NE.dtype) / chosen_Nk.numel()
        return experts * (share_E * p_NE.mean(0)).sum()
