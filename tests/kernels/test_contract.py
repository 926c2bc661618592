"""What every op promises besides numbers: registration, compilation, dispatch, messages, nothing paid by CPU users."""

import subprocess
import sys

import kernel_properties as props
import pytest
import torch
from kernel_properties import CASES, OFFSETS

import kernels.delta_rule as delta_module
import kernels.gated_linear_attention as gla_module
import kernels.linear_scan as scan_module
from kernels.common import Decision, explain
from kernels.common.checks import require_cu_seqlens
from kernels.delta_rule import delta_rule
from kernels.gated_linear_attention import gated_linear_attention, mlstm
from kernels.gated_linear_attention.mlstm import MLSTMState
from kernels.linear_scan import linear_scan

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def small(case, length=4):
    inputs = props.draw(case, length, "cos 0.5")
    return {n: (x[:1, :, ..., :1, :] if n in "ua" else x).detach().requires_grad_() for n, x in inputs.items()}


@every
def test_gradcheck(case):
    # two heads of 5 x 7 take gradcheck seconds; one small head says as much
    inputs = props.draw(case, 5)
    cut = {"q": 2, "k": 2, "v": 2, "a": 2, "u": 2}
    leaves = {}
    for name, x in inputs.items():
        if name == "initial_state":
            x = x[:, :1, :2, :2] if case.is_matrix else x[:, :1, :2]
        elif name in cut:
            x = x[:, :, :1, :2]
        elif x.dim() > 1:
            x = x[:, :, :1] if x.dim() == 3 else x[:, :, :1, :2]
        else:
            x = x[:1]
        leaves[name] = x[: 1 if x.dim() > 1 else None].contiguous().requires_grad_()
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
    """backend="aot_eager": the same capture and fake tensors as inductor, without waiting for its C++ compiler."""
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


def test_values_of_offsets_are_read_on_a_card_only_when_asked(monkeypatch):
    """`meta` stands for the card: reading a value there raises."""
    cu = torch.tensor([1, 9], device="meta")
    monkeypatch.delenv("KERNELS_CHECK", raising=False)
    require_cu_seqlens("op", cu, 1, 4)
    monkeypatch.setenv("KERNELS_CHECK", "1")
    with pytest.raises((NotImplementedError, RuntimeError)):
        require_cu_seqlens("op", cu, 1, 4)


def test_explain_tells_what_runs_and_why(monkeypatch):
    x = torch.ones(1, 40, 2, 4)
    found = explain(gated_linear_attention, x, x, x)
    assert (found.backend, found.chunk) == ("chunked", 32)
    assert "CUDA" in found.reason
    assert found.as_tags()["kernel.gated_linear_attention.backend"] == "chunked"
    assert explain(gated_linear_attention, x[:, :1], x[:, :1], x[:, :1]).chunk == 1
    assert explain(gated_linear_attention, x, x, x, backend="reference").backend == "reference"
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    assert explain(linear_scan, x, x).backend == "reference"
    assert explain(linear_scan, x, x, backend="chunked").backend == "chunked"
    assert isinstance(found, Decision)
    with pytest.raises(ValueError, match="not one of our ops"):
        explain(print, x)


