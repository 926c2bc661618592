"""The memory ops as cases for the shared properties: how to draw them, and their states flattened to one tensor.

A flattened state is [sequences, numbers]; positions in chunks and segments travel as its last numbers, so that a state
handed over in the middle of a chunk is a state like any other.
"""

from functools import partial
from typing import Any

import torch
from kernel_properties import DISTRIBUTIONS, EDGES, Inputs, OpCase, _keys
from torch import Tensor

from kernels.memory_cache import MemoryCacheState, memory_cache, routed_memory
from kernels.neural_memory import NeuralMemoryState, neural_memory
from kernels.ridge_memory import ridge_memory

HEADS, K, V, HIDDEN, ROUTE, SEGMENT, CHUNK = 2, 5, 7, 6, 3, 6, 4
LINEAR, LAYERS = [(K, V)], [(K, HIDDEN), (HIDDEN, V)]
# beta is a step, not up to 2 as in the delta rule
_case = partial(OpCase, length=39, edges=EDGES[:-1])


def tokens(gen: torch.Generator, batch: int, length: int, kind: str, *, value: int = V) -> Inputs:
    """q, k, v, beta, g as everywhere."""
    cosine, slow = DISTRIBUTIONS[kind]
    rand = {"generator": gen, "dtype": torch.float64}
    return {
        "q": torch.nn.functional.normalize(torch.randn(batch, length, HEADS, K, **rand), dim=-1),
        "k": _keys(gen, (batch, length, HEADS, K), cosine),
        "v": torch.randn(batch, length, HEADS, value, **rand),
        "beta": torch.rand(batch, length, HEADS, **rand),
        "g": torch.nn.functional.logsigmoid(torch.randn(batch, length, HEADS, **rand) + slow),
    }


# ridge_memory: converged solves, so that the exact reference is the truth


def _ridge(names: str, with_mix: bool) -> Any:
    def draw(gen: torch.Generator, batch: int, length: int, sequences: int, kind: str) -> tuple[Inputs, Tensor]:
        inputs = tokens(gen, batch, length, kind)
        inputs = {name: inputs[name] for name in names.split()}
        if with_mix:
            inputs["mix"] = torch.rand(batch, length, HEADS, generator=gen, dtype=torch.float64)
        root = torch.randn(sequences, HEADS, K, K, generator=gen, dtype=torch.float64)
        values = torch.randn(sequences, HEADS, K, V, generator=gen, dtype=torch.float64)
        return inputs, torch.cat([root @ root.mT, values], dim=-1)

    return draw


RIDGE = partial(ridge_memory, ratio=0.1, steps=60)

# neural_memory


def flat_neural(state: NeuralMemoryState) -> Tensor:
    parts = [x.flatten(1) for group in state[:3] for x in group]
    return torch.cat([*parts, parts[0].new_tensor(state.position)[:, None]], dim=1)


def neural_state(flat: Tensor, shapes: list[tuple[int, int]], with_momentum: bool) -> NeuralMemoryState:
    groups, at = [], 0
    for number in (1, int(with_momentum), 1):
        group = []
        for shape in shapes * number:
            size = HEADS * shape[0] * shape[1]
            group.append(flat[:, at : at + size].reshape(-1, HEADS, *shape))
            at += size
        groups.append(tuple(group))
    return NeuralMemoryState(*groups, tuple(int(p) for p in flat[:, -1].tolist()))


def constants(shapes: list[tuple[int, int]], like: Tensor) -> list[Tensor]:
    """Fixed weights (and norm) for calls without a state."""
    gen = torch.Generator().manual_seed(3)
    return [(torch.randn(HEADS, *s, generator=gen, dtype=torch.float64) / s[0] ** 0.5).to(like) for s in shapes]


def _neural(name: str, names: str, shapes: list[tuple[int, int]], step: float = 0.3, **how: Any) -> OpCase:
    """`step` keeps a memory stable: what explodes says nothing about an implementation."""
    value, with_momentum, with_norm = shapes[-1][1], "momentum" in names, how.pop("with_norm", False)

    def op(*, initial_state: Tensor | None = None, chunk: int | None = None, **given: Any) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if given["v"].dtype == torch.float64 else torch.float32
        if with_norm:
            gamma = torch.linspace(0.5, 1.5, HEADS * value, dtype=wide).view(HEADS, value).to(given["v"].device)
            given["norm"] = (gamma, gamma - 1)
        state = None if initial_state is None else neural_state(initial_state, shapes, with_momentum)
        weights = constants(shapes, torch.empty(0, dtype=wide, device=given["v"].device))
        # the chunk is the model's: what the suites wish is not asked for
        out, final = neural_memory(**given, chunk=CHUNK, weights=weights, initial_state=state, **how)
        return out, flat_neural(final)

    def draw(gen: torch.Generator, batch: int, length: int, sequences: int, kind: str) -> tuple[Inputs, Tensor]:
        inputs = tokens(gen, batch, length, kind, value=value)
        inputs["beta"] = step * inputs["beta"]
        momentum = torch.nn.functional.logsigmoid(torch.randn(batch, length, HEADS, generator=gen, dtype=torch.float64))
        inputs["momentum"] = momentum
        size = sum(a * b for a, b in shapes) * HEADS * (2 + with_momentum)
        state = torch.randn(sequences, size, generator=gen, dtype=torch.float64) / 2
        # in the middle of a chunk, elsewhere in every sequence of a packed call
        position = torch.tensor([(2 if batch > 1 else s) % CHUNK for s in range(sequences)], dtype=torch.float64)
        state = torch.cat([state, position[:, None]], dim=1)
        return {name: inputs[name] for name in names.split()}, state

    # a nonlinear memory explodes on errors of 1e4, in any precision
    edges = EDGES[:-1] if shapes == LINEAR and not with_momentum and "loss" not in how else EDGES[:-2]
    return _case(name, op, draw, free_chunk=False, is_traced=True, edges=edges)


