"""ParaRNN cells on any device: Newton over the states at chunk starts, every chunk walked side by side.

Unknown are only the states at chunk starts. A pass walks all chunks of a block of time at once (C steps on wide tensors
instead of T on narrow ones) and gives their ends and, when asked, the ends' derivative; Newton closes the gaps between
ends and starts by a linear recurrence over the chunks. Inside a chunk nothing is linearised, so two to four passes do
where Newton over every token (chunk = 1, ParaRNN's own iteration) needs five or more, and weights converge on which it
diverges. A block whose gap stays above the tolerance is walked token by token.

The backward, without any iteration, is in `adjoint`.

Legend: B batch, T time, G gates, U units ([N] or [H, D]), P parts of the state, n chunks, C chunk, S sequences.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.linear_scan.chunked import walk
from kernels.newton_rnn.adjoint import backward
from kernels.newton_rnn.cells import GRU, LSTM, Parts, cell_of
from kernels.newton_rnn.layout import Layout, initial, initial_parts

__all__ = ["backward", "forward", "own_block"]

# where a batch fills the vector units by itself, walking token by token costs less than two passes
WIDE = 16384
# long enough that most chunks forget their start: then two walks are the solution
CHUNK = 64
# elements of one wide tensor of a walk: a dozen of them stay in the cache
SPAN = 65536


def own_block(units: int, chunk: int, *, wide: bool) -> int:
    """Tokens of one block of time; 0 where token by token is faster and `wide` says that is allowed."""
    if wide and units >= WIDE:
        return 0
    return max(2, SPAN // max(units, 1)) * chunk


class Steps:
    """One piece of time as C steps of n chunks: inputs, and the replaced states of every step."""

    def __init__(self, x_BTGU: Tensor, begin: int, n: int, chunk: int, layout: Layout, starts: Parts):
        piece = x_BTGU[:, begin : begin + n * chunk].unflatten(1, (n, chunk))
        self.x = [list(step.unbind(2)) for step in piece.unbind(2)]
        self.n, self.chunk = n, chunk
        self.replaced: dict[int, tuple[tuple[Tensor, Tensor], Parts]] = {}
        by_step: dict[int, list[tuple[int, int, int]]] = {}
        for b, t, s in layout.within(begin, begin + n * chunk):
            by_step.setdefault((t - begin) % chunk, []).append((b, (t - begin) // chunk, s))
        for i, found in by_step.items():
            at = torch.tensor(found, device=x_BTGU.device).unbind(1)
            self.replaced[i] = (at[0], at[1]), [initial(start, at[2]) for start in starts]

    def _replace(self, i: int, state: Parts) -> Parts:
        at, values = self.replaced[i]
        return [part.index_put(at, value) for part, value in zip(state, values, strict=True)]

    def guess(self, cell: GRU | LSTM, state: Parts) -> Parts:
        """Roughly the end of every chunk."""
        for i, x in enumerate(self.x):
            state = cell.guess(x, self._replace(i, state) if i in self.replaced else state)
        return state

    def walk(self, cell: GRU | LSTM, state: Parts, outs: Parts) -> Parts:
        """Walk every chunk from its start, writing `outs` [B, n, C, U]; returns the ends."""
        for i, x in enumerate(self.x):
            state = cell.step(x, self._replace(i, state) if i in self.replaced else state, [o[:, :, i] for o in outs])
        return state

    def push(self, cell: GRU | LSTM, state: Parts, outs: Parts) -> tuple[Parts, Parts]:
        """As `walk`; also the derivative of the ends by the starts."""
        tangents = cell.recur.directions(len(state), state[0])
        for i, x in enumerate(self.x):
            if i in self.replaced:
                state = self._replace(i, state)
                b, j = self.replaced[i][0]
                for tangent in tangents:
                    tangent[:, b, j] = 0
            state, tangents = cell.push(x, state, tangents, [o[:, :, i] for o in outs])
        return state, tangents


def _gaps(ends: Parts, starts: Parts) -> tuple[Parts, float]:
    """End of each chunk minus start of the next, and the largest relative to the states (inf if not finite)."""
    gaps = [e[:, :-1] - s[:, 1:] for e, s in zip(ends, starts, strict=True)]
    size = max(float(e.abs().max()) for e in ends)
    largest = max(float(g.abs().max()) for g in gaps)
    if largest == 0:
        return gaps, 0.0
    return gaps, largest / size if 0 < size < float("inf") and largest < float("inf") else float("inf")


def _close(cell: GRU | LSTM, starts: Parts, gaps: Parts, tangents: Parts) -> None:
    """One Newton correction of the starts: delta_{j+1} = J_j delta_j + gap_j along the chunks."""
    if len(starts) == 1 and tangents[0].shape[0] == 1:
        delta = torch.empty_like(gaps[0])
        walk(tangents[0][0][:, :-1], gaps[0], torch.zeros_like(gaps[0][:, 0]), delta, 32, reverse=False)
        starts[0][:, 1:] += delta
        return
    step = [torch.zeros_like(g[:, 0]) for g in gaps]
    for j in range(gaps[0].shape[1]):
        moved = cell.recur.move([t[:, :, j] for t in tangents], step)
        step = [m + g[:, j] for m, g in zip(moved, gaps, strict=True)]
        for start, d in zip(starts, step, strict=True):
            start[:, j + 1] += d


def _newton(
    cell: GRU | LSTM, steps: Steps, state: Parts, outs: Parts, tolerance: float, most: int
) -> tuple[Parts | None, int, float]:
    """Solve one block; returns the last state (None when it did not converge), corrections made, final residual."""
    starts = [s.new_zeros(s.shape[0], steps.n, *s.shape[1:]) for s in state]
    for start, s in zip(starts, state, strict=True):
        start[:, 0] = s
    # the first guess of ParaRNN, f(0, x), for chunks: walk each from zero
    for start, end in zip(starts, steps.guess(cell, starts), strict=True):
        start[:, 1:] = end[:, :-1]
    # a chunk forgets most of its start; while that alone brings the next residual down, no derivative is needed
    tangent, before, residual = steps.chunk == 1, 1.0, float("inf")
    for count in range(most + 1):
        ends, tangents = steps.push(cell, starts, outs) if tangent else (steps.walk(cell, starts, outs), [])
        gaps, residual = _gaps(ends, starts)
        if residual <= tolerance:
            return [e[:, -1] for e in ends], count, residual
        if residual == float("inf") or count == most:
            break
        if tangent:
            _close(cell, starts, gaps, tangents)
        else:
            for start, end in zip(starts, ends, strict=True):
                start[:, 1:] = end[:, :-1]
        tangent = tangent or residual * residual / before > tolerance
        before = residual
    return None, count, residual


def forward(
    x_BTGU: Tensor,
    r: Tensor,
    peephole: Tensor | None,
    h0_SPU: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell_name: str,
    chunk: int,
    block: int,
    tolerance: float,
    most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve all tokens, one block of time after the other.

    Returns:
        h [B, T, U], c or the GRU's candidates [B, T, U], last state [S, P, U], in the state dtype;
        per block of time the corrections made (int32; -1: walked without trying) and the last residual.
    """
    dtype = state_dtype(x_BTGU.dtype)
    x = x_BTGU.to(dtype)
    batch, length, _, *units = x.shape
    diagonal = r.dim() == x.dim() - 2
    cell = cell_of(cell_name, r.to(dtype), None if peephole is None else peephole.to(dtype), is_diagonal=diagonal)
    layout = Layout.of(batch, length, reset, cu_seqlens)
    starts = initial_parts(h0_SPU, x, layout.rows, cell.parts)
    outs = [x.new_empty(batch, length, *units) for _ in range(2)]
    state = starts if cu_seqlens is None else [torch.zeros_like(s[:1]) for s in starts]
    span = block or length
    counts, residuals = [-1] * -(-length // span), [0.0] * -(-length // span)
    for k, begin in enumerate(range(0, length, span)):
        end = min(begin + span, length)
        n = (end - begin) // chunk if block and most > 0 else 0
        solved = begin
        if n >= 2:
            steps = Steps(x, begin, n, chunk, layout, starts)
            views = [o[:, begin : begin + n * chunk].unflatten(1, (n, chunk)) for o in outs]
            found, counts[k], residuals[k] = _newton(cell, steps, state, views, tolerance, most)
            if found is not None:
                state, solved = found, begin + n * chunk
        if solved < end:
            steps = Steps(x, solved, 1, end - solved, layout, starts)
            views = [o[:, None, solved:end] for o in outs]
            state = [e[:, 0] for e in steps.walk(cell, [s[:, None] for s in state], views)]
    final = torch.stack(starts, dim=1)
    for b, t, s in layout.ends:
        final[s] = torch.stack([o[b, t] for o in outs[: cell.parts]])
    h, aside = outs if cell.parts == 1 else outs[::-1]
    report = (torch.tensor(counts, dtype=torch.int32), torch.tensor(residuals, dtype=torch.float32))
    return h, aside, final, report[0].to(x.device), report[1].to(x.device)
