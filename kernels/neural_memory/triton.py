"""Linear memory without momentum on Triton, composed of the chunk kernels of gated linear attention.

With the gradients of a chunk taken at its start M, the chunk is linear attention from the state with the corrections
beta (v - k M) in the place of v: one matrix product and one call of that op per chunk of the model, however long; the
kernels' own chunks subdivide it. There is no kernel of its own here.
"""

from functools import partial

from torch import Tensor

from kernels.gated_linear_attention import gated_linear_attention
from kernels.neural_memory.model import Model
from kernels.neural_memory.schedule import Advance, Piece

# the kernels cut a chunk themselves
PIECE = None


def _advance(
    piece: Piece, now: tuple[Tensor, ...], momentum: tuple[Tensor, ...], start: tuple[Tensor, ...], *, backend: str
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    corrections = piece.beta * (piece.v - piece.k @ start[0])
    q, k, d = (x.transpose(1, 2) for x in (piece.q, piece.k, corrections))
    g = None if piece.g is None else piece.g[..., 0].transpose(1, 2)
    out, after = gated_linear_attention(q, k, d, g, scale=1.0, initial_state=now[0], backend=backend)
    return out.transpose(1, 2), (after,), momentum


def advance(model: Model, backend: str = "triton") -> Advance:
    """The step of `schedule.run`; `model` is the plain one, see `kernels.neural_memory`."""
    return partial(_advance, backend=backend)
