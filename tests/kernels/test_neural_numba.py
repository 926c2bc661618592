"""Neural memory as compiled loops against its token loop, whose inner gradient is torch's."""

from itertools import pairwise
from typing import Any, NamedTuple

import kernel_properties as props
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from kernels.common import explain, numba
from kernels.neural_memory import NeuralMemoryState, _numbers, neural_memory, tnt_memory
from kernels.neural_memory import numba as numba_module

HEADS, LENGTH = 2, 75


class Kind(NamedTuple):
    """Which gates, whether behind a norm, widths between layers (no whole vectors), how it answers and is judged."""

    gates: str
    is_normed: bool
    widths: tuple[int, ...]
    how: dict[str, Any]


KINDS = {
    "titans": Kind("g momentum", False, (5, 7), {}),
    "titans_mlp": Kind("g momentum", False, (5, 20, 7), {}),
    "three_layers": Kind("g", False, (5, 18, 9, 3), {"activation": "silu"}),
    "plain": Kind("", False, (6, 3), {}),
    "momentum": Kind("momentum", False, (6, 9, 3), {}),
    "ttt": Kind("", True, (6, 6), {}),
    "ttt_mlp": Kind("", True, (6, 17, 6), {}),
    "all": Kind("g momentum", True, (6, 6), {}),
    "yaad": Kind("g momentum", True, (6, 12, 6), {"loss": "huber", "threshold": 0.5}),
    "moneta": Kind("momentum", True, (6, 12, 6), {"loss": "lp", "threshold": 3.0, "activation": "silu"}),
    "huber": Kind("g momentum", False, (5, 12, 7), {"loss": "huber"}),
    "lp": Kind("g momentum", False, (5, 7), {"loss": "lp", "threshold": 2.5}),
}
# sequences, and the tokens of its chunk that each has read before
PLACES = {"dense": (None, (0, 0)), "resumed": (None, (3, 3)), "packed": ([0, 5, 5, 40, 75], (2, 0, 1, 3))}
TIMED = ("q", "k", "v", "beta", "g", "momentum")
every = pytest.mark.parametrize("kind", KINDS)
Inputs = dict[str, Tensor]


def drawn(kind: str, place: str = "dense", length: int = LENGTH) -> Inputs:
    """All that has a gradient: tokens, gates, the state of every layer, the norm."""
    names, is_normed, widths, _ = KINDS[kind]
    cu, positions = PLACES[place]
    gen = torch.Generator().manual_seed(0)
    lead, (key, *_, value) = (2 if cu is None else 1, length, HEADS), widths

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    unit = torch.nn.functional.normalize
    inputs = {"q": unit(rand(*lead, key), dim=-1), "k": unit(rand(*lead, key), dim=-1), "v": rand(*lead, value)}
    inputs["beta"] = (0.2 if len(widths) == 2 else 0.003) * rand(*lead).sigmoid()
    inputs |= {name: torch.nn.functional.logsigmoid(rand(*lead) + 2) for name in names.split()}
    for n, sizes in enumerate(pairwise(widths)):
        shape = (len(positions), HEADS, *sizes)
        scale = len(widths) ** 0.5
        inputs |= {f"W{n}": rand(*shape) / scale, f"S{n}": rand(*shape) / scale}
        if "momentum" in names:
            inputs[f"P{n}"] = rand(*shape) / 8
    if is_normed:
        inputs |= {"gamma": 1 + rand(HEADS, value) / 4, "bias": rand(HEADS, value) / 4}
    return inputs


def called(
    given: Inputs, backend: str, chunk: int, place: str = "dense", kind: str = "titans"
) -> tuple[Tensor, NeuralMemoryState]:
    cu, positions = PLACES[place]
    tokens = {n: x for n, x in given.items() if n in TIMED}
    norm = (given["gamma"], given["bias"]) if "gamma" in given else None
    groups = [tuple(x for n, x in given.items() if n[0] == group and n[1:].isdigit()) for group in "WPS"]
    state = NeuralMemoryState(*groups, tuple(p % chunk for p in positions))
    offsets = None if cu is None else torch.tensor(cu)
    how = {"chunk": chunk, "norm": norm, "backend": backend, **KINDS[kind].how}
    return neural_memory(**tokens, initial_state=state, cu_seqlens=offsets, **how)


