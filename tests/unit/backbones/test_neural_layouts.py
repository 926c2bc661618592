"""How a neural memory works alone and with attention: each layout by hand, one head, token by token."""

import pytest
import torch

from cl.backbones._spec import build_mixer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def attended(q_TK, keys, values):
    """Token t over keys[t], values[t], lists of vectors."""
    outs = []
    for q, k, v in zip(q_TK, keys, values, strict=True):
        weights = torch.softmax(torch.stack([q @ each for each in k]) / q.shape[0] ** 0.5, 0)
        outs.append(sum(w * each for w, each in zip(weights, v, strict=True)))
    return torch.stack(outs)


def turned(x, place, base=10_000.0):
    if base is None:
        return x
    half = x.shape[0] // 2
    angle = place * base ** (-torch.arange(half, dtype=torch.float64) / half)
    left, right = x[:half], x[half:]
    return torch.cat((left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()))


@pytest.mark.parametrize(("memory", "num_heads"), [("depth=1", 1), ("expansion=2", 2)])
def test_plain_layout_by_hand(memory, num_heads, plain):
    """Every weight from the token to the output, and the gradient that torch finds through it."""
    words = f"neural_memory(rule=titans(chunk=3, {memory}, max_step=0.9), conv=2)"
    mixer = build_mixer(words, 4, num_heads=num_heads).double()
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    y, expected = mixer(x)[0], plain.titans(dict(mixer.named_parameters()), x, num_heads, chunk=3, max_step=0.9)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    weights = list(mixer.parameters())
    found, wanted = (torch.autograd.grad(each.square().sum(), weights) for each in (y, expected))
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


bases = pytest.mark.parametrize("base", [10_000.0, None])
"""Of the rotary angles; none, as in Gpt, gives no positions."""


@bases
def test_memory_as_context_by_hand(base):
    """One head, two segments of three tokens: attention over persistent, recalled and seen, in causal order."""
    words = "neural_memory(rule=titans(chunk=3, depth=1), layout=mac, num_persistent=2, conv=0)"
    mixer = build_mixer(words, 4, num_heads=1, rope_base=base).double()
    x, core, branch = torch.randn(1, 6, 4, dtype=torch.float64), mixer.context, mixer.memory
    memory, outs = branch.init_state(1), []
    for begin in (0, 3):
        segment = x[:, begin : begin + 3]
        recalled = branch.finish(
            branch.rule.ask(memory["rule"]["weights"], branch.rule.features(branch.query(segment).unsqueeze(2))),
            segment,
        )
        pk, pv = list(core.persistent_key[0]), list(core.persistent_value[0])
        q = [turned(core.query(segment)[0, t], t, base) for t in range(3)]
        keys, values = [], []
        for t in range(3):
            seen = [(source[0, s], s) for source in (recalled, segment) for s in range(t + 1)]
            keys.append(pk + [turned(core.key(each), s, base) for each, s in seen])
            values.append(pv + [core.value(each) for each, s in seen])
        a = core.mix(attended(q, keys, values)).unsqueeze(0)
        o, memory = branch(a, memory, None, "recurrent")
        outs.append(a * o.sigmoid())
    torch.testing.assert_close(mixer(x)[0], mixer.out(torch.cat(outs, 1)), atol=1e-10, rtol=1e-10)


def test_the_second_segment_recalls_the_first():
    mixer = build_mixer("neural_memory(rule=titans(chunk=4), layout=mac, conv=0)", 8, num_heads=2)
    x = torch.randn(1, 8, 8)
    other = torch.cat((torch.randn(1, 4, 8), x[:, 4:]), 1)
    assert (mixer(x)[0][:, 4:] - mixer(other)[0][:, 4:]).abs().max() > 1e-6


@bases
@pytest.mark.parametrize("layout", ["mag", "mal"])
def test_windows_with_persistent_tokens_by_hand(layout, base):
    words = f"neural_memory(rule=titans(chunk=3, depth=1), layout={layout}, num_persistent=2, window=2)"
    mixer = build_mixer(words, 4, num_heads=1, rope_base=base).double()
    x, attention = torch.randn(1, 7, 4, dtype=torch.float64), mixer.attention
    o, _ = mixer.memory(x, mixer.memory.init_state(1), None, "recurrent")
    read = (x if layout == "mag" else o)[0]
    pk, pv = list(attention.persistent_key[0]), list(attention.persistent_value[0])
    q = [turned(attention.query(read[t]), t + 1, base) for t in range(7)]
    windows = [range(max(0, t - 1), t + 1) for t in range(7)]
    keys = [pk + [turned(attention.key(read[s]), s + 1, base) for s in window] for window in windows]
    values = [pv + [attention.value(read[s]) for s in window] for window in windows]
    a = attended(q, keys, values).unsqueeze(0)
    expected = mixer.out(a if layout == "mal" else mixer.norm(a) * o.sigmoid())
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-10, rtol=1e-10)
