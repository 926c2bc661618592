"""What a mixer declares that a document start clears (docs/memory.md): noise in its place is without influence.

The same for memories around blocks is in test_segments.
"""

import pytest
import torch

from cl.backbones._spec import build_mixer, plugin, plugin_names
from cl.backbones._state import mapped
from cl.seeding import Seeds

WIDTH, HEADS, ROWS, TOKENS, START = 16, 2, 3, 13, 2
NAMES = plugin_names("mixers")


def examples(name):
    return plugin("mixers", name, "").examples or (name,)


EVERY = [
    pytest.param(words, id=words, marks=pytest.mark.slow if number > 1 else ())
    for name in NAMES
    for number, words in enumerate(examples(name))
]


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed=0, length=TOKENS):
    return drawn(seed, ROWS, length, WIDTH)


def made(words):
    with Seeds(0).as_global("init"):
        mixer = build_mixer(words, width=WIDTH, num_heads=HEADS).double()
    # what starts at zero, such as a closed gate, would hide what lies behind it
    with torch.no_grad():
        for p in mixer.parameters():
            if not p.any():
                p.copy_(0.3 * drawn(7, *p.shape))
    return mixer


def left_by(mixer, x, state=None, start=None):
    """Outputs and the state left behind, where documents start at one token of every row, or at none."""
    reset = None if start is None else (torch.arange(x.shape[1]) == start).expand(ROWS, -1)
    y, left = mixer(x, state, reset=reset)
    return y, {name: value for name, value in left.items() if name != "auxiliary"}


def numbers_of(entry):
    """Tensors of an entry of a state; those of an inner state that count tokens are its owner's to declare."""
    if not isinstance(entry, dict):
        return [entry]
    inner = [leaf for value in entry.values() for leaf in numbers_of(value)]
    return [leaf for leaf in inner if leaf.is_floating_point()]


def noised(entry):
    """Other numbers in the place of an entry."""
    is_inner = isinstance(entry, dict)

    def changed(value):
        if value.is_floating_point():
            return value + drawn(9, *value.shape)
        return value if is_inner else value + 1

    return mapped(changed, entry) if is_inner else changed(entry)


def since_start(entry, before):
    """Of an entry that keeps something of every token, what those of the last document left; all of any other."""
    for dim, (size, old) in enumerate(zip(entry.shape, before.shape, strict=True)):
        if size == old + TOKENS:
            return entry.narrow(dim, old + START, TOKENS - START)
    return entry


def differs(left, right):
    return any(not torch.equal(a, b) for a, b in zip(numbers_of(left), numbers_of(right), strict=True))


def close(left, right):
    torch.testing.assert_close(left, right, atol=1e-12, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("words", EVERY)
def test_a_document_start_clears_what_is_declared(words):
    """Noise in a cleared entry is neither seen nor left behind by what is read from there on."""
    mixer, x = made(words), tokens()
    _, before = left_by(mixer, tokens(5, 7))
    y, left = left_by(mixer, x, before, START)
    later, _ = left_by(mixer, tokens(3), left)
    for name in mixer.lifetime.cleared:
        noisy_y, noisy = left_by(mixer, x, before | {name: noised(before[name])}, START)
        close(noisy_y[:, START:], y[:, START:])
        close(left_by(mixer, tokens(3), noisy)[0], later)
        for each, wanted, old in zip(*(numbers_of(state[name]) for state in (noisy, left, before)), strict=True):
            close(since_start(each, old), since_start(wanted, old))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_document_start_clears_nothing_else(name):
    """The same noise is felt where no document starts; what is not declared counts tokens, and goes on counting."""
    mixer, x = made(examples(name)[0]), tokens()
    _, before = left_by(mixer, tokens(5, 7))
    (y, left), (_, begun) = left_by(mixer, x, before), left_by(mixer, x, before, 0)
    for entry in mixer.lifetime.fast:
        noise = before | {entry: noised(before[entry])}
        noisy_y, noisy = left_by(mixer, x, noise)
        assert not torch.equal(noisy_y, y) or differs(noisy[entry], left[entry]), f"{entry} holds nothing"
        if entry not in mixer.lifetime.cleared:
            kinds = {leaf.dtype for leaf in numbers_of(before[entry])}
            assert kinds == {torch.int64}, f"{entry} is declared to outlive its document"
            assert differs(left_by(mixer, x, noise, 0)[1][entry], begun[entry]), f"{entry} is cleared"
