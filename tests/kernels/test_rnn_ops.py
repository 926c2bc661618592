"""The nonlinear recurrences on the CPU: against the float64 token loop, in every way they can be called."""

from itertools import pairwise

import kernel_properties as props
import pytest
import torch
from kernel_properties import DISTRIBUTIONS, OFFSETS
from rnn_cases import RNN_CASES, TIMELESS, carried, is_tokens

import kernels.newton_rnn as newton_module
import kernels.sequential_rnn as sequential_module
import kernels.sequential_rnn.matrix as m2rnn_module
from kernels.common import explain
from kernels.newton_rnn import newton_rnn
from kernels.sequential_rnn import m2rnn, sequential_rnn

every = pytest.mark.parametrize("case", RNN_CASES.values(), ids=RNN_CASES.keys())


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_agrees_with_token_loop(case, dtype, kind):
    props.assert_agrees(case, props.draw(case, 70, kind), "chunked", dtype, chunk=8)


@every
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33])
def test_any_length(case, length):
    props.assert_agrees(case, props.draw(case, length), "chunked", torch.float64, chunk=8)
    props.assert_agrees(case, props.draw(case, length), "chunked", torch.float64)


@pytest.mark.parametrize("name", ["newton_gru", "newton_lstm", "newton_block_gru", "m2rnn"])
def test_chunk_length_does_not_matter(name):
    case = RNN_CASES[name]
    inputs = props.cast(props.draw(case, 100), torch.float32)
    runs = [props.tensors_of(case, inputs, backend="chunked", chunk=c) for c in (16, 32, 64)]
    for other in runs[1:]:
        props.assert_close(case, inputs, other, runs[0], 1e-6)


@every
@pytest.mark.parametrize("cut", [1, 15, 16, 17, 25])
def test_carry(case, cut):
    inputs = props.draw(case, 50, "cos 0.5")
    whole = props.tensors_of(case, inputs, backend="chunked", chunk=8)
    parts = props.tensors_of(carried(case, cut), inputs, backend="chunked", chunk=8)
    props.assert_close(case, inputs, parts, whole, 1e-10)


@every
@pytest.mark.parametrize("kind", ["random", "cos 0.5 slow"])
def test_packed_sequences(case, kind):
    cu = torch.tensor(OFFSETS, dtype=torch.int32)
    inputs = props.draw(case, OFFSETS[-1], kind, OFFSETS)
    props.assert_agrees(case, inputs, "chunked", torch.float64, cu_seqlens=cu, chunk=8)


@every
def test_packed_is_separate_calls(case):
    """Not through the reference: each sequence alone, by the same backend."""
    cu = [0, 9, 10, 40]
    inputs = props.draw(case, 40, "cos 0.5", cu)
    together, final = case.op(**inputs, cu_seqlens=torch.tensor(cu), chunk=4, backend="chunked")
    for s, (begin, end) in enumerate(pairwise(cu)):
        alone = {n: x[:, begin:end] if is_tokens(n) else x for n, x in inputs.items()}
        alone["initial_state"] = inputs["initial_state"][s : s + 1]
        out, last = case.op(**alone, chunk=4, backend="chunked")
        assert props.error(together[:, begin:end], out) < 1e-10
        assert props.error(final[s : s + 1], last) < 1e-10


@every
def test_packed_gradients_do_not_leak(case):
    cu = torch.tensor([0, 13, 40])
    leaves = {n: x.requires_grad_() for n, x in props.draw(case, 40, cu=[0, 13, 40]).items()}
    out, _ = case.op(**leaves, cu_seqlens=cu, backend="chunked", chunk=8)
    grads = torch.autograd.grad(out[:, 13:].abs().sum(), list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        if name not in TIMELESS:
            before = grad[:1] if name == "initial_state" else grad[:, :13]
            assert torch.count_nonzero(before) == 0, f"{case.name}: d{name} of sequence 0 is not exactly zero"


@every
@pytest.mark.parametrize("packed", [False, True])
def test_reset_forgets(case, packed):
    cu = [0, 6, 30] if packed else None
    inputs = props.draw(case, 30, "cos 0.5", cu)
    reset = torch.zeros(inputs["x" if "x" in inputs else "q"].shape[:2], dtype=torch.bool)
    reset[0, 7] = reset[0, 20] = reset[-1, 0] = True
    options = {"reset": reset, **({"cu_seqlens": torch.tensor(cu)} if packed else {})}
    truth = props.truth_of(case, inputs, **options)
    found = props.tensors_of(case, inputs, backend="chunked", chunk=4, **options)
    props.assert_close(case, inputs, found, truth, 1e-10)
    tail = {n: x[:1, 20:] if is_tokens(n) else x for n, x in inputs.items() if n != "initial_state"}
    assert props.error(found[0][:1, 20:], case.op(**tail)[0]) < 1e-10


@every
def test_without_initial_state(case):
    inputs = props.draw(case, 20)
    del inputs["initial_state"]
    props.assert_agrees(case, inputs, "chunked", torch.float64, chunk=4)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_inputs_are_computed_in_float32(case, dtype):
    given = props.cast(props.draw(case, 40), dtype)
    found = props.tensors_of(case, given, backend="chunked")
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    # states are kept in float32: what is rounded is what comes and goes in 16 bits, the cotangents among it
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    props.assert_close(case, given, found, props.truth_of(case, given), tolerance)


@every
def test_non_contiguous_inputs(case):
    inputs = props.draw(case, 20)
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in inputs.items()}
    plain = props.tensors_of(case, inputs, backend="chunked", chunk=4)
    other = props.tensors_of(case, strided, backend="chunked", chunk=4)
    props.assert_close(case, inputs, other, plain, 1e-12)