X = torch.ones(1, 4, 2, 3)
B = torch.ones(1, 4, 2)
BAD = [
    (linear_scan, (X, X[:, :3]), {}, "a must be the shape of u"),
    (linear_scan, (X, X), {"backend": "cuda"}, "unknown backend 'cuda'; use one of auto"),
    (linear_scan, (X, X), {"chunk": 24}, "power of two, got 24"),
    (linear_scan, (X, X.to(torch.complex64)), {}, "both be real or both complex"),
    (linear_scan, (X.int(), X.int()), {}, "must be floating point, got torch.int32"),
    (linear_scan, (X[:, :0], X[:, :0]), {}, "T >= 1"),
    (linear_scan, (X, X), {"reset": torch.zeros(1, 3)}, "reset must be"),
    (gated_linear_attention, (X, X[..., :2], X), {}, "k must be the shape of q"),
    (gated_linear_attention, (X, X, X[:, :2]), {}, "v must be"),
    (gated_linear_attention, (X, X, X, B[:, :2]), {}, "g must be"),
    (gated_linear_attention, (X, X, X.double()), {}, "share one dtype"),
    (gated_linear_attention, (X, X, X), {"initial_state": torch.ones(1, 2, 3, 4)}, "initial_state must be"),
    (gated_linear_attention, (X.double(), X.double(), X.double()), {"backend": "triton"}, "refuses float64"),
    (delta_rule, (X, X, X, X), {}, "beta must be"),
    (
        delta_rule,
        (X.repeat(2, 1, 1, 1),) * 3 + (B.repeat(2, 1, 1),),
        {"cu_seqlens": torch.tensor([0, 4])},
        "must be 1, got 2",
    ),
    (delta_rule, (X, X, X, B), {"cu_seqlens": torch.tensor([0.0, 4.0])}, "int32 or int64"),
    (delta_rule, (X, X, X, B), {"cu_seqlens": torch.tensor([1, 4])}, "cu_seqlens must start at 0, got 1"),
    (linear_scan, (X, X), {"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens must end at T = 4, got 3"),
    (gated_linear_attention, (X, X, X), {"cu_seqlens": torch.tensor([0, 5])}, "must end at T = 4, got 5"),
    (
        gated_linear_attention,
        (X, X, X),
        {"cu_seqlens": torch.tensor([0, 3, 2, 4])},
        "must never decrease, got 3 then 2 at sequence 1",
    ),
    (mlstm, (X, X, X, B, B), {"cu_seqlens": torch.tensor([0, 1, 3])}, "mlstm: cu_seqlens must end at T = 4"),
    (delta_rule, (X, X, X, B), {"backend": "triton", "chunk": 128}, "has chunks 16, 32, 64, got 128"),
    (delta_rule, (torch.ones(1, 4, 1, 300),) * 3 + (B[..., :1],), {"backend": "triton"}, "K <= 256, got 300"),
    (mlstm, (X, X, X, B, B), {"variant": "tanh"}, "unknown variant 'tanh'"),
    (mlstm, (X, X, X, X, B), {}, "i_gate must be"),
]


@pytest.mark.parametrize(("op", "args", "options", "message"), BAD, ids=[bad[3] for bad in BAD])
def test_one_clear_sentence(op, args, options, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as caught:
        op(*args, **options)
    assert "\n" not in str(caught.value)


def test_triton_is_refused_on_cpu_and_never_imported():
    code = """
import sys, torch
from kernels.delta_rule import delta_rule
x = torch.ones(1, 40, 1, 4); b = torch.ones(1, 40, 1)
delta_rule(x, x, x, b)
# torch itself looks for triton at the first call of any custom op; ours stay out
assert not [m for m in sys.modules if m.endswith(".triton") and m.startswith("kernels")], "triton imported"
try:
    delta_rule(x, x, x, b, backend="triton")
except ValueError as e:
    print(e)
"""
    env = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "delta_rule: backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1 for its slow interpreter), got cpu; "
        "use backend='chunked'"
    )


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


def test_scan_against_associative_scan():
    from torch._higher_order_ops.associative_scan import associative_scan

    inputs = props.draw(CASES["scan_real"], 33)
    inputs["u"][:, 0] += inputs["a"][:, 0] * inputs["initial_state"]

    def combine(x, y):
        return x[0] * y[0], y[0] * x[1] + y[1]

    _, truth = associative_scan(combine, (inputs["a"], inputs["u"]), dim=1, combine_mode="generic")
    found, _ = linear_scan(inputs["a"], inputs["u"])
    assert props.error(found, truth) < 1e-12
