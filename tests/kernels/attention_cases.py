"""Recurrent attention as cases for the shared properties, its state flattened to one tensor.

A flattened state is [sequences, numbers]: keys and values of the positions that count, the latest first, then zeros;
last how many positions count, and a zero.
"""

from typing import Any

import torch
from kernel_properties import DISTRIBUTIONS, KEYS, Inputs, OpCase, _keys
from torch import Tensor

from kernels.recurrent_attention import RecurrentAttentionState, recurrent_attention

HEADS, K, V, WIDTH, INNER, KEPT = 2, 3, 4, 6, 5, 5
WEIGHTS = ("w_out", "w_k", "w_v", "w_up", "w_down")
SIZE = HEADS * (K + V)


def flat(state: RecurrentAttentionState) -> Tensor:
    number = state.keys.shape[1]
    live = torch.arange(number, device=state.first.device) >= state.first[:, None]
    both = torch.cat([state.keys, state.values], dim=-1) * live[..., None, None]
    count = (number - state.first).to(both.dtype)[:, None]
    return torch.cat([both.flip(1).flatten(1), count, 0 * count], dim=1)


def unflat(numbers: Tensor) -> RecurrentAttentionState:
    both = numbers[:, :-2].reshape(numbers.shape[0], -1, HEADS, K + V).flip(1)
    first = both.shape[1] - numbers[:, -2].detach().long()
    return RecurrentAttentionState(*both.split([K, V], dim=-1), first)


def _case(name: str, *, inner: bool, alibi: bool) -> OpCase:
    def op(*, initial_state: Tensor | None = None, **given: Any) -> tuple[Tensor, Tensor]:
        if alibi:
            given["slopes"] = torch.tensor([0.5, 0.1], dtype=torch.float64, device=given["x"].device)
        state = None if initial_state is None else unflat(initial_state)
        y, after = recurrent_attention(**given, initial_state=state)
        return y, flat(after)

    def draw(gen: torch.Generator, batch: int, length: int, sequences: int, kind: str) -> tuple[Inputs, Tensor]:
        rand = {"generator": gen, "dtype": torch.float64}
        cosine, sharp = DISTRIBUTIONS[kind]
        inputs = {"x": torch.randn(batch, length, WIDTH, **rand)}
        # sharper softmax where others decay slowly
        inputs["q"] = torch.randn(batch, length, HEADS, K, **rand) * sharp / 2
        inputs["k"] = _keys(gen, (batch, length, HEADS, K), cosine) * K**0.5
        inputs["v"] = torch.randn(batch, length, HEADS, V, **rand)
        shapes = [(HEADS, V, WIDTH), (WIDTH, HEADS, K), (WIDTH, HEADS, V), (WIDTH, INNER), (INNER, WIDTH)]
        for weight, shape in zip(WEIGHTS[: 5 if inner else 3], shapes, strict=False):
            inputs[weight] = torch.randn(shape, **rand) / WIDTH**0.5
        state = torch.randn(sequences, KEPT * SIZE, **rand)
        # one position less counts in the first sequence
        state[0, -SIZE:] = 0
        header = torch.tensor([[KEPT - (s == 0), 0] for s in range(sequences)], dtype=torch.float64)
        return inputs, torch.cat([state, header], dim=1)

    edges = (*KEYS, "large value")
    return OpCase(
        name, op, draw, WEIGHTS, length=39, chunk=4, has_reset=True, edges=edges, has_triton=False, state_grows=True
    )


ATTENTION_CASES = {
    case.name: case
    for case in (
        _case("recurrent_attention", inner=True, alibi=False),
        _case("recurrent_attention_alibi", inner=False, alibi=True),
    )
}