@every
def test_nothing_uninitialised_and_bit_equal(case, nan_scratch):
    for cu in (None, OFFSETS):
        inputs = {n: props.in_halo(x) for n, x in props.draw(case, 50, cu=cu).items()}
        packed = {} if cu is None else {"cu_seqlens": torch.tensor(cu)}
        runs = [props.tensors_of(case, inputs, backend="chunked", chunk=8, **packed) for _ in range(2)]
        assert all(torch.isfinite(x).all() for x in runs[0])
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@every
def test_pieces_of_time_do_not_matter(case, monkeypatch):
    monkeypatch.setattr("kernels.newton_rnn.adjoint.BACK_SPAN", 1)
    monkeypatch.setattr("kernels.newton_rnn.chunked.SPAN", 1)
    monkeypatch.setattr("kernels.sequential_rnn.chunked.SPAN", 1)
    props.assert_agrees(case, props.draw(case, 150, "cos 0.5"), "chunked", torch.float64, chunk=8)
    cu = [0, 70, 71, 150]
    inputs = props.draw(case, 150, "cos 0.5", cu)
    props.assert_agrees(case, inputs, "chunked", torch.float64, chunk=8, cu_seqlens=torch.tensor(cu))


@every
def test_kept_memory(case):
    """Kept for the backward beside the inputs: at most twice their size (the M2RNN: a state per chunk)."""
    inputs = {n: x.float().requires_grad_() for n, x in props.draw(case, 256).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        case.op(**inputs, backend="chunked", chunk=32)
    own = {x.untyped_storage().data_ptr() for x in inputs.values()}
    extra = sum(x.numel() for x in kept if x.untyped_storage().data_ptr() not in own)
    allowed = 8 * inputs["initial_state"].numel() if case.name == "m2rnn" else 2 * inputs["x"].numel()
    assert extra <= allowed


@every
def test_gradcheck(case):
    inputs = props.draw(case, 5, "cos 0.5")
    # one head says as much as two, in a quarter of the time
    leaves = {}
    for name, x in inputs.items():
        axis = {"r": 1, "bias": 1, "peephole": 1, "w": 0, "x": 3, "initial_state": -2}.get(name, 2)
        if name == "initial_state" and case.name == "m2rnn":
            axis = 1
        x = x.narrow(axis, 0, 1)
        leaves[name] = (x if name in TIMELESS else x[:1]).contiguous().requires_grad_()
    names = list(leaves)

    def call(*values):
        return case.op(**dict(zip(names, values, strict=True)), backend="chunked", chunk=2)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@every
def test_second_derivative_is_refused(case):
    leaves = {n: x.requires_grad_() for n, x in props.draw(case, 4).items()}
    out, _ = case.op(**leaves, backend="chunked")
    (first,) = torch.autograd.grad(out.abs().sum(), [next(iter(leaves.values()))], create_graph=True)
    with pytest.raises(RuntimeError):
        first.abs().sum().backward()


def schemas():
    cu, reset = torch.tensor([0, 2, 5]), torch.tensor([[False, True, False, False, True]])
    for name in ("newton_gru", "newton_lstm", "newton_block_gru"):
        given = props.draw(RNN_CASES[name], 6, cu=[0, 2, 6])
        is_block, lstm = "block" in name, "lstm" in name
        x, r, h0 = given["x"], given["r"], given["initial_state"]
        peephole = given.get("peephole")
        if not is_block:
            x, r = x.flatten(3), r.flatten(1)
            peephole = None if peephole is None else peephole.flatten(1)
        h0 = h0.reshape(2, 1 + lstm, *x.shape[3:])
        tail = ("lstm" if lstm else "gru", 2, 4, 1e-12, 8, "chunked")
        yield name, newton_module._forward, (x, r, peephole, h0, None, torch.tensor([0, 2, 6]), *tail)
        yield f"{name}_dense", newton_module._forward, (x, r, None, None, None, None, *tail)
    for cell in ("gru", "lstm", "slstm"):
        given = props.draw(RNN_CASES[f"sequential_{cell}"], 5, cu=[0, 2, 5])
        x, r, bias, s0 = given.values()
        s0 = s0[:, None] if cell == "gru" else s0
        yield cell, sequential_module._forward, (x, r, bias, s0, None, cu, cell, "chunked")
        yield f"{cell}_reset", sequential_module._forward, (x, r, None, None, reset, None, cell, "chunked")
    q, k, v, f, w, s0 = props.draw(RNN_CASES["m2rnn"], 5, cu=[0, 2, 5]).values()
    yield "m2rnn", m2rnn_module._forward, (q, k, v, f, w, s0, None, cu, 2, 0.0, "chunked", True)
    yield "m2rnn_reset", m2rnn_module._forward, (q, k, v, f, w, None, reset, None, 2, 0.5, "chunked", True)


SCHEMAS = list(schemas())


@pytest.mark.parametrize(("_name", "op", "args"), SCHEMAS, ids=[s[0] for s in SCHEMAS])
def test_opcheck(_name, op, args):
    given = tuple(
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in args
    )
    torch.library.opcheck(op, given)


@every
def test_compiles_without_graph_breaks(case):
    inputs = props.cast(props.draw(case, 20), torch.float32)

    def step(*values):
        out, final = case.op(**dict(zip(inputs, values, strict=True)))
        return (out * 2).abs().sum() + final.abs().sum()

    def grads(function):
        leaves = [x.detach().clone().requires_grad_() for x in inputs.values()]
        loss = function(*leaves)
        return loss, *torch.autograd.grad(loss, leaves)

    torch._dynamo.reset()
    compiled = grads(torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(x, y) for x, y in zip(compiled, grads(step), strict=True))


def test_explain_tells_what_runs_and_why(monkeypatch):
    x, r = torch.ones(1, 40, 3, 2, 4), torch.ones(3, 2, 4)
    found = explain(newton_rnn, x, r)
    assert (found.op, found.backend, found.chunk) == ("newton_rnn", "chunked", 64)
    assert "CUDA" in found.reason
    assert explain(sequential_rnn, x, torch.ones(3, 2, 4, 4)).as_tags()["kernel.sequential_rnn.backend"] == "chunked"
    q = torch.ones(1, 40, 2, 4)
    assert explain(m2rnn, q, q, q, q[..., 0], torch.ones(4, 4)).chunk == 32
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    assert explain(newton_rnn, x, r).backend == "reference"


X, R, Q = torch.ones(1, 4, 3, 2, 3), torch.ones(3, 2, 3), torch.ones(1, 4, 2, 3)
BLOCK, F, WIDE = torch.ones(3, 2, 3, 3), torch.ones(1, 4, 2), torch.ones(1, 2, 3, 1, 70)
BAD = [
    (newton_rnn, (X, R), {"cell": "rnn"}, "unknown cell 'rnn'; use one of gru, lstm"),
    (newton_rnn, (X[:, :, :2], R), {}, "x must be [B, T, 3, ...]"),
    (newton_rnn, (X, R[:, :1]), {}, "r must be"),
    (newton_rnn, (X[..., 0], torch.ones(3, 2, 2)), {}, "a matrix per head needs x"),
    (newton_rnn, (X, R), {"peephole": R[:2]}, "peephole is for cell 'lstm', got cell 'gru'"),
    (newton_rnn, (X, R), {"initial_state": R}, "initial_state must be"),
    (newton_rnn, (X, R), {"max_iterations": -1}, "at least 0, got -1"),
    (newton_rnn, (X, R), {"tolerance": 0.0}, "tolerance must be positive, got 0.0"),
    (newton_rnn, (X, BLOCK), {"backend": "triton"}, "has diagonal cells only"),
    (newton_rnn, (torch.ones(1, 4, 3, 1, 17), torch.ones(3, 1, 17, 17)), {}, "D <= 16, got 17"),
    (newton_rnn, (X, R), {"reset": torch.zeros(1, 3)}, "reset must be"),
    (sequential_rnn, (X, BLOCK), {"cell": "lstm"}, "x must be [B, T, 4, H, D] for lstm"),
    (sequential_rnn, (X, BLOCK), {"cell": "rnn"}, "unknown cell 'rnn'"),
    (sequential_rnn, (X, R), {}, "r must be"),
    (sequential_rnn, (X, BLOCK, R[:2]), {}, "bias must be"),
    (sequential_rnn, (X, BLOCK), {"backend": "cuda"}, "unknown backend 'cuda'"),
    (
        sequential_rnn,
        (torch.ones(1, 2, 3, 1, 130), torch.ones(3, 1, 130, 130)),
        {"backend": "triton"},
        "D <= 64 in float32, got 130",
    ),
    (m2rnn, (Q, Q, Q, F, torch.ones(2, 2)), {}, "w must be [V, V]"),
    (m2rnn, (Q, Q, Q, Q, torch.ones(3, 3)), {}, "f must be"),
    (m2rnn, (Q, Q, Q, F, torch.ones(3, 3)), {"clip": 0.0}, "clip must be positive"),
    (m2rnn, (Q, Q, Q, F, torch.ones(3, 3)), {"clip": 1.0, "backend": "reference"}, "use another backend"),
    (m2rnn, (Q, Q, torch.ones(1, 4, 2, 70), F, torch.ones(70, 70)), {"backend": "triton"}, "V <= 64, got 70"),
]


@pytest.mark.parametrize(("op", "args", "options", "message"), BAD, ids=[bad[3] for bad in BAD])
def test_one_clear_sentence(op, args, options, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as caught:
        op(*args, **options)
    assert "\n" not in str(caught.value)
