"""A neural memory on a CPU: every sequence and head walks its pieces in a compiled loop, all in the nearer caches.

Torch pays for calls, and for passes over what lies far away between its products. Lanes share nothing and are spread
over threads, so that results do not depend on how many there are. First derivatives are by hand (`numba_adjoint.py`),
and there are no others. What a norm does to the answers is torch's.

Legend: N tokens, H heads, S sequences, K/V key/value width; tokens [N, H, X], gates [N, H]. A state is flat, all layers
one after another: [2 or 3, S, H, numbers], of weights, chunk start and, with momentum, P.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves its registrations without types

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.common.checks import cotangents
from kernels.common.numba import array, scratch, spread
from kernels.common.numba_vectors import filled
from kernels.neural_memory.model import ACTIVATIONS, LOSSES, Model, answer
from kernels.neural_memory.numba_adjoint import backward
from kernels.neural_memory.numba_loops import forward
from kernels.neural_memory.schedule import NeuralMemoryState, Row

# tokens of a piece: longer ones have more to do in coefficients, shorter ones in moving weights
PIECE = 32


def run(
    tokens: Sequence[Tensor | None], rows: Sequence[Row], state: NeuralMemoryState, chunk: int, model: Model
) -> tuple[Tensor, NeuralMemoryState]:
    """Outputs [N, H, V] and the state after every sequence, as `schedule.run`."""
    q, k, v, *gates = tokens
    assert q is not None
    assert k is not None
    assert v is not None
    layers = [w.shape[-2:] for w in state.weights]
    widths = [filled(size, q.element_size()) for size in (layers[0][0], *(out for _, out in layers))]
    given = torch.stack([_flat(group, widths) for group in (state.weights, state.start, state.momentum) if group])
    size = -(-chunk // -(-chunk // PIECE))
    pieces = list(accumulate((_pieces(row, chunk, size) for row in rows), initial=0))
    places = torch.tensor([[*row, place] for row, place in zip(rows, pieces[:-1], strict=True)])
    norm = None if model.norm is None else torch.stack(model.norm)
    keeps = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tokens, norm, given))
    wide = [pad(x, (0, width - x.shape[2])) for x, width in ((q, widths[0]), (k, widths[0]), (v, widths[-1]))]
    gates = [None if x is None else x.squeeze(-1) for x in gates]
    kind = [LOSSES.index(model.loss), ACTIVATIONS.index(model.activation), v.shape[2]]
    out, final, _ = _forward(
        *wide, *gates, norm, given, places, [chunk, size, *widths], kind, model.threshold, pieces[-1] if keeps else 0
    )
    weights, start, *momentum = (_layers(x, widths, layers) for x in final.unbind(0))
    position = tuple((row.position + row.length) % chunk for row in rows)
    products = out[..., : v.shape[2]].unsqueeze(2)
    out = answer(q.unsqueeze(2), 1, lambda _, __: products, model).output.squeeze(2)
    return out, NeuralMemoryState(weights, momentum[0] if momentum else (), start, position)


def _pieces(row: Row, chunk: int, size: int) -> int:
    """How many pieces a sequence is cut into, at multiples of `size` in every chunk and at its ends."""
    end = row.position + row.length
    whole = end // chunk * -(-chunk // size) + -(-(end % chunk) // size)
    return whole - row.position // size if row.length else 0


def _flat(group: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """Matrices [S, H, in, out] of all layers, filled up to whole vectors, as [S, H, numbers]."""
    sizes = pairwise(widths)
    full = [pad(w, (0, out - w.shape[3], 0, in_ - w.shape[2])) for w, (in_, out) in zip(group, sizes, strict=True)]
    return torch.cat([w.flatten(2) for w in full], 2)


def _layers(flat: Tensor, widths: Sequence[int], layers: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """What `_flat` was given."""
    sizes = list(pairwise(widths))
    parts = flat.split([a * b for a, b in sizes], 2)
    full = [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
    return tuple(w[..., :in_, :out] for w, (in_, out) in zip(full, layers, strict=True))


class _Call:
    """What both passes of one call read."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        momentum: Tensor | None,
        norm: Tensor | None,
        given: Tensor,
        places: Tensor,
        sizes: Sequence[int],
        kind: Sequence[int],
        threshold: float,
    ):
        (chunk, size, *widths), (loss, activation, values) = sizes, kind
        self.lanes, self.work = places.shape[0] * k.shape[1], k.shape[0] * given[0, 0].numel()
        one = torch.ones_like(beta)
        # what is written is made like these, and must not be copied on its way to the loops
        self.tokens = [x.contiguous() for x in (q, k, v, beta, *(one if x is None else x.exp() for x in (g, momentum)))]
        # its width is that of the values, with or without a norm
        self.norm = v.new_empty(2, v.shape[1], values) if norm is None else norm
        before = [0, *accumulate(widths)]
        numbers = [0, *accumulate(a * b for a, b in pairwise(widths)), 0]
        table = np.array([[*widths, 0], before, numbers])
        self.length = filled(size, k.element_size())
        self.arguments = (
            array(places), chunk, size, self.length, table, loss, array(v.new_tensor(threshold))[()], norm is not None,
            activation, tuple(map(array, self.tokens)), array(self.norm), array(given),
        )  # fmt: skip

    def run(self, loop: Any, *arguments: Any) -> None:
        spread(loop, self.lanes, self.work, *self.arguments, *arguments)


