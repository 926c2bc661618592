"""Chunks over time: which tokens share the weights their gradients are taken at, for dense, packed and resumed calls.

A chunk is part of the model, so it goes on where the last call stopped: a sequence that enters with `position` tokens
of its chunk already read gets that many idle tokens in front (no decay, no step, no momentum), and idle tokens behind
to the end of its last chunk.

Legend: S sequences, T tokens, H heads, L padded length, C chunk, X trailing sizes; N = B*T flat tokens.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class NeuralMemoryState(NamedTuple):
    """Memory of S sequences. Every matrix is [S, H, in, out].

    weights: now. momentum: of each (empty without momentum). start: weights at the start of the unfinished chunk, where
    its gradients are taken. position: tokens of that chunk already read, per sequence.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    start: tuple[Tensor, ...]
    position: tuple[int, ...]

    def take(self, rows: Sequence[int]) -> "NeuralMemoryState":
        """The memories of some of the sequences, in the order given."""
        if list(rows) == list(range(len(self.position))):
            return self
        index = torch.tensor(rows, device=self.weights[0].device)
        groups = [tuple(x[index] for x in group) for group in self[:3]]
        return NeuralMemoryState(groups[0], groups[1], groups[2], tuple(self.position[s] for s in rows))


class Row(NamedTuple):
    """One sequence: its first flat token, its number of tokens, the tokens of its chunk read before."""

    begin: int
    length: int
    position: int


class Piece(NamedTuple):
    """Consecutive tokens of one chunk [S, H, c, X]; `valid` [S, 1, c, 1] is None where no token is idle."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    momentum: Tensor | None
    valid: Tensor | None


# (piece, weights now, momentum, weights at the chunk's start) -> output [S, H, c, V], weights, momentum
Advance = Callable[
    [Piece, tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]],
    tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]],
]


def join(states: Sequence[NeuralMemoryState]) -> NeuralMemoryState:
    """All sequences of several states in one."""
    if len(states) == 1:
        return states[0]
    groups = [tuple(torch.cat(xs) for xs in zip(*(s[i] for s in states), strict=True)) for i in range(3)]
    return NeuralMemoryState(groups[0], groups[1], groups[2], tuple(p for s in states for p in s.position))


def where(rows: list[bool], yes: tuple[Tensor, ...], no: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of some rows of every tensor these, of the others those."""
    if all(rows):
        return yes
    if not any(rows):
        return no
    mask = torch.tensor(rows, device=yes[0].device).view(-1, *[1] * (yes[0].dim() - 1))
    return tuple(torch.where(mask, a, b) for a, b in zip(yes, no, strict=True))


