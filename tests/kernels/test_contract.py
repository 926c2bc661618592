"""What every op promises to torch: exact derivatives, a sound registration, one graph without breaks."""

import kernel_properties as props
import pytest
import torch
from all_cases import ALL, each
from attention_cases import ATTENTION_CASES
from kernel_properties import CASES, OFFSETS
from memory_cases import MEMORY_CASES
from rnn_cases import RNN_CASES

import kernels.delta_rule as delta_module
import kernels.gated_linear_attention as gla_module
import kernels.linear_scan as scan_module
import kernels.newton_rnn.op as newton_op
import kernels.recurrent_attention as attention_module
import kernels.ridge_memory as ridge_module
import kernels.sequential_rnn as sequential_module
import kernels.sequential_rnn.matrix as m2rnn_module

every = each(ALL)


def small_call(case, backend):
    """The op of three tokens as a function of its inputs, and those."""
    leaves = {n: x[:1, :3].clone() if case.is_tokens(n) else x.clone() for n, x in props.draw(case, 5).items()}
    leaves["initial_state"] = leaves["initial_state"][:1].clone()
    # positions stand at the end of a flattened state: numbers, but not differentiable ones
    header = leaves["initial_state"][:, -2:].clone() if leaves["initial_state"].dim() == 2 else None

    def call(*values):
        given = dict(zip(leaves, values, strict=True))
        if header is not None:
            given["initial_state"] = torch.cat([given["initial_state"][:, :-2], header], dim=1)
        out, final = case.op(**given, backend=backend, chunk=2)
        return out, final if header is None else final[:, :-2]

    return call, tuple(x.requires_grad_() for x in leaves.values())


@every
def test_gradcheck(case):
    """Projected onto one random direction per input: all elements at once, at the price of one."""
    assert torch.autograd.gradcheck(*small_call(case, "chunked"), fast_mode=True)


@every
def test_second_derivatives_are_those_of_the_numbers(case):
    """The gradient inside a memory counts as one more: what a torch function has as its third is asked for."""
    for backend in ("reference", "chunked") if case.is_traced else ("reference",):
        assert torch.autograd.gradgradcheck(*small_call(case, backend), fast_mode=True)


@each([case for case in ALL.values() if not case.is_traced])
def test_forward_mode_is_refused_where_it_would_be_zero(case):
    """Torch takes what it cannot differentiate forward for a constant, without a word; the token loop it can."""
    call, leaves = small_call(case, "chunked")
    leaves = tuple(x.detach() for x in leaves)
    with pytest.raises(ValueError, match="forward-mode derivatives are those of backend='reference', got 'chunked'"):
        torch.func.jvp(call, leaves, leaves)
    _, along = torch.func.jvp(small_call(case, "reference")[0], leaves, leaves)
    assert all(x.abs().sum() > 0 for x in along)


def test_forward_mode_of_a_traced_op():
    """What is traced, torch differentiates; its kernels are written by hand."""
    case = MEMORY_CASES["ttt_linear"]
    leaves = tuple(x.detach() for x in small_call(case, "chunked")[1])
    found, truth = (torch.func.jvp(small_call(case, b)[0], leaves, leaves)[1] for b in ("chunked", "reference"))
    assert max(props.error(x, y) for x, y in zip(found, truth, strict=True)) < 1e-10
    with pytest.raises(ValueError, match="forward-mode derivatives are those of backend='reference', got 'triton'"):
        torch.func.jvp(small_call(case, "triton")[0], leaves, leaves)


@every
def test_second_derivative(case):
    """Refused where the backward is written by hand; there where autograd goes through."""
    leaves = {n: x.requires_grad_() for n, x in props.draw(case, 4).items()}
    out, _ = case.op(**leaves, backend="chunked")
    first = torch.autograd.grad(out.abs().square().sum(), list(leaves.values()), create_graph=True)[0]
    if case.is_traced:
        first.abs().sum().backward()
        assert torch.isfinite(next(iter(leaves.values())).grad).all()
        return
    with pytest.raises(RuntimeError):
        first.abs().sum().backward()


def schemas():
    scan = props.draw(CASES["scan_real"], 5)
    a, u, h = (x.flatten(2) if x.dim() > 3 else x.flatten(1) for x in scan.values())
    yield "linear_scan", scan_module._forward, (a, u, h, None, 4, "chunked")
    yield "linear_scan_packed", scan_module._forward, (a[:1], u[:1], h, torch.tensor([0, 2, 5]), 4, "chunked")
    gla = props.draw(CASES["gla_channel"], 5)
    tail = (None, 0.5, 4, "chunked", True)
    yield "gla", gla_module._forward, (*gla.values(), *tail)
    yield "gla_none", gla_module._forward, (gla["q"], gla["k"], gla["v"], None, None, *tail)
    delta, tail = props.draw(CASES["gated_deltanet"], 5), (None, 0.5, 4, "chunked", False, True)
    yield "delta", delta_module._forward, (*delta.values(), *tail)
    packed = props.draw(CASES["kda"], 5, cu=[0, 2, 5])
    yield "delta_packed", delta_module._forward, (*packed.values(), torch.tensor([0, 2, 5]), *tail[1:])
    normalized = props.draw(CASES["normalized"], 5)
    yield "delta_normalized", delta_module._forward, (*normalized.values(), None, 0.5, 4, "chunked", True, True)
    yield "gla_numba", gla_module._forward, (*gla.values(), None, 0.5, 4, "numba", True)
    yield "delta_numba", delta_module._forward, (*packed.values(), torch.tensor([0, 2, 5]), 0.5, 4, "numba", True, True)


