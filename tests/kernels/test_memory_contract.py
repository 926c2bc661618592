"""What the memory ops promise besides numbers: gradients, registration, compilation, decisions, messages."""

from functools import partial

import kernel_properties as props
import pytest
import torch
from memory_cases import MEMORY_CASES, NEURAL

import kernels.ridge_memory as ridge_module
from kernels.common import explain
from kernels.memory_cache import memory_cache, routed_memory
from kernels.neural_memory import neural_memory, tnt_memory
from kernels.ridge_memory import ridge_memory

every = pytest.mark.parametrize("case", MEMORY_CASES.values(), ids=MEMORY_CASES.keys())


@every
def test_gradcheck(case):
    leaves = {n: x[:1, :3].clone() if n != "initial_state" else x[:1].clone() for n, x in props.draw(case, 5).items()}
    names = list(leaves)
    # projected onto one random direction per input: all elements at once, at the price of one
    fast = partial(torch.autograd.gradcheck, fast_mode=True)
    header = {n: leaves[n][:, -2:].clone() for n in names if n == "initial_state" and leaves[n].dim() == 2}

    def call(*values):
        given = dict(zip(names, values, strict=True))
        for n, fixed in header.items():
            given[n] = torch.cat([given[n][:, :-2], fixed], dim=1)
        out, final = case.op(**given, backend="chunked")
        return out, final[:, :-2] if header else final

    assert fast(call, tuple(x.requires_grad_() for x in leaves.values()))


def schemas():
    how = (None, 0.1, 1e-6, 20, 4, "chunked", False, True)
    inputs = props.draw(MEMORY_CASES["ridge"], 5)
    h0 = inputs["initial_state"][..., :5].contiguous()
    yield "ridge", (inputs["q"], inputs["k"], inputs["beta"], inputs["g"], h0, *how)
    yield "ridge_plain", (inputs["q"], inputs["k"], None, None, h0, *how)
    packed = props.draw(MEMORY_CASES["ridge"], 5, cu=[0, 2, 5])
    start = packed["initial_state"][..., :5].contiguous()
    yield "ridge_packed", (packed["q"], packed["k"], packed["beta"], None, start, torch.tensor([0, 2, 5]), *how[1:])


SCHEMAS = list(schemas())


@pytest.mark.parametrize(("_name", "args"), SCHEMAS, ids=[s[0] for s in SCHEMAS])
def test_opcheck(_name, args):
    def leaf(x):
        return x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    torch.library.opcheck(ridge_module._forward, tuple(leaf(x) for x in args))


COMPILED = [n for n in MEMORY_CASES if n not in NEURAL]


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_graph_breaks(name):
    """Neural memory has its own test: there the loop over chunks is traced."""
    case = MEMORY_CASES[name]
    inputs = props.cast(props.draw(case, 14), torch.float32)
    if "cache" in name:
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


def test_explain_tells_what_runs_and_why():
    x, b = torch.ones(1, 40, 2, 4), torch.ones(1, 40, 2)
    found = explain(ridge_memory, x, x, x, b)
    assert (found.backend, found.chunk) == ("chunked", 32)
    assert explain(partial(ridge_memory, ratio=0.1), x, x, x, backend="reference").backend == "reference"
    found = explain(neural_memory, x, x, x, b, chunk=5)
    assert (found.backend, found.chunk) == ("chunked", 5)
    found = explain(neural_memory, x, x, x, b, None, b * 0, chunk=5)
    assert "momentum" in found.reason or "CUDA" in found.reason
    found = explain(memory_cache, x, x, x, b, segment=8, variant="residual")
    assert (found.op, found.backend) == ("memory_cache", "chunked")
    assert "delta_rule" in found.reason
    found = explain(routed_memory, x, x, x, torch.ones(1, 40, 3))
    assert (found.op, found.backend) == ("routed_memory", "chunked")
    assert "gated_linear_attention" in found.reason


