"""Packed sequences: many sequences of different lengths in one row, bounded by `cu_seqlens`.

Legend: T packed length, S number of sequences, L padded length of one group, X trailing sizes.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kernels.common.checks import state_dtype


def cu_seqlens_from_reset(reset_BT: Tensor) -> Tensor:
    """Turn "a new document starts here" flags into the offsets of the packed form of the batch.

    Row starts are always offsets. Pack the inputs by `x.flatten(0, 1)[None]`. Reads the flags, so it waits for the
    device and is not for use inside a compiled region.

    Args:
        reset_BT: bool [B, T], True where the state must be forgotten before the token is read.

    Returns:
        cu_seqlens int32 [S + 1].

    Raises:
        ValueError: not [B, T], or no token.

    Example:
        >>> cu_seqlens_from_reset(torch.tensor([[False, False, True], [False, True, False]])).tolist()
        [0, 2, 3, 4, 6]
    """
    if reset_BT.dim() != 2 or reset_BT.shape[1] < 1:
        raise ValueError(f"cu_seqlens_from_reset: reset must be [B, T] with T >= 1, got {list(reset_BT.shape)}")
    starts_BT = reset_BT.bool().clone()
    starts_BT[:, 0] = True
    ends = torch.tensor([reset_BT.numel()], device=reset_BT.device)
    return torch.cat([starts_BT.flatten().nonzero().flatten(), ends]).to(torch.int32)


def per_sequence(
    fn: Callable[..., tuple[Tensor, Tensor]],
    tokens_BTX: Sequence[Tensor | None],
    state_SX: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Call `fn(*tokens, state)` for each sequence alone and join the results (the definition of varlen)."""
    outs, finals = [], []
    for s, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        part = [None if x is None else x[:, begin:end] for x in tokens_BTX]
        out, final = fn(*part, None if state_SX is None else state_SX[s : s + 1])
        outs.append(out)
        finals.append(final)
    return torch.cat(outs, dim=1), torch.cat(finals)


def num_chunks(batch: int, length: int, chunk: int, cu_seqlens: Tensor | None) -> int:
    """Rows needed to keep one state per chunk; for packed rows an upper bound that needs no look at the lengths."""
    if cu_seqlens is None:
        return batch * -(-length // chunk)
    return length // chunk + cu_seqlens.shape[0] - 1


def empty_outputs(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What an op with a K x V state per head returns, without its values: outputs, last states, states of chunks."""
    shape, dtype = (q.shape[2], q.shape[3], v.shape[3]), state_dtype(v.dtype)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = (num_chunks(q.shape[0], q.shape[1], chunk, cu_seqlens), *shape) if save else (0,)
    return v.new_empty(v.shape), v.new_empty(sequences, *shape, dtype=dtype), v.new_empty(rows, dtype=dtype)


def chunk_offsets(cu_seqlens: Tensor, chunk: int) -> Tensor:
    """First chunk row of every sequence, and the total: int64 [S + 1]."""
    lengths = cu_seqlens.long().diff()
    return torch.nn.functional.pad(((lengths + chunk - 1) // chunk).cumsum(0), (1, 0))


def states_before(states_TX: Tensor, cu: Tensor, start_SX: Tensor | None, reset: Tensor | None) -> Tensor:
    """The state that every packed token started from, given those after every token; waits for nothing."""
    token = torch.arange(states_TX.shape[0], device=states_TX.device)
    # of an empty sequence no token is the first
    owner = torch.searchsorted(cu, token, right=True) - 1
    start = states_TX.new_zeros(cu.shape[0] - 1, *states_TX.shape[1:]) if start_SX is None else start_SX
    tail = [1] * (states_TX.dim() - 1)
    before = torch.cat([torch.zeros_like(states_TX[:1]), states_TX[:-1]])
    before = torch.where((cu[owner] == token).view(-1, *tail), start[owner].to(before.dtype), before)
    return before if reset is None else before.masked_fill(reset.flatten().bool().view(-1, *tail), 0)


class Group:
    """Sequences of similar length, padded to one length, so that a dense algorithm can run them as a batch."""

    def __init__(
        self, rows: list[int], begins: list[int], lengths: list[int], chunk_rows: list[int], chunk: int, like: Tensor
    ):
        size = [-(-length // chunk) for length in lengths]
        self.chunks = max(size)
        self.rows = torch.tensor(rows, device=like.device)
        self.tokens = _Padded(begins, lengths, self.chunks * chunk, like)
        # a sequence shorter than the group has fewer chunks of its own; its surplus rows are never stored
        self.states = _Padded(chunk_rows, size, self.chunks, like)

    def gather(self, x_BTX: Tensor | None) -> Tensor | None:
        """Rows of the packed tensor as [S, L, X], zeros in the padding (a zero token changes no state)."""
        return None if x_BTX is None else self.tokens.take(x_BTX[0])

    def scatter(self, out_BTX: Tensor, padded_SLX: Tensor) -> None:
        """Write the valid part of [S, L, X] back to its packed place."""
        self.tokens.put(out_BTX[0], padded_SLX)

    def take_chunks(self, states_RX: Tensor) -> Tensor:
        """Saved chunk states as [S, N, X]."""
        return self.states.take(states_RX)

    def put_chunks(self, states_RX: Tensor, padded_SNX: Tensor) -> None:
        """Store chunk states of [S, N, X] in their packed rows."""
        self.states.put(states_RX, padded_SNX)


class _Padded:
    """Stretches of packed rows side by side: S of them, padded to L rows. Whole rows are copied as they lie."""

    def __init__(self, begins: list[int], lengths: list[int], longest: int, like: Tensor):
        position = torch.arange(longest)[None]
        valid_SL = position < torch.tensor(lengths)[:, None]
        index_SL = (torch.tensor(begins)[:, None] + position) * valid_SL
        self.shape = index_SL.shape
        self.index, self.packed = index_SL.flatten().to(like.device), index_SL[valid_SL].to(like.device)
        self.own, self.padding = (each.flatten().nonzero()[:, 0].to(like.device) for each in (valid_SL, ~valid_SL))

    def take(self, x_RX: Tensor) -> Tensor:
        """[S, L, X], zeros in the padding."""
        padded = x_RX.index_select(0, self.index)
        return padded.index_fill_(0, self.padding, 0).view(*self.shape, *x_RX.shape[1:])

    def put(self, out_RX: Tensor, padded_SLX: Tensor) -> None:
        """The rows of [S, L, X] that are no padding, where they belong."""
        rows = padded_SLX[:, : self.shape[1]].flatten(0, 1)
        out_RX.index_copy_(0, self.packed, rows.index_select(0, self.own))


def groups(cu_seqlens: Tensor, chunk: int) -> Iterator[Group]:
    """Bucket the non-empty sequences by the power of two of their chunk count: padding at most doubles the work."""
    offsets = cu_seqlens.tolist()
    first_chunk = chunk_offsets(cu_seqlens, chunk).tolist()
    buckets: dict[int, list[int]] = {}
    for s, (begin, end) in enumerate(pairwise(offsets)):
        if end > begin:
            buckets.setdefault((-(-(end - begin) // chunk) - 1).bit_length(), []).append(s)
    for rows in buckets.values():
        yield Group(
            rows,
            [offsets[s] for s in rows],
            [offsets[s + 1] - offsets[s] for s in rows],
            [first_chunk[s] for s in rows],
            chunk,
            cu_seqlens,
        )
