"""Neural memory as compiled loops against its token loop, whose inner gradient is torch's."""

from itertools import pairwise

import kernel_properties as props
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from kernels.common import explain, numba
from kernels.neural_memory import NeuralMemoryState, neural_memory, tnt_memory

HEADS, LENGTH = 2, 75
# which gates, whether behind a norm, K and V: no multiples of what loops walk side by side
KINDS = {
    "titans": ("g momentum", False, 5, 7),
    "plain": ("", False, 6, 3),
    "ttt": ("", True, 6, 6),
    "all": ("g momentum", True, 6, 6),
}
# sequences, and the tokens of its chunk that each has read before
PLACES = {"dense": (None, (0, 0)), "resumed": (None, (3, 3)), "packed": ([0, 5, 5, 40, 75], (2, 0, 1, 3))}
every = pytest.mark.parametrize("kind", KINDS)
Inputs = dict[str, Tensor]


def drawn(kind: str, place: str = "dense", length: int = LENGTH) -> Inputs:
    """All that has a gradient: tokens, gates, the state, the norm."""
    names, is_normed, key, value = KINDS[kind]
    cu, positions = PLACES[place]
    gen = torch.Generator().manual_seed(0)
    lead = (2 if cu is None else 1, length, HEADS)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    unit = torch.nn.functional.normalize
    inputs = {"q": unit(rand(*lead, key), dim=-1), "k": unit(rand(*lead, key), dim=-1), "v": rand(*lead, value)}
    inputs["beta"] = 0.2 * rand(*lead).sigmoid()
    inputs |= {name: torch.nn.functional.logsigmoid(rand(*lead) + 2) for name in names.split()}
    shape = (len(positions), HEADS, key, value)
    inputs |= {"weights": rand(*shape), "start": rand(*shape)}
    if "momentum" in names:
        inputs["speed"] = rand(*shape) / 8
    if is_normed:
        inputs |= {"gamma": 1 + rand(HEADS, value) / 4, "bias": rand(HEADS, value) / 4}
    return inputs


def called(given: Inputs, backend: str, chunk: int, place: str = "dense") -> tuple[Tensor, NeuralMemoryState]:
    given, (cu, positions) = dict(given), PLACES[place]
    norm = (given.pop("gamma"), given.pop("bias")) if "gamma" in given else None
    weights, start, speed = given.pop("weights"), given.pop("start"), given.pop("speed", None)
    state = NeuralMemoryState(
        (weights,), () if speed is None else (speed,), (start,), tuple(p % chunk for p in positions)
    )
    offsets = None if cu is None else torch.tensor(cu)
    return neural_memory(**given, chunk=chunk, norm=norm, initial_state=state, cu_seqlens=offsets, backend=backend)


