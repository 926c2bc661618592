"""The cells that run in order, against torch's own layers, the equations without stabiliser, and numbers by hand."""

import math

import kernel_properties as props
import pytest
import torch
from rnn_cases import RNN_CASES

from kernels.sequential_rnn import m2rnn, sequential_rnn
from kernels.sequential_rnn.reference import GATES, PARTS


def torch_layer(kind, width=5, inputs=4):
    torch.manual_seed(0)
    layer = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[kind]
    return layer(inputs, width, batch_first=True, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("packed", [False, True])
def test_one_head_is_the_layer_of_torch(kind, packed):
    layer, gates = torch_layer(kind), {"gru": 3, "lstm": 4}[kind]
    lengths = [13, 7, 1]
    y = torch.randn(3, 13, 4, dtype=torch.float64, requires_grad=True)
    h0, c0 = (torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    start = h0 if kind == "gru" else (h0, c0)
    if packed:
        from torch.nn.utils.rnn import pack_padded_sequence

        theirs, last = layer(pack_padded_sequence(y, lengths, batch_first=True), start)
        theirs = torch.nn.utils.rnn.pad_packed_sequence(theirs, batch_first=True)[0]
        theirs = torch.cat([theirs[s, :n] for s, n in enumerate(lengths)])[None]
    else:
        theirs, last = layer(y, start)
    rows = torch.cat([y[s, :n] for s, n in enumerate(lengths)])[None] if packed else y
    x = torch.nn.functional.linear(rows, layer.weight_ih_l0, layer.bias_ih_l0).unflatten(-1, (gates, 1, 5))
    r = layer.weight_hh_l0.unflatten(0, (gates, 5)).mT[:, None]
    bias = layer.bias_hh_l0.view(gates, 1, 5)
    s0 = h0[0][:, None] if kind == "gru" else torch.stack([c0[0], h0[0]], 1)[:, :, None]
    options = {"cu_seqlens": torch.tensor([0, 13, 20, 21])} if packed else {}
    h, final = sequential_rnn(x, r, bias, cell=kind, initial_state=s0, backend="chunked", **options)
    assert props.error(h[:, :, 0], theirs) < 1e-12
    end = final[:, 0] if kind == "gru" else final[:, 1, 0]
    assert props.error(end, last[0] if kind == "gru" else last[0][0]) < 1e-12
    if kind == "lstm":
        assert props.error(final[:, 0, 0], last[1][0]) < 1e-12
    weight = torch.randn(theirs.shape, dtype=torch.float64)
    leaves = [y, h0, *([c0] if kind == "lstm" else []), *layer.parameters()]
    ours = torch.autograd.grad((h[:, :, 0] * weight).sum() + end.sum(), leaves)
    truth = torch.autograd.grad((theirs * weight).sum() + (last if kind == "gru" else last[0]).sum(), leaves)
    assert max(props.error(a, b) for a, b in zip(ours, truth, strict=True)) < 1e-11


def slstm_plain(x, r, bias, exponential):
    """The xLSTM paper's equations with exponentials as they stand."""
    c = n = h = torch.zeros(x.shape[0], *x.shape[3:], dtype=x.dtype)
    outs = []
    for t in range(x.shape[1]):
        a = x[:, t] + torch.einsum("bhd,ghde->bghe", h, r) + bias
        i, f = a[:, 0].exp(), a[:, 1].exp() if exponential else a[:, 1].sigmoid()
        c, n = f * c + i * a[:, 2].tanh(), f * n + i
        h = a[:, 3].sigmoid() * c / n
        outs.append(h)
    return torch.stack(outs, 1), c, n


@pytest.mark.parametrize("cell", ["slstm", "slstm_exp"])
def test_slstm_without_stabiliser(cell):
    inputs = props.draw(RNN_CASES[f"sequential_{cell}"], 30, "cos 0.5")
    leaves = [inputs[n].requires_grad_() for n in ("x", "r", "bias")]
    truth, c, n = slstm_plain(*leaves, cell == "slstm_exp")
    h, state = sequential_rnn(*leaves, cell=cell, backend="chunked")
    assert props.error(h, truth) < 1e-11
    assert props.error(state[:, 0] * state[:, 2].exp(), c) < 1e-11
    assert props.error(state[:, 1] * state[:, 2].exp(), n) < 1e-11
    assert (state[:, 1] >= 1 - 1e-12).all(), "one of the two weights is 1, so the normaliser never falls below it"
    ours = torch.autograd.grad(h.sin().sum(), leaves)
    theirs = torch.autograd.grad(truth.sin().sum(), leaves)
    assert max(props.error(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-10


@pytest.mark.parametrize("gate", [-300.0, 300.0])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_slstm_gates_of_any_size(gate, backend):
    """The first input gate sets the scale: exp(-300) is no underflow, exp(300) no overflow."""
    x = torch.randn(1, 9, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] += gate
    x.requires_grad_()
    h, state = sequential_rnn(x, torch.zeros(4, 2, 3, 3), cell="slstm", backend=backend)
    # the scale of all input gates cancels
    plain, _ = sequential_rnn(
        x.detach() - torch.tensor([gate, 0, 0, 0]).view(4, 1, 1), torch.zeros(4, 2, 3, 3), cell="slstm"
    )
    torch.testing.assert_close(h, plain, rtol=1e-4, atol=1e-6)
    grads = torch.autograd.grad(h.sum() + state.sum(), x)
    assert all(torch.isfinite(g).all() for g in grads)


def test_slstm_by_hand():
    """Two steps of one unit: i = 1, f = sigmoid(0) = 1/2, z = 1 then 0: c = 1, then 1/2; n = 1, then 3/2."""
    x = torch.zeros(1, 2, 4, 1, 1, dtype=torch.float64)
    x[0, 0, 2] = 100.0
    h, state = sequential_rnn(x, torch.zeros(4, 1, 1, 1, dtype=torch.float64), cell="slstm")
    torch.testing.assert_close(h.flatten(), torch.tensor([0.5, 0.5 * 0.5 / 1.5], dtype=torch.float64))
    torch.testing.assert_close(state.flatten()[:3], torch.tensor([0.5, 1.5, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_slstm_of_two_equal_scales_takes_the_carried_one(backend):
    """m' = max(f + m, i) with both 0: the gradient of the last m is one of what was carried, not half of either."""
    x = torch.zeros(1, 2, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    _, state = sequential_rnn(x, torch.zeros(4, 1, 1, 1, dtype=torch.float64), cell="slstm_exp", backend=backend)
    (grad,) = torch.autograd.grad(state[:, 2].sum(), x)
    assert grad.flatten(1).tolist() == [[1, 0, 0, 0, 0, 1, 0, 0]]


def test_heads_do_not_meet():
    inputs = props.draw(RNN_CASES["sequential_lstm"], 12)
    whole, _ = sequential_rnn(**inputs, cell="lstm")
    one = {n: v[:, :, :, 1:] if n == "x" else v[:, 1:] for n, v in inputs.items() if n != "initial_state"}
    alone, _ = sequential_rnn(**one, initial_state=inputs["initial_state"][:, :, 1:], cell="lstm")
    assert props.error(whole[:, :, 1:], alone) < 1e-12


def test_m2rnn_by_hand():
    one = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    k, v = torch.tensor([0.5, -1.0]).double().view(1, 1, 1, 2), torch.tensor([2.0, 0.0]).double().view(1, 1, 1, 2)
    start = torch.eye(2, dtype=torch.float64)[None, None]
    w = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    o, state = m2rnn(one, k, v, torch.full((1, 1, 1), 0.25, dtype=torch.float64), w, initial_state=start)
    # S W + k v^T = [[0, 1], [1, 0]] + [[1, 0], [-2, 0]] = [[1, 1], [-1, 0]]
    t = math.tanh(1.0)
    truth = torch.tensor([[0.25 + 0.75 * t, 0.75 * t], [-0.75 * t, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(state[0, 0], truth)
    torch.testing.assert_close(o.flatten(), truth.sum(0))


def test_m2rnn_shared_transition_sums_its_gradient():
    inputs = props.draw(RNN_CASES["m2rnn"], 10)
    shared = inputs.pop("w")[0].clone().requires_grad_()
    own = shared.detach()[None].repeat(2, 1, 1).requires_grad_()
    both = [m2rnn(**inputs, w=w)[0].sin().sum() for w in (shared, own)]
    (one,), (each,) = (torch.autograd.grad(loss, w) for loss, w in zip(both, (shared, own), strict=True))
    assert props.error(one, each.sum(0)) < 1e-12


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_m2rnn_clips_the_gradient_of_the_state(chunk):
    """One unit, f = 1: the gradient of S is carried unchanged, so every step adds dy q and is cut at the bound."""
    one = torch.ones(1, 5, 1, 1, dtype=torch.float64)
    start = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    given = (one, one, one, torch.ones(1, 5, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    for clip, truth in ((None, 5.0), (2.5, 2.5), (10.0, 5.0)):
        o, _ = m2rnn(*given, initial_state=start, clip=clip, chunk=chunk)
        assert torch.autograd.grad(o.sum(), start)[0].item() == truth


@pytest.mark.parametrize("cell", ["gru", "lstm", "slstm", "slstm_exp"])
@pytest.mark.parametrize("length", [1, 17])
def test_gradient_through_a_piece_of_one_row(cell, length, monkeypatch):
    """One sequence and one head: of the last step alone (the 17th of pieces of 16) no slice of the gates is a copy."""
    monkeypatch.setattr("kernels.sequential_rnn.chunked.SPAN", 1)
    gates, parts = GATES[cell], PARTS[cell]
    gen = torch.Generator().manual_seed(0)
    rand = {"generator": gen, "dtype": torch.float64}
    x, r = torch.randn(1, length, gates, 1, 4, **rand), torch.randn(gates, 1, 4, 4, **rand) / 2
    state = torch.rand(1, parts, 1, 4, **rand) if parts > 1 else torch.rand(1, 1, 4, **rand)
    leaves = [t.requires_grad_() for t in (x, r, state)]
    grads = []
    for backend in ("chunked", "reference"):
        h, last = sequential_rnn(x, r, cell=cell, initial_state=state, backend=backend)
        grads.append(torch.autograd.grad(h.square().sum() + last.square().sum(), leaves))
    assert max(props.error(ours, truth) for ours, truth in zip(*grads, strict=True)) < 1e-10
