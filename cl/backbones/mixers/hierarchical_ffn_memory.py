"""Hierarchical FFN memory: a tree of small MLPs, of which the ones on the path of the context are fetched.

    context = mean of the document's tokens so far, renewed after every n-th one
    path: the root, then at each level the child whose centroid is nearest in angle to the context
    y = mlp_root(x) + sum over the other nodes of the path of p_node mlp_node(x)
    p_node = softmax over a node and its siblings of sharpness * cos(centroid, context)

Common knowledge is in the root and in the rest of the network, rare knowledge in leaves that only their own context
trains. Before the first n tokens of a document only the root is fetched. `commit` moves the centroids on the path
towards the contexts they were chosen for; nothing else does.

Shape legend: B rows, T tokens, D width, L levels, J children of all nodes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime, Mixer
from cl.backbones._state import State
from cl.backbones.mlps.swiglu import Swiglu
from cl.core import UserError


class HierarchicalFfnMemory(Mixer):
    """Banks of FFN rows fetched by context; beside attention, as in `3x[attention + hierarchical_ffn_memory]`.

    Beside the FFNs of a model that is there already it is `strategy=hierarchical_ffn_memory`.

    Args:
        width: D.
        hidden: units of each node's MLP.
        levels: L, with the root.
        branches: children of a node; there are branches^l nodes at level l.
        block: n, tokens after which the context is renewed.
        sharpness: of the weights of the fetched nodes; through them the context is learnt, the choice is not.
        rate: how far `commit` moves a centroid towards its contexts; 0 leaves them as they were drawn.

    Raises:
        UserError: a value outside its range.

    Cost: 3 L D hidden + J D multiply-adds a token; 3 D hidden weights a node. The state holds 2 D numbers a row.
    Source: Pouransari et al., "Pretraining with Hierarchical Memories", 2025 [paper abstract]: FFN rows fetched by the
        cluster path of the document. Differences: own choices throughout: clusters are online and of the network's own
        tokens, there they are those of a document embedding, fixed before training; the path follows the text.
    """

    lifetime = Lifetime(fast=("sum", "count", "context"), kept=("centroids",))
    examples = ("hierarchical_ffn_memory(hidden=4, levels=2, branches=2, block=3)",)

    def __init__(
        self,
        width: int,
        *,
        hidden: int = 32,
        levels: int = 3,
        branches: int = 4,
        block: int = 16,
        sharpness: float = 4.0,
        rate: float = 0.05,
    ) -> None:
        super().__init__()
        for name, value in (("hidden", hidden), ("levels", levels), ("branches", branches), ("block", block)):
            require_width(name, value)
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise UserError(f"rate of hierarchical_ffn_memory is {rate!r}; it must be a number from 0 to 1")
        if isinstance(sharpness, bool) or not isinstance(sharpness, int | float) or not sharpness > 0:
            raise UserError(f"sharpness of hierarchical_ffn_memory is {sharpness!r}; it must be a number above 0")
        self.levels, self.branches, self.block = levels, branches, block
        self.sharpness, self.rate = float(sharpness), float(rate)
        self.nodes = nn.ModuleList(
            nn.ModuleList(Swiglu(width, hidden=hidden) for _ in range(branches**level)) for level in range(levels)
        )
        count = sum(branches**level for level in range(1, levels))
        self.register_buffer("centroids", F.normalize(torch.randn(count, width), dim=-1))
        self.centroids: Tensor

    def init_state(self, num_rows: int) -> State:
        width = self.centroids.shape[1]
        count = torch.zeros(num_rows, dtype=torch.int64, device=self.centroids.device)
        return {"sum": self.fresh(num_rows, width), "count": count, "context": self.fresh(num_rows, width)}

    def piece(self, x_BTD: Tensor, state: State, reset: Tensor | None, mode: str) -> tuple[Tensor, State]:
        context_BTD, count_BT, left = self._contexts(x_BTD, state, reset)
        path_BTL, weight_BTL = self.path(context_BTD)
        y_BTD = self.root(x_BTD)
        has_context_BT = count_BT >= self.block
        for level in range(1, self.levels):
            for number, node in enumerate(self.nodes[level].children()):
                # a node that nobody fetches reads nothing
                chosen_BT = has_context_BT & (path_BTL[..., level] == number)
                found_ND = node(x_BTD[chosen_BT])[0] * weight_BTL[..., level][chosen_BT].to(x_BTD.dtype).unsqueeze(1)
                y_BTD = y_BTD.index_put(chosen_BT.nonzero(as_tuple=True), found_ND.to(y_BTD.dtype), accumulate=True)
        return y_BTD, left

    def root(self, x_BTD: Tensor) -> Tensor:
        """What is fetched always says."""
        y_BTD: Tensor = self.get_submodule("nodes.0.0")(x_BTD)[0]
        return y_BTD

    def path(self, context_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, L) number of the node at each level, counted within the level, and its weight."""
        node_BT = torch.zeros(context_BTD.shape[:2], dtype=torch.int64, device=context_BTD.device)
        path, weights, first = [node_BT], [torch.ones_like(context_BTD[..., 0])], 0
        near_BTJ = F.normalize(context_BTD, dim=-1) @ F.normalize(self.centroids, dim=-1).to(context_BTD.dtype).T
        for level in range(1, self.levels):
            children = node_BT.unsqueeze(-1) * self.branches + torch.arange(self.branches, device=node_BT.device)
            weight, best = (self.sharpness * near_BTJ.gather(-1, first + children)).softmax(-1).max(-1)
            node_BT = node_BT * self.branches + best
            path.append(node_BT)
            weights.append(weight)
            first += self.branches**level
        return torch.stack(path, -1), torch.stack(weights, -1)

    @property
    def out(self) -> nn.Module:
        """What writes into the residual stream: the root's; every node has one."""
        return self.get_submodule("nodes.0.0.out")

    def _contexts(self, x_BTD: Tensor, state: State, reset_BT: Tensor | None) -> tuple[Tensor, Tensor, State]:
        """Context of each token, how many tokens of its document came before, and the state."""
        num_tokens, n = x_BTD.shape[1], self.block
        number_T = torch.arange(num_tokens, device=x_BTD.device)
        if reset_BT is None:
            reset_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        is_new_BT = reset_BT.cumsum(1) > 0
        start_BT = torch.where(reset_BT, number_T, 0).cummax(1).values
        before_BT = number_T - start_BT + torch.where(is_new_BT, 0, state["count"].unsqueeze(1))
        # sums from the start of the piece, without what lies before the document
        total_BTD = F.pad(x_BTD.to(state["sum"].dtype).cumsum(1), (0, 0, 1, 0))
        earlier_BTD = _taken(total_BTD, start_BT) - state["sum"].unsqueeze(1) * ~is_new_BT.unsqueeze(2)
        whole_BT = before_BT // n * n
        # the token after the last whole block of the document: in this piece, or before it
        after_BT = number_T - (before_BT - whole_BT)
        mean_BTD = (_taken(total_BTD, after_BT.clamp(min=0)) - earlier_BTD) / whole_BT.clamp(min=1).unsqueeze(2)
        context_BTD = torch.where((after_BT >= 0).unsqueeze(2), mean_BTD, state["context"].unsqueeze(1))
        count_B = before_BT[:, -1] + 1
        sum_BD = total_BTD[:, -1] - earlier_BTD[:, -1]
        # a block that has just ended makes the context of the next token
        context_BD = torch.where((count_B % n == 0).unsqueeze(1), sum_BD / count_B.unsqueeze(1), context_BTD[:, -1])
        return context_BTD, before_BT, {"sum": sum_BD, "count": count_B, "context": context_BD}

    @torch.no_grad()
    def commit(self, state: State) -> None:
        """Online k-means: centroids on the paths of the rows move towards the rows' contexts."""
        rows = state["count"] >= self.block
        if self.rate == 0 or not bool(rows.any()):
            return
        context_ND = F.normalize(state["context"][rows], dim=-1)
        path_NL = self.path(context_ND.unsqueeze(1))[0][:, 0]
        first = 0
        for level in range(1, self.levels):
            for node in path_NL[:, level].unique().tolist():
                mean_D = context_ND[path_NL[:, level] == node].mean(0).to(self.centroids.dtype)
                self.centroids[first + node].lerp_(mean_D, self.rate)
            first += self.branches**level


def _taken(x_BTD: Tensor, place_BT: Tensor) -> Tensor:
    return x_BTD.gather(1, place_BT.unsqueeze(2).expand(-1, -1, x_BTD.shape[2]))
