"""Neural memory against other ops in its limits, its dependence on the chunk, and TNT against a token loop."""

from itertools import pairwise

import kernel_properties as props
import pytest
import torch
from memory_cases import HEADS, MEMORY_CASES, K, constants, flat_neural, tokens

from kernels.delta_rule import delta_rule
from kernels.gated_linear_attention import gated_linear_attention
from kernels.neural_memory import NeuralMemoryState, neural_memory, tnt_memory

LAYERS = [(K, 6), (6, K)]


def drawn(length=20, batch=2, kind="cos 0.5"):
    inputs = tokens(torch.Generator().manual_seed(0), batch, length, kind, value=K)
    inputs["beta"] = 0.3 * inputs["beta"]
    gen = torch.Generator().manual_seed(1)
    momentum = torch.nn.functional.logsigmoid(torch.randn(batch, length, HEADS, generator=gen, dtype=torch.float64))
    return {**inputs, "momentum": momentum}


def some(inputs, names):
    return {n: inputs[n] for n in names.split()}


def test_chunk_of_one_is_the_delta_rule():
    given = some(drawn(), "q k v beta")
    truth, state = delta_rule(**given, scale=1.0, backend="reference")
    found, final = neural_memory(**given, chunk=1)
    assert props.error(found, truth) < 1e-12
    assert props.error(final.weights[0], state) < 1e-12


def test_one_chunk_from_nothing_is_linear_attention():
    """All gradients at zero weights are -k v^T; whatever comes later never sees them change."""
    given = some(drawn(), "q k v beta g")
    q, k, v, beta, g = given.values()
    truth, _ = gated_linear_attention(q, k, v * beta[..., None], g, scale=1.0, backend="reference")
    assert props.error(neural_memory(**given, chunk=20)[0], truth) < 1e-12


def test_momentum_of_nothing_is_no_momentum():
    inputs = drawn()
    with_it, _ = neural_memory(**{**inputs, "momentum": inputs["momentum"] * 0 - 80}, chunk=4)
    without, _ = neural_memory(**some(inputs, "q k v beta g"), chunk=4)
    assert props.error(with_it, without) < 1e-12


