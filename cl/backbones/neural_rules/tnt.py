"""TNT: a memory with long chunks over the whole stream, and local ones with short chunks, new in every shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones._mixer import in_full_precision
from cl.backbones._state import Packing, State, where_rows
from cl.backbones.memory_rules._rule import Row
from cl.backbones.neural_rules._rule import Gates, NeuralRule, packed, unpacked
from cl.core import UserError
from kernels.neural_memory import TNTState, tnt_memory


class Tnt(NeuralRule):
    """o_t = M(q_t; W_t) + sum over local memories n of M(p_t; W_t^n), each a memory of Titans.

    Local memory n starts again at its learned weights every shards[n] tokens. Shards do not wait for each other, which
    is what makes short chunks affordable. p_t is q_t, or with `project` the sum over the shard's keys of k k^T q_t.

    Args:
        chunk: of the global memory.
        local_chunks: of the local ones.
        shards: tokens after which each local one starts again.
        project: ask the local memories with the part of q_t that their keys span. The sum grows with the tokens of the
            shard, and with it what deep memories answer; false asks with q_t.

    Raises:
        UserError: the two lists are empty or differ in length, or a value below 1.

    Source: TNT (Improving Chunkwise Training for Test-Time Memorization), from notes on the paper: in the spirit of it.
        Differences: as in `kernels.neural_memory.tnt`; there is one stage of training, chunks do not change in it.
    """

    row = Row(
        "layers W, and local ones new in every shard",
        "1/2 |M(k) - v|^2",
        "alpha W",
        "as titans, local ones in short chunks",
        "M(q; W) + sum of M(p; W local)",
        "P, W of the chunk starts, sum of k (x) k of the shard",
        "TNT, 2025",
    )
    has_decay = has_momentum = True

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        *,
        chunk: int = 64,
        local_chunks: Sequence[int] = (8,),
        shards: Sequence[int] = (64,),
        project: bool = False,
        depth: int = 2,
        expansion: int = 4,
        max_step: float = 1.0,
    ) -> None:
        super().__init__(width, num_heads, head_width, chunk=chunk, depth=depth, expansion=expansion, max_step=max_step)
        if not _are_counts(local_chunks) or not _are_counts(shards) or len(local_chunks) != len(shards):
            raise UserError(
                f"the rule tnt has local_chunks={local_chunks!r} and shards={shards!r}; they must be two lists of one "
                "length with integers of at least 1"
            )
        self.local_chunks, self.shards, self.project = list(local_chunks), list(shards), project
        self.local_starts = nn.ModuleList(
            nn.ParameterList(torch.randn_like(w) / w.shape[-2] ** 0.5 for w in self.start) for _ in shards
        )

    def init_state(self, num_rows: int) -> State:
        memory = super().init_state(num_rows)
        zeros = self.start[0].new_zeros(num_rows, self.num_heads, self.head_width, self.head_width)
        states: State = {"memory": memory, "locals": {}, "seen": {}, "positions": {}}
        for n, weights in enumerate(self.local_starts):
            start = {str(i): wide(w).expand(num_rows, *w.shape) for i, w in enumerate(weights)}
            states["locals"][str(n)] = memory | {"weights": start, "start": start}
            states["seen"][str(n)], states["positions"][str(n)] = wide(zeros), memory["position"]
        return states

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
        given = [q_BTHF, k_BTHF, wide(v_BTHK), gates["eta"], gates["g"], gates["momentum"]]
        with in_full_precision(v_BTHK):
            if mode == "recurrent":
                return self._walk(state, given, reset)
            if reset is None:
                o, after = self._call(given, state)
                return o, after
            packing = Packing.of(reset)
            begun = packing.start(state, self.init_state(v_BTHK.shape[0]))
            o, after = self._call([packing.tokens(x) for x in given], begun, cu_seqlens=packing.cu_seqlens)
            return packing.rows(o), packing.end(after)

    def _walk(self, state: State, given: list[Tensor], reset: Tensor | None) -> tuple[Tensor, State]:
        """Token by token, every memory by its token loop."""
        fresh, outs = self.init_state(given[0].shape[0]), []
        for t in range(given[0].shape[1]):
            state = state if reset is None else where_rows(reset[:, t], fresh, state)
            o, state = self._call([x[:, t : t + 1] for x in given], state, backend="reference")
            outs.append(o)
        return torch.cat(outs, 1), state

    def _call(self, given: list[Tensor], state: State, **how: Any) -> tuple[Tensor, State]:
        names = [str(n) for n in range(len(self.shards))]
        begun = TNTState(
            unpacked(state["memory"]),
            tuple(unpacked(state["locals"][n]) for n in names),
            tuple(state["seen"][n] for n in names),
            tuple(tuple(state["positions"][n].tolist()) for n in names),
        )
        # a local memory that starts again starts at its learned weights, which the call must know beside the states
        o, after = tnt_memory(
            *given,
            chunk=self.chunk,
            local_chunks=self.local_chunks,
            shards=self.shards,
            local_weights=[[wide(w) for w in weights] for weights in self.local_starts],
            project=self.project,
            initial_state=begun,
            **how,
        )
        device = o.device
        return o, {
            "memory": packed(after.memory, device),
            "locals": {n: packed(x, device) for n, x in zip(names, after.locals, strict=True)},
            "seen": dict(zip(names, after.seen, strict=True)),
            "positions": {n: torch.tensor(x, device=device) for n, x in zip(names, after.positions, strict=True)},
        }


def _are_counts(values: object) -> bool:
    """Whether it is a list of integers of at least 1."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        return False
    return all(isinstance(each, int) and not isinstance(each, bool) and each >= 1 for each in values)