X = torch.ones(1, 4, 2, 3)
B = torch.ones(1, 4, 2)
R = torch.ones(1, 4, 5)
PAIR = (torch.ones(2, 3), torch.ones(2, 3))
BAD = [
    (ridge_memory, (X, X, X, X), {}, "beta must be"),
    (ridge_memory, (X, X, X, B, X), {}, "H stays symmetric"),
    (ridge_memory, (X, X, X, B, B, X), {}, "mix must be"),
    (ridge_memory, (X, X, X), {"steps": 0}, "steps must be at least 1, got 0"),
    (ridge_memory, (X, X, X), {"ratio": 0.0}, "above 0, got 0.0 and 1e-06"),
    (ridge_memory, (X, X, X), {"initial_state": torch.ones(1, 2, 3, 3)}, "initial_state must be"),
    (ridge_memory, (torch.ones(1, 4, 1, 200),) * 3, {"backend": "triton"}, "K <= 128, got 200"),
    (neural_memory, (X, X, X, X), {"chunk": 2}, "beta must be"),
    (neural_memory, (X, X, X, B), {"chunk": 0}, "chunk must be at least 1, got 0"),
    (neural_memory, (X, X, X, B), {"chunk": 2, "loss": "l1"}, "unknown loss 'l1'; use one of l2, huber, lp"),
    (neural_memory, (X, X, X, B), {"chunk": 2, "activation": "relu"}, "unknown activation 'relu'"),
    (neural_memory, (X, X, X[..., :2], B), {"chunk": 2, "norm": PAIR}, "K must be V, got 3 and 2"),
    (neural_memory, (X, X, X, B), {"chunk": 2, "weights": []}, "one matrix per layer, got none"),
    (neural_memory, (X, X, X, B), {"chunk": 2, "weights": [torch.ones(2, 3, 4)]}, "must end in V = 3, got 4"),
    (neural_memory, (X, X, X, B, None, B), {"chunk": 2, "backend": "triton"}, "has no kernel for momentum"),
    (tnt_memory, (X, X, X, B), {"chunk": 2, "local_chunks": [1], "shards": []}, "of one length"),
    (tnt_memory, (X, X, X, B), {"chunk": 2, "local_chunks": [1], "shards": [0]}, "must be at least 1"),
    (memory_cache, (X, X, X), {"segment": 2}, "needs both route_q and route_k"),
    (memory_cache, (X, X, X), {"segment": 2, "variant": "residual", "route_q": X, "route_k": X}, "takes neither"),
    (memory_cache, (X, X, X), {"segment": 2, "variant": "best"}, "unknown variant 'best'"),
    (memory_cache, (X, X, X), {"segment": 2, "write": "both"}, "unknown write 'both'; use one of carry, restart"),
    (memory_cache, (X, X, X), {"segment": 0, "variant": "residual"}, "segment must be at least 1, got 0"),
    (memory_cache, (X, X, X), {"segment": [3], "variant": "residual"}, "sum to T = 4, got [3]"),
    (memory_cache, (X, X, X, X), {"segment": 2, "variant": "residual"}, "memory_cache: beta must be"),
    (memory_cache, (X, X, X), {"segment": 2, "variant": "residual", "initial_state": X}, "one MemoryCacheState"),
    (routed_memory, (X, X, X, X), {}, "router must be"),
    (routed_memory, (X, X, X, R), {"top_k": 6}, "top_k must be between 1 and E = 5, got 6"),
    (routed_memory, (X, X[:, :, None], X, R), {}, "k must have a memory axis"),
    (routed_memory, (X, X, X, R), {"initial_state": X}, "initial_state must be"),
]


@pytest.mark.parametrize(("op", "args", "options", "message"), BAD, ids=[bad[3] for bad in BAD])
def test_one_clear_sentence(op, args, options, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as caught:
        op(*args, **options)
    assert "\n" not in str(caught.value)