def _kept(k: Tensor, given: Tensor, sizes: Sequence[int], pieces: int) -> tuple[int, int, int]:
    """The shape of what the first pass keeps."""
    _, size, _, *hidden, last = sizes
    of_tokens = filled(size, k.element_size()) * (3 * sum(hidden) + 2 * last)
    return pieces, k.shape[1], (given.shape[0] - 1) * given.shape[3] + of_tokens


@torch.library.custom_op("cl_kernels::neural_memory", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    momentum: Tensor | None,
    norm: Tensor | None,
    given: Tensor,
    places: Tensor,
    sizes: Sequence[int],
    kind: Sequence[int],
    threshold: float,
    pieces: int,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, beta, g, momentum, norm, given, places, sizes, kind, threshold)
    out, final = torch.empty_like(call.tokens[2]), torch.empty_like(given, memory_format=torch.contiguous_format)
    kept = scratch(_kept(k, given, sizes, pieces), k)
    call.run(forward, *map(array, (out, final, kept)))
    return out, final, kept


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    given, sizes, pieces = rest[4], rest[6], rest[9]
    return v.new_empty(v.shape), given.new_empty(given.shape), k.new_empty(_kept(k, given, sizes, pieces))


@torch.library.custom_op("cl_kernels::neural_memory_backward", mutates_args=())
def _backward(
    do: Tensor,
    dfinal: Tensor,
    kept: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    momentum: Tensor | None,
    norm: Tensor | None,
    given: Tensor,
    places: Tensor,
    sizes: Sequence[int],
    kind: Sequence[int],
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, beta, g, momentum, norm, given, places, sizes, kind, threshold)
    grads, dgiven = [torch.empty_like(x) for x in call.tokens], torch.empty_like(dfinal)
    dnorm = v.new_empty(2, places.shape[0], *call.norm.shape[1:])
    call.run(backward, *map(array, (kept, do, dfinal)), tuple(map(array, grads)), *map(array, (dnorm, dgiven)))
    return grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], dnorm.sum(1), dgiven


@_backward.register_fake
def _(do: Tensor, dfinal: Tensor, kept: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *rest: Any) -> Any:
    tokens = [x.new_empty(x.shape) for x in (q, k, v, beta, beta, beta)]
    return *tokens, v.new_empty(2, v.shape[1], rest[6][2]), dfinal.new_empty(dfinal.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, ctx.sizes, ctx.kind, ctx.threshold, _ = inputs
    # what is kept has no gradient, and zeros of its size would be made for it at every backward
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, output[2])


def _differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *inputs, places, kept = ctx.saved_tensors
    do, dfinal = cotangents((do, inputs[2]), (dfinal, inputs[7]))
    grads = _backward(do, dfinal, kept, *inputs, places, ctx.sizes, ctx.kind, ctx.threshold)
    found = [None if x is None else grad for x, grad in zip(inputs, grads, strict=True)]
    return *found, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
