"""Every op on a card that is pretended: what the token loop and chunked torch make lies where the inputs do."""

import kernel_properties as props
import pytest
import torch
from all_cases import ALL, each
from kernel_properties import OFFSETS

from cl.testing import CARD, pretended_card


def on_card(case, given, **options):
    with pretended_card():
        found = props.tensors_of(case, {name: x.to(CARD) for name, x in given.items()}, **options)
        assert all(x.device == CARD for x in found)
        return [x.cpu() for x in found]


@each(ALL)
@pytest.mark.parametrize(("backend", "length"), [("chunked", 20), ("reference", 4)])
def test_numbers_are_those_of_the_processor(case, backend, length):
    given = props.cast(props.draw(case, length), torch.float32)
    expected = props.tensors_of(case, given, backend=backend)
    for x, y in zip(on_card(case, given, backend=backend), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


@each(ALL)
def test_packed_sequences(case):
    given = props.cast(props.draw(case, OFFSETS[-1], "cos 0.5", OFFSETS), torch.float32)
    borders = torch.tensor(OFFSETS)
    expected = props.tensors_of(case, given, backend="chunked", cu_seqlens=borders)
    with pretended_card():
        there = borders.to(CARD)
    for x, y in zip(on_card(case, given, backend="chunked", cu_seqlens=there), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    with pytest.raises(ValueError, match=r"cu_seqlens is on cpu but the inputs are on cuda:0"):
        on_card(case, given, backend="chunked", cu_seqlens=borders)
