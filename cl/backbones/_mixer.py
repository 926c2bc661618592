"""What moves information between the tokens of a block: the interface of everything in `cl/backbones/mixers/`.

    y, state = mixer(x, state, reset=reset, mode="chunk")

x and y are (B, T, D), y_t a function of x_1 .. x_t. `reset` (B, T) is True where a document starts: nothing before it
may be seen from there on. `state` is what earlier tokens left behind; with it a text may be read in pieces, cut
anywhere, and the pieces give what the whole gives. "recurrent" reads token by token, as the paper writes it; "chunk"
is the fast way to the same numbers. A forward changes nothing in the module: what outlives a batch is written by
`commit` alone.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cl.backbones._state import State
from cl.core import UserError

MODES = ("chunk", "recurrent")


@dataclass(frozen=True)
class Lifetime:
    """What of a mixer changes when; its parameters are what the optimizer changes (slow).

    Args:
        fast: entries of its state: they change with every token, and a checkpoint in mid-document needs them. No row
            of a batch, and so no task, begins with any of them.
        resets: those that a document start clears; None means all of them.
        kept: buffers that outlive a batch and a task, or parts with all of theirs: only `commit` writes them, and every
            checkpoint holds them.
    """

    fast: tuple[str, ...]
    resets: tuple[str, ...] | None = None
    kept: tuple[str, ...] = ()

    @property
    def cleared(self) -> tuple[str, ...]:
        return self.fast if self.resets is None else self.resets


class Mixer(nn.Module):
    """Base of every mixer; subclasses define `init_state` and `piece`, or all of `forward`.

    Class attributes:
        lifetime: what changes when.
        examples: block strings that the tests of all mixers run, small ones; the mixer's own name when empty.
    """

    lifetime: ClassVar[Lifetime]
    examples: ClassVar[tuple[str, ...]] = ()

    def init_state(self, num_rows: int) -> State:
        """What is remembered before the first token."""
        raise NotImplementedError(f"{type(self).__name__} must define init_state")

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, reset: Tensor | None = None, mode: str = "chunk"
    ) -> tuple[Tensor, State]:
        """Read x after `state`, or from the start; in "recurrent" mode one token after the other."""
        require_mode(mode)
        if mode == "recurrent" and x_BTD.shape[1] > 1:
            return self.token_by_token(x_BTD, state, reset)
        return self.piece(x_BTD, self.init_state(x_BTD.shape[0]) if state is None else state, reset, mode)

    def piece(self, x_BTD: Tensor, state: State, reset: Tensor | None, mode: str) -> tuple[Tensor, State]:
        """Read x in "chunk" mode, or a single token in "recurrent" mode."""
        raise NotImplementedError(f"{type(self).__name__} must define piece")

    def commit(self, state: State) -> None:
        """After the optimizer step of a training batch: write what outlives it, from the state it left behind."""

    @property
    def commits(self) -> bool:
        """Whether `commit` does anything, here or further in."""
        return any(type(m).commit is not Mixer.commit for m in self.modules() if isinstance(m, Mixer))

    def fresh(self, *shape: int) -> Tensor:
        """Zeros as a state is kept: float32 (float64 for a double model), on the device of the weights."""
        p = next(self.parameters())
        return torch.zeros(shape, dtype=torch.promote_types(torch.float32, p.dtype), device=p.device)

    def token_by_token(self, x_BTD: Tensor, state: State | None, reset_BT: Tensor | None) -> tuple[Tensor, State]:
        """`forward` of one token at a time, in "recurrent" mode: the oracle of a mixer whose step is its forward."""
        outputs = []
        for t in range(x_BTD.shape[1]):
            reset_B1 = None if reset_BT is None else reset_BT[:, t : t + 1]
            y_B1D, state = self.forward(x_BTD[:, t : t + 1], state, reset=reset_B1, mode="recurrent")
            outputs.append(y_B1D)
        assert state is not None
        return torch.cat(outputs, 1), state


def in_full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Autocast switched off, around kernels and steps: memories are kept and computed in float32.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), in_full_precision(torch.ones(1)):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    return torch.autocast(x.device.type, enabled=False)


def require_mode(mode: str) -> None:
    """Raise `UserError` unless the mode is a known one."""
    if mode not in MODES:
        raise UserError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
