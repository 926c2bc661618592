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

from kernels.neural_memory import normed
from kernels.neural_memory.chunked import PIECE, coefficients
from kernels.neural_memory.model import Model, answer, before_norm, slopes, to_all_layers
from kernels.neural_memory.schedule import Aligned, NeuralMemoryState, where

# tokens of a section: bounds what is held at once without gradients; 512 to 8192 take the same time
SECTION = 1024


class Gates(NamedTuple):
    """What the gates of a section come to. `None` is one: nothing is lost, and tokens have no momentum.

    step [M, c, c], M = N * Z * p, or [c, c]: of token i in the weights at token t. read [N, Z, p, c, 2]: of weights and
    momentum before the piece in the weights at token t. write, alike: of token i in both after the piece. move
    [N, Z, p, 2, 2]: of both before the piece in both after it.
    """

    step: Tensor
    read: Tensor | None
    write: Tensor | None
    move: Tensor | None


def _gates(g: Tensor | None, momentum: Tensor | None, valid: Tensor | None, like: Tensor) -> Gates:
    if g is None and momentum is None:
        return Gates(like.new_ones(like.shape[3], like.shape[3]).tril(), None, None, None)
    lead = like.shape[:2]
    g, momentum, valid = (None if x is None else x.flatten(0, 1) for x in (g, momentum, valid))
    c = coefficients(g, momentum, valid, like.flatten(0, 1))
    step, last = c.step.flatten(0, 1), c.step[:, :, -1:].mT
    if c.carry is None or c.slowed is None or c.push is None:
        parts = (c.into, last, c.into[:, :, -1:])
    else:
        read = torch.cat([c.into, c.carry], -1)
        still = torch.cat([torch.zeros_like(c.slowed), c.slowed], -1)
        parts = (read, torch.cat([last, c.push], -1), torch.cat([read[:, :, -1:], still], -2))
    return Gates(step, *(x.unflatten(0, lead) for x in parts))


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    """x [..., c, K] times every weight [..., c, 2], side by side [..., c, 2 K]."""
    return x if weight is None else (x.unsqueeze(-2) * weight.unsqueeze(-1)).flatten(-2)


def _read(h: Tensor, both: Tensor, weight: Tensor | None) -> Tensor:
    """h [M, c, in] times both matrices [M, 2, in, out], weighted [M, c, 2]: what is narrower takes the weights."""
    if weight is None or both.shape[2] <= both.shape[3]:
        return torch.bmm(_weighted(h, weight), both.flatten(1, 2))
    parts = [torch.bmm(h, each) * w for each, w in zip(both.unbind(1), weight.split(1, -1), strict=False)]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class _Walked(NamedTuple):
    """One chunk, per layer: inputs and slopes [Z, p * c, X], weights with momentum before its pieces [Z, p, 2, X]."""

    inputs: list[Tensor]
    deltas: list[Tensor]
    before: list[Tensor]


