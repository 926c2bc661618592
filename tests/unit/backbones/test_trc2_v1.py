"""TRC2's first form against its equations token by token, and beside the published routing, which sees the future."""

import math

import pytest
import torch
import torch.nn.functional as F

from cl.backbones._spec import build_mixer
from cl.backbones.gpt import Gpt
from cl.core import Batch, Setting, StreamInfo, UserError
from cl.seeding import Seeds
from cl.state import tensor_bytes

WIDTH, CHUNK = 12, 8
WORDS = f"trc2_v1(chunk={CHUNK}, columns=5, top=2, state=3, taps=3, lateral=2, slots=6, rank=4)"


def made(words=WORDS):
    with Seeds(0).as_global("init"):
        mixer = build_mixer(words, WIDTH).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return mixer


def tokens(rows=2, length=29, seed=0):
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the equations, token by token


def mean(vectors):
    return torch.stack(vectors).mean(0)


def routed(m, s):
    """Weights of the columns for one summary."""
    here = torch.tanh(m.location(s))
    logits = [
        (
            m.route_query(s) @ m.route_key_MR[k] - m.distance * sum((here[i] - m.places[k, i]) ** 2 for i in (0, 1))
        ).item()
        for k in range(m.sizes[0])
    ]
    chosen = sorted(range(len(logits)), key=lambda k: -logits[k])[: m.top]
    total = sum(math.exp(logits[k]) for k in chosen)
    return [math.exp(logits[k]) / total if k in chosen else 0.0 for k in range(len(logits))]


def column(m, u, k, t):
    """What column k answers at token t of a document."""
    size = m.sizes[1]
    parts = [m.drive(each).unflatten(0, (m.sizes[0], -1))[k] for each in u[: t + 1]]
    h = torch.zeros(size, dtype=torch.float64)
    for j in range(len(m.inside_JX)):
        if t - j >= t - t % m.chunk:
            delta, b = parts[t - j][:size], parts[t - j][size : 2 * size]
            alpha = torch.sigmoid(delta) * torch.sigmoid(-m.log_decay_MN[k])
            h = h + m.inside_JX[j].view(m.sizes)[k] * (1 - alpha) * b
    c, gate, free = parts[t][2 * size : 3 * size], torch.sigmoid(parts[t][-2]), torch.sigmoid(parts[t][-1])
    return ((1 - free) * gate + free) * c * h


def document(m, x, nearest):
    """One document; `nearest` 1 looks at the chunk before, and 0 at the token's own, as published."""
    zero = torch.zeros(WIDTH, dtype=torch.float64)
    u = []
    for t in range(len(x)):
        near = sum((m.near_JD[j - 1] * x[t - j] for j in range(1, len(m.near_JD) + 1) if t >= j), zero)
        u.append(x[t] - (1 - m.trust) * m.predict(near))
    means = [mean(u[low : low + m.chunk]) for low in range(0, len(u), m.chunk)]
    out = []
    for t in range(len(u)):
        seen = [t // m.chunk - i - nearest for i in range(m.lateral)]
        before = [means[c] if c >= 0 else zero for c in seen]
        route = routed(m, before[0])
        y = m.join(torch.cat([route[k] * column(m, u, k, t) for k in range(m.sizes[0])]))
        y = y + sum(m.lateral_LD[m.lateral - 1 - i] * before[i] for i in range(m.lateral))
        slots = F.normalize(m.slots_SD, dim=1)
        recalled = torch.softmax(m.sharpness * slots @ F.normalize(m.ask(u[t]), dim=0), 0) @ slots
        y = y + m.recalled_norm(recalled)
        out.append(m.out(y + m.up(m.down(F.silu(m.own(u[t]) + m.other(y))))))
    return torch.stack(out)


@pytest.mark.parametrize("topology", ["grid", "circle"])
def test_is_its_equations_written_out(topology):
    """Two documents in one row, the border inside a chunk."""
    mixer, x = made(WORDS.replace("rank=4", f"rank=4, topology={topology}")), tokens()
    reset = torch.zeros(2, 29, dtype=torch.bool)
    reset[0, 11] = True
    with torch.no_grad():
        y, _ = mixer(x, reset=reset)
        wanted = torch.cat((document(mixer, x[0, :11], 1), document(mixer, x[0, 11:], 1)))
        torch.testing.assert_close(y[0], wanted, atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(y[1], document(mixer, x[1], 1), atol=1e-9, rtol=1e-7)


def test_published_routing_leaks_and_this_one_does_not():
    """Change token 7 of a chunk of 8: there all tokens before it change, here none does."""
    mixer, x = made(), tokens(1)
    other = x.clone()
    other[0, 7] += 1
    with torch.no_grad():
        published = document(mixer, other[0], 0) - document(mixer, x[0], 0)
        assert (published[:7].abs().amax(1) > 1e-3).all(), "what the paper's equations do"
        ours = document(mixer, other[0], 1) - document(mixer, x[0], 1)
        found = mixer(other)[0] - mixer(x)[0]
    assert ours[:7].eq(0).all()
    assert found[0, :7].eq(0).all()
    torch.testing.assert_close(found[0], ours, atol=1e-9, rtol=1e-7)


def test_chunks_are_seen_by_the_chunks_after_them_and_no_further():
    """Token 0 reaches tokens of its own chunk by convolution, and the two chunks after it by their summaries."""
    mixer, x = made(), tokens(1, 40)
    other = x.clone()
    other[0, 0] += 1
    with torch.no_grad():
        change = (mixer(other)[0] - mixer(x)[0])[0].abs().amax(1)
    # two convolutions of three taps, the first of them on what is strictly past
    assert change[:6].gt(0).all()
    assert change[6:8].eq(0).all()
    assert change[8:24].gt(0).all()
    assert change[24:].eq(0).all()


# the terms of the loss, by hand


def test_prediction_is_the_squared_error_of_the_token_before():
    mixer, x = made("trc2_v1(chunk=4, columns=4, top=2, prediction=0.3, balance=0)").train(), tokens()
    with torch.no_grad():
        mixer.near_JD.zero_()[0] = 1.0
        mixer.predict.weight.copy_(torch.eye(WIDTH))
    reset = torch.zeros(2, 29, dtype=torch.bool)
    reset[1, 4] = True
    terms = mixer(x, reset=reset)[1]["auxiliary"]
    squares = [(x[b, t] - x[b, t - 1]).square().mean() for b in (0, 1) for t in range(1, 29) if (b, t) != (1, 4)]
    assert set(terms) == {"prediction"}
    torch.testing.assert_close(terms["prediction"], 0.3 * mean(squares))
    # what is predicted is held: nothing is gained by making it easy to predict
    with torch.no_grad():
        mixer.predict.weight.zero_()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x)[1]["auxiliary"]["prediction"], x)
    assert gradient.eq(0).all()
    assert "auxiliary" not in mixer.eval()(x)[1]