def memory_schemas():
    how = (None, 0.1, 1e-6, 20, 4, "chunked", False, True)
    inputs = props.draw(MEMORY_CASES["ridge"], 5)
    h0 = inputs["initial_state"][..., :5].contiguous()
    yield "ridge", ridge_module._forward, (inputs["q"], inputs["k"], inputs["beta"], inputs["g"], h0, *how)
    yield "ridge_plain", ridge_module._forward, (inputs["q"], inputs["k"], None, None, h0, *how)
    packed = props.draw(MEMORY_CASES["ridge"], 5, cu=[0, 2, 5])
    start = packed["initial_state"][..., :5].contiguous()
    given = (packed["q"], packed["k"], packed["beta"], None, start, torch.tensor([0, 2, 5]))
    yield "ridge_packed", ridge_module._forward, (*given, *how[1:])


def nonlinear_schemas():
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
        yield name, newton_op.solved, (x, r, peephole, h0, None, torch.tensor([0, 2, 6]), *tail)
        yield f"{name}_dense", newton_op.solved, (x, r, None, None, None, None, *tail)
    for cell in ("gru", "lstm", "slstm"):
        given = props.draw(RNN_CASES[f"sequential_{cell}"], 5, cu=[0, 2, 5])
        x, r, bias, s0 = given.values()
        s0 = s0[:, None] if cell == "gru" else s0
        yield cell, sequential_module._forward, (x, r, bias, s0, None, cu, cell, "chunked")
        yield f"{cell}_reset", sequential_module._forward, (x, r, None, None, reset, None, cell, "chunked")
    q, k, v, f, w, s0 = props.draw(RNN_CASES["m2rnn"], 5, cu=[0, 2, 5]).values()
    yield "m2rnn", m2rnn_module._forward, (q, k, v, f, w, s0, None, cu, 2, 0.0, "chunked", True)
    yield "m2rnn_reset", m2rnn_module._forward, (q, k, v, f, w, None, reset, None, 2, 0.5, "chunked", True)


def attention_schemas():
    given = props.draw(ATTENTION_CASES["recurrent_attention"], 5)
    *tensors, state = given.values()
    kept = state[:, :-2].reshape(2, 2, -1, 7).clone()
    first, slopes = torch.tensor([[0], [3]]), torch.tensor([0.5, 0.1], dtype=torch.float64)
    yield "recurrent_attention", attention_module._forward, (tensors[:4], tensors[4:], kept, None, None, 0.5, 2)
    # constants: not to be differentiated
    hidden = (kept[:, :, :0], first + torch.arange(5) // 4, slopes, 0.5, 2)
    yield "recurrent_attention_alibi", attention_module._forward, (tensors[:4], tensors[4:7], *hidden)


SCHEMAS = [*schemas(), *memory_schemas(), *nonlinear_schemas(), *attention_schemas()]


@pytest.mark.parametrize(("_name", "op", "args"), SCHEMAS, ids=[s[0] for s in SCHEMAS])
def test_opcheck(_name, op, args):
    def leaf(x):
        if isinstance(x, list):
            return [leaf(one) for one in x]
        return x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    torch.library.opcheck(op, tuple(leaf(x) for x in args))


@each([case for case in ALL.values() if not case.is_traced])
def test_compiles_without_graph_breaks(case):
    """backend="aot_eager": the same capture and fake tensors as inductor, without waiting for its C++ compiler.

    (Neural memory has a test of its own: there the loop over chunks is traced.)
    """
    inputs = props.cast(props.draw(case, 14), torch.float32)
    if "cache" in case.name:
        # the flattened state of the tests is unpacked by numbers it holds, which a graph cannot follow
        del inputs["initial_state"]

    def step(*values):
        out, final = case.op(**dict(zip(inputs, values, strict=True)))
        return (out * 2).abs().sum() + final.abs().sum()

    def grads(function):
        leaves = [x.detach().clone().requires_grad_() for x in inputs.values()]
        loss = function(*leaves)
        return loss, *torch.autograd.grad(loss, leaves)

    torch._dynamo.reset()
    compiled = grads(torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert all(props.error(x, y) < 1e-6 for x, y in zip(compiled, grads(step), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scan_real", "gla_scalar", "gated_deltanet"])
def test_compiles_with_inductor(name):
    """The whole way, C++ compiler included, packed: what a user of torch.compile on a CPU gets."""
    case = CASES[name]
    inputs = props.cast(props.draw(case, OFFSETS[-1], cu=OFFSETS), torch.float32)
    cu = torch.tensor(OFFSETS)

    def step(*values):
        out, final = case.op(**dict(zip(inputs, values, strict=True)), cu_seqlens=cu)
        return (out * 2).sigmoid().sum() + final.abs().sum()

    def grads(function):
        leaves = [x.detach().clone().requires_grad_() for x in inputs.values()]
        loss = function(*leaves)
        return loss, *torch.autograd.grad(loss, leaves)

    torch._dynamo.reset()
    compiled, eager = grads(torch.compile(step, fullgraph=True)), grads(step)
    assert all(props.error(x, y) < 1e-6 for x, y in zip(compiled, eager, strict=True))
