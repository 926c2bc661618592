"""The backward of the ParaRNN cells on any device: one linear solve, no iteration.

The adjoint is a linear recurrence with the transposed Jacobians, for diagonal weights by the passes of `linear_scan`
(2x2 for the LSTM), for a matrix per head token by token. Gates are computed again for a piece of time at once, and so
are the candidates of the LSTM; the GRU's were kept: it has one state less, and a tanh costs more than reading one.

Legend: B batch, T time, G gates, U units ([N] or [H, D]), P parts of the state, n chunks, C chunk, S sequences.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.linear_scan.chunked import gates_ahead, steps_of, walk
from kernels.newton_rnn.cells import GRU, LSTM, Parts, cell_of
from kernels.newton_rnn.layout import Layout, Mark, initial, initial_parts

# elements of one wide tensor of a piece of time, and the chunk of the linear recurrence
BACK_SPAN = 131072
BACK_CHUNK = 8
# units of a batch from which on two parts go token by token: three walks of a chunk cost more than they spare
BACK_WIDE = 4096

# the transposed Jacobian of an LSTM step in four planes (f, i, x, o): M (c, h) = (f t, x t + o h), t = c + i h. What
# reaches the new c is t, by itself and through the output, and an adjoint is kept as (t, h)
Planes = Sequence[Tensor]
IDENTITY = (1.0, 0.0, 0.0, 1.0)


def move(m: Planes, v: Planes) -> Parts:
    """M v, for one part M = (m); of two parts v is (t, h)."""
    if len(m) == 1:
        return [m[0] * v[0]]
    f, _, x, o = m
    return [f * v[0], (x * v[0]).addcmul_(o, v[1])]


def _token_by_token(steps: Sequence[Planes], t: Tensor, h: Tensor) -> None:
    """Write (t, h) of every step, given what stands behind the first one."""
    for f, i, x, o, add_c, add_h, into_t, into_h in steps:
        h = torch.addcmul(add_h, o, h, out=into_h).addcmul_(x, t)
        t = torch.addcmul(add_c, f, t, out=into_t).addcmul_(i, h)


def _walk_pair(m: Planes, given: Planes, state: Planes, out: Planes, chunk: int) -> None:
    """Reversed 2x2 linear recurrence, out_t = given_t + M_{t+1} out_{t+1}, in the three passes of `linear_scan`.

    `given` is (c, h), `out` takes (t, h). `state` stands behind the last token, whose M is the identity.
    """
    length = out[0].shape[1]
    n = length // chunk if length >= 2 * chunk and state[0].numel() < BACK_WIDE else 0
    rest = length - n * chunk
    if n:
        f, i, x, o = (steps_of(plane, rest, n, chunk) for plane in m)
        f, x, o = (gates_ahead(steps, IDENTITY[k]) for steps, k in ((f, 0), (x, 2), (o, 3)))
        ends = (steps_of(u, rest, n, chunk) for u in (*given, *out))
        steps = list(zip(f, i, x, o, *ends, strict=True))[::-1]
        # three adjoints side by side: what a unit c and a unit h behind the chunk give, and what the chunk itself does
        both = out[0].new_zeros(2, 3, *f[0].shape)
        t, h = both
        t[0] = h[1] = 1
        for gate, through, cross, keep, add_c, add_h, _, _ in steps:
            h.mul_(keep).addcmul_(cross, t)[2].add_(add_h)
            t.mul_(gate)[2].add_(add_c)
            t.addcmul_(through, h)
        starts = torch.empty_like(both[:, 0])
        v = torch.stack(list(state))
        chunks = zip(starts.unbind(2), (per_chunk.unbind(1) for per_chunk in both.unbind(3)), strict=True)
        for start, (by_c, by_h, own) in list(chunks)[::-1]:
            start.copy_(v)
            v = torch.addcmul(own, by_c, start[0]).addcmul_(by_h, start[1])
        _token_by_token(steps, *starts)
        state = v.unbind(0)
    ahead = [list(plane[:, 1 : rest + 1].unbind(1)) for plane in m]
    if not n:
        ahead = [[*steps, torch.full_like(state[0], one)] for steps, one in zip(ahead, IDENTITY, strict=True)]
    through = m[1][:, :rest].unbind(1)
    ends = (u[:, :rest].unbind(1) for u in (*given, *out))
    _token_by_token(list(zip(ahead[0], through, *ahead[2:], *ends, strict=True))[::-1], *state)


class Adjoint:
    """The backward of one call: time in reverse, gradients of weights and initial states summed on the way."""

    def __init__(
        self, cell: GRU | LSTM, layout: Layout, starts: Parts, dfinal_SPU: Tensor, *, diagonal: bool, packed: bool
    ):
        self.cell, self.layout, self.starts = cell, layout, starts
        self.diagonal, self.packed = diagonal, packed
        self.dfinal = dfinal_SPU
        self.dr: list[Tensor] | None = None
        self.dpeephole: Tensor | None = None
        self.dh0 = torch.zeros_like(dfinal_SPU)

    def piece(self, x: Tensor, dh: Tensor, kept: Parts, begin: int, end: int, carry: Parts, dx_BTGU: Tensor) -> Parts:
        """Write the gradients of the pre-activations of tokens begin .. end; returns the adjoint that leaves them."""
        marks = self.layout.within(begin, end)
        before = self._before(kept[: self.cell.parts], begin, end, marks)
        planes = self.cell.planes(list(x[:, begin:end].unbind(2)), before, [s[:, begin:end] for s in kept])
        given = [dh[:, begin:end].to(before[0].dtype)]
        if len(before) == 2:
            given = [given[0].new_zeros(()).expand_as(given[0]), *given]
        # what comes from behind a row is its carry; sequences that are packed end inside
        ends = [m for m in self.layout.ends if begin <= m.t < end] if self.packed else []
        if ends:
            given = [part.clone() for part in given]
        for b, t, s in ends:
            for part, d in zip(given, self.dfinal[s], strict=True):
                part[b, t - begin] += d
        solve = self._scan if self.diagonal else self._loop
        adjoint, carry = solve(planes, given, marks, begin, carry)
        dx = self.cell.token(planes, adjoint, dx_BTGU[:, begin:end].unbind(2))
        dr, dpeephole = self.cell.weights(planes, dx)
        self.dr = dr if self.dr is None else [a.add_(b) for a, b in zip(self.dr, dr, strict=True)]
        if dpeephole is not None:
            self.dpeephole = dpeephole if self.dpeephole is None else self.dpeephole.add_(dpeephole)
        return carry

    def _before(self, states: Parts, begin: int, end: int, marks: list[Mark]) -> Parts:
        """The state each token started from."""
        if begin:
            before = [s[:, begin - 1 : end - 1] for s in states]
        else:
            firsts = [s if s.shape[0] == states[0].shape[0] else torch.zeros_like(states[0][:, 0]) for s in self.starts]
            before = [torch.cat([f[:, None], s[:, : end - 1]], 1) for f, s in zip(firsts, states, strict=True)]
        if not marks:
            return before
        b, t, s = torch.tensor(marks, device=states[0].device).unbind(1)
        values = [initial(start, s) for start in self.starts]
        return [part.index_put((b, t - begin), value) for part, value in zip(before, values, strict=True)]

    def _release(self, s: int, leaving: Tensor) -> None:
        if s >= 0:
            self.dh0[s] += leaving

    def _scan(
        self, planes: dict[str, Tensor], given: Parts, marks: list[Mark], begin: int, carry: Parts
    ) -> tuple[Parts, Parts]:
        """Diagonal weights: the adjoint is `linear_scan` reversed (a 2x2 one for two parts)."""
        m = self.cell.matrix(planes)
        kept = [[x[b, t - begin].clone() for x in m] for b, t, _ in marks]
        for b, t, _ in marks:
            # without these two or three planes M is zero; the gradients of the token still need `into`
            for entry in m if len(m) == 1 else (m[0], m[2], m[3]):
                entry[b, t - begin] = 0
        out = [torch.empty_like(m[0]) for _ in given]
        if len(m) == 1:
            walk(m[0], given[0], carry[0], out[0], BACK_CHUNK, reverse=True)
        else:
            _walk_pair(m, given, carry, out, BACK_CHUNK)
        for (b, t, s), planes_t in zip(marks, kept, strict=True):
            self._release(s, torch.stack(move(planes_t, [o[b, t - begin] for o in out])))
        return out, move([x[:, 0] for x in m], [o[:, 0] for o in out])

    def _loop(
        self, planes: dict[str, Tensor], given: Parts, marks: list[Mark], begin: int, carry: Parts
    ) -> tuple[Parts, Parts]:
        """A matrix per head: the adjoint token by token."""
        out = [torch.empty_like(next(iter(planes.values()))) for _ in given]
        steps = {name: plane.unbind(1) for name, plane in planes.items()}
        replaced: dict[int, list[Mark]] = {}
        for mark in marks:
            replaced.setdefault(mark.t - begin, []).append(mark)
        for t in range(out[0].shape[1] - 1, -1, -1):
            now = {name: plane[t][:, None] for name, plane in steps.items()}
            u = self.cell.reached(now, [g[:, t, None] + c[:, None] for g, c in zip(given, carry, strict=True)])
            for o, value in zip(out, u, strict=True):
                o[:, t] = value[:, 0]
            carry = [c[:, 0] for c in self.cell.back(now, u, self.cell.token(now, u))]
            for b, _, s in replaced.get(t, ()):
                self._release(s, torch.stack([c[b] for c in carry]))
                for c in carry:
                    c[b] = 0
        return out, carry


def backward(
    dh_BTU: Tensor,
    dfinal_SPU: Tensor,
    x_BTGU: Tensor,
    r: Tensor,
    peephole: Tensor | None,
    h0_SPU: Tensor | None,
    h_BTU: Tensor,
    aside_BTU: Tensor,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell_name: str,
    chunk: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of x, r, peephole and of the initial states [S, P, U]."""
    dtype = h_BTU.dtype
    batch, length = x_BTGU.shape[:2]
    diagonal = r.dim() == x_BTGU.dim() - 2
    cell = cell_of(cell_name, r.to(dtype), None if peephole is None else peephole.to(dtype), is_diagonal=diagonal)
    layout = Layout.of(batch, length, reset, cu_seqlens)
    starts = initial_parts(h0_SPU, x_BTGU, layout.rows, cell.parts)
    adjoint = Adjoint(cell, layout, starts, dfinal_SPU.to(dtype), diagonal=diagonal, packed=cu_seqlens is not None)
    dx = x_BTGU.new_empty(x_BTGU.shape, dtype=dtype)
    kept = [h_BTU, aside_BTU] if cell.parts == 1 else [aside_BTU, h_BTU]
    carry = list(adjoint.dfinal.unbind(1))
    if cu_seqlens is not None:
        carry = [torch.zeros_like(h_BTU[:, 0]) for _ in carry]
    elements = batch * h_BTU[0, 0].numel()
    span = max(64, BACK_SPAN // elements)
    x = x_BTGU.to(dtype)
    for begin in range((length - 1) // span * span, -1, -span):
        end = min(begin + span, length)
        carry = adjoint.piece(x, dh_BTU, kept, begin, end, carry, dx)
    dh0 = adjoint.dh0
    if cu_seqlens is None:
        dh0 += torch.stack(carry, dim=1)
    else:
        empty = cu_seqlens.diff() == 0
        dh0[empty] = dfinal_SPU.to(dtype)[empty]
    assert adjoint.dr is not None
    dr = torch.stack(adjoint.dr).to(r.dtype)
    dpeephole = None if adjoint.dpeephole is None or peephole is None else adjoint.dpeephole.to(peephole.dtype)
    return dx.to(x_BTGU.dtype), dr, dpeephole, dh0