def tensors(inputs: Inputs, backend: str, chunk: int = 4, place: str = "dense", call=called) -> Inputs:
    """Output, all of the final state, and the gradient of every input, for fixed random cotangents."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out, final = call(leaves, backend, chunk, place)
    found = {"o": out, "W": final.weights[0], "S": final.start[0]}
    found |= dict(zip("P", final.momentum, strict=False))
    gen = torch.Generator().manual_seed(9)
    cotangents = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x) for x in found.values()]
    grads = torch.autograd.grad(list(found.values()), list(leaves.values()), cotangents, materialize_grads=True)
    found |= {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}
    position = torch.tensor(final.position)
    return {name: x.detach() for name, x in found.items()} | {"position": position}


def assert_close(found: Inputs, truth: Inputs, tolerance: float) -> None:
    assert found.keys() == truth.keys()
    errors = {name: props.error(x, truth[name]) for name, x in found.items()}
    assert not {name: e for name, e in errors.items() if not e <= tolerance}


def narrow(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Inputs:
    return {name: x.to(dtype) for name, x in inputs.items()}


@every
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_agrees_with_token_loop(kind, place, chunk):
    inputs = drawn(kind, place)
    found, truth = (tensors(inputs, backend, chunk, place) for backend in ("numba", "reference"))
    assert_close(found, truth, 1e-10)


@pytest.mark.parametrize("kind", ["titans", "ttt"])
@pytest.mark.parametrize("chunk", [4, 50])
def test_float32(kind, chunk):
    inputs = narrow(drawn(kind))
    found = tensors(inputs, "numba", chunk)
    assert {x.dtype for name, x in found.items() if name != "position"} == {torch.float32}
    assert_close(found, tensors({n: x.double() for n, x in inputs.items()}, "reference", chunk), 1e-5)


def test_two_tokens_by_hand():
    """w = 1; k = q = 1, v = 3, beta = 1/2, keep 0.9, eta 0.5; both slopes at w = 1 are -2, times beta -1.

    P_1 = 1, w_1 = 0.9 + 1 = 1.9; P_2 = 0.5 + 1 = 1.5, w_2 = 0.9 * 1.9 + 1.5 = 3.21. d w_2 / d w = 0.9^2 - beta (0.9 +
    0.5 + 1) = -0.39.
    """
    half = torch.full((1, 2, 1), 0.5, dtype=torch.float64)
    key, value, start = (torch.zeros(*shape, dtype=torch.float64) for shape in ((1, 2, 1, 5), (1, 2, 1, 7), (1, 5, 7)))
    key[..., 0], value[..., 0], start[:, 0, 0] = 1, 3, 1
    given = (key, key, value, half, torch.full_like(half, 0.9).log(), half.log())
    o, state = neural_memory(*given, chunk=2, weights=[start.requires_grad_()], backend="numba")
    torch.testing.assert_close(o[..., 0].flatten(), torch.tensor([1.9, 3.21], dtype=torch.float64))
    assert (state.momentum[0][0, 0, 0, 0].item(), state.position) == (pytest.approx(1.5), (0,))
    (slope,) = torch.autograd.grad(state.weights[0][0, 0, 0, 0], start)
    assert slope[0, 0, 0].item() == pytest.approx(-0.39)


@every
@pytest.mark.parametrize("cut", [1, 31, 33, 74])
def test_cut_anywhere_is_the_whole(kind, cut):
    """Not a bit of what it says changes, and of gradients the rounding."""

    def in_two(given, backend, chunk, place):
        timed = ("q", "k", "v", "beta", "g", "momentum")
        parts = [{n: x[:, w] if n in timed else x for n, x in given.items()} for w in (slice(cut), slice(cut, None))]
        out, middle = called(parts[0], backend, chunk, place)
        rest = {n: x for n, x in parts[1].items() if n in timed}
        norm = (given["gamma"], given["bias"]) if "gamma" in given else None
        after, final = neural_memory(**rest, chunk=chunk, norm=norm, initial_state=middle, backend=backend)
        return torch.cat([out, after], 1), final

    inputs = drawn(kind, "resumed")
    whole = tensors(inputs, "numba", 50, "resumed")
    parts = tensors(inputs, "numba", 50, "resumed", in_two)
    assert all(torch.equal(whole[name], parts[name]) for name in ("o", "W", "S", "position"))
    assert_close(parts, whole, 1e-12)


@every
def test_learned_start_without_a_state(kind):
    inputs = {n: x for n, x in drawn(kind, length=20).items() if n not in ("start", "speed")}
    inputs["weights"] = inputs["weights"][0]

    def fresh(given, backend, chunk, place):
        given = dict(given)
        norm = (given.pop("gamma"), given.pop("bias")) if "gamma" in given else None
        return neural_memory(**given | {"weights": [given["weights"]]}, chunk=chunk, norm=norm, backend=backend)

    found, truth = (tensors(inputs, backend, call=fresh) for backend in ("numba", "reference"))
    assert_close(found, truth, 1e-10)


@pytest.mark.parametrize("place", ["dense", "packed"])
def test_threads_change_nothing(place, monkeypatch):
    monkeypatch.setattr(numba, "WORTH", 0)
    inputs, runs = narrow(drawn("titans", place)), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        runs.append(tensors(inputs, "numba", 4, place))
    assert all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())


@every
@pytest.mark.parametrize("place", ["dense", "packed"])
def test_nothing_uninitialised_and_nothing_is_written(kind, place, nan_scratch):
    inputs = {n: props.in_halo(x) for n, x in drawn(kind, place).items()}
    before = {n: x.clone() for n, x in inputs.items()}
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in inputs.items()}
    runs = [tensors(given, "numba", 4, place) for given in (inputs, strided)]
    assert all(torch.isfinite(x).all() and torch.equal(x, runs[1][name]) for name, x in runs[0].items())
    assert all(torch.equal(x, before[n]) for n, x in inputs.items())


def test_what_no_gradient_is_asked_of():
    """Nothing is kept, and the answer is the same; a part of the inputs alone, and of the outputs, has its gradient."""
    inputs = drawn("titans")
    whole = tensors(inputs, "numba")
    with torch.no_grad():
        out, final = called(inputs, "numba", 4)
    assert torch.equal(out, whole["o"]) and torch.equal(final.weights[0], whole["W"])
    key = inputs["k"].requires_grad_()
    found, truth = (
        torch.autograd.grad(called(inputs, backend, 4)[1].momentum[0].square().sum(), key)[0]
        for backend in ("numba", "reference")
    )
    assert props.error(found, truth) < 1e-10


@pytest.mark.parametrize("gate", [-torch.inf, -1e4, 0.05])
def test_gates_far_below_zero_and_above(gate):
    inputs = drawn("titans", length=40)
    inputs["g"][:, 5::7] = inputs["momentum"][:, 3::5] = gate
    found, truth = tensors(inputs, "numba"), tensors({n: x.clamp(min=-1e4) for n, x in inputs.items()}, "reference")
    assert_close(found, truth, 1e-10)


def test_half_precision_inputs_are_computed_in_float32():
    inputs = narrow(narrow(drawn("titans"), torch.bfloat16))
    tokens = {n: x.bfloat16() if n in "qkv" else x for n, x in inputs.items()}
    out, final = called(tokens, "numba", 4)
    truth, end = called(inputs, "numba", 4)
    assert (out.dtype, final.weights[0].dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, truth.bfloat16()) and torch.equal(final.weights[0], end.weights[0])


def test_tnt_takes_them_for_its_memories():
    inputs = {n: x for n, x in drawn("all", length=25).items() if n in ("q", "k", "v", "beta", "g", "momentum")}
    how = {"chunk": 8, "local_chunks": [2], "shards": [6]}
    found, truth = (tnt_memory(**inputs, **how, backend=backend)[0] for backend in ("numba", "reference"))
    assert props.error(found, truth) < 1e-12


def test_packed_is_separate_calls():
    inputs, (cu, positions) = drawn("titans", "packed"), PLACES["packed"]
    out, final = called(inputs, "numba", 4, "packed")
    states = ("weights", "speed", "start")
    for s, (a, b) in enumerate(pairwise(cu)):
        state = NeuralMemoryState(*((inputs[name][s : s + 1],) for name in states), (positions[s],))
        if a == b:
            assert torch.equal(final.weights[0][s], state.weights[0][0])
            assert torch.equal(final.start[0][s], state.start[0][0])
            continue
        part = {n: x[:, a:b] for n, x in inputs.items() if n not in states}
        alone, end = neural_memory(**part, chunk=4, initial_state=state, backend="numba")
        assert torch.equal(out[:, a:b], alone) and end.position == final.position[s : s + 1]
        assert all(torch.equal(x[0][s : s + 1], y[0]) for x, y in zip(final[:3], end[:3], strict=True))


# who runs


def sized(length: int, width: int = 32) -> list[Tensor]:
    one = torch.zeros(1, 1, 1, 1)
    return [*(one.expand(1, length, 4, width),) * 3, one[..., 0].expand(1, length, 4)]


def test_a_cpu_takes_the_loops_where_they_are_worth_compiling():
    assert explain(neural_memory, *sized(1024), chunk=4).backend == "numba"
    assert explain(neural_memory, *sized(1023), chunk=4).backend == "chunked"
    wide, narrow_ = sized(4096, 65), sized(4096, 64)
    assert explain(neural_memory, *wide, chunk=4).backend == "chunked"
    assert explain(neural_memory, *narrow_, chunk=4).backend == "numba"
    asked = explain(neural_memory, *wide, chunk=7, backend="numba")
    assert (asked.chunk, asked.reason) == (7, "asked for")


def test_what_they_cannot_is_refused_and_never_automatic():
    given = sized(1024)
    layers = {"weights": [torch.zeros(4, 32, 8), torch.zeros(4, 8, 32)]}
    for how, why in (
        (layers, "takes a memory of one layer, got 2"),
        ({"loss": "huber"}, "has the loss 'l2', got 'huber'"),
    ):
        assert explain(neural_memory, *given, chunk=4, **how).backend == "chunked"
        with pytest.raises(ValueError, match=f"neural_memory: backend 'numba' {why}; use backend='chunked'"):
            neural_memory(*given, chunk=4, backend="numba", **how)


def test_forward_mode_is_not_theirs():
    """In forward mode torch takes what has a backward by hand for a constant."""
    given = sized(1024)

    def backend_of(x, backend="auto"):
        return explain(neural_memory, x, *given[1:], chunk=4, backend=backend).backend

    seen = []
    torch.func.jvp(lambda x: seen.append(backend_of(x)) or x, (given[0],), (given[0],))
    assert seen == ["chunked"]
    with pytest.raises(ValueError, match="backend 'numba' has no forward-mode derivatives; use backend='chunked'"):
        torch.func.jvp(lambda x: backend_of(x, "numba") and x, (given[0],), (given[0],))


def test_second_derivatives_are_refused():
    inputs = {n: x.requires_grad_() for n, x in drawn("titans", length=8).items()}
    (grad,) = torch.autograd.grad(called(inputs, "numba", 4)[0].square().sum(), inputs["k"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"neural_memory_backward.* no autograd formula"):
        grad.sum().backward()


def test_compiles_without_graph_breaks():
    inputs = drawn("ttt", length=8)
    names = [n for n in inputs if n not in ("weights", "start")]

    def step(*values):
        given = dict(zip(names, values, strict=True))
        norm = (given.pop("gamma"), given.pop("bias"))
        out, final = neural_memory(**given, chunk=3, norm=norm, backend="numba")
        return out.square().sum() + final.weights[0].sum()

    def grads(function):
        leaves = [inputs[n].detach().clone().requires_grad_() for n in names]
        loss = function(*leaves)
        return loss, *torch.autograd.grad(loss, leaves)

    torch._dynamo.reset()
    compiled = grads(torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert all(props.error(x, y) < 1e-10 for x, y in zip(compiled, grads(step), strict=True))
