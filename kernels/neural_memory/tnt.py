"""TNT: one memory with long chunks over the whole stream, and local ones with short chunks that restart per shard."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.common.checks import require_shape, state_dtype
from kernels.gated_linear_attention import gated_linear_attention
from kernels.neural_memory.schedule import NeuralMemoryState, Row, join


class TNTState(NamedTuple):
    """State of the hierarchy, per sequence: the global memory, every local one, the spans of keys the locals have seen
    [S, H, K, K], and the tokens of the unfinished shard already read.
    """

    memory: NeuralMemoryState
    locals: tuple[NeuralMemoryState, ...]
    seen: tuple[Tensor, ...]
    positions: tuple[tuple[int, ...], ...]


def _shards(spans: Sequence[tuple[int, int]], positions: Sequence[int], shard: int) -> list[list[tuple[int, int]]]:
    """Per sequence, the pieces of its tokens between shard borders (none of an empty sequence)."""
    found = []
    for (begin, end), position in zip(spans, positions, strict=True):
        borders = [begin, *range(begin + shard - position, end, shard), end]
        found.append([(a, b) for a, b in pairwise(borders) if b > a])
    return found


def _require_state(state: TNTState, shards: Sequence[int]) -> None:
    """Raise unless the state holds as many local memories, each within a shard of this length."""
    if len(state.locals) != len(shards):
        raise ValueError(f"tnt_memory: initial_state must hold {len(shards)} local memories, got {len(state.locals)}")
    for shard, positions in zip(shards, state.positions, strict=True):
        if not all(0 <= p < shard for p in positions):
            raise ValueError(
                f"tnt_memory: initial_state must stand within a shard of {shard}, got positions {positions}"
            )


def tnt_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    momentum: Tensor | None = None,
    *,
    chunk: int,
    local_chunks: Sequence[int],
    shards: Sequence[int],
    weights: Sequence[Tensor] | None = None,
    local_weights: Sequence[Sequence[Tensor]] | None = None,
    project: bool = True,
    activation: str = "gelu",
    loss: str = "l2",
    threshold: float | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    initial_state: TNTState | None = None,
    cu_seqlens: Tensor | None = None,
    checkpoint: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, TNTState]:
    """Hierarchical test-time memory: o_t = M(q_t; W_t) + sum over local memories n of M(p_t; W_t^n).

    Local memory n is reset every shards[n] tokens. p_t = (sum over the shard's keys so far of k k^T / |k|^2) q_t: it is
    only asked about what it has seen. Shards do not depend on each other, so they run side by side as packed sequences.

    Args:
        q, k, v, beta, g, momentum, activation, loss, threshold, norm, cu_seqlens, checkpoint, backend: as in
            `neural_memory`, for all memories alike.
        chunk: of the global memory; local_chunks: of every local one.
        shards: tokens after which every local memory forgets all and starts at its learned weights.
        weights: of the global memory at the start, local_weights: of every local one, as in `neural_memory`.
        project: False asks the locals with q itself.
        initial_state: as returned; shards and chunks go on where they stopped.

    Returns:
        o [B, T, H, V] in the dtype of v, and the state.

    Raises:
        ValueError: as `neural_memory`, or the lists of the local memories differ in length.

    Cost: the sum of its memories; T / shard times as many rows run side by side in the local ones.
    Source: TNT. The projection and the sum of answers follow the project's notes on the paper, not its text.
    Differences: every memory answers with its weights at token t, not at its chunk's start.

    Example:
        >>> x = torch.ones(1, 4, 1, 1)
        >>> o, state = tnt_memory(x, x, x, x[..., 0] / 2, chunk=4, local_chunks=[1], shards=[2], project=False)
        >>> o.flatten().tolist(), state.positions
        ([1.0, 1.75, 2.0, 2.75], ((0,),))
    """
    from kernels import neural_memory as op

    op_name = "tnt_memory"
    if not len(local_chunks) == len(shards) == (len(shards) if local_weights is None else len(local_weights)):
        raise ValueError(f"{op_name}: local_chunks, shards and local_weights must be of one length")
    if not all(isinstance(number, int) and number >= 1 for number in (*local_chunks, *shards)):
        raise ValueError(
            f"{op_name}: local_chunks and shards must be whole numbers of at least 1, got {local_chunks} and {shards}"
        )
    if initial_state is not None:
        _require_state(initial_state, shards)
    shared: dict[str, Any] = {
        "activation": activation,
        "loss": loss,
        "threshold": threshold,
        "norm": norm,
        "backend": backend,
    }
    starts = [None] * len(shards) if local_weights is None else list(local_weights)
    out, memory = op.neural_memory(
        q,
        k,
        v,
        beta,
        g,
        momentum,
        chunk=chunk,
        weights=weights,
        initial_state=None if initial_state is None else initial_state.memory,
        cu_seqlens=cu_seqlens,
        checkpoint=checkpoint,
        **shared,
    )
    dtype, spans = state_dtype(v.dtype), op.spans_of(q, cu_seqlens)
    tokens = op.flat_tokens(q, k, v, beta, g, momentum)
    model = op.model_of(activation, loss, threshold, norm, dtype)
    total, after = out.to(dtype).flatten(0, 1), []
    for n, shard in enumerate(shards):
        given: dict[str, Any] = {"weights": starts[n], "chunk": local_chunks[n], "cu_seqlens": cu_seqlens, **shared}
        decision = op._plan(q, k, v, beta, g, momentum, **given)
        fresh = op.fresh_state(starts[n], q, v, momentum is not None, len(spans))
        state, positions = fresh, (0,) * len(spans)
        seen = q.new_zeros(len(spans), *q.shape[2:], q.shape[3], dtype=dtype)
        if initial_state is not None:
            state, seen, positions = initial_state.locals[n], initial_state.seen[n], initial_state.positions[n]
            op._plan(q, k, v, beta, g, momentum, initial_state=state, **given)
            require_shape(op_name, "seen", seen, (len(spans), *q.shape[2:], q.shape[3]), "[sequences, H, K, K]")
        pieces = _shards(spans, positions, shard)
        # a sequence in the middle of a shard goes on with its state, every other piece starts anew
        going = [s for s, p in enumerate(positions) if p > 0]
        both, seen_both = join([fresh, state]), torch.cat([torch.zeros_like(seen), seen.to(dtype)])
        source = [s + len(spans) * (i == 0 and s in going) for s, own in enumerate(pieces) for i in range(len(own))]
        begun = both.take(source)
        rows = [Row(a, b - a, p) for (a, b), p in zip((x for own in pieces for x in own), begun.position, strict=True)]
        index = torch.tensor(source, device=q.device)
        asked = list(tokens)
        seen_after = seen_both[index]
        if project:
            asked[0], seen_after = _projected(tokens[0], tokens[1], rows, seen_after, decision.backend)
        answer, end = op.dispatch(decision.backend, asked, rows, begun, local_chunks[n], model, checkpoint)
        total = total + answer
        # the last piece of every sequence is what goes on; without tokens, what came in
        last, count = [], 0
        for s, own in enumerate(pieces):
            count += len(own)
            last.append(count - 1 if own else len(rows) + len(spans) * (s in going) + s)
        index = torch.tensor(last, device=q.device)
        kept = torch.cat([seen_after, seen_both])[index]
        moved = tuple((p + b - a) % shard for (a, b), p in zip(spans, positions, strict=True))
        after.append((join([end, both]).take(last), kept, moved))
    locals_, seen_all, positions_all = zip(*after, strict=True) if after else ((), (), ())
    return total.view(v.shape).to(v.dtype), TNTState(memory, tuple(locals_), tuple(seen_all), tuple(positions_all))


def _projected(
    q_NHK: Tensor | None, k_NHK: Tensor | None, rows: Sequence[Row], seen: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Queries through the span of the keys seen in their shard, and that span after every shard."""
    assert q_NHK is not None
    assert k_NHK is not None
    unit = torch.nn.functional.normalize(k_NHK, dim=-1)[None]
    offsets = [row.begin for row in rows] + [q_NHK.shape[0]]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=q_NHK.device)
    out, after = gated_linear_attention(
        q_NHK[None], unit, unit, scale=1.0, initial_state=seen, cu_seqlens=cu_seqlens, backend=backend
    )
    return out[0], after
