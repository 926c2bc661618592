"""Self-modifying memory: what makes keys, values, rates and decays is itself a memory that these write to.

    for the memories m in {key, value, output, rate, decay}, all linear, per head:
        k = norm(M_key u);  v = norm(M_value u);  eta = sigmoid(M_rate u);  alpha = sigmoid(M_decay u + b)
        M_m <- M_m0 + alpha (M_m - M_m0) - eta (M_m k - M_m v) k^T        every memory sets its own target, M_m v
        o = M_output q,   q = norm(W_q x), the only static one

u are the token's inputs to its heads; initial memories M_m0 are weights. All memories are read and written alike, so
they are the rows of one matrix.

What is written comes from the memories alone. So they decay to where they began, and not to zero, where all of them
would end; and v has the length of k: one that is longer would make them grow with every token.

Shape legend: B rows, T tokens, D width, H heads, K width of a head, R = 3 K + 2 rows of a head's memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime, Mixer, in_full_precision, require_mode
from cl.backbones._norm import RMSNorm
from cl.backbones._state import State
from cl.core import UserError
from kernels.common.fused import gated


class SelfModifying(Mixer):
    """The mixer of a Hope block; with `mlp=cms` behind it, the block.

    Args:
        width: D.
        num_heads: H; D must be a multiple of it.
        keep: b, of the decay; 5 keeps 99.3 % a token.

    Raises:
        UserError: a value outside its range.

    Cost: 4 D^2 + 13 D K multiply-adds a token, one token after another; the state holds D (3 K + 2) numbers a row.
    Source: in the spirit of the self-modifying Titans of Behrouz et al., "Nested Learning: The Illusion of Deep
        Learning Architectures", NeurIPS 2025: k, v, eta, alpha and the memory are memories, q is static. Update and
        targets [recalled]. Differences: linear memories, one gradient step of a squared error a token, read after it;
        values of length 1, and decay to the initial memories.
    """

    lifetime = Lifetime(fast=("memory",))
    examples = ("self_modifying",)

    def __init__(self, width: int, *, num_heads: int = 4, keep: float = 5.0) -> None:
        super().__init__()
        require_width("num_heads", num_heads)
        if width % num_heads:
            raise UserError(f"backbone.width is {width}; it must be a multiple of backbone.num_heads={num_heads}")
        if isinstance(keep, bool) or not isinstance(keep, int | float):
            raise UserError(f"keep of self_modifying is {keep!r}; it must be a number")
        self.num_heads, self.head_width, self.keep = num_heads, width // num_heads, float(keep)
        self.query, self.inner, self.gate = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        self.norm = RMSNorm(self.head_width, eps=1e-6)
        rows = 3 * self.head_width + 2
        self.start = nn.Parameter(torch.empty(num_heads, rows, self.head_width))
        self.initialise()

    def initialise(self) -> None:
        """Initial memories: maps that keep the length of what they read."""
        nn.init.normal_(self.start, std=self.head_width**-0.5)

    def init_state(self, num_rows: int) -> State:
        start = self.start.to(torch.promote_types(torch.float32, self.start.dtype))
        return {"memory": start.unsqueeze(0).expand(num_rows, -1, -1, -1)}

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, reset: Tensor | None = None, mode: str = "chunk"
    ) -> tuple[Tensor, State]:
        require_mode(mode)
        fresh_BHRK = self.init_state(len(x_BTD))["memory"]
        memory_BHRK = fresh_BHRK if state is None else state["memory"]
        q_BTHK, u_BTHK = (
            layer(x_BTD).unflatten(-1, (self.num_heads, -1)).to(memory_BHRK.dtype) for layer in (self.query, self.inner)
        )
        q_BTHK, outputs = F.normalize(q_BTHK, dim=-1), []
        with in_full_precision(x_BTD):
            for t in range(x_BTD.shape[1]):
                if reset is not None:
                    memory_BHRK = torch.where(reset[:, t].view(-1, 1, 1, 1), fresh_BHRK, memory_BHRK)
                memory_BHRK = self._written(memory_BHRK, fresh_BHRK, u_BTHK[:, t])
                output_BHKK = memory_BHRK[:, :, 2 * self.head_width : 3 * self.head_width]
                outputs.append(_read(output_BHKK, q_BTHK[:, t]))
        o_BTHK = self.norm(torch.stack(outputs, 1).to(x_BTD.dtype))
        y_BTD: Tensor = self.out(gated(self.gate(x_BTD), o_BTHK.flatten(2)))
        return y_BTD, {"memory": memory_BHRK}

    def _written(self, memory_BHRK: Tensor, fresh_BHRK: Tensor, u_BHK: Tensor) -> Tensor:
        """All memories after one token."""
        width = self.head_width
        k, v, _, rate, decay = _read(memory_BHRK, u_BHK).split((width, width, width, 1, 1), -1)
        k, v = F.normalize(k, dim=-1), F.normalize(v, dim=-1)
        eta, alpha = rate.sigmoid().unsqueeze(-1), (decay + self.keep).sigmoid().unsqueeze(-1)
        # M k - M v, the error of every memory, in one reading
        error_BHR = _read(memory_BHRK, k - v)
        kept_BHRK = torch.lerp(fresh_BHRK, memory_BHRK, alpha)
        return kept_BHRK - eta * error_BHR.unsqueeze(-1) * k.unsqueeze(-2)


def _read(memory_BHRK: Tensor, x_BHK: Tensor) -> Tensor:
    return (memory_BHRK @ x_BHK.unsqueeze(-1)).squeeze(-1)
