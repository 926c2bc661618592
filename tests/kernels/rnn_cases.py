"""The nonlinear recurrences as cases for the shared properties: how to draw them, which inputs have no time axis."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kernel_properties import DECAYS, DISTRIBUTIONS, KEYS, Inputs, OpCase
from torch import Tensor

from kernels.newton_rnn import newton_rnn
from kernels.sequential_rnn import m2rnn, sequential_rnn
from kernels.sequential_rnn.reference import GATES, PARTS

HEADS, WIDTH, K, V = 2, 3, 5, 3
# what is the same for all tokens
TIMELESS = ("r", "bias", "peephole", "w")
# recurrent weights in +-scale; beyond 2 the recurrences are chaotic and float32 cannot follow float64
SCALES = dict(zip(DISTRIBUTIONS, (0.5, 1.0, 1.5, 2.0), strict=True))


def _uniform(gen: torch.Generator, shape: tuple[int, ...], scale: float) -> Tensor:
    return (2 * torch.rand(shape, generator=gen, dtype=torch.float64) - 1) * scale


def _newton(cell: str, is_block: bool) -> Callable[..., tuple[Inputs, Tensor]]:
    def draw(gen: torch.Generator, batch: int, length: int, sequences: int, kind: str) -> tuple[Inputs, Tensor]:
        rand = {"generator": gen, "dtype": torch.float64}
        x = torch.randn(batch, length, 3, HEADS, WIDTH, **rand)
        if "slow" in kind:
            # long memories: a small update gate, a large forget gate
            x[:, :, 0] += 3 if cell == "lstm" else -3
        shape = (3, HEADS, WIDTH, WIDTH) if is_block else (3, HEADS, WIDTH)
        inputs = {"x": x, "r": _uniform(gen, shape, SCALES[kind] / (WIDTH**0.5 if is_block else 1))}
        if cell == "lstm":
            inputs["peephole"] = _uniform(gen, (2, HEADS, WIDTH), SCALES[kind])
        parts = (2,) if cell == "lstm" else ()
        return inputs, torch.randn(sequences, *parts, HEADS, WIDTH, **rand)

    return draw


def _sequential(cell: str) -> Callable[..., tuple[Inputs, Tensor]]:
    def draw(gen: torch.Generator, batch: int, length: int, sequences: int, kind: str) -> tuple[Inputs, Tensor]:
        rand = {"generator": gen, "dtype": torch.float64}
        gates, parts = GATES[cell], PARTS[cell]
        inputs = {"x": torch.randn(batch, length, gates, HEADS, WIDTH, **rand)}
        inputs["r"] = _uniform(gen, (gates, HEADS, WIDTH, WIDTH), SCALES[kind] / WIDTH**0.5)
        inputs["bias"] = torch.randn(gates, HEADS, WIDTH, **rand)
        state = torch.randn(sequences, *((parts,) if parts > 1 else ()), HEADS, WIDTH, **rand)
        if parts == 4:
            # the normaliser is a sum of what was written: positive
            state[:, 1] = 0.5 + state[:, 1].abs()
        return inputs, state

    return draw


def _m2rnn(gen: torch.Generator, batch: int, length: int, sequences: int, kind: str) -> tuple[Inputs, Tensor]:
    rand = {"generator": gen, "dtype": torch.float64}
    inputs = {name: torch.randn(batch, length, HEADS, K, **rand) for name in ("q", "k")}
    inputs["v"] = torch.randn(batch, length, HEADS, V, **rand)
    inputs["f"] = torch.sigmoid(torch.randn(batch, length, HEADS, **rand) + DISTRIBUTIONS[kind][1] - 2)
    inputs["w"] = _uniform(gen, (HEADS, V, V), SCALES[kind] / V**0.5)
    return inputs, torch.randn(sequences, HEADS, K, V, **rand)


def _without_chunk(op: Any, **how: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same op for tests that pass a chunk to everything."""
    return lambda *, chunk=None, **given: op(**how, **given)


_case = partial(OpCase, timeless=TIMELESS, chunk=8, has_reset=True, edges=("saturated",))
RNN_CASES = {
    case.name: case
    for case in (
        *(
            _case(f"newton_{b}{c}", partial(newton_rnn, cell=c), _newton(c, bool(b)))
            for b in ("", "block_")
            for c in ("gru", "lstm")
        ),
        *(
            _case(f"sequential_{c}", _without_chunk(sequential_rnn, cell=c), _sequential(c), free_chunk=False)
            for c in GATES
        ),
        _case("m2rnn", m2rnn, _m2rnn, edges=(*DECAYS, *KEYS)),
    )
}
