"""Where sequences begin and end in the rows of a call, and the states they begin with.

Legend: B batch, T time, G gates, U units ([N] or [H, D]), P parts of the state, S sequences.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.newton_rnn.cells import Parts


class Mark(NamedTuple):
    """A token before which the state is replaced: by the initial state of sequence `s`, or by zero (s = -1)."""

    b: int
    t: int
    s: int


@dataclass
class Layout:
    """Where sequences begin and end: the marks in order of time, and the last token of every non-empty sequence."""

    marks: list[Mark]
    ends: list[Mark]
    rows: int

    @staticmethod
    def of(batch: int, length: int, reset: Tensor | None, cu_seqlens: Tensor | None) -> "Layout":
        flags = [] if reset is None else reset.bool().nonzero().tolist()
        if cu_seqlens is None:
            ends = [Mark(b, length - 1, b) for b in range(batch)]
            return Layout(sorted((Mark(b, t, -1) for b, t in flags), key=lambda m: m.t), ends, batch)
        offsets = cu_seqlens.tolist()
        alive = [s for s in range(len(offsets) - 1) if offsets[s + 1] > offsets[s]]
        at = {offsets[s]: Mark(0, offsets[s], s) for s in alive}
        at |= {t: Mark(0, t, -1) for _, t in flags}
        return Layout([at[t] for t in sorted(at)], [Mark(0, offsets[s + 1] - 1, s) for s in alive], len(offsets) - 1)

    def within(self, begin: int, end: int) -> list[Mark]:
        return [m for m in self.marks if begin <= m.t < end]


def initial(start_SU: Tensor, s: Tensor) -> Tensor:
    """Initial states of the given sequences, zero for -1."""
    picked = start_SU[s.clamp(min=0)]
    return picked.masked_fill_((s < 0).view(-1, *[1] * (picked.dim() - 1)), 0)


def initial_parts(h0_SPU: Tensor | None, x_BTGU: Tensor, sequences: int, parts: int) -> Parts:
    """Initial states of all sequences, per part of the state."""
    dtype = state_dtype(x_BTGU.dtype)
    if h0_SPU is None:
        h0_SPU = x_BTGU.new_zeros(sequences, parts, *x_BTGU.shape[3:], dtype=dtype)
    return list(h0_SPU.to(dtype).unbind(1))
