"""A memory that trains itself on the stream it reads: TTT, Titans, ATLAS, Miras and TNT, beside attention or alone.

Shape legend: B rows, T tokens, D width, H heads, K width of a head.
"""

from __future__ import annotations

from torch import Tensor, nn

from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime, Mixer
from cl.backbones._norm import RMSNorm
from cl.backbones._spec import Spec
from cl.backbones._state import State
from cl.backbones.mixers._memory_as_context import MemoryAsContext
from cl.backbones.mixers._neural_branch import NeuralBranch
from cl.backbones.mixers._persistent import PersistentAttention
from cl.backbones.mixers._rotary import require_rope_base
from cl.backbones.neural_rules.tnt import Tnt
from cl.core import UserError
from kernels.common.fused import gated

LAYOUTS = ("plain", "mac", "mag", "mal")


class NeuralMemory(Mixer):
    """o = M(q; W_t), W_t trained on (k, v) while reading; a layout says how it works with attention.

    plain: y = W_out (norm(o) * silu(W_gate x)).
    mac (memory as context): attention within segments, over the segment and what the memory recalls for it.
    mag (memory as gate): y = W_out (norm(attention(x)) * sigmoid(norm(o))), with sliding-window attention.
    mal (memory as layer): y = W_out attention(norm(o)), with sliding-window attention.

    Args:
        width: D, a multiple of twice `num_heads`.
        num_heads: H, each with a memory of its own.
        rule: ttt_linear, ttt_mlp, titans, atlas, moneta, yaad, memora or tnt: a file in `cl/backbones/neural_rules/`,
            with options where wanted, as in titans(chunk=8, depth=1). The rule's `chunk` is part of the model.
        layout: plain, mac, mag or mal.
        conv: tokens that the short convolution of q, k and v sees; 0 leaves it out.
        window: of the attention of mag and mal; mac has segments as long as the rule's chunk.
        num_persistent: learned keys and values that attention sees from everywhere.
        rope_base: of the attention's rotary angles; None gives no positions.

    Raises:
        UserError: a value outside its range, or tnt as context.

    Cost: 5 D^2 multiply-adds a token for the projections (7 with mag and mal, 11 with mac), and with a memory of |W|
        weights, |W_1| of them in its first layer, 4 |W| - |W_1| for two answers and a gradient; the state holds three
        copies of the memory a row (weights, momentum, chunk start).
    Source: Titans (Behrouz et al., 2024) for the layouts, checked in the paper's text, equations (21) to (31) and its
        section 4.4, which leave gates and norms open; in the spirit of it, there is no official code. The rules' own
        files for the rest. Differences: only attention sees what is persistent; mal has no H3 layer around it.
    """

    lifetime = Lifetime(fast=("memory",))
    examples = (
        "neural_memory(rule=titans(chunk=4, expansion=2))",
        "neural_memory(rule=titans(chunk=3, depth=1), layout=mac, conv=0)",
        "neural_memory(rule=titans(chunk=4, depth=1), layout=mag, window=3)",
        "neural_memory(rule=titans(chunk=4, depth=1), layout=mal, window=3)",
        "neural_memory(rule=ttt_linear(chunk=4))",
        "neural_memory(rule=ttt_mlp(chunk=4, expansion=2))",
        "neural_memory(rule=atlas(chunk=4, window=3))",
        "neural_memory(rule=atlas(chunk=4, window=2, degree=1, depth=2, step=gradient), layout=mac)",
        "neural_memory(rule=moneta(chunk=4, expansion=2))",
        "neural_memory(rule=yaad(chunk=4, expansion=2))",
        "neural_memory(rule=memora(chunk=4, expansion=2))",
        "neural_memory(rule=tnt(chunk=8, local_chunks=[2], shards=[4], depth=1, project=true))",
    )

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        rule: str | Spec = "titans",
        layout: str = "plain",
        conv: int = 4,
        window: int = 64,
        num_persistent: int = 4,
        rope_base: float | None = 10_000.0,
    ) -> None:
        super().__init__()
        require_width("num_heads", num_heads)
        require_width("window", window)
        require_rope_base(rope_base)
        if width % num_heads or width // num_heads % 2:
            raise UserError(
                f"backbone.width is {width} for backbone.num_heads={num_heads}; a multiple of twice the heads is needed"
            )
        if layout not in LAYOUTS:
            raise UserError(f"layout of neural_memory is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
        require_width("num_persistent", num_persistent)
        if not isinstance(conv, int) or isinstance(conv, bool) or conv < 0:
            raise UserError(f"conv of neural_memory is {conv!r}; it must be an integer of at least 0")
        self.layout, self.memory = layout, NeuralBranch(width, num_heads, rule, conv)
        if layout == "mac":
            if isinstance(self.memory.rule, Tnt):
                raise UserError("layout of neural_memory is 'mac' with the rule tnt; it must be plain, mag or mal")
            self.context = MemoryAsContext(self.memory, width, num_heads, num_persistent, rope_base)
        if layout in ("mag", "mal"):
            self.attention = PersistentAttention(
                width, num_heads=num_heads, num_persistent=num_persistent, window=window, rope_base=rope_base
            )
        if layout == "mag":
            self.norm = RMSNorm(width, eps=1e-6)
        if layout == "plain":
            self.gate = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        parts = {"plain": (), "mac": ("context",), "mag": ("attention",), "mal": ("attention",)}[layout]
        self.lifetime = Lifetime(fast=("memory", *parts))  # type: ignore[misc]

    def init_state(self, num_rows: int) -> State:
        state: State = {"memory": self.memory.init_state(num_rows)}
        if self.layout == "mac":
            state["context"] = self.context.init_state(self.fresh(num_rows, 0))
        if self.layout in ("mag", "mal"):
            state["attention"] = self.attention.init_state(num_rows)
        return state

    def piece(self, x_BTD: Tensor, state: State, reset: Tensor | None, mode: str) -> tuple[Tensor, State]:
        if self.layout == "mac":
            y_BTD, left = self.context(x_BTD, self.memory, state, reset, mode)
            return self.out(y_BTD), left
        o_BTD, memory = self.memory(x_BTD, state["memory"], reset, mode)
        if self.layout == "plain":
            return self.finish(o_BTD, x_BTD), {"memory": memory}
        read_BTD = x_BTD if self.layout == "mag" else o_BTD
        y_BTD, attention = self.attention(read_BTD, state["attention"], reset=reset, mode=mode)
        left = {"memory": memory, "attention": attention}
        return self.out(y_BTD if self.layout == "mal" else self.norm(y_BTD) * o_BTD.sigmoid()), left

    def finish(self, o_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        """What the plain layout gives, from what the memory answered."""
        y_BTD: Tensor = self.out(gated(self.gate(x_BTD), o_BTD))
        return y_BTD
