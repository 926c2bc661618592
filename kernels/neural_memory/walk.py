"""Many chunks of a neural memory at once, on any device, under autograd: only what must wait for the weights waits.

The gradients of a chunk need the weights of its start, so keys walk from chunk to chunk: through the weights, to the
slopes, into the weights. All else, the coefficients before and the answers to the queries behind, is the same product
for every piece of a section: a few large ones in the place of many small.

Weights and momentum of a layer travel as one matrix [Z, 2, in * out] (without momentum [Z, 1, in * out]), which a piece
moves by a matrix [2, 2] and adds to.

Legend: N chunks of a section, Z sequences times heads, p pieces of a chunk, c tokens of a piece, X trailing sizes.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.neural_memory.chunked import PIECE, coefficients
from kernels.neural_memory.model import Answer, Model, answer, slopes
from kernels.neural_memory.schedule import Aligned, NeuralMemoryState, Piece, where

# tokens of a section: what it makes fits into a cache
SECTION = 1024


class Gates(NamedTuple):
    """What the gates of a section come to. `None` is one: nothing is lost, and tokens have no momentum.

    step [N * Z, p, c, c]: of token i in the weights at token t. read [N * Z, p, c, 2]: of weights and momentum before
    the piece in the weights at token t. write [N * Z, p, c, 2]: of token i in both after the piece. move
    [N, Z, p, 2, 2]: of both before the piece in both after it.
    """

    step: Tensor
    read: Tensor | None
    write: Tensor | None
    move: Tensor | None


def _gates(piece: Piece, chunks: int) -> Gates:
    if piece.g is None and piece.momentum is None:
        size = piece.q.shape[2]
        return Gates(piece.q.new_ones(size, size).tril(), None, None, None)
    c = coefficients(piece)
    last = c.step[:, :, -1:].mT
    if c.carry is None or c.slowed is None or c.push is None:
        return Gates(c.step, c.into, last, c.into[:, :, -1:].unflatten(0, (chunks, -1)))
    read = torch.cat([c.into, c.carry], -1)
    still = torch.cat([torch.zeros_like(c.slowed), c.slowed], -1)
    move = torch.cat([read[:, :, -1:], still], -2)
    return Gates(c.step, read, torch.cat([last, c.push], -1), move.unflatten(0, (chunks, -1)))


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    """x [M, c, K] times every weight [M, c, 2], side by side [M, c, 2 K]."""
    return x if weight is None else (x.unsqueeze(-2) * weight.unsqueeze(-1)).flatten(-2)


def _moved(now: Tensor, pushes: Tensor, move: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and momentum [Z, 2, in * out] before every piece of a chunk [Z, p, 2, in * out], and after the last."""
    before = []
    moves = [None] * pushes.shape[1] if move is None else move.unbind(1)
    for push, factors in zip(pushes.unbind(1), moves, strict=True):
        before.append(now)
        now = now - push if factors is None else torch.baddbmm(push, factors, now, beta=-1)
    return torch.stack(before, 1), now


class _Walked(NamedTuple):
    """Of every layer, for all pieces of a section: inputs and slopes [M, c, X], weights and momentum before [M, 2, X]."""

    inputs: list[Tensor]
    deltas: list[Tensor]
    before: list[Tensor]


