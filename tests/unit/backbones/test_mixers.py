"""What every mixer in cl/backbones/mixers/ must keep, whatever it remembers; found by listing the folder."""

import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from cl import backbones
from cl.backbones._mixer import Mixer
from cl.backbones._spec import build_mixer, plugin, plugin_names
from cl.backbones._state import detached, mapped, rows_of
from cl.backbones.gpt import Gpt
from cl.core import Batch, Setting, StreamInfo, UserError
from cl.seeding import Seeds
from cl.state import tensor_bytes

WIDTH, HEADS, ROWS, TOKENS = 16, 2, 3, 13
NAMES = plugin_names("mixers")
FAST = 2
"""Examples of a mixer that are run at once; the others are slow ones."""


def examples():
    for name in NAMES:
        for number, words in enumerate(plugin("mixers", name, "").examples or (name,)):
            yield pytest.param(words, id=words, marks=pytest.mark.slow if number >= FAST else ())


every_mixer = pytest.mark.parametrize("words", list(examples()))


def made(words, dtype=torch.float64):
    with Seeds(0).as_global("init"):
        mixer = build_mixer(words, width=WIDTH, num_heads=HEADS).to(dtype)
    # what starts at zero, such as a closed gate, would hide what lies behind it
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in mixer.parameters():
            if not p.any():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return mixer


def tokens(seed=0, rows=ROWS, length=TOKENS, dtype=torch.float64):
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def documents(rows=ROWS, length=TOKENS):
    """Borders in the middle, at both ends, next to each other, and nowhere (the last row)."""
    reset = torch.zeros(rows, length, dtype=torch.bool)
    reset[0, 5] = reset[0, 6] = reset[1, 0] = reset[1, 9] = reset[0, length - 1] = True
    return reset


def remembered(mixer, dtype=torch.float64, rows=ROWS):
    """A state that holds something: what seven tokens leave behind."""
    with torch.no_grad():
        return without_terms(mixer(tokens(5, rows, 7, dtype))[1])


def without_terms(state):
    return {name: value for name, value in state.items() if name != "auxiliary"}


