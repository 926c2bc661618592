"""The backward of the ParaRNN cells on any device: one linear solve, no iteration.

The adjoint is a linear recurrence with the transposed Jacobians, for diagonal weights by the passes of `linear_scan`
(2x2 for the LSTM), for a matrix per head token by token. Gates are computed again for a piece of time at once;
candidates were kept, a tanh costs more than reading one.

Legend: B batch, T time, G gates, U units ([N] or [H, D]), P parts of the state, n chunks, C chunk, S sequences.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

import torch
from torch import Tensor

from kernels.linear_scan.chunked import walk
from kernels.newton_rnn.cells import GRU, LSTM, Parts, cell_of
from kernels.newton_rnn.layout import Layout, Mark, initial, initial_parts

# elements of one wide tensor of a piece of time, and the chunk of the linear recurrence
BACK_SPAN = 262144
BACK_CHUNK = 8


def _walk_pair(m: list[Tensor], u: Parts, state: Parts, out: Parts, chunk: int) -> None:
    """Reversed 2x2 linear recurrence, out_t = u_t + M_{t+1} out_{t+1}, in the three passes of `linear_scan`.

    m: entries (00, 01, 10, 11) for the step from the token after; state: out of the token after the last.
    """
    length = u[0].shape[1]
    n = length // chunk
    tail = length - n * chunk if n >= 2 else length

    def step(a: list[Tensor], add: Parts, v: Parts, into: Parts | None = None) -> Parts:
        first = torch.addcmul(add[0], a[0], v[0]).addcmul_(a[1], v[1])
        second = torch.addcmul(add[1], a[2], v[0]).addcmul_(a[3], v[1])
        return [first, second] if into is None else [into[0].copy_(first), into[1].copy_(second)]

    if n >= 2:
        body = slice(tail, length)
        mc, uc, oc = ([x[:, body].unflatten(1, (n, chunk)) for x in group] for group in (m, u, out))
        at = [[x[:, :, i] for x in mc] for i in range(chunk)]
        adds = [[x[:, :, i] for x in uc] for i in range(chunk)]
        product, last = at[chunk - 1], adds[chunk - 1]
        for i in range(chunk - 2, -1, -1):
            a = at[i]
            product = [
                torch.addcmul(a[2 * row] * product[col], a[2 * row + 1], product[2 + col])
                for row in (0, 1)
                for col in (0, 1)
            ]
            last = step(a, adds[i], last)
        starts = [torch.empty_like(x) for x in last]
        for j in range(n - 1, -1, -1):
            for start, s in zip(starts, state, strict=True):
                start[:, j] = s
            state = step([p[:, j] for p in product], [x[:, j] for x in last], state)
        for i in range(chunk - 1, -1, -1):
            starts = step(at[i], adds[i], starts, [x[:, :, i] for x in oc])
    for t in range(tail - 1, -1, -1):
        state = step([x[:, t] for x in m], [x[:, t] for x in u], state, [x[:, t] for x in out])


class Adjoint:
    """The backward of one call: time in reverse, gradients of weights and initial states summed on the way."""

    def __init__(self, cell: GRU | LSTM, layout: Layout, starts: Parts, dfinal_SPU: Tensor, *, diagonal: bool):
        self.cell, self.layout, self.starts, self.diagonal = cell, layout, starts, diagonal
        self.dfinal = dfinal_SPU
        self.dr: list[Tensor] | None = None
        self.dpeephole: Tensor | None = None
        self.dh0 = torch.zeros_like(dfinal_SPU)

    def piece(self, x: Tensor, dh: Tensor, kept: Parts, begin: int, end: int, carry: Parts) -> tuple[Parts, Parts]:
        """Gradients of the pre-activations of tokens begin .. end, and the adjoint that leaves towards the past."""
        marks = self.layout.within(begin, end)
        before = self._before(kept[:-1], begin, end, marks)
        planes = self.cell.planes(list(x[:, begin:end].unbind(2)), before, [s[:, begin:end] for s in kept])
        given = [torch.zeros_like(before[0]) for _ in before[:-1]] + [dh[:, begin:end].to(before[0].dtype)]
        ends = [m for m in self.layout.ends if begin <= m.t < end]
        if ends:
            given[-1] = given[-1].clone()
        for b, t, s in ends:
            for part, d in zip(given, self.dfinal[s], strict=True):
                part[b, t - begin] += d
        solve = self._scan if self.diagonal else self._loop
        adjoint, carry = solve(planes, given, marks, begin, carry)
        dx = self.cell.token(planes, adjoint)
        dr, dpeephole = self.cell.weights(planes, dx)
        self.dr = dr if self.dr is None else [a.add_(b) for a, b in zip(self.dr, dr, strict=True)]
        if dpeephole is not None:
            self.dpeephole = dpeephole if self.dpeephole is None else self.dpeephole.add_(dpeephole)
        return dx, carry

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
        size = len(given)
        kept = [torch.stack([entry[b, t - begin] for entry in m]).unflatten(0, (size, size)) for b, t, _ in marks]
        for b, t, _ in marks:
            for entry in m:
                entry[b, t - begin] = 0
        out = [torch.empty_like(g, memory_format=torch.contiguous_format) for g in given]
        for o, g, c in zip(out, given, carry, strict=True):
            torch.add(g[:, -1], c, out=o[:, -1])
        last, rest = [o[:, -1] for o in out], [o[:, :-1] for o in out]
        if size == 1:
            walk(m[0][:, 1:], given[0][:, :-1], last[0], rest[0], BACK_CHUNK, reverse=True)
        else:
            _walk_pair([e[:, 1:] for e in m], [g[:, :-1] for g in given], last, rest, BACK_CHUNK)
        for (b, t, s), entries in zip(marks, kept, strict=True):
            u = torch.stack([o[b, t - begin] for o in out])
            self._release(s, (entries * u).sum(1))
        first = [o[:, 0] for o in out]
        leaving = [sum(m[size * i + k][:, 0] * first[k] for k in range(size)) for i in range(size)]
        return out, [torch.as_tensor(x) for x in leaving]

    def _loop(
        self, planes: dict[str, Tensor], given: Parts, marks: list[Mark], begin: int, carry: Parts
    ) -> tuple[Parts, Parts]:
        """A matrix per head: the adjoint token by token."""
        out = [torch.empty_like(g, memory_format=torch.contiguous_format) for g in given]
        steps = {name: plane.unbind(1) for name, plane in planes.items()}
        replaced: dict[int, list[Mark]] = {}
        for mark in marks:
            replaced.setdefault(mark.t - begin, []).append(mark)
        for t in range(given[0].shape[1] - 1, -1, -1):
            now = {name: plane[t][:, None] for name, plane in steps.items()}
            u = [torch.add(g[:, t], c) for g, c in zip(given, carry, strict=True)]
            for o, value in zip(out, u, strict=True):
                o[:, t] = value
            u = [value[:, None] for value in u]
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
    c_BTU: Tensor,
    candidate_BTU: Tensor,
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
    adjoint = Adjoint(cell, layout, starts, dfinal_SPU.to(dtype), diagonal=diagonal)
    dx = x_BTGU.new_empty(x_BTGU.shape)
    kept = [*([c_BTU] if cell.parts == 2 else []), h_BTU, candidate_BTU]
    carry = [torch.zeros_like(h_BTU[:, 0]) for _ in kept[:-1]]
    elements = batch * h_BTU[0, 0].numel()
    span = max(64, BACK_SPAN // elements)
    x = x_BTGU.to(dtype)
    for begin in range((length - 1) // span * span, -1, -span):
        end = min(begin + span, length)
        found, carry = adjoint.piece(x, dh_BTU, kept, begin, end, carry)
        for g, d in enumerate(found):
            dx[:, begin:end, g] = d
    dh0 = adjoint.dh0
    if cu_seqlens is None:
        dh0 += torch.stack(carry, dim=1)
    else:
        empty = cu_seqlens.diff() == 0
        dh0[empty] = dfinal_SPU.to(dtype)[empty]
    assert adjoint.dr is not None
    dr = torch.stack(adjoint.dr).to(r.dtype)
    dpeephole = None if adjoint.dpeephole is None or peephole is None else adjoint.dpeephole.to(peephole.dtype)
    return dx, dr, dpeephole, dh0