@pytest.mark.parametrize(("columns", "top", "wanted"), [(4, 4, 1.0), (4, 2, 2.0), (6, 2, 3.0)])
def test_balance_is_one_when_all_columns_are_used_alike(columns, top, wanted):
    """M sum_m mean(r_m)^2: with no preference, the `top` that are chosen share everything."""
    mixer = made(f"trc2_v1(chunk=4, columns={columns}, top={top}, distance=0, balance=0.5, prediction=0)").train()
    with torch.no_grad():
        mixer.route_key_MR.zero_()
    terms = mixer(tokens())[1]["auxiliary"]
    torch.testing.assert_close(terms["balance"], torch.tensor(0.5 * wanted, dtype=torch.float64))


def test_nearest_columns_are_chosen():
    """Where topology decides, a summary that lies on a column is read by it, and by its neighbours on the grid."""
    mixer = made("trc2_v1(chunk=4, columns=9, top=5, distance=50)")
    with torch.no_grad():
        mixer.route_key_MR.zero_()
        mixer.location.weight.zero_()
        # the middle of the grid of three by three
        mixer.location.bias.zero_()
        route = mixer._route(torch.zeros(1, 1, WIDTH, dtype=torch.float64))[0, 0]
    assert route.nonzero().flatten().tolist() == [1, 3, 4, 5, 7]
    assert route.argmax() == 4


# as a network


def test_terms_and_size():
    info = StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (24,), 11, 1, separator=10)
    with Seeds(0).as_global("init"):
        network = Gpt(info, width=16, num_heads=2, blocks="trc2_v1", mlp="none", num_layers=2).train()
    text, ids = torch.randint(10, (3, 24)), torch.arange(3)
    output = network(Batch(text, text.roll(-1, 1), ids * 0, ids))
    assert set(output.auxiliary) == {"prediction", "balance"}
    (F.cross_entropy(output.logits.flatten(0, 1), text.flatten()) + sum(output.auxiliary.values())).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    layer = build_mixer("trc2_v1(columns=4, state=3, taps=5, lateral=2)", 16)
    for length in (1, 40, 400):
        state = layer.eval()(torch.randn(2, length, 16))[1]
        assert tensor_bytes(state) == 2 * (4 * ((5 + 2 + 1) * 16 + 4 * 4 * 3) + 8)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("top=1", "top of trc2_v1 is 1; it must be from 2 to its number of columns, 16"),
        ("top=17", "top of trc2_v1 is 17"),
        ("chunk=0", "chunk is 0"),
        ("trust=1.5", "trust of trc2_v1 is 1.5; it must be a number from 0 to 1"),
        ("distance=-1", "distance of trc2_v1 is -1; it must be a number of at least 0"),
        ("balance=much", "balance of trc2_v1 is 'much'"),
        ("topology=torus", "topology of trc2_v1 is 'torus'; it must be one of grid, circle"),
    ],
)
def test_refuses_in_one_sentence(options, wanted):
    with pytest.raises(UserError, match=wanted):
        build_mixer(f"trc2_v1({options})", WIDTH)