def test_two_tokens_by_hand():
    """One weight w = 1; k = 1, v = 3, beta = 1/2, keep 0.9, eta 0.5; both gradients at w = 1 are -2.

    P_1 = 1, w_1 = 0.9 + 1 = 1.9; P_2 = 0.5 + 1 = 1.5, w_2 = 0.9 * 1.9 + 1.5 = 3.21.
    """
    one = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    half = torch.full((1, 2, 1), 0.5, dtype=torch.float64)
    for backend in ("chunked", "reference"):
        o, state = neural_memory(
            one, one, 3 * one, half, half * 0 + torch.tensor(0.9).double().log(), half.log(),
            chunk=2, weights=[torch.ones(1, 1, 1)], backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(o.flatten(), torch.tensor([1.9, 3.21], dtype=torch.float64), rtol=1e-6, atol=0)
        assert state.position == (0,)
        torch.testing.assert_close(state.momentum[0].item(), 1.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_an_error_of_zero_has_a_gradient(backend):
    """A memory of zeros that is told zero. |e|^2 / 2: W_1 = beta k v^T as ever; |e|^p / p, p < 2: no slope there."""
    given = some(drawn(length=1, batch=1), "q k v beta")
    given["v"] = torch.zeros_like(given["v"]).requires_grad_()
    q, k, v, beta = given.values()
    o, _ = neural_memory(**given, chunk=1, backend=backend)
    (dv,) = torch.autograd.grad(o.sum(), v)
    expected = ((q * k).sum(-1) * beta)[..., None].expand_as(dv)
    assert props.error(dv, expected) < 1e-12
    o, _ = neural_memory(**given, chunk=1, backend=backend, loss="lp", threshold=1.5)
    (dv,) = torch.autograd.grad(o.sum(), v)
    assert torch.equal(dv, torch.zeros_like(v))


def test_the_chunk_is_part_of_the_model():
    """Relative deviation from chunk 1, against the method card's 0.02, 0.05, 0.10, 0.21 (eta 0.9, alpha 0.02)."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 256, 1, 64, generator=gen, dtype=torch.float64) for _ in range(3))
    one = torch.ones(1, 256, 1, dtype=torch.float64)
    rest = (torch.nn.functional.normalize(k, dim=-1), v, 0.1 * one, (0.98 * one).log(), (0.9 * one).log())
    runs = {c: neural_memory(q, *rest, chunk=c)[0] for c in (1, 2, 4, 8, 16, 64)}
    for chunk, published in ((2, 0.02), (4, 0.05), (8, 0.10), (16, 0.21), (64, 0.50)):
        assert 0.75 * published < props.error(runs[chunk], runs[1]) < 1.25 * published


@pytest.mark.parametrize("shapes", [[(K, K)], LAYERS], ids=["linear", "mlp"])
def test_pieces_do_not_matter(shapes, monkeypatch):
    """A piece only bounds the size of the coefficients; a chunk that is no multiple of it included."""
    from kernels.neural_memory import chunked

    inputs = drawn(23)
    weights = constants(shapes, inputs["q"])
    whole = neural_memory(**inputs, chunk=10, weights=weights)
    monkeypatch.setattr(chunked, "PIECE", 4)
    parts = neural_memory(**inputs, chunk=10, weights=weights)
    assert props.error(parts[0], whole[0]) < 1e-12
    assert props.error(flat_neural(parts[1]), flat_neural(whole[1])) < 1e-12


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_gradient_of_the_learned_start(backend):
    inputs = drawn(11)
    weights = [w.requires_grad_() for w in constants(LAYERS, inputs["q"])]

    def call(*ws):
        return neural_memory(**inputs, chunk=4, weights=ws, backend=backend)[0].square().sum()

    assert torch.autograd.gradcheck(call, tuple(weights), rtol=1e-4)


def test_gradient_of_the_norm():
    inputs = some(drawn(7, batch=1), "q k v beta g")
    weights = constants(LAYERS, inputs["q"])
    norm = tuple(torch.rand(HEADS, K, generator=torch.Generator().manual_seed(i)).double() + 0.5 for i in (0, 1))
    for p in norm:
        p.requires_grad_()

    def call(*pair):
        return neural_memory(**inputs, chunk=3, weights=weights, norm=pair)[0]

    assert torch.autograd.gradcheck(call, norm)


def test_checkpoint_keeps_one_state_per_piece():
    inputs = {n: x.float().requires_grad_() for n, x in drawn(256, batch=1).items()}
    kept = {}
    for checkpoint in (False, True):
        seen = kept[checkpoint] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=seen: s.setdefault(id(x), x), lambda x: x):
            neural_memory(**inputs, chunk=32, checkpoint=checkpoint)
    own = {x.untyped_storage().data_ptr() for x in inputs.values()}

    def size(seen):
        return sum(x.numel() for x in seen.values() if x.untyped_storage().data_ptr() not in own)

    # weights, momentum, chunk start of 8 pieces, and what little surrounds them
    assert size(kept[True]) < size(kept[False]) / 4


@pytest.mark.parametrize("names", ["q k v beta", "q k v beta g momentum"], ids=["plain", "titans"])
def test_compiles_without_graph_breaks(names):
    inputs = {n: x.float() for n, x in some(drawn(10), names).items()}
    weights = [w.float() for w in constants(LAYERS, inputs["q"])]

    def step(*values):
        out, final = neural_memory(**dict(zip(inputs, values, strict=True)), chunk=4, weights=weights)
        return out.square().sum() + sum(w.sum() for w in final.weights)

    def grads(function):
        leaves = [x.detach().clone().requires_grad_() for x in inputs.values()]
        loss = function(*leaves)
        return loss, *torch.autograd.grad(loss, leaves)

    torch._dynamo.reset()
    compiled = grads(torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert all(props.error(x, y) < 1e-6 for x, y in zip(compiled, grads(step), strict=True))


def tnt_loop(inputs, chunk, local_chunks, shards, weights, local_weights):
    """TNT token by token with ops of one token: resets by starting over, spans of keys as a plain sum."""
    total, state = [], None
    states, seen = [None] * len(shards), [None] * len(shards)
    for t in range(inputs["q"].shape[1]):
        now = {n: x[:, t : t + 1] for n, x in inputs.items()}
        o, state = neural_memory(**now, chunk=chunk, weights=weights, initial_state=state, backend="reference")
        for n, shard in enumerate(shards):
            key = now["k"][:, 0] / now["k"][:, 0].norm(dim=-1, keepdim=True)
            if t % shard == 0:
                states[n], seen[n] = None, torch.zeros(*key.shape, K, dtype=key.dtype)
            seen[n] = seen[n] + key[..., None] * key[..., None, :]
            ask = torch.einsum("bhij,bhj->bhi", seen[n], now["q"][:, 0])[:, None]
            answer, states[n] = neural_memory(
                **{**now, "q": ask}, chunk=local_chunks[n], weights=local_weights[n], initial_state=states[n],
                backend="reference",
            )  # fmt: skip
            o = o + answer
        total.append(o)
    return torch.cat(total, 1)


@pytest.mark.parametrize("shapes", [[(K, K)], LAYERS], ids=["linear", "mlp"])
@pytest.mark.parametrize("names", ["q k v beta g", "q k v beta g momentum"], ids=["decay", "momentum"])
def test_tnt_against_a_token_loop(shapes, names):
    inputs = {n: x.requires_grad_() for n, x in some(drawn(25), names).items()}
    weights = [w.requires_grad_() for w in constants(shapes, inputs["q"])]
    how = {"chunk": 8, "local_chunks": [2, 3], "shards": [6, 10]}
    how |= {"weights": weights, "local_weights": [weights, weights[:]]}
    truth = tnt_loop(inputs, **how)
    out, _ = tnt_memory(**inputs, **how)
    assert props.error(out, truth) < 1e-12
    leaves = [*inputs.values(), *weights]
    found = torch.autograd.grad(out.square().sum(), leaves)
    right = torch.autograd.grad(truth.square().sum(), leaves)
    assert max(props.error(x, y) for x, y in zip(found, right, strict=True)) < 1e-10
    reference, _ = tnt_memory(**inputs, **how, backend="reference")
    assert props.error(reference, truth) < 1e-12


@pytest.mark.parametrize("cuts", [(1,), (6,), (7, 13), (5, 12, 18), (24,)])
def test_tnt_goes_on_where_it_stopped(cuts):
    inputs = drawn(25)
    weights = constants([(K, K)], inputs["q"])
    how = {"chunk": 8, "local_chunks": [2, 3], "shards": [6, 10], "weights": weights, "local_weights": [weights] * 2}
    whole, end = tnt_memory(**inputs, **how)
    outs, state = [], None
    for a, b in zip((0, *cuts), (*cuts, 25), strict=True):
        out, state = tnt_memory(**{n: x[:, a:b] for n, x in inputs.items()}, **how, initial_state=state)
        outs.append(out)
    assert props.error(torch.cat(outs, 1), whole) < 1e-12
    assert state.positions == end.positions == ((1, 1), (5, 5))
    assert props.error(flat_neural(state.locals[1]), flat_neural(end.locals[1])) < 1e-12
    assert props.error(state.seen[0], end.seen[0]) < 1e-12


def test_tnt_packed_is_separate_calls():
    inputs = {n: x[:1] for n, x in drawn(25).items()}
    how = {"chunk": 4, "local_chunks": [2], "shards": [5]}
    cu = [0, 0, 7, 25]
    out, state = tnt_memory(**inputs, **how, cu_seqlens=torch.tensor(cu))
    for s, (a, b) in enumerate(pairwise(cu[1:]), start=1):
        alone, end = tnt_memory(**{n: x[:, a:b] for n, x in inputs.items()}, **how)
        assert props.error(out[:, a:b], alone) < 1e-12
        assert props.error(state.locals[0].weights[0][s : s + 1], end.locals[0].weights[0]) < 1e-12
    assert state.positions == ((0, 2, 3),)
    assert isinstance(state.memory, NeuralMemoryState)
    again, _ = tnt_memory(**inputs, **how, cu_seqlens=torch.tensor(cu), initial_state=state)
    assert torch.isfinite(again).all()


@pytest.mark.parametrize("name", ["linear_decay", "titans_linear"])
@pytest.mark.parametrize("gate", [-1e4, -1e30, -torch.inf, 0.05])
def test_gates_far_below_zero_and_above(name, gate):
    """A wiped memory leaves the decays behind it exact; what grows (not checked) is right until it overflows."""
    case = MEMORY_CASES[name]
    inputs = props.draw(case, 40)
    inputs["g"][:, 5::7] = gate
    for dtype in (torch.float64, torch.float32):
        given = props.cast(inputs, dtype)
        found, truth = props.tensors_of(case, given, backend="chunked"), props.truth_of(case, given)
        props.assert_close(case, inputs, found, truth, props.TOLERANCE["chunked", dtype])