def tensors(
    inputs: Inputs, backend: str, chunk: int = 4, place: str = "dense", kind: str = "titans", call=called
) -> Inputs:
    """Output, all of the final state, and the gradient of every input, for fixed random cotangents."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out, final = call(leaves, backend, chunk, place, kind)
    found = {"o": out}
    found |= {f"{name}{n}": x for name, group in zip("WPS", final[:3], strict=True) for n, x in enumerate(group)}
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
    found, truth = (tensors(inputs, backend, chunk, place, kind) for backend in ("numba", "reference"))
    assert_close(found, truth, 1e-10)


@pytest.mark.parametrize("kind", ["titans", "titans_mlp", "three_layers", "ttt", "ttt_mlp", "huber"])
@pytest.mark.parametrize("chunk", [4, 50])
def test_float32(kind, chunk):
    inputs = narrow(drawn(kind))
    found = tensors(inputs, "numba", chunk, kind=kind)
    assert {x.dtype for name, x in found.items() if name != "position"} == {torch.float32}
    truth = tensors({n: x.double() for n, x in inputs.items()}, "reference", chunk, kind=kind)
    assert_close(found, truth, 1e-5)


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
    """But for rounding: a piece that is cut becomes two."""

    def in_two(given, backend, chunk, place, kind):
        parts = [{n: x[:, w] if n in TIMED else x for n, x in given.items()} for w in (slice(cut), slice(cut, None))]
        out, middle = called(parts[0], backend, chunk, place, kind)
        rest = {n: x for n, x in parts[1].items() if n in TIMED}
        norm = (given["gamma"], given["bias"]) if "gamma" in given else None
        how = {"chunk": chunk, "norm": norm, "backend": backend, **KINDS[kind].how}
        after, final = neural_memory(**rest, initial_state=middle, **how)
        return torch.cat([out, after], 1), final

    inputs = drawn(kind, "resumed")
    whole = tensors(inputs, "numba", 50, "resumed", kind)
    parts = tensors(inputs, "numba", 50, "resumed", kind, in_two)
    assert torch.equal(whole["position"], parts["position"])
    assert_close(parts, whole, 1e-12)


@every
def test_learned_start_without_a_state(kind):
    inputs = {n: x for n, x in drawn(kind, length=20).items() if n[0] not in "PS"}
    inputs |= {n: x[0] for n, x in inputs.items() if n[0] == "W"}

    def fresh(given, backend, chunk, place, kind):
        tokens, weights = ({n: x for n, x in given.items() if n in TIMED}, [x for n, x in given.items() if n[0] == "W"])
        norm = (given["gamma"], given["bias"]) if "gamma" in given else None
        return neural_memory(**tokens, weights=weights, chunk=chunk, norm=norm, backend=backend, **KINDS[kind].how)

    found, truth = (tensors(inputs, backend, kind=kind, call=fresh) for backend in ("numba", "reference"))
    assert_close(found, truth, 1e-10)


@pytest.mark.parametrize("place", ["dense", "packed"])
def test_threads_change_nothing(place, monkeypatch):
    monkeypatch.setattr(numba, "WORTH", 0)
    inputs, runs = narrow(drawn("titans_mlp", place)), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        runs.append(tensors(inputs, "numba", 4, place, "titans_mlp"))
    assert all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())


@every
@pytest.mark.parametrize("place", ["dense", "packed"])
def test_nothing_uninitialised_and_nothing_is_written(kind, place, nan_scratch):
    inputs = {n: props.in_halo(x) for n, x in drawn(kind, place).items()}
    before = {n: x.clone() for n, x in inputs.items()}
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in inputs.items()}
    runs = [tensors(given, "numba", 4, place, kind) for given in (inputs, strided)]
    assert all(torch.isfinite(x).all() and torch.equal(x, runs[1][name]) for name, x in runs[0].items())
    assert all(torch.equal(x, before[n]) for n, x in inputs.items())


def test_much_that_is_kept_lies_in_room_of_its_own(monkeypatch):
    inputs = drawn("titans_mlp")
    truth = tensors(inputs, "numba", kind="titans_mlp")
    monkeypatch.setattr(numba, "LARGE", 0)
    found = tensors(inputs, "numba", kind="titans_mlp")
    assert all(torch.equal(x, truth[name]) for name, x in found.items())


def test_what_no_gradient_is_asked_of():
    """Nothing is kept, and the answer is the same; a part of the inputs alone, and of the outputs, has its gradient."""
    inputs = drawn("titans")
    whole = tensors(inputs, "numba")
    with torch.no_grad():
        out, final = called(inputs, "numba", 4)
    assert torch.equal(out, whole["o"]) and torch.equal(final.weights[0], whole["W0"])
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
    states = ("W0", "P0", "S0")
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
    assert explain(neural_memory, *sized(4096), chunk=4).backend == "numba"
    assert explain(neural_memory, *sized(4095), chunk=4).backend == "chunked"
    layers = [torch.zeros(4, 32, 128), torch.zeros(4, 128, 32)]
    assert explain(neural_memory, *sized(512), chunk=4, weights=layers).backend == "numba"
    assert explain(neural_memory, *sized(511), chunk=4, weights=layers).backend == "chunked"
    state = NeuralMemoryState(tuple(layers), (), tuple(layers), ())
    assert _numbers(*sized(1)[:2], None, state) == 2 * 32 * 128
    asked = explain(neural_memory, *sized(1), chunk=7, backend="numba")
    assert (asked.chunk, asked.reason) == (7, "asked for")


def test_forward_mode_is_not_theirs():
    """In forward mode torch takes what has a backward by hand for a constant."""
    given = sized(4096)

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
    names = [n for n in inputs if n[0] not in "WS"]

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


@pytest.mark.parametrize("kind", ["titans_mlp", "ttt"])
def test_registration(kind, monkeypatch):
    """As torch asks of an op: schema, shapes without numbers, autograd, dynamic shapes."""
    op, seen = numba_module._forward, []
    monkeypatch.setattr(numba_module, "_forward", lambda *given: seen.append(given) or op(*given))
    called({n: x.requires_grad_() for n, x in drawn(kind, "packed").items()}, "numba", 4, "packed", kind)
    (given,) = seen
    detached = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in given]
    torch.library.opcheck(op, tuple(detached))
