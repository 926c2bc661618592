"""Neural memory on Triton, chunk after chunk: one launch per layer for what is read and for the weights afterwards.

The rest of a chunk, the keys through the weights of its start and the slopes, are matrix products under autograd. A
linear memory without momentum needs no kernel of its own: with the gradients of a chunk taken at its start M, the chunk
is linear attention from the state with the corrections beta (v - k M) in the place of v, one call of that op per chunk
of the model, however long.
"""

from functools import partial

from torch import Tensor

from kernels.gated_linear_attention import gated_linear_attention
from kernels.neural_memory import chunked
from kernels.neural_memory.model import Model
from kernels.neural_memory.schedule import Advance, Piece
from kernels.neural_memory.triton_layer import layer


def _attend(
    piece: Piece, now: tuple[Tensor, ...], momentum: tuple[Tensor, ...], start: tuple[Tensor, ...], *, backend: str
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    corrections = piece.beta * (piece.v - piece.k @ start[0])
    q, k, d = (x.transpose(1, 2) for x in (piece.q, piece.k, corrections))
    g = None if piece.g is None else piece.g[..., 0].transpose(1, 2)
    out, after = gated_linear_attention(q, k, d, g, scale=1.0, initial_state=now[0], backend=backend)
    return out.transpose(1, 2), (after,), momentum


def engine(model: Model, is_plain: bool) -> tuple[Advance, int | None]:
    """The step of `schedule.run` and the most tokens of a piece, but for the kernels of linear attention, which cut a
    chunk themselves; `is_plain`: one layer, l2, no momentum, no norm.
    """
    if is_plain:
        return partial(_attend, backend="triton"), None
    return partial(chunked.advance, model=model, layer=layer), chunked.PIECE