def leaves(state):
    return [leaf for value in state.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


def close(left, right, tolerance=1e-10):
    """Within a tolerance relative to the largest number."""
    assert left.shape == right.shape
    if left.numel():
        assert (left - right).abs().max() <= tolerance * max(1.0, right.abs().max().item())


def same_state(left, right, tolerance=1e-10):
    left, right = without_terms(left), without_terms(right)
    assert left.keys() == right.keys()
    for name in left:
        if isinstance(left[name], dict):
            same_state(left[name], right[name], tolerance)
        elif left[name].is_floating_point():
            close(left[name], right[name], tolerance)
        else:
            assert torch.equal(left[name], right[name])


@every_mixer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_chunk_is_recurrent(words, dtype):
    """Outputs, last state and every gradient, from a state that holds something and across documents."""
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    mixer, found = made(words, dtype), []
    before = remembered(mixer, dtype)
    for mode in ("chunk", "recurrent"):
        x = tokens(dtype=dtype).requires_grad_()
        start = mapped(lambda s: s.clone().requires_grad_(s.is_floating_point()), before)
        y, state = mixer(x, start, reset=documents(), mode=mode)
        ends = [leaf for leaf in leaves(without_terms(state)) if leaf.is_floating_point() and leaf.requires_grad]
        loss = (y * tokens(1, dtype=dtype)).sum() + sum(0.1 * end.sin().sum() for end in ends)
        inputs = [x, *(leaf for leaf in leaves(start) if leaf.requires_grad), *mixer.parameters()]
        found.append((y, state, torch.autograd.grad(loss, inputs, allow_unused=True)))
    (y, state, gradients), (slow_y, slow_state, slow_gradients) = found
    close(y, slow_y, tolerance)
    same_state(state, slow_state, tolerance)
    for fast, slow in zip(gradients, slow_gradients, strict=True):
        if fast is None or slow is None:
            # a way of computing may not even look at what does not matter
            assert all(each is None or not each.any() for each in (fast, slow))
        else:
            close(fast, slow, 10 * tolerance)


@every_mixer
@pytest.mark.parametrize("length", [1, 37])
def test_chunk_is_recurrent_at_other_lengths(words, length):
    """One token, and chunks with a rest; without documents."""
    mixer, x = made(words), tokens(2, 2, length)
    with torch.no_grad():
        y, state = mixer(x)
        slow_y, slow_state = mixer(x, mode="recurrent")
    close(y, slow_y)
    same_state(state, slow_state)


@every_mixer
@pytest.mark.parametrize(
    ("cuts", "has_documents"), [([1] * TOKENS, True), ([4, 1, 6, 2], True), ([12, 1], False)], ids=["1", "4", "12"]
)
def test_pieces_give_the_whole(words, cuts, has_documents):
    mixer, x, reset = made(words), tokens(), documents()
    with torch.no_grad():
        whole, last = mixer(x, reset=reset if has_documents else None)
        state, pieces = mixer.init_state(ROWS), []
        for piece, border in zip(x.split(cuts, 1), reset.split(cuts, 1), strict=True):
            y, state = mixer(piece, without_terms(state), reset=border if has_documents else None)
            pieces.append(y)
    close(torch.cat(pieces, 1), whole)
    same_state(state, last)


@every_mixer
def test_nothing_leaks_from_the_future(words):
    """In training mode and with a memory that holds something."""
    mixer = made(words).train()
    before, x = remembered(mixer), tokens()
    with torch.no_grad():
        y, _ = mixer(x, before, reset=documents())
        for t in (1, 8, TOKENS - 1):
            other = x.clone()
            other[:, t] += 1.0
            changed, _ = mixer(other, before, reset=documents())
            close(changed[:, :t], y[:, :t], 1e-12)
            assert (changed[:, t] - y[:, t]).abs().max() > 1e-6


@every_mixer
def test_documents_are_read_as_if_alone(words):
    """Neither outputs nor what is remembered at the end know of the documents before."""
    mixer, x, reset = made(words), tokens(), documents()
    with torch.no_grad():
        whole, last = mixer(x, remembered(mixer), reset=reset)
        later, _ = mixer(tokens(3), without_terms(last))
        for row in range(ROWS):
            starts = reset[row].nonzero().flatten().tolist()
            for low, high in zip(starts, [*starts[1:], TOKENS][: len(starts)], strict=True):
                alone, end = mixer(x[row : row + 1, low:high])
                close(whole[row : row + 1, low:high], alone)
            if starts:
                close(later[row : row + 1], mixer(tokens(3)[row : row + 1], without_terms(end))[0])


@every_mixer
def test_rows_do_not_see_each_other(words):
    mixer, x, order = made(words), tokens(), torch.tensor([2, 0, 1])
    before = remembered(mixer)
    with torch.no_grad():
        y, state = mixer(x, before, reset=documents())
        permuted, other = mixer(x[order], rows_of(before, order), reset=documents()[order])
        alone, _ = mixer(x[1:2], rows_of(before, slice(1, 2)), reset=documents()[1:2])
    close(permuted, y[order])
    same_state(other, rows_of(without_terms(state), order))
    close(alone, y[1:2])


@every_mixer
def test_a_saved_state_goes_on_bit_for_bit(words):
    mixer = made(words, torch.float32)
    state, file = remembered(mixer, torch.float32), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    with torch.no_grad():
        left, right = mixer(tokens(dtype=torch.float32), state), mixer(tokens(dtype=torch.float32), loaded)
    assert torch.equal(left[0], right[0])
    same_state(left[1], right[1], 0.0)


@every_mixer
def test_truncation_is_exact(words):
    """No gradient of later tokens reaches those before `detached`, and some does without it."""
    mixer, x = made(words), tokens().requires_grad_()
    _, state = mixer(x[:, :6])
    for cut, keep in ((detached, False), (dict, True)):
        y, _ = mixer(x[:, 6:], cut(without_terms(state)))
        (gradient,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        assert gradient[:, 6:].abs().max() > 0
        assert (gradient[:, :6].abs().max() > 0) == keep


@every_mixer
def test_lifetimes_are_what_is_declared(words):
    """Fast is what the state holds; slow is what the optimizer sees; forward writes nothing that is kept."""
    mixer = made(words).train()
    lifetime, saved = mixer.lifetime, {name: p.clone() for name, p in mixer.state_dict().items()}
    assert set(mixer.init_state(ROWS)) == set(lifetime.fast)
    y, state = mixer(tokens(), reset=documents())
    assert set(without_terms(state)) == set(lifetime.fast)
    assert set(lifetime.cleared) <= set(lifetime.fast)
    assert all(torch.equal(value, saved[name]) for name, value in mixer.state_dict().items()), "forward must be pure"
    assert set(lifetime.kept) <= {name for name, _ in mixer.named_buffers()}
    assert mixer.commits == bool(lifetime.kept), "commit writes what `kept` names, and nothing else does"
    y.square().sum().backward()
    still = [name for name, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still, f"no gradient reaches {still}"


@every_mixer
def test_state_is_single_precision_under_bfloat16(words):
    mixer, x = made(words, torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x, remembered(mixer, torch.float32), reset=documents())
    y.float().square().sum().backward()
    floats = {leaf.dtype for leaf in leaves(without_terms(state)) if leaf.is_floating_point()}
    assert floats <= {torch.float32}
    exact, _ = mixer(x, remembered(mixer, torch.float32), reset=documents())
    # in the mean over numbers: a memory that learns while it reads can carry one rounding far
    assert (y.float() - exact).norm() < 0.1 * exact.norm()
    assert all(p.grad.isfinite().all() for p in mixer.parameters() if p.grad is not None)


@every_mixer
def test_weights_may_be_narrower_than_states(words):
    """A model in bfloat16: read in both modes, and gone on with from a state that stays in float32."""
    mixer, x = made(words, torch.bfloat16), tokens(dtype=torch.bfloat16)
    exact, _ = made(words, torch.float32)(x.float(), reset=documents())
    for mode in ("chunk", "recurrent"):
        with torch.no_grad():
            y, state = mixer(x, reset=documents(), mode=mode)
            mixer(x, without_terms(state), mode=mode)
        assert y.dtype == torch.bfloat16
        floats = {leaf.dtype for leaf in leaves(without_terms(state)) if leaf.is_floating_point()}
        assert floats <= {torch.float32}
        # a loss that is switched by a threshold has jumps
        assert (y - exact).norm() < 0.3 * exact.norm()


@every_mixer
def test_lora_attaches_to_the_projections(words):
    peft = pytest.importorskip("peft")
    mixer = made(words, torch.float32)
    assert isinstance(mixer.out, nn.Linear), "the projection that writes into the residual stream is named out"
    names = [name for name, m in mixer.named_modules() if isinstance(m, nn.Linear)]
    plain, _ = mixer(tokens(dtype=torch.float32))
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, mixer)
    y, _ = adapted(tokens(dtype=torch.float32))
    assert not torch.allclose(y, plain)
    y.square().sum().backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)


@every_mixer
def test_is_a_block_of_the_decoder(words):
    info = StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (TOKENS,), 11, 1, separator=10)
    with Seeds(0).as_global("init"):
        network = Gpt(info, width=WIDTH, num_heads=HEADS, blocks=f"2x[{words}] + attention").double().eval()
    text = torch.randint(11, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(ROWS)
    batch = Batch(text, text.roll(-1, 1), ids * 0, ids)
    with torch.no_grad():
        whole = network(batch).logits
        close(network.step(batch, mode="recurrent").logits, whole)
        state, pieces = network.init_state(ROWS), []
        for piece in text.split([5, 1, 7], 1):
            output = network.step(Batch(piece, piece, ids * 0, ids), state)
            state = output.state
            pieces.append(output.logits)
    close(torch.cat(pieces, 1), whole)
    assert tensor_bytes(state) > 0


@pytest.mark.parametrize("name", NAMES)
def test_mixers_keep_the_interface(name):
    mixer = build_mixer((plugin("mixers", name, "").examples or (name,))[0], WIDTH, num_heads=HEADS)
    assert isinstance(mixer, Mixer)
    with pytest.raises(UserError, match="mode is 'fast'; it must be one of chunk, recurrent"):
        mixer(tokens(dtype=torch.float32), mode="fast")


@pytest.mark.parametrize("folder", ["memory_rules", "neural_rules", "rnn_cells", "scan_cells"])
def test_every_rule_and_cell_is_in_an_example(folder):
    """So that a new file is under all tests of this one."""
    words = " ".join(word for name in NAMES for word in plugin("mixers", name, "").examples or (name,))
    names = [path.stem for path in (Path(backbones.__file__).parent / folder).glob("[!_]*.py")]
    assert names and not [name for name in names if name not in re.findall(r"\w+", words)]