class Aligned:
    """Sequences of one bucket as [S, H, L, X] on the grid of chunks."""

    def __init__(self, rows: Sequence[Row], chunk: int, device: torch.device):
        self.rows, ends = rows, [r.position + r.length for r in rows]
        self.length = -(-max(ends) // chunk) * chunk
        same, stride = rows[0], rows[1].begin - rows[0].begin if len(rows) > 1 else 0
        self.dense = stride == same.length * (len(rows) > 1) and all(
            r == Row(same.begin + i * stride, same.length, same.position) for i, r in enumerate(rows)
        )
        token = torch.arange(self.length, device=device)
        first, last = (torch.tensor(x, device=device)[:, None] for x in ([r.position for r in rows], ends))
        self.valid = (token >= first) & (token < last)
        self.is_full = all(r.position == 0 and r.length == self.length for r in rows)
        begins = torch.tensor([r.begin - r.position for r in rows], device=device)[:, None]
        self.index = None if self.dense else ((begins + token) * self.valid)

    def entered(self, chunk: int) -> list[list[bool]]:
        """Per chunk, which sequences begin it here: not where the last call did, nor behind their end."""
        ends = [r.position + r.length for r in self.rows]
        return [
            [(begin > 0 or r.position == 0) and begin < end for r, end in zip(self.rows, ends, strict=True)]
            for begin in range(0, self.length, chunk)
        ]

    def gather(self, x_NX: Tensor | None) -> Tensor | None:
        """[N, H, X] to [S, H, L, X], zeros where idle."""
        if x_NX is None:
            return None
        if self.index is None:
            row = self.rows[0]
            x = x_NX[row.begin : row.begin + row.length * len(self.rows)].unflatten(0, (len(self.rows), row.length))
            pad = (0, 0, 0, 0, row.position, self.length - row.position - row.length)
            return torch.nn.functional.pad(x, pad).transpose(1, 2)
        return torch.where(self.valid[..., None, None], x_NX[self.index], 0).transpose(1, 2)

    def tokens(self, out_SHLX: Tensor) -> Tensor:
        """The tokens that are not idle, sequence after sequence: [n, H, X]."""
        spans = [(i, r.position, r.position + r.length) for i, r in enumerate(self.rows)]
        out = out_SHLX.transpose(1, 2)
        if self.index is None:
            return out[:, spans[0][1] : spans[0][2]].flatten(0, 1)
        return torch.cat([out[i, a:b] for i, a, b in spans])


# (tokens [S, H, L, X], their grid, state, chunk) -> output [S, H, L, V], state; its position is not read
Walk = Callable[[Sequence[Tensor | None], Aligned, NeuralMemoryState, int], tuple[Tensor, NeuralMemoryState]]


def _buckets(rows: Sequence[Row], chunk: int) -> list[list[int]]:
    """Sequences of like numbers of chunks; empty ones are in none."""
    found: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if row.length:
            found.setdefault((-(-(row.position + row.length) // chunk) - 1).bit_length(), []).append(i)
    return list(found.values())


def _inverse(order: list[int]) -> list[int]:
    inverse = [0] * len(order)
    for place, original in enumerate(order):
        inverse[original] = place
    return inverse


def run(
    advance: Advance,
    tokens: Sequence[Tensor | None],
    rows: Sequence[Row],
    state: NeuralMemoryState,
    chunk: int,
    most: int | None,
    save_memory: bool,
    walk: Walk | None = None,
) -> tuple[Tensor, NeuralMemoryState]:
    """Run all sequences over flat tokens q, k, v, beta, g, momentum [N, H, X] (the last two may be None).

    Returns outputs [N, H, V] and the state after every sequence. `most` bounds the tokens of a piece; `save_memory`
    keeps the states between pieces only and computes the rest again in the backward. Without that, `walk` takes the
    place of `advance` where there is one.
    """
    device = tokens[0].device if tokens[0] is not None else torch.device("cpu")
    outs: list[Tensor] = []
    states: list[NeuralMemoryState] = []
    order: list[int] = []
    for bucket in _buckets(rows, chunk):
        grid = Aligned([rows[s] for s in bucket], chunk, device)
        part, aligned = state.take(bucket), [grid.gather(x) for x in tokens]
        if walk is None or save_memory:
            out, after = _run_bucket(advance, aligned, grid, part, chunk, most, save_memory)
        else:
            out, after = walk(aligned, grid, part, chunk)
        outs.append(grid.tokens(out))
        position = tuple((r.position + r.length) % chunk for r in grid.rows)
        start = where([p == 0 for p in position], after.weights, after.start)
        states.append(NeuralMemoryState(after.weights, after.momentum, start, position))
        order += bucket
    idle = [s for s, row in enumerate(rows) if not row.length]
    if idle:
        states.append(state.take(idle))
        order += idle
    final = join(states).take(_inverse(order))
    if order == sorted(order):
        return torch.cat(outs), final
    places = [t for s in order for t in range(rows[s].begin, rows[s].begin + rows[s].length)]
    return torch.cat(outs)[torch.tensor(_inverse(places), device=device)], final


def _run_bucket(
    advance: Advance,
    tokens: Sequence[Tensor | None],
    grid: Aligned,
    state: NeuralMemoryState,
    chunk: int,
    most: int | None,
    save_memory: bool,
) -> tuple[Tensor, NeuralMemoryState]:
    now, momentum, start = state[:3]
    size = min(most or chunk, chunk)
    outs = []
    for begin, entered in zip(range(0, grid.length, chunk), grid.entered(chunk), strict=True):
        start = where(entered, now, start)
        for t in range(begin, begin + chunk, size):
            cut = slice(t, min(t + size, begin + chunk))
            values = [None if x is None else x[:, :, cut] for x in tokens]
            valid = None if grid.is_full else grid.valid[:, None, cut, None]
            out, now, momentum = _call(advance, values, valid, now, momentum, start, save_memory)
            outs.append(out)
    return torch.cat(outs, dim=2), NeuralMemoryState(now, momentum, start, ())


def _call(
    advance: Advance,
    values: Sequence[Any],
    valid: Tensor | None,
    now: tuple[Tensor, ...],
    momentum: tuple[Tensor, ...],
    start: tuple[Tensor, ...],
    save_memory: bool,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    q, k, v, beta, g, speed = values
    piece = Piece(q, k, v, beta, g, speed, valid)
    if not (save_memory and torch.is_grad_enabled()):
        return advance(piece, now, momentum, start)
    result: tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]] = checkpoint(
        advance, piece, now, momentum, start, use_reentrant=False
    )
    return result
