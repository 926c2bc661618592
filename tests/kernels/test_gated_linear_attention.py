"""Gated linear attention and the mLSTM on top: second oracles, and decays per channel of every strength."""

import kernel_properties as props
import pytest
import torch
from kernel_properties import CASES

from kernels.gated_linear_attention import gated_linear_attention, mlstm
from kernels.gated_linear_attention.mlstm import MLSTMState


def mlstm_loop(q, k, v, i_gate, f_gate, scale, state=None):
    """The mLSTM as the paper's equations have it, without stabiliser, in float64."""
    c, n = (
        (torch.zeros(q.shape[0], q.shape[2], 5, 7), torch.zeros(q.shape[0], q.shape[2], 5)) if state is None else state
    )
    outs = []
    for t in range(q.shape[1]):
        f, i = torch.sigmoid(f_gate[:, t])[..., None], torch.exp(i_gate[:, t])[..., None]
        c = f[..., None] * c + (i * k[:, t])[..., None] * v[:, t][..., None, :]
        n = f * n + i * k[:, t]
        query = q[:, t] * scale
        down = (query * n).sum(-1, keepdim=True).abs().clamp(min=1)
        outs.append((query[..., None, :] @ c)[..., 0, :] / down)
    return torch.stack(outs, 1), (c, n)


@pytest.mark.parametrize("packed", [False, True])
def test_mlstm_against_its_equations(packed):
    inputs = props.draw(CASES["gated_deltanet"], 30)
    q, k, v = inputs["q"][:1], inputs["k"][:1], inputs["v"][:1]
    gen = torch.Generator().manual_seed(5)
    i_gate, f_gate = (3 * torch.randn(1, 30, 2, generator=gen, dtype=torch.float64) for _ in range(2))
    tokens = [x.clone().requires_grad_() for x in (q, k, v, i_gate, f_gate)]
    if packed:
        bounds = [(0, 11), (11, 30)]
        truth = torch.cat([mlstm_loop(*(x[:, a:b] for x in tokens), 0.4)[0] for a, b in bounds], 1)
        found, _ = mlstm(*tokens, scale=0.4, cu_seqlens=torch.tensor([0, 11, 11, 30]), chunk=8)
    else:
        truth, (c, n) = mlstm_loop(*tokens, 0.4)
        first, middle = mlstm(*(x[:, :13] for x in tokens), scale=0.4, chunk=8)
        second, final = mlstm(*(x[:, 13:] for x in tokens), scale=0.4, chunk=8, initial_state=middle)
        found = torch.cat([first, second], 1)
        assert isinstance(final, MLSTMState)
        assert props.error(final.matrix * final.log_scale.exp()[..., None, None], c) < 1e-10
        assert props.error(final.normaliser * final.log_scale.exp()[..., None], n) < 1e-10
    assert props.error(found, truth) < 1e-10
    weights = torch.randn(truth.shape, generator=gen, dtype=torch.float64)
    ours = torch.autograd.grad((found * weights).sum(), tokens, retain_graph=True)
    theirs = torch.autograd.grad((truth * weights).sum(), tokens)
    assert max(props.error(x, y) for x, y in zip(ours, theirs, strict=True)) < 1e-10


def test_mlstm_sigmoid_and_huge_gates():
    x = torch.randn(1, 9, 2, 4, generator=torch.Generator().manual_seed(0))
    gate = torch.full((1, 9, 2), 80.0)
    h, _ = mlstm(x, x, x, gate, gate)
    assert torch.isfinite(h).all()
    h, state = mlstm(x, x, x, gate, gate, variant="sigmoid")
    torch.testing.assert_close(h, gated_linear_attention(x, x, x)[0])
    torch.testing.assert_close(state.matrix, gated_linear_attention(x, x, x)[1])


def test_retention_is_attention_with_a_decay_mask():
    """Independent second oracle: the quadratic form."""
    inputs = props.draw(CASES["retention"], 40)
    del inputs["initial_state"]
    t = torch.arange(40)
    mask = torch.exp(inputs["g"][:, None, None] * (t[:, None] - t)).tril()
    scores = torch.einsum("bihk,bjhk->bhij", inputs["q"], inputs["k"]) * 5**-0.5 * mask
    truth = torch.einsum("bhij,bjhv->bihv", scores, inputs["v"])
    assert props.error(gated_linear_attention(**inputs)[0], truth) < 1e-12


@pytest.mark.parametrize("name", ["gla_channel", "kda"])
@pytest.mark.parametrize(("strength", "block"), [(0.1, 16), (1.5, 8), (3.5, 4), (7.0, 2), (20.0, 1)])
def test_decays_per_channel_of_every_strength(name, strength, block, monkeypatch):
    """The harder the decay, the narrower the blocks on the diagonal; each width must be as exact."""
    from kernels.common import channel_decay

    seen = set()
    make = channel_decay.ChannelDecay.__init__

    def watched(self, g):
        make(self, g)
        seen.add(self.block)

    monkeypatch.setattr(channel_decay.ChannelDecay, "__init__", watched)
    inputs = props.draw(CASES[name], 48, "cos 0.5")
    # within a factor of 1.1 of the strength, so that every block of the call has the same width
    inputs["g"] = -strength * (0.9 + 0.2 * torch.rand(inputs["g"].shape, generator=torch.Generator().manual_seed(2)))
    inputs["g"] = inputs["g"].double()
    for dtype in (torch.float64, torch.float32):
        props.assert_agrees(CASES[name], inputs, "chunked", dtype, chunk=16)
    assert seen == {block}