# memory_cache


def flat_cache(state: Any) -> Tensor:
    """One state or a tuple of them; the shorter ones are padded with zeros."""
    if not isinstance(state, MemoryCacheState):
        rows = [flat_cache(s)[0] for s in state]
        width = max(row.shape[0] for row in rows)
        return torch.stack([torch.cat([r[:-2], r.new_zeros(width - r.shape[0]), r[-2:]]) for r in rows])
    parts = [x.flatten(1) for x in state[:4]]
    header = parts[0].new_tensor([state.cached.shape[1], state.position]).expand(parts[0].shape[0], 2)
    return torch.cat([*parts, header], dim=1)


def cache_state(flat: Tensor, route: int) -> MemoryCacheState:
    number, position = (int(x) for x in flat[0, -2:].tolist())
    memory = HEADS * K * V
    sizes = [memory, number * memory, number * HEADS * route, HEADS * route]
    current, cached, pooled, running = flat[:, : sum(sizes)].split(sizes, dim=1)
    shape = (flat.shape[0], number, HEADS)
    return MemoryCacheState(
        current.reshape(flat.shape[0], HEADS, K, V),
        cached.reshape(*shape, K, V),
        pooled.reshape(*shape, route),
        running.reshape(flat.shape[0], HEADS, route),
        position,
    )


def _cache(name: str, names: str, **how: Any) -> OpCase:
    route = 0 if how["variant"] == "residual" else ROUTE

    def op(*, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, **given: Any) -> Any:
        state: Any = None
        if initial_state is not None:
            state = cache_state(initial_state, route)
            if cu_seqlens is not None:
                state = [cache_state(row[None], route) for row in initial_state]
        out, final = memory_cache(**given, segment=SEGMENT, initial_state=state, cu_seqlens=cu_seqlens, **how)
        return out, flat_cache(final)

    def draw(gen: torch.Generator, batch: int, length: int, sequences: int, kind: str) -> tuple[Inputs, Tensor]:
        inputs = tokens(gen, batch, length, kind)
        for r in ("route_q", "route_k"):
            inputs[r] = torch.randn(batch, length, HEADS, ROUTE, generator=gen, dtype=torch.float64)
        size = HEADS * (2 * K * V + 2 * route)
        state = torch.randn(sequences, size, generator=gen, dtype=torch.float64)
        # one memory cached, two tokens into the segment
        header = torch.tensor([1.0, 2.0], dtype=torch.float64).expand(sequences, 2)
        return {n: inputs[n] for n in names.split()}, torch.cat([state, header], dim=1)

    return _case(name, op, draw, state_grows=True)


def _routed(name: str, names: str, memories: int, *, per_memory: bool = False, shared: bool = False) -> OpCase:
    def draw(gen: torch.Generator, batch: int, length: int, sequences: int, kind: str) -> tuple[Inputs, Tensor]:
        inputs = tokens(gen, batch, length, kind)
        all_memories = memories + shared
        if per_memory:
            more = [tokens(gen, batch, length, kind) for _ in range(all_memories)]
            for n in ("k", "v", "beta", "g"):
                inputs[n] = torch.stack([x[n] for x in more], dim=2)
        inputs["router"] = torch.randn(batch, length, memories, generator=gen, dtype=torch.float64)
        state = torch.randn(sequences, all_memories, HEADS, K, V, generator=gen, dtype=torch.float64)
        return {n: inputs[n] for n in names.split()}, state

    # wiped, both chosen memories hold the same token: the router's gradient is 1e-13 of its terms
    edges = tuple(edge for edge in EDGES[:-1] if per_memory or edge != "wiped")
    return _case(name, partial(routed_memory, top_k=2, shared=shared), draw, edges=edges)


MEMORY_CASES = {
    case.name: case
    for case in (
        _case("ridge", RIDGE, _ridge("q k v beta g", False)),
        _case("ridge_mixed", RIDGE, _ridge("q k v", True)),
        _neural("ttt_linear", "q k v beta", LINEAR),
        _neural("linear_decay", "q k v beta g", LINEAR),
        _neural("titans_linear", "q k v beta g momentum", LINEAR, checkpoint=True),
        _neural("titans_mlp", "q k v beta g momentum", LAYERS, step=0.05),
        _neural("huber_silu", "q k v beta g", LAYERS, loss="huber", threshold=0.5, activation="silu"),
        _neural("lp", "q k v beta momentum", LINEAR, step=0.01, loss="lp"),
        _neural("ttt_norm", "q k v beta", [(K, HIDDEN), (HIDDEN, K)], step=0.01, with_norm=True),
        _cache("cache_residual", "q k v beta g", variant="residual", write="carry"),
        _cache("cache_gated", "q k v g route_q route_k", variant="gated", write="carry"),
        _cache("cache_soup", "q k v g route_q route_k", variant="soup", write="restart"),
        _cache("cache_sparse", "q k v beta route_q route_k", variant="sparse", write="restart", top_k=1),
        _routed("routed", "q k v router g", 3),
        _routed("routed_delta", "q k v router beta g", 2, per_memory=True, shared=True),
    )
}