def _pushed(now: Tensor, x_mT: Tensor, deltas: list[Tensor], move: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights with momentum before every piece of a chunk, and after the last.

    x_mT [Z * p, 2 in, c] times one delta [Z * p, c, out], or [Z * p, in, c] times one for each of the two.
    """
    heads, kinds = now.shape[:2]
    pieces = x_mT.shape[0] // heads
    if move is None and pieces == 1:
        after = torch.baddbmm(now.view(heads, -1, deltas[0].shape[-1]), x_mT, deltas[0], alpha=-1)
        return now.unsqueeze(1), after.view(now.shape)
    products = [torch.bmm(x_mT, delta) for delta in deltas]
    pushes = (products[0] if len(products) == 1 else torch.stack(products, 1)).view(heads, pieces, kinds, -1)
    moves = [None] * pieces if move is None else move.unbind(1)
    before = []
    for push, factors in zip(pushes.unbind(1), moves, strict=True):
        before.append(now)
        now = now - push if factors is None else torch.baddbmm(push, factors, now, beta=-1)
    return torch.stack(before, 1), now


class _Keys:
    """Keys, values and gates of a section by chunk: all that does not wait for the weights."""

    def __init__(self, k: Tensor, v: Tensor, beta: Tensor, gates: Gates, model: Model):
        self.model, self.size, none = model, k.shape[3], [None] * k.shape[0]
        self.write = none if gates.write is None else gates.write.flatten(1, 2).unbind(0)
        self.move = none if gates.move is None else gates.move.unbind(0)
        self.written = _weighted(k, gates.write).flatten(1, 2).mT.unbind(0)
        k, v, beta = (x.flatten(2, 3) for x in (k, v, beta))
        self.is_normed = model.norm is not None and model.loss == "l2"
        targets = normed.targets(k, v, beta, model.norm) if model.norm and self.is_normed else (v, beta)
        self.k, self.targets = k.unbind(0), list(zip(*(x.unbind(0) for x in targets), strict=True))

    def slopes(self, n: int, start: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs of every layer for the keys of chunk n, and the slopes of every product, times the step."""
        run = before_norm if self.is_normed else answer
        found = run(self.k[n], len(start), lambda i, h: torch.bmm(h, start[i]), self.model)
        if not self.is_normed:
            value, step = self.targets[n]
            return found.inputs, slopes(found, value, start, self.model, step)
        delta = normed.slope(found.output, *self.targets[n])
        return found.inputs, to_all_layers(delta, found.products, start, self.model)

    def walk(self, n: int, now: list[Tensor], start: tuple[Tensor, ...]) -> tuple[_Walked, list[Tensor]]:
        """Chunk n: what its queries will ask for, and weights with momentum after it."""
        inputs, deltas = self.slopes(n, start)
        before, after = [], []
        for i, (m, x, delta) in enumerate(zip(now, inputs, deltas, strict=True)):
            x, rows = (each.reshape(-1, self.size, each.shape[-1]) for each in (x, delta))
            weight, weighted = self.write[n], [rows]
            if weight is not None and x.shape[2] > rows.shape[2]:
                x_mT, weighted = x.mT, [rows * each for each in weight.split(1, -1)]
            else:
                x_mT = self.written[n] if i == 0 else _weighted(x, weight).mT
            was, m = _pushed(m, x_mT, weighted, self.move[n])
            before.append(was)
            after.append(m)
        return _Walked(inputs, deltas, before), after


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
    gates = _gates(g, momentum, valid, q)
    keys, walked = _Keys(k, v, beta, gates, model), []
    for n, rows in enumerate(entered):
        start = where(rows, tuple(_weights(m, w) for m, w in zip(now, start, strict=True)), start)
        found, now = keys.walk(n, now, start)
        walked.append(found)
    # [M, c, X], M = N * Z * p
    flat = q.shape[0] * q.shape[1] * q.shape[2], q.shape[3]
    inputs = [k, *(torch.stack(xs) for xs in list(zip(*(w.inputs for w in walked), strict=True))[1:])]
    inputs = [x.view(*flat, -1) for x in inputs]
    deltas = [torch.stack(xs).view(*flat, -1) for xs in zip(*(w.deltas for w in walked), strict=True)]
    before = [torch.stack(xs) for xs in zip(*(w.before for w in walked), strict=True)]
    read = None if gates.read is None else gates.read.flatten(0, 2)

    def product(i: int, h: Tensor) -> Tensor:
        h = h.reshape(*flat, -1)
        out = _read(h, before[i].view(flat[0], -1, h.shape[-1], deltas[i].shape[-1]), read)
        scores = torch.bmm(h, inputs[i].mT) * gates.step
        return torch.baddbmm(out, scores, deltas[i], alpha=-1).view(*q.shape[:2], -1, deltas[i].shape[-1])

    return answer(q.flatten(2, 3), len(start), product, model).output, now, start


def _weights(m: Tensor, like: Tensor) -> Tensor:
    """The weights [Z, in, out] of a layer, without its momentum."""
    return (m if m.shape[1] == 1 else m[:, 0]).view(like.shape)


def walk(
    tokens: Sequence[Tensor | None], grid: Aligned, state: NeuralMemoryState, chunk: int, model: Model
) -> tuple[Tensor, NeuralMemoryState]:
    """Tokens q, k, v, beta, g, momentum [S, H, L, X]: outputs [S, H, L, V], and the state after them.

    Its chunk start is that of every sequence's last chunk, finished or not; its position is left out.
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
    weights, *momentum, start = (
        tuple(x.view(w.shape) for x, w in zip(group, state.weights, strict=True))
        for group in (*zip(*(m.unbind(1) for m in now), strict=True), start)
    )
    after = NeuralMemoryState(weights, momentum[0] if momentum else (), start, ())
    return out.permute(1, 2, 0, 3, 4).flatten(2, 3), after
