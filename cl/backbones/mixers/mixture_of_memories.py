"""Mixture of memories: every token is written to, and read from, a few of several matrix memories.

Shape legend: B rows, T tokens, N chosen tokens, D width, E memories, k memories of a token, S documents, H heads, K key
width, V value width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime, Mixer, in_full_precision
from cl.backbones._state import Packing, State, mapped, rows_of, where_rows
from cl.backbones.memory_rules._rule import Rule
from cl.backbones.mixers._convolution import ShortConvolution
from cl.backbones.mixers.linear_memory import LinearMemory
from cl.core import UserError


class MixtureOfMemories(Mixer):
    """o_t = sum over e in top(p_t) of p_te / (sum of those) o_te [+ o_t,shared],  p = softmax(W_router x).

    Memory e is an ordinary linear memory over the tokens that chose it: the others neither write to it nor decay it.
    Queries, output gate and map are shared; each memory has keys, values and gates of its own.

    The auxiliary term `balance` is balance * E * sum_e f_e P_e: f_e is the share of the choices that fell on memory e,
    P_e the mean of p_e over tokens, both over one forward pass: see `moe` for what that means where a batch is cut.

    Args:
        width: D.
        inner: the memory, a linear_memory with any rule.
        num_memories: E. top: k, memories of a token.
        shared: one memory more, that every token uses with weight 1.
        separate: keys, values and gates of its own for each memory; false shares one projection.
        balance: weight of the auxiliary term; 0 leaves it out.

    Raises:
        UserError: a value outside its range, or another mixer to wrap.

    Cost: E (+ 1) times the keys, values and gates of the inner layer, k (+ 1) times its memory; the state holds E (+ 1)
        memories a row.
    Source: Mixture of Memories (MoM, Du et al., 2025), as in flash-linear-attention's layer. Differences: short
        convolutions run over the text, not over a memory's own tokens; projections are computed for all tokens.
    """

    lifetime = Lifetime(fast=("memories", "tail", "position"), resets=("memories", "tail"))
    examples = (
        "mixture_of_memories(linear_memory(rule=gated_delta), num_memories=3)",
        "mixture_of_memories(linear_memory(rule=mamba2), num_memories=2, shared=true)",
        "mixture_of_memories(linear_memory(rule=gla, conv=0), num_memories=3, separate=false)",
    )

    def __init__(
        self,
        width: int,
        inner: Callable[[int], nn.Module],
        *,
        num_memories: int = 4,
        top: int = 2,
        shared: bool = False,
        separate: bool = True,
        balance: float = 0.01,
    ) -> None:
        super().__init__()
        require_width("num_memories", num_memories)
        if not isinstance(top, int) or isinstance(top, bool) or not 1 <= top <= num_memories:
            raise UserError(
                f"top of mixture_of_memories is {top!r}; it must be an integer from 1 to num_memories={num_memories}"
            )
        if not isinstance(balance, int | float) or not balance >= 0:
            raise UserError(f"balance of mixture_of_memories is {balance!r}; it must be a number of at least 0")
        first = inner(width)
        if not isinstance(first, LinearMemory):
            raise UserError(f"mixture_of_memories wraps a linear_memory; it got a {type(first).__name__}")
        self.num_memories, self.top, self.balance = num_memories, top, float(balance)
        self.num_slots, self.separate = num_memories + bool(shared), separate
        self.has_shared = bool(shared)
        self.router = nn.Linear(width, num_memories, bias=False)
        self.first = first
        self.others = nn.ModuleList(Slot(inner(width)) for _ in range(self.num_slots - 1) if separate)

    @property
    def out(self) -> nn.Module:
        """The projection that writes into the residual stream."""
        return self.first.out

    def init_state(self, num_rows: int) -> State:
        inner = self.first.init_state(num_rows)
        tails = {"0": inner["tail"]}
        for number, slot in enumerate(self.others, 1):
            before, channels = slot.convolution.num_before, slot.convolution.channels
            tails[str(number)] = self.fresh(num_rows, before, channels)
        memories = {str(slot): mapped(torch.clone, inner["memory"]) for slot in range(self.num_slots)}
        return {"memories": memories, "tail": tails, "position": inner["position"]}

    def piece(self, x_BTD: Tensor, state: State, reset: Tensor | None, mode: str) -> tuple[Tensor, State]:
        # routing in full precision: a bfloat16 softmax sends near ties elsewhere
        p_BTE = self.router(x_BTD).to(self.fresh(0).dtype).softmax(-1)
        weight_BTE, auxiliary = self._routed(p_BTE)
        tokens, tails = self._tokens(x_BTD, state, reset)
        run = self._step if mode == "recurrent" else self._chunk
        with in_full_precision(x_BTD):
            o_BTHV, memories = run(tokens, weight_BTE, state["memories"], reset)
        left: State = {"memories": memories, "tail": tails, "position": state["position"] + x_BTD.shape[1]}
        return self.first.finish(o_BTHV, x_BTD), left | ({"auxiliary": auxiliary} if auxiliary else {})

    def _routed(self, p_BTE: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weight of each memory for each token, 0 where it was not chosen, and the balance term."""
        score, chosen = p_BTE.topk(self.top, -1)
        weight = torch.zeros_like(p_BTE).scatter(-1, chosen, score / score.sum(-1, keepdim=True))
        auxiliary = {}
        if self.balance and self.training:
            share_E = torch.bincount(chosen.flatten(), minlength=self.num_memories) / chosen.numel()
            imbalance = self.num_memories * (share_E.to(p_BTE.dtype) * p_BTE.flatten(0, 1).mean(0)).sum()
            auxiliary["balance"] = self.balance * imbalance
        if self.has_shared:
            weight = torch.cat((weight, torch.ones_like(weight[..., :1])), -1)
        return weight, auxiliary

    def _tokens(
        self, x_BTD: Tensor, state: State, reset: Tensor | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """What each memory reads, and the tails of the convolutions."""
        position = state["position"]
        first, tail = self.first.tokens(x_BTD, {"tail": state["tail"]["0"], "position": position}, reset)
        if not self.separate:
            return [first] * self.num_slots, {"0": tail}
        every, tails = [first], {"0": tail}
        for number, slot in enumerate(self.others, 1):
            own, tails[str(number)] = slot(x_BTD, state["tail"][str(number)], reset, int(position))
            every.append({"q": first["q"], **own})
        return every, tails

    def _rule(self, slot: int) -> Rule:
        return self.others[slot - 1].rule if slot and self.separate else self.first.rule

    def _step(
        self, tokens: list[dict[str, Tensor]], weight_B1E: Tensor, memories: State, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        total, after = torch.zeros(()), {}
        for slot in range(self.num_slots):
            at = {name: each[:, 0].to(weight_B1E.dtype) for name, each in tokens[slot].items()}
            own, weight_B = memories[str(slot)], weight_B1E[:, 0, slot]
            if reset is not None:
                own = where_rows(reset[:, 0], self.first._fresh_memory(reset.shape[0]), own)
            o_BHV, new = self._rule(slot).step(own, at.pop("q"), at.pop("k"), at.pop("v"), at)
            after[str(slot)] = where_rows(weight_B > 0, new, own)
            total = total + weight_B[:, None, None] * o_BHV
        return total.unsqueeze(1), after

    def _chunk(
        self, tokens: list[dict[str, Tensor]], weight_BTE: Tensor, memories: State, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        shape = weight_BTE.shape[:2]
        packing = Packing.of(torch.zeros(shape, dtype=torch.bool, device=weight_BTE.device) if reset is None else reset)
        fresh, weight_NE = self.first._fresh_memory(shape[0]), weight_BTE.flatten(0, 1)
        begun = [packing.start(memories[str(slot)], fresh) for slot in range(self.num_slots)]
        total = weight_NE.new_zeros(weight_NE.shape[0], *tokens[0]["v"].shape[2:])
        after: State = {}
        for slots in self._together():
            state = mapped(lambda *each: torch.stack(each), *(begun[slot] for slot in slots))
            weight_EN, own = weight_NE[:, slots].T, [tokens[slot] for slot in slots]
            total, state = self._run(self._rule(slots[0]), own, weight_EN, state, packing, total)
            for place, slot in enumerate(slots):
                after[str(slot)] = packing.end(mapped(lambda each: each[place], state))  # noqa: B023
        return total.view(*shape, *total.shape[1:]), after

    def _run(
        self, rule: Rule, tokens: list[dict[str, Tensor]], weight_EN: Tensor, state: State, packing: Packing, to: Tensor
    ) -> tuple[Tensor, State]:
        """`to` (N, H, V) with what some memories answer their tokens, and those memories (E, S, ...) after them.

        By memory, then by time: to the rule the documents of all these memories are sequences of one row.
        """
        length_S = packing.cu_seqlens.diff().long()
        document_N = torch.arange(len(length_S), device=length_S.device).repeat_interleave(length_S)
        memory_M, chosen_M = weight_EN.nonzero(as_tuple=True)
        size = (len(tokens), len(length_S))
        counts = torch.bincount(memory_M * size[1] + document_N[chosen_M], minlength=size[0] * size[1])
        # documents without a token here are none to the rule
        (filled,) = counts.nonzero(as_tuple=True)
        if not len(filled):
            return to, state
        chosen = chosen_M.split(counts.view(size).sum(1).tolist())
        flat = {name: _gathered([own[name] for own in tokens], chosen) for name in tokens[0]}
        q, k, v = (flat.pop(name) for name in ("q", "k", "v"))
        cu_seqlens = F.pad(counts[filled].cumsum(0), (1, 0)).to(torch.int32)
        state = mapped(lambda each: each.flatten(0, 1), state)
        o_1MHV, left = rule.chunk(rows_of(state, filled), q, k, v, flat, cu_seqlens=cu_seqlens, chunk=self.first.chunk)
        state = mapped(lambda old, new: old.index_copy(0, filled, new).unflatten(0, size), state, left)
        weight_M11 = weight_EN[memory_M, chosen_M, None, None]
        return to.index_add(0, chosen_M, weight_M11 * o_1MHV.squeeze(0).to(to.dtype)), state

    def _together(self) -> list[list[int]]:
        """Memories that one call of a rule can run: all, unless their rules have weights of their own besides gates."""
        slots = list(range(self.num_slots))
        is_one = not self.separate or next(self.first.rule.parameters(recurse=False), None) is None
        return [slots] if is_one else [[slot] for slot in slots]


def _gathered(sources: list[Tensor], chosen: tuple[Tensor, ...]) -> Tensor:
    """Rows of several (B, T, X), each of its own, in one row (1, M, X)."""
    if all(source is sources[0] for source in sources):
        return sources[0].flatten(0, 1).index_select(0, torch.cat(chosen)).unsqueeze(0)
    rows = [source.flatten(0, 1).index_select(0, own) for source, own in zip(sources, chosen, strict=True)]
    return torch.cat(rows).unsqueeze(0)


class Slot(nn.Module):
    """Keys, values and gates of one memory beside the first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        assert isinstance(inner, LinearMemory)
        self.num_heads, self.key, self.value, self.rule = inner.num_heads, inner.key, inner.value, inner.rule
        size = inner.convolution.size
        self.convolution = ShortConvolution(self.key.out_features + self.value.out_features, size)

    def forward(
        self, x_BTD: Tensor, tail_BPC: Tensor, reset: Tensor | None, position: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        kv, tail = self.convolution.parts((self.key(x_BTD), self.value(x_BTD)), tail_BPC, reset)
        k, v = (each.unflatten(-1, (self.num_heads, -1)) for each in kv)
        return {"k": self.rule.prepare(k, k, position)[1], "v": v, **self.rule.gates(x_BTD)}, tail
