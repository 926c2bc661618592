"""One rule of a neural memory: its slow starting weights, its gates, and how tokens run through it.

A rule is a memory that trains itself on the stream it reads, on a loss, with a retention and a step. Subclasses choose
by class attributes; the numbers that a user may set are arguments. What `kernels.neural_memory` has (squared error,
plain decay, gradient steps with or without momentum) runs there, all else in `_general`; both are held to the same
token loop, `_general.walked`.

Shape legend: B rows, T tokens, D width, H heads, K width of a head, F features of a key.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones._mixer import in_full_precision
from cl.backbones._state import Packing, State, mapped
from cl.backbones._windows import windows
from cl.backbones.neural_rules._general import Recipe, Tokens, chunked, walked
from cl.backbones.neural_rules._parts import Norm, ask, in_order, monomials
from cl.core import UserError
from kernels.neural_memory import NeuralMemoryState, neural_memory
from kernels.neural_memory.schedule import Row

Gates = dict[str, Tensor]


class NeuralRule(nn.Module):
    """M_t = a memory of `depth` layers, trained while it reads: one chunk of tokens at the weights it started with.

    Args:
        width: D of the tokens that gates are made from.
        num_heads, head_width: H memories side by side, keys and values K.
        chunk: tokens whose gradients are taken at the same weights. Part of the model: another chunk is another model.
        depth: layers of the memory; 1 is a matrix.
        expansion: hidden width of deeper ones, in heads' widths.
        max_step: what the step sizes of a chunk can sum to, the effects of momentum and window included: its tokens
            step together from the same weights, so that alike ones add up. Gradient steps on a matrix cannot diverge
            below 2. Of orthogonal steps, which have a length of their own, the most of one token.
        degree: of the polynomial features of keys and queries, 1 or 2.

    Class attributes:
        recipe: loss, retention and step.
        has_decay, has_momentum: whether tokens set a retention alpha, and a decay of the momentum.
        has_threshold: whether tokens set the threshold of the loss; `threshold` is it otherwise.
        row: its line in docs/memory.md.
        is_normed: M(x) = x + LayerNorm(f(x)), with trained LayerNorm, as in TTT.

    Raises:
        UserError: a value outside its range.
    """

    recipe: ClassVar[Recipe] = Recipe()
    has_decay: ClassVar[bool] = False
    has_momentum: ClassVar[bool] = False
    has_threshold: ClassVar[bool] = False
    threshold: ClassVar[float] = 1.0
    is_normed: ClassVar[bool] = False

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        *,
        chunk: int = 16,
        depth: int = 1,
        expansion: int = 4,
        max_step: float = 1.0,
        degree: int = 1,
    ) -> None:
        super().__init__()
        name = self.name
        for option, value in (("chunk", chunk), ("depth", depth), ("expansion", expansion)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{option} of the rule {name} is {value!r}; it must be an integer of at least 1")
        require_above(name, "max_step", max_step, 0)
        if degree not in (1, 2):
            raise UserError(f"degree of the rule {name} is {degree!r}; it must be 1 or 2")
        self.num_heads, self.head_width, self.chunk, self.max_step = num_heads, head_width, chunk, max_step
        self.degree = degree
        num_features = head_width if degree == 1 else head_width + head_width * (head_width + 1) // 2
        sizes = [num_features, *[expansion * head_width] * (depth - 1), head_width]
        self.start = nn.ParameterList(
            torch.randn(num_heads, size, after) / size**0.5 for size, after in pairwise(sizes)
        )
        self.names = ["eta", *["g"] * self.has_decay, *["momentum"] * self.has_momentum]
        self.names += ["omega"] * (self.recipe.window > 1) + ["threshold"] * self.has_threshold
        self.gate = nn.Linear(width, len(self.names) * num_heads, bias=False)
        # beside the map's own bias, which backbones set to zero: half-lives of 280 tokens, of 5 for the momentum
        begin = {"eta": 0.0, "g": 6.0, "momentum": 2.0, "omega": 0.0, "threshold": 0.5}
        self.gate_bias = nn.Parameter(torch.tensor([begin[n] for n in self.names]).repeat_interleave(num_heads))
        if self.is_normed:
            self.norm_weight = nn.Parameter(torch.ones(num_heads, head_width))
            self.norm_bias = nn.Parameter(torch.zeros(num_heads, head_width))

    @property
    def name(self) -> str:
        """The word that names it: that of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    def norm(self) -> Norm | None:
        return (wide(self.norm_weight), wide(self.norm_bias)) if self.is_normed else None

    @property
    def window(self) -> int:
        """Tokens in the loss of one."""
        return self.recipe.window

    @property
    def uses_kernel(self) -> bool:
        """Whether `kernels.neural_memory` has all of it."""
        return self.recipe == Recipe()

    def init_state(self, num_rows: int) -> State:
        """The learned start, in every row."""
        start = {str(i): wide(w).expand(num_rows, *w.shape) for i, w in enumerate(self.start)}
        zeros = mapped(torch.zeros_like, start) if self.has_momentum else {}
        position = torch.zeros(num_rows, dtype=torch.int64, device=self.gate_bias.device)
        state: State = {"weights": start, "momentum": zeros, "start": start, "position": position}
        if self.window > 1:
            before, like = (num_rows, self.window - 1, self.num_heads), next(iter(start.values()))
            sizes = {"key": self.start[0].shape[1], "value": self.head_width, "omega": 1}
            state["tail"] = {name: like.new_zeros(*before, size) for name, size in sizes.items()}
        return state

    def features(self, x_BTHK: Tensor) -> Tensor:
        """What the memory is asked with: keys and queries of length 1, and their products."""
        unit_BTHK = _unit(wide(x_BTHK))
        return unit_BTHK if self.degree == 1 else _unit(monomials(unit_BTHK, self.degree))

    def gates(self, x_BTD: Tensor) -> Gates:
        """Step sizes, log decays, weights in the window and thresholds, (B, T, H) each."""
        raw = wide(self.gate(x_BTD)) + wide(self.gate_bias)
        found = dict(zip(self.names, raw.unflatten(-1, (-1, self.num_heads)).unbind(-2), strict=True))
        for name in ("g", "momentum"):
            if name in found:
                found[name] = F.logsigmoid(found[name])
        found["eta"] = self.max_step * found["eta"].sigmoid()
        if self.recipe.step == "gradient":
            # each token is in the losses of a window
            found["eta"] = found["eta"] / (self.chunk * self.window)
            if self.has_momentum:
                # momentum repeats a step 1 / (1 - decay) times
                found["eta"] = found["eta"] * -torch.expm1(found["momentum"])
        if "omega" in found:
            found["omega"] = found["omega"].sigmoid()
        if "threshold" in found:
            found["threshold"] = F.softplus(found["threshold"])
        return found

    def ask(self, weights: State, q_BTHF: Tensor) -> Tensor:
        """What a memory with accumulators `weights` answers to features, and nothing is written: (B, T, H, K)."""
        a = self.recipe.weights(in_order(weights))
        return ask(a, q_BTHF.transpose(1, 2), self.norm).transpose(1, 2)

    def run(
        self,
        state: State,
        q_BTHF: Tensor,
        k_BTHF: Tensor,
        v_BTHK: Tensor,
        gates: Gates,
        reset: Tensor | None,
        mode: str,
    ) -> tuple[Tensor, State]:
        """Write every token and read after each: (B, T, H, K), and the state after the last one."""
        with in_full_precision(v_BTHK):
            if mode == "chunk" and self.uses_kernel:
                return self._kernel(state, q_BTHF, k_BTHF, wide(v_BTHK), gates, reset)
            tokens, tail = self._tokens(state, q_BTHF, k_BTHF, wide(v_BTHK), gates, reset)
            rest = {name: value for name, value in state.items() if name != "tail"}
            fresh = {name: value for name, value in self.init_state(v_BTHK.shape[0]).items() if name != "tail"}
            if mode == "recurrent":
                o, after = walked(tokens, rest, fresh, reset, self.chunk, self.recipe, self.norm)
            else:
                o, after = self._chunked(tokens, rest, fresh, reset)
            return o, after | tail

    def _kernel(
        self, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        how: dict[str, Any] = {"chunk": self.chunk, "norm": self.norm}
        given = [q, k, v, gates["eta"], gates.get("g"), gates.get("momentum")]
        if reset is None:
            o, after = neural_memory(*given, initial_state=unpacked(state), **how)
            return o, packed(after, v.device)
        packing = Packing.of(reset)
        begun = unpacked(packing.start(state, self.init_state(v.shape[0])))
        flat = [None if x is None else packing.tokens(x) for x in given]
        o, after = neural_memory(*flat, initial_state=begun, cu_seqlens=packing.cu_seqlens, **how)
        return packing.rows(o), packing.end(packed(after, v.device))

    def _chunked(self, tokens: Tokens, state: State, fresh: State, reset: Tensor | None) -> tuple[Tensor, State]:
        packing = Packing.of(reset if reset is not None else tokens.q.new_zeros(tokens.q.shape[:2], dtype=torch.bool))
        begun = unpacked(packing.start(state, fresh))
        ends = packing.cu_seqlens.tolist()
        rows = [Row(a, b - a, p) for a, b, p in zip(ends[:-1], ends[1:], begun.position, strict=True)]
        o, after = chunked(tokens, begun, rows, self.chunk, self.recipe, self.norm)
        return o.view(*tokens.q.shape[:3], -1), packing.end(packed(after, o.device))

    def _tokens(
        self, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, reset: Tensor | None
    ) -> tuple[Tokens, State]:
        """Keys and values with those of the window before each, and what the next call needs of them."""
        eta = gates["eta"]
        omega = gates.get("omega", torch.ones_like(eta))
        tail: State = {}
        if self.window == 1:
            k, v, omega = k.unsqueeze(3), v.unsqueeze(3), omega.unsqueeze(-1)
        else:
            parts = {"key": k, "value": v, "omega": omega.unsqueeze(-1)}
            seen = {name: windows(x, state["tail"][name], reset, self.window) for name, x in parts.items()}
            k, v, omega = (each.transpose(2, 3) for each, _ in seen.values())
            omega, tail = omega.squeeze(-1), {"tail": {name: left for name, (_, left) in seen.items()}}
        threshold = gates.get("threshold", torch.full_like(eta, self.threshold))
        return Tokens(q, k, v, omega, eta, gates.get("g"), gates.get("momentum"), threshold), tail


def _unit(x: Tensor) -> Tensor:
    """x of length 1: `F.normalize` with one division a vector, whose backward takes half the time."""
    return x * torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12).reciprocal()


def require_above(rule: str, option: str, value: object, bound: float) -> None:
    """Raise `UserError` unless the value of a rule's option is a number above the bound."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not bound < value < float("inf"):
        raise UserError(f"{option} of the rule {rule} is {value!r}; it must be a number above {bound:g}")


def unpacked(state: State) -> NeuralMemoryState:
    """As the kernels take it."""
    weights, momentum, start = (in_order(state[name]) for name in ("weights", "momentum", "start"))
    return NeuralMemoryState(weights, momentum, start, tuple(state["position"].tolist()))


def packed(state: NeuralMemoryState, device: torch.device) -> State:
    """As a backbone keeps it."""
    groups = {
        name: {str(i): x for i, x in enumerate(group)}
        for name, group in (("weights", state.weights), ("momentum", state.momentum), ("start", state.start))
    }
    return groups | {"position": torch.tensor(state.position, dtype=torch.int64, device=device)}