@pytest.mark.parametrize("backend", ["chunked", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["gla_scalar", "gla_channel", "gated_deltanet", "kda"])
@pytest.mark.parametrize("gate", [-1e4, -1e30, -torch.inf, 0.05])
def test_gates_far_below_zero_and_above(name, backend, gate):
    """A wiped state leaves the decays behind it exact; what grows (not checked) is right until it overflows."""
    case = CASES[name]
    inputs = props.draw(case, 40)
    if backend == "triton":
        # a sequence of two chunks says as much
        inputs = {n: x[:1, :21] if case.is_tokens(n) else x[:1] for n, x in inputs.items()}
    inputs["g"][:, 5::7] = gate
    truth = props.truth_of(case, inputs)
    assert all(torch.isfinite(x).all() for x in truth)
    for dtype in (torch.float64, torch.float32) if backend == "chunked" else (torch.float32,):
        found = props.tensors_of(case, props.cast(inputs, dtype), backend=backend, chunk=16)
        truth = props.truth_of(case, props.cast(inputs, dtype))
        props.assert_close(case, inputs, found, truth, props.TOLERANCE[backend, dtype])


def mlstm_inputs(dtype=torch.float64):
    inputs = props.draw(CASES["gated_deltanet"], 30)
    gen = torch.Generator().manual_seed(5)
    gates = [torch.randn(2, 30, 2, generator=gen, dtype=torch.float64) for _ in range(2)]
    return [x.to(dtype) for x in (inputs["q"], inputs["k"], inputs["v"], *gates)]


@pytest.mark.parametrize("shut", [-1e30, -torch.inf])
@pytest.mark.parametrize("which", [3, 4])
def test_mlstm_with_gates_shut(shut, which):
    """As a mask writes them: tokens that are not read (from the first on), or a memory emptied before a token."""
    tokens = mlstm_inputs()
    tokens[which][:, 0::7] = shut
    tokens = [x.requires_grad_() for x in tokens]
    found, truth = mlstm(*tokens, scale=0.4, chunk=8)[0], mlstm_loop(*tokens, 0.4)[0]
    assert props.error(found, truth) < 1e-10
    ours, theirs = (torch.autograd.grad(x.square().sum(), tokens, retain_graph=True) for x in (found, truth))
    assert max(props.error(x, y) for x, y in zip(ours, theirs, strict=True)) < 1e-10


@pytest.mark.parametrize(
    ("backend", "dtype", "variant"),
    [
        ("chunked", torch.bfloat16, "exponential"),
        ("chunked", torch.bfloat16, "sigmoid"),
        pytest.param("triton", torch.float16, "exponential", marks=pytest.mark.slow),
    ],
)
def test_mlstm_of_16_bits_is_computed_in_float32(backend, dtype, variant):
    """Where n^T q is a small difference of large terms, keys times gates in 16 bits would be 25 times as wrong.

    In float16 a small normaliser has few digits, and the gradients that it divides may leave the range.
    """
    gen = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, 40, 2, 5, generator=gen) for _ in range(2))
    v = torch.randn(2, 40, 2, 7, generator=gen)
    i_gate, f_gate = (3 * torch.randn(2, 40, 2, generator=gen) for _ in range(2))
    tokens = [x.to(dtype).requires_grad_() for x in (q, k, v, 5 + i_gate, 3 + f_gate)]
    exact = [x.detach().double().requires_grad_() for x in tokens]
    if variant == "exponential":
        truth = mlstm_loop(*exact, 0.4)[0]
    else:
        weighted = exact[1] * exact[3].sigmoid()[..., None]
        truth, _ = gated_linear_attention(
            exact[0], weighted, exact[2], exact[4].sigmoid().log(), scale=0.4, backend="reference"
        )
    found, _ = mlstm(*tokens, scale=0.4, variant=variant, backend=backend)
    assert found.dtype == dtype
    assert props.error(found, truth) < 3e-3
    weights = torch.randn(truth.shape, generator=gen).to(dtype)
    ours = torch.autograd.grad((found * weights).sum(), tokens)
    theirs = torch.autograd.grad((truth * weights).sum(), exact)
    assert max(props.error(x, y) for x, y in zip(ours, theirs, strict=True)) < 5e-3


def test_mlstm_query_of_zero_with_a_huge_gate():
    """e^-m is zero in float32, and so is what the query reads: the answer is 0, not 0 / 0."""
    q, k, v, i_gate, f_gate = mlstm_inputs(torch.float32)
    q[:, 4] = 0
    h, _ = mlstm(q, k, v, i_gate + 150, f_gate)
    assert torch.isfinite(h).all()
    assert not h[:, 4].any()


def test_mlstm_gradient_of_a_given_log_scale():
    """How large a state is, its log scale says; so a learned one has a gradient, the same as of what it scales."""
    tokens = mlstm_inputs()
    gen = torch.Generator().manual_seed(6)
    sizes = [(2, 2, 5, 7), (2, 2, 5), (2, 2)]
    parts = [torch.randn(s, generator=gen, dtype=torch.float64).requires_grad_() for s in sizes]
    found = mlstm(*tokens, scale=0.4, chunk=8, initial_state=MLSTMState(*parts))[0]
    size = parts[2].exp()
    truth = mlstm_loop(*tokens, 0.4, (parts[0] * size[..., None, None], parts[1] * size[..., None]))[0]
    assert props.error(found, truth) < 1e-10
    ours, theirs = (torch.autograd.grad(x.square().sum(), parts, retain_graph=True) for x in (found, truth))
    assert max(props.error(x, y) for x, y in zip(ours, theirs, strict=True)) < 1e-10
