"""A memory of one matrix with the squared error on a CPU: every sequence and head walks its tokens in a compiled loop.

Such a lane keeps its matrices in the nearest cache, where the chunked form pays for passes over coefficients and for
calls. Lanes share nothing and are spread over threads, so that results do not depend on how many there are. First
derivatives are by hand (`numba_loops.py`), and there are no others. What a norm does to the answers is torch's.

Legend: N tokens, H heads, S sequences, K/V key/value width; tokens [N, H, X]. States of a sequence are weights, chunk
start and, with momentum, P: [2 or 3, S, H, K, V].
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves its registrations without types

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.common.checks import cotangents
from kernels.common.numba import array, spread
from kernels.neural_memory import numba_loops as loops
from kernels.neural_memory.model import Model, answer
from kernels.neural_memory.schedule import NeuralMemoryState, Row


def run(
    tokens: Sequence[Tensor | None], rows: Sequence[Row], state: NeuralMemoryState, chunk: int, model: Model
) -> tuple[Tensor, NeuralMemoryState]:
    """Outputs [N, H, V] and the state after every sequence, as `schedule.run`."""
    q, k, v, *gates = tokens
    assert q is not None
    given = torch.stack([group[0] for group in (state.weights, state.start, state.momentum) if group])
    norm = None if model.norm is None else torch.stack(model.norm)
    gates = [None if x is None else x.squeeze(-1) for x in gates]
    stretches = list(accumulate((-(-row.length // loops.STRETCH) for row in rows), initial=0))
    places = torch.tensor([[*row, place] for row, place in zip(rows, stretches[:-1], strict=True)])
    keeps = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tokens, norm, given))
    products, final, *_ = _forward(q, k, v, *gates, norm, given, places, chunk, stretches[-1] if keeps else 0)
    weights, start, *momentum = ((x,) for x in final.unbind(0))
    position = tuple((row.position + row.length) % chunk for row in rows)
    out = answer(q.unsqueeze(2), 1, lambda _, __: products.unsqueeze(2), model).output.squeeze(2)
    return out, NeuralMemoryState(weights, momentum[0] if momentum else (), start, position)


class _Call:
    """What both passes of one call read, widths padded to what the loops walk side by side."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        momentum: Tensor | None,
        norm: Tensor | None,
        places: Tensor,
        chunk: int,
    ):
        self.more = tuple(-x.shape[2] % 4 for x in (k, v))
        self.widths = k.shape[2] + self.more[0], v.shape[2] + self.more[1]
        self.flags = g is not None, momentum is not None, norm is not None
        self.lanes, self.work = places.shape[0] * k.shape[1], k.numel() * self.widths[1]
        one = torch.ones_like(beta)
        wide = [pad(x, (0, -x.shape[2] % 4)) for x in (q, k, v)]
        gates = (one if x is None else x.exp() for x in (g, momentum))
        # what is written is made like these, and must not be copied on its way to the loops
        self.tokens = [x.contiguous() for x in (*wide, beta, *gates)]
        # its width is that of the values before padding, with or without a norm
        self.norm = v.new_empty(2, *v.shape[1:]) if norm is None else norm
        self.arguments = (array(places), chunk, tuple(map(array, self.tokens)), array(self.norm))

    def padded(self, states: Tensor) -> Tensor:
        return pad(states, (0, self.more[1], 0, self.more[0])).contiguous()

    def run(self, loop: Any, *arguments: Any) -> None:
        spread(loop, self.lanes, self.work, *self.arguments, *arguments)


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
    chunk: int,
    pieces: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, beta, g, momentum, norm, places, chunk)
    started = call.padded(given)
    out, x, final = torch.empty_like(call.tokens[2]), torch.empty_like(call.tokens[2]), torch.empty_like(started)
    kept = v.new_empty(pieces, v.shape[1], given.shape[0], *call.widths)
    call.run(loops.forward(*call.widths, *call.flags[1:]), *map(array, (started, out, x, final, kept)))
    keys, values = k.shape[2], v.shape[2]
    return out[..., :values].contiguous(), final[..., :keys, :values].contiguous(), x, kept


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, pieces = rest[4], rest[7]
    keys, values = (size + -size % 4 for size in (k.shape[2], v.shape[2]))
    kept = v.new_empty(pieces, v.shape[1], given.shape[0], keys, values)
    return v.new_empty(v.shape), given.new_empty(given.shape), v.new_empty(*v.shape[:2], values), kept


@torch.library.custom_op("cl_kernels::neural_memory_backward", mutates_args=())
def _backward(
    do: Tensor,
    dfinal: Tensor,
    x: Tensor,
    kept: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    momentum: Tensor | None,
    norm: Tensor | None,
    places: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, beta, g, momentum, norm, places, chunk)
    given = (x, kept, pad(do, (0, call.more[1])), call.padded(dfinal))
    dq, dk, dv, *gates = grads = [torch.empty_like(x) for x in call.tokens]
    dnorm, dgiven = v.new_empty(2, places.shape[0], *v.shape[1:]), torch.empty_like(given[3])
    arguments = (*map(array, given), tuple(map(array, grads)), array(dnorm), array(dgiven))
    call.run(loops.backward(*call.widths, *call.flags), *arguments)
    keys, values = k.shape[2], v.shape[2]
    dq, dk, dv = (x[..., :size].contiguous() for x, size in ((dq, keys), (dk, keys), (dv, values)))
    return dq, dk, dv, gates[0], gates[1], gates[2], dnorm.sum(1), dgiven[..., :keys, :values].contiguous()


@_backward.register_fake
def _(
    do: Tensor, dfinal: Tensor, x: Tensor, kept: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *_: Any
) -> Any:
    tokens = [x.new_empty(x.shape) for x in (q, k, v, beta, beta, beta)]
    return *tokens, v.new_empty(2, *v.shape[1:]), dfinal.new_empty(dfinal.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, ctx.chunk, _ = inputs
    # what is kept has no gradient, and zeros of its size would be made for it at every backward
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *output[2:])


def _differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *tokens, norm, given, places, x, kept = ctx.saved_tensors
    do, dfinal = cotangents((do, tokens[2]), (dfinal, given))
    grads = _backward(do, dfinal, x, kept, *tokens, norm, places, ctx.chunk)
    found = [None if x is None else grad for x, grad in zip((*tokens, norm, given), grads, strict=True)]
    return *found, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
