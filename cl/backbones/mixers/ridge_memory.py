"""Gated KalmaNet: ridge regression of values on keys over all of the past, solved anew at every token.

Shape legend: B rows, T tokens, D width, H heads, K width of a head for keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._mixer import Lifetime, Mixer, in_full_precision
from cl.backbones._norm import RMSNorm
from cl.backbones._state import Packing, State, where_rows
from cl.backbones.memory_rules._rule import Decay, Row, Strength
from cl.backbones.mixers._convolution import ShortConvolution
from cl.backbones.mixers.linear_memory import head_width, require_chunk
from cl.core import UserError
from kernels.common.fused import gated, unit
from kernels.ridge_memory import ridge_memory


class RidgeMemory(Mixer):
    """H = g H + b k (x) k,  U = g U + b k (x) v,  o = (m q + (1 - m) q (H + lambda I)^-1) U,  lambda = ratio |H|_F.

    The inverse is taken by Chebyshev steps; "recurrent" mode solves exactly, in float64 where the model is. With q, k
    of length 1, b = sigmoid(.), m = sigmoid(.) and log g = -exp(A) softplus(.) per head.

    Args:
        width: D.
        num_heads: H.
        ratio: lambda relative to |H|_F; the condition number of the system is at most 1 + 1 / ratio.
        steps: of the Chebyshev iteration; relative error at ratio 0.02: 9e-2 after 10, 5e-3 after 20, 3e-4 after 30.
        head: K, width of a head; None takes D / H.
        conv: tokens that the short convolution of q, k and v sees; 0 leaves it out.
        forget: decay H and U; false remembers all of a document alike.
        mix: read with a mixture of the query and the solution; false reads with the solution.
        gate: multiply the output by silu(W_gate x).
        chunk: tokens that the kernel handles at once, a power of two; None takes its own. Changes rounding only.

    Raises:
        UserError: a value outside its range.

    Cost: 5 D H K multiply-adds a token for the projections, 5 H K^2 to write and read, and steps * K^2 H for the solve,
        twice that backward; the state holds 2 H K^2 + 3 (conv - 1) H K numbers a row.
    Source: Peng et al., "Gated KalmaNet: A Fading Memory Layer Through Test-Time Ridge Regression", 2025, and
        flash-linear-attention's layer. Differences: b weighs a token's error once (there keys and values are both
        multiplied by it, so that it enters H and U squared); the floor of lambda (1e-6) is ours.
    """

    row = Row(
        "U (H + lambda I)^-1",
        "lambda |S|^2 + sum over the past of 1/2 |k S - v|^2",
        "g H, g U, per head",
        "H + b k (x) k, U + b k (x) v",
        "(m q + (1 - m) q (H + lambda I)^-1) U",
        "H",
        "Peng et al., 2025",
    )
    lifetime = Lifetime(fast=("gram", "cross", "tail"))
    # at ratio 0.5 so many steps are exact in float64
    examples = (
        "ridge_memory(ratio=0.5, steps=60)",
        "ridge_memory(ratio=0.5, steps=60, forget=false, mix=false, gate=false, conv=0, chunk=4)",
    )

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        ratio: float = 0.02,
        steps: int = 30,
        head: int | None = None,
        conv: int = 4,
        forget: bool = True,
        mix: bool = True,
        gate: bool = True,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(ratio, int | float) or not ratio > 0:
            raise UserError(f"ratio of ridge_memory is {ratio!r}; it must be a number above 0")
        for name, value, least in (("steps", steps, 1), ("conv", conv, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{name} of ridge_memory is {value!r}; it must be an integer of at least {least}")
        require_chunk("ridge_memory", chunk)
        self.num_heads, self.head_width = num_heads, head_width(width, num_heads, head, "head")
        self.ratio, self.steps, self.chunk = float(ratio), steps, chunk
        inner = num_heads * self.head_width
        self.query, self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.convolution = ShortConvolution(3 * inner, conv)
        self.strength = Strength(width, num_heads)
        self.retention = Decay(width, num_heads) if forget else None
        self.mix = nn.Linear(width, num_heads) if mix else None
        self.gate = nn.Linear(width, inner, bias=False) if gate else None
        self.norm = RMSNorm(self.head_width, eps=1e-6)
        self.out = nn.Linear(inner, width, bias=False)

    def init_state(self, num_rows: int) -> State:
        square = self.fresh(num_rows, self.num_heads, self.head_width, self.head_width)
        tail = self.fresh(num_rows, self.convolution.num_before, self.convolution.channels)
        return {"gram": square, "cross": square, "tail": tail}

    def piece(self, x_BTD: Tensor, state: State, reset: Tensor | None, mode: str) -> tuple[Tensor, State]:
        projected = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        qkv, tail = self.convolution.parts(projected, state["tail"], reset)
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)) for each in qkv)
        tokens = {"q": unit(q), "k": unit(k), "v": v, "beta": self.strength(x_BTD)}
        if self.retention is not None:
            tokens["g"] = self.retention(x_BTD)[1].squeeze(-1)
        if self.mix is not None:
            tokens["mix"] = self.mix(x_BTD).to(tokens["beta"].dtype).sigmoid()
        with in_full_precision(x_BTD):
            o_BTHK, left = self._solve(tokens, {"gram": state["gram"], "cross": state["cross"]}, reset, mode)
        o_BTHK = self.norm(o_BTHK.to(self.norm.weight.dtype))
        if self.gate is not None:
            o_BTHK = gated(self.gate(x_BTD).view_as(o_BTHK), o_BTHK)
        y_BTD: Tensor = self.out(o_BTHK.flatten(2).to(x_BTD.dtype))
        return y_BTD, left | {"tail": tail}

    def _solve(self, tokens: dict[str, Tensor], memory: State, reset: Tensor | None, mode: str) -> tuple[Tensor, State]:
        how = {"ratio": self.ratio, "steps": self.steps, "chunk": self.chunk}
        if mode == "recurrent":
            if reset is not None:
                memory = where_rows(reset[:, 0], self._empty(reset.shape[0]), memory)
            o, end = ridge_memory(**tokens, **how | {"backend": "reference"}, initial_state=_joined(memory))
            return o, self._parted(end)
        if reset is None:
            o, end = ridge_memory(**tokens, **how, initial_state=_joined(memory))
            return o, self._parted(end)
        packing = Packing.of(reset)
        start = _joined(packing.start(memory, self._empty(reset.shape[0])))
        packed = {name: packing.tokens(each) for name, each in tokens.items()}
        o, end = ridge_memory(**packed, **how, initial_state=start, cu_seqlens=packing.cu_seqlens)
        return packing.rows(o), packing.end(self._parted(end))

    def _empty(self, num_rows: int) -> State:
        square = self.fresh(num_rows, self.num_heads, self.head_width, self.head_width)
        return {"gram": square, "cross": square}

    def _parted(self, joined: Tensor) -> State:
        return {"gram": joined[..., : self.head_width], "cross": joined[..., self.head_width :]}


def _joined(memory: State) -> Tensor:
    """[H, U], as the kernel keeps them."""
    return torch.cat((memory["gram"], memory["cross"]), -1)
