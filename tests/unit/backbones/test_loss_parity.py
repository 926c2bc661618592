"""Loss parity: the same tiny run with our layer and with a plain re-derivation of it, from the same weights.

The twins are in conftest.py, in float64, and read every document by itself; ours reads both of a row at once, in
float32 as users train, and in float64, where nothing but rounding may be between the two.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl.backbones.gpt import Gpt
from cl.core import Batch, Setting, StreamInfo
from cl.seeding import Seeds

HEADS, SEPARATOR, ROWS, TOKENS, STEPS = 4, 4, 8, 10, 20


# by the words of a block: its mixer (weights, x) -> y out of `plain`
TWINS = {
    "attention(num_kv_heads=2)": lambda plain: partial(plain.attention, num_heads=HEADS),
    "linear_memory(rule=gated_delta)": lambda plain: partial(plain.linear_memory, num_heads=HEADS, rule="gated_delta"),
    "linear_memory(rule=gla(rank=3))": lambda plain: partial(plain.linear_memory, num_heads=HEADS, rule="gla"),
    # so many steps are exact to twelve digits
    "ridge_memory(ratio=0.2, steps=30)": lambda plain: lambda w, x: plain.ridge_memory(w, x, HEADS, ratio=0.2)[0],
    "neural_memory(rule=titans(chunk=3, expansion=2))": lambda plain: partial(plain.titans, num_heads=HEADS, chunk=3),
    "scan_rnn(cell=mingru)": lambda plain: plain.mingru,
    "nonlinear_rnn(cell=gru)": lambda plain: plain.gru,
}


def made(words):
    info = StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (TOKENS,), SEPARATOR + 1, 1, separator=SEPARATOR)
    with Seeds(0).as_global("init"):
        network = Gpt(info, width=16, num_heads=HEADS, blocks=f"2x[{words}]")
    # maps of deviation 0.02 hardly let one token feel another
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
                part.weight.mul_(6)
    return network


def texts():
    """Of every step: two documents a row, each of them two tokens in turns, and where the second begins."""
    generator = torch.Generator().manual_seed(0)
    for border in torch.randint(3, TOKENS - 3, (STEPS,), generator=generator).tolist():
        pairs = torch.randint(SEPARATOR, (2, ROWS, 2), generator=generator).repeat(1, 1, TOKENS)
        text = torch.cat((pairs[0, :, :border], pairs[1, :, : TOKENS + 1 - border]), 1)
        text[:, border] = SEPARATOR
        yield text, border


def losses(parameters, logits):
    """Of every step; `logits` of tokens (B, T) and of where the second document begins."""
    optimizer, found = torch.optim.AdamW(parameters, lr=1e-3), []
    for text, border in texts():
        loss = F.cross_entropy(logits(text[:, :-1], border).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def ours(network):
    ids = torch.zeros(ROWS, dtype=torch.int64)
    return losses(network.parameters(), lambda text, _: network(Batch(text, text, ids, ids)).logits)


@pytest.mark.slow
@pytest.mark.parametrize("words", TWINS)
def test_training_ends_where_a_plain_twin_does(words, plain):
    mixer = TWINS[words](plain)
    weights = {name: p.detach().double().requires_grad_() for name, p in made(words).named_parameters()}

    def logits(text, border):
        documents = text[:, :border], text[:, border:]
        return torch.cat([plain.decoder(weights, document, mixer) for document in documents], 1)

    wanted = losses(weights.values(), logits)
    assert wanted[-1] < 0.9 * wanted[0], "something was learned"
    torch.testing.assert_close(ours(made(words).double()), wanted, atol=0, rtol=1e-9)
    torch.testing.assert_close(ours(made(words)), wanted, atol=0, rtol=1e-4)