def _section(
    tokens: Sequence[Tensor | None],
    valid: Tensor | None,
    now: list[Tensor],
    start: tuple[Tensor, ...],
    entered: Sequence[list[bool]],
    model: Model,
) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]]:
    """Answers [N, Z, p * c, V], weights with momentum after the last chunk, and where its gradients were taken."""
    q, k, v, beta, g, momentum = tokens
    assert q is not None
    assert k is not None
    assert v is not None
    assert beta is not None
    chunks, heads, pieces, size = q.shape[:4]
    wide = [None if x is None else x.flatten(0, 1) for x in (q, k, v, beta, g, momentum, valid)]
    gates = _gates(Piece(*wide), chunks)  # type: ignore[arg-type]
    write = None if gates.write is None else gates.write.view(chunks, heads * pieces, size, -1)
    move = None if gates.move is None else gates.move
    keys = _weighted(k.flatten(0, 2), None if write is None else write.flatten(0, 1))
    written = keys.unflatten(0, (chunks, -1)).unbind(0)
    whole = [x.flatten(2, 3).unbind(0) for x in (k, v, beta)]
    found: list[tuple[Answer, list[Tensor], list[Tensor]]] = []
    for n in range(chunks):
        shapes = [w.shape for w in start]
        first = tuple(m[:, 0].view(shape) for m, shape in zip(now, shapes, strict=True))
        start = where(entered[n], first, start)
        key, value, step = (x[n] for x in whole)
        answered = answer(key, len(start), lambda i, h, start=start: torch.bmm(h, start[i]), model)
        deltas = slopes(answered, value, start, model, step)
        befores = []
        for i, (x, delta) in enumerate(zip(answered.inputs, deltas, strict=True)):
            mine = written[n] if i == 0 else _weighted(x.view(-1, size, x.shape[-1]), None if write is None else write[n])
            push = torch.bmm(mine.mT, delta.view(-1, size, delta.shape[-1]))
            before, now[i] = _moved(now[i], push.view(heads, pieces, *now[i].shape[1:]), None if move is None else move[n])
            befores.append(before)
        found.append((answered, deltas, befores))
    inputs = [k if i == 0 else torch.stack([f[0].inputs[i] for f in found]) for i in range(len(start))]
    deltas = [torch.stack([f[1][i] for f in found]) for i in range(len(start))]
    before = [torch.stack([f[2][i] for f in found]) for i in range(len(start))]
    inputs, deltas = ([x.view(-1, size, x.shape[-1]) for x in xs] for xs in (inputs, deltas))

    def product(i: int, h: Tensor) -> Tensor:
        h = h.reshape(-1, size, h.shape[-1])
        read = None if gates.read is None else gates.read.flatten(0, 1)
        out = torch.bmm(_weighted(h, read), before[i].view(h.shape[0], -1, deltas[i].shape[-1]))
        scores = torch.bmm(h, inputs[i].mT) * (gates.step if gates.step.dim() == 2 else gates.step.flatten(0, 1))
        return torch.baddbmm(out, scores, deltas[i], alpha=-1).view(chunks, heads, pieces * size, -1)

    return answer(q.flatten(2, 3), len(start), product, model).output, now, start


def walk(
    tokens: Sequence[Tensor | None], grid: Aligned, state: NeuralMemoryState, chunk: int, model: Model
) -> tuple[Tensor, NeuralMemoryState]:
    """Tokens q, k, v, beta, g, momentum [S, H, L, X]: outputs [S, H, L, V], and the state after them.

    The last one's chunk start is that of every sequence's last chunk, finished or not.
    """
    rows, heads = state.weights[0].shape[:2]
    pieces = -(-chunk // PIECE)
    size = -(-chunk // pieces)
    is_full = grid.is_full and pieces * size == chunk

    def cut(x: Tensor) -> Tensor:
        """[S, H, L, X] to [N, Z, p, c, X]."""
        x = x.unflatten(2, (-1, chunk))
        if pieces * size != chunk:
            x = torch.nn.functional.pad(x, (0, 0, 0, pieces * size - chunk))
        return x.permute(2, 0, 1, 3, 4).contiguous().view(-1, rows * heads, pieces, size, x.shape[-1])

    step = max(1, SECTION // chunk)
    valid = None if is_full else grid.valid[:, None, :, None].expand(-1, heads, -1, -1).to(state.weights[0].dtype)
    parts = [None if x is None else cut(x).split(step) for x in (*tokens, valid)]
    groups = [tuple(w.flatten(0, 1) for w in group) for group in state[:3]]
    stacked = zip(*groups[:2], strict=True) if state.momentum else zip(groups[0], strict=True)
    now = [torch.stack(ms, 1).flatten(2) for ms in stacked]
    start, outs = groups[2], []
    wide = model if model.norm is None else model._replace(norm=tuple(x.repeat(rows, 1) for x in model.norm))  # type: ignore[arg-type]
    entered = [[e for e in es for _ in range(heads)] for es in grid.entered(chunk)]
    for i in range(-(-len(entered) // step)):
        given = [None if x is None else x[i] for x in parts]
        out, now, start = _section(given[:6], given[6], now, start, entered[i * step : (i + 1) * step], wide)
        outs.append(out)
    out = torch.cat(outs).unflatten(1, (rows, heads))[:, :, :, :chunk]
    after = [
        tuple(m[:, j].view(w.shape) for m, w in zip(now, state.weights, strict=True)) for j in range(now[0].shape[1])
    ]
    start = tuple(x.view(w.shape) for x, w in zip(start, state.weights, strict=True))
    return out.permute(1, 2, 0, 3, 4).flatten(2, 3), NeuralMemoryState(
        after[0], after[1] if state.momentum else (), start, ()
    )
