"""The call as the chunkwise kernels see it: packed tensors, the chunk table, grids, and whether one launch does it all.

Legend: tensors packed [T, H, D]; states [R, H, K, V], one row per chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels.common.triton import INTERPRET, Kernel, chunk_table, host, offsets, precision
from kernels.common.varlen import num_chunks

# processors of the card that is assumed where there is none: in the interpreter and for the AOT table
PROCESSORS = 132
_FUSING: bool | None = None


@contextmanager
def fusing(choice: bool | None) -> Iterator[None]:
    """Force the fused walk on or off: for the tests, the AOT table and the check of every kernel on a card."""
    global _FUSING
    before, _FUSING = _FUSING, choice
    try:
        yield
    finally:
        _FUSING = before


def _is_hopper(device: torch.device) -> bool:
    """Hopper or later; also where there is no card, for the AOT table."""
    return device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9)


def _processors(device: torch.device) -> int:
    cuda = device.type == "cuda"
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if cuda else PROCESSORS


class Packed:
    """The call as the kernels see it: packed tensors, offsets, the chunk table and the common arguments."""

    def __init__(self, tokens: list[Tensor], g: Tensor | None, cu_seqlens: Tensor | None, width: int, chunk: int):
        q = tokens[0]
        self.tokens = [host(x.flatten(0, 1)) for x in tokens]
        self.gate = None if g is None else host(g.flatten(0, 1))
        self.rows = num_chunks(q.shape[0], q.shape[1], chunk, cu_seqlens)
        self.cu = offsets(q.shape[0], q.shape[1], cu_seqlens, q.device)
        self.sequences, self.heads, self.width_k, self.width_v = self.cu.shape[0] - 1, q.shape[2], q.shape[3], width
        self.total = q.shape[0] * q.shape[1]
        seq, first = chunk_table(self.cu, self.rows, chunk)
        channel = g is not None and g.dim() == 4
        self.walk: dict[str, Any] = {
            "g_ptr": self.tokens[0] if self.gate is None else self.gate,
            "cu_ptr": self.cu,
            "first_ptr": first,
            "H": self.heads,
            "K": self.width_k,
            "V": self.width_v,
            "HAS_GATE": g is not None,
            "CHANNEL": channel,
            "C": chunk,
            "PREC": precision(),
        }
        self.chunk = {**self.walk, "seq_ptr": seq, "S": self.sequences, "LEVELS": chunk.bit_length() - 1}
        self.fused = {name: value for name, value in self.walk.items() if name != "CHANNEL"}
        self.device = q.device

    def states(self, rows: int) -> Tensor:
        shape = (rows, self.heads, self.width_k, self.width_v)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def fuses(self, kernel: Kernel, most_k: int = 128) -> bool:
        """Whether one launch that walks over the chunks of every (sequence, head, tile of V) fills the card.

        The state, all of K by a tile of V, stays in registers: wider, in float32, with a decay per channel and on
        cards before Hopper it would spill.
        """
        fits = INTERPRET or (self.tokens[0].dtype != torch.float32 and _is_hopper(self.device))
        if self.walk["CHANNEL"] or self.width_k > most_k or not fits:
            return False
        if _FUSING is not None:
            return _FUSING
        tile = dict(kernel.rows(self.fused)[0].meta)["BV"]
        programs = self.sequences * self.heads * -(-self.width_v // tile)
        return programs >= _processors(self.device)

    # the long axis comes first: a grid's second and third end at 65535
    def walk_grid(self, meta: dict[str, int]) -> tuple[int, ...]:
        k, v = -(-self.width_k // meta["BK"]), -(-self.width_v // meta["BV"])
        return (self.sequences * self.heads, v, k)

    def fused_grid(self, meta: dict[str, int]) -> tuple[int, ...]:
        return (self.sequences * self.heads, -(-self.width_v // meta["BV"]))

    def value_grid(self, meta: dict[str, int]) -> tuple[int, ...]:
        return (self.rows, -(-self.width_v // meta["BV"]), self.heads)

    def key_grid(self, meta: dict[str, int]) -> tuple[int, ...]:
        return (self.rows, -(-self.width_k // meta["BK"]), self.heads)
